from __future__ import annotations

import numpy as np

import gfx


def test_it_is_that_of_the_published_model(cells, any_model, slow):
    gfx.tl.attention(cells, model=any_model)
    received, lengths, by_rank, special = {}, {}, {}, []
    for tokens in slow.tokens(cells):
        weights = np.stack([block[0].double().numpy() for block in slow.run(tokens).attentions]).mean(axis=2)
        genes = [place for place, token in enumerate(tokens) if slow.is_gene(token)]
        for rank, place in enumerate(genes):
            symbol = slow.vocabulary.symbols[tokens[place]]
            received.setdefault(symbol, []).append(weights[:, :, place])
            lengths.setdefault(symbol, []).append(len(tokens))
            by_rank.setdefault(rank, []).append(weights[:, :, place])
        special.append(1 - weights[:, :, genes].sum(axis=2))
    for at, gene in enumerate(cells.var_names):
        found = cells.varm["gfx_attention"][at]
        assert cells.var["gfx_attention_n_cells"].iloc[at] == len(received.get(gene, []))
        if gene in received:
            np.testing.assert_allclose(found, np.mean(received[gene], axis=0).ravel(), atol=1e-6)
            uniform = np.mean([1 / length for length in lengths[gene]])
            np.testing.assert_allclose(cells.var["gfx_attention_uniform"].iloc[at], uniform, rtol=1e-6)
        else:
            assert np.isnan(found).all()
    result = cells.uns["gfx_attention"]
    assert (result["n_layers"], result["n_heads"], result["n_cells"]) == (3, 2, 24)
    assert result["ranks"].shape == (3, 2, len(by_rank))
    for rank, values in by_rank.items():
        np.testing.assert_allclose(result["ranks"][:, :, rank], np.mean(values, axis=0), atol=1e-6)
        assert result["ranks_n_cells"][rank] == len(values)
    np.testing.assert_allclose(result["special"], np.mean(special, axis=0), atol=1e-5)
    assert result["entropy"].shape == (3, 2)


def test_a_shorter_run_leaves_nothing_of_a_longer_one(cells, toy_model):
    gfx.tl.attention(cells, model=toy_model)
    few = np.arange(24) == 16  # a cell of few genes
    gfx.tl.attention(cells, model=toy_model, mask_obs=few)
    result = cells.uns["gfx_attention"]
    n_genes = int((cells.X[16, :-5] > 0).sum())
    assert result["n_cells"] == 1
    assert result["ranks"].shape[2] == len(result["ranks_uniform"]) == len(result["ranks_n_cells"]) == n_genes
    assert cells.var["gfx_attention_n_cells"].sum() == n_genes
    np.testing.assert_allclose(result["ranks_uniform"], 1 / (n_genes + 2))

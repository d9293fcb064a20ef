from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import gfx
from gfx._engine.encoder import random_encoder
from gfx.tl import _gene_pairs

LAYERS, HEADS = 3, 2


def weights_of(slow, tokens, positions=None):
    """Attention of a cell, `(layers * heads, query, key)`."""
    weights = [block[0].double().numpy() for block in slow.run(tokens, positions).attentions]
    return np.concatenate(weights)


def by_gene(slow, rows, weights):
    """Lists of what each gene received and gave in its cells, and of its ranks, by symbol."""
    found = {name: {} for name in ("received", "given", "uniform", "given_uniform", "rank")}
    for tokens, of_cell in zip(rows, weights, strict=True):
        genes = [place for place, token in enumerate(tokens) if slow.is_gene(token)]
        for rank, place in enumerate(genes):
            values = {
                "received": of_cell[:, :, place].mean(axis=1),
                "given": of_cell[:, place, genes].sum(axis=1) - of_cell[:, place, place],
                "uniform": 1 / len(tokens),
                "given_uniform": (len(genes) - 1) / len(tokens),
                "rank": rank,
            }
            for name, value in values.items():
                found[name].setdefault(slow.vocabulary.symbols[tokens[place]], []).append(value)
    return found


def test_it_is_that_of_the_published_model(cells, any_model, slow):
    gfx.tl.attention(cells, model=any_model, controls=None)
    rows = slow.tokens(cells)
    weights = [weights_of(slow, tokens) for tokens in rows]
    expected = by_gene(slow, rows, weights)
    for at, gene in enumerate(cells.var_names):
        values = expected["received"].get(gene, [])
        assert cells.var["gfx_attention_n_cells"].iloc[at] == len(values)
        for name, part in (("received", ""), ("given", "_given")):
            found, sd = cells.varm[f"gfx_attention{part}"][at], cells.varm[f"gfx_attention{part}_sd"][at]
            if values:
                np.testing.assert_allclose(found, np.mean(expected[name][gene], axis=0), atol=1e-6)
                np.testing.assert_allclose(sd, np.std(expected[name][gene], axis=0), atol=1e-6)
            else:
                assert np.isnan(found).all()
                assert np.isnan(sd).all()
        for name in ("uniform", "given_uniform", "rank"):
            mean = np.mean(expected[name][gene]) if values else np.nan
            np.testing.assert_allclose(cells.var[f"gfx_attention_{name}"].iloc[at], mean, rtol=1e-6)
    result = cells.uns["gfx_attention"]
    assert (result["n_layers"], result["n_heads"], result["n_cells"]) == (LAYERS, HEADS, 24)
    by_rank, special = {}, []
    for tokens, of_cell in zip(rows, weights, strict=True):
        genes = [place for place, token in enumerate(tokens) if slow.is_gene(token)]
        for rank, place in enumerate(genes):
            by_rank.setdefault(rank, []).append(of_cell[:, :, place].mean(axis=1))
        special.append(1 - of_cell[:, :, genes].mean(axis=1).sum(axis=1))
    assert result["ranks"].shape == (LAYERS, HEADS, len(by_rank))
    for rank, values in by_rank.items():
        np.testing.assert_allclose(result["ranks"][:, :, rank].ravel(), np.mean(values, axis=0), atol=1e-6)
        assert result["ranks_n_cells"][rank] == len(values)
    np.testing.assert_allclose(result["special"].ravel(), np.mean(special, axis=0), atol=1e-5)
    assert result["entropy"].shape == result["distance"].shape == (1, LAYERS, HEADS)


def test_a_shorter_run_leaves_nothing_of_a_longer_one(cells, toy_model):
    gfx.tl.attention(cells, model=toy_model, genes=["TOY1", "TOY2"], groupby="cell_type")
    few = np.arange(24) == 16  # a cell of few genes
    gfx.tl.attention(cells, model=toy_model, mask_obs=few, controls=None)
    result = cells.uns["gfx_attention"]
    n_genes = int((cells.X[16, :-5] > 0).sum())
    assert result["n_cells"] == 1
    assert result["ranks"].shape[2] == len(result["ranks_uniform"]) == len(result["ranks_n_cells"]) == n_genes
    assert cells.var["gfx_attention_n_cells"].sum() == n_genes
    np.testing.assert_allclose(result["ranks_uniform"], 1 / (n_genes + 2))
    assert "gfx_attention" not in cells.varp
    assert not {"gfx_attention_groups", "gfx_attention_random"} & set(cells.varm)


def test_groups_and_donors_are_means_over_their_own_cells(cells, toy_model):
    cells.obs["donor"] = np.array(["a", "b", "c"])[np.arange(24) % 3]
    cells.obs["state"] = pd.Categorical(np.where(np.arange(24) < 10, "x", "y"))
    cells.obs.loc[cells.obs_names[5:7], "state"] = np.nan
    gfx.tl.attention(cells, model=toy_model, groupby="state", donor_key="donor", controls=None)
    result = cells.uns["gfx_attention"]
    groups, donors = result["groups"].tolist(), result["donors"].tolist()
    assert list(zip(groups, donors, strict=True)) == [(g, d) for g in ("x", "y") for d in "abc"] + [
        ("", "a"),
        ("", "c"),
    ]
    for unit, (group, donor) in enumerate(zip(groups, donors, strict=True)):
        state = cells.obs["state"].isna() if not group else cells.obs["state"] == group
        alone = cells.copy()
        chosen = (state & (cells.obs["donor"] == donor)).to_numpy()
        gfx.tl.attention(alone, model=toy_model, mask_obs=chosen, controls=None)
        for part in ("uniform", "given_uniform"):
            name = f"gfx_attention_groups_{part}"
            np.testing.assert_allclose(cells.varm[name][:, unit], alone.var[f"gfx_attention_{part}"], atol=1e-6)
        for part in ("", "_sd", "_given", "_given_sd"):
            name = f"gfx_attention_groups{part}"
            np.testing.assert_allclose(cells.varm[name][:, unit], alone.varm[f"gfx_attention{part}"], atol=1e-6)
        np.testing.assert_array_equal(
            cells.varm["gfx_attention_groups_n_cells"][:, unit], alone.var["gfx_attention_n_cells"]
        )
    assert result["of"].tolist() == ["all", "x", "y"]
    for row, group in enumerate(["x", "y"], 1):
        alone = cells.copy()
        chosen = (cells.obs["state"] == group).to_numpy()
        gfx.tl.attention(alone, model=toy_model, mask_obs=chosen, controls=None)
        for name in ("entropy", "distance", "special", "bands", "distance_uniform", "bands_uniform"):
            np.testing.assert_allclose(result[name][row], alone.uns["gfx_attention"][name][0], atol=1e-5, err_msg=name)
        assert result["of_n_cells"][row] == chosen.sum()


def test_a_deletion_is_compared_in_the_same_cells_at_the_same_positions(cells, any_model, slow):
    gfx.tl.attention(cells, model=any_model, deleted=["TOY3", "TOY5"], controls=None)
    gone = slow.named(["TOY3", "TOY5"])
    rows = [tokens for tokens in slow.tokens(cells) if set(gone) <= set(tokens)]
    assert 0 < len(rows) < 24
    assert cells.uns["gfx_attention"]["n_cells"] == len(rows)
    changes, to_deleted = {}, {}
    for tokens in rows:
        stays = [place for place, token in enumerate(tokens) if token not in gone]
        before, after = weights_of(slow, tokens), weights_of(slow, [tokens[place] for place in stays], stays)
        for at, place in enumerate(stays):
            if slow.is_gene(tokens[place]):
                symbol = slow.vocabulary.symbols[tokens[place]]
                change = after[:, :, at].sum(axis=1) - before[:, :, place].sum(axis=1)  # uniform attention adds up to 1
                changes.setdefault(symbol, []).append(change)
                lost = before[:, place, [tokens.index(token) for token in gone]].sum(axis=1)
                to_deleted.setdefault(symbol, []).append(lost)
    assert cells.uns["gfx_attention"]["groups"].tolist() == ["intact", "deleted", "change"]
    means, deviations = cells.varm["gfx_attention_groups"], cells.varm["gfx_attention_groups_sd"]
    for symbol, values in changes.items():
        at = cells.var_names.get_loc(symbol)
        np.testing.assert_allclose(means[at, 2], np.mean(values, axis=0), atol=2e-5)
        np.testing.assert_allclose(deviations[at, 2], np.std(values, axis=0), atol=2e-5)
        np.testing.assert_allclose(
            cells.varm["gfx_attention_to_deleted"][at], np.mean(to_deleted[symbol], axis=0), atol=1e-6
        )
    np.testing.assert_array_equal(cells.varm["gfx_attention"], means[:, 0])
    assert np.isnan(means[cells.var_names.get_indexer(["TOY3", "TOY5"]), 1:]).all()
    for statistic in ("received", "given"):  # what changes is a ratio
        of_change = gfx.get.attention_df(cells, statistic=statistic, group="change")
        assert (of_change["uniform"] == 1).all()
        np.testing.assert_array_equal(of_change["ratio"], of_change["attention"])


PAIRS = [f"TOY{number}" for number in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)]


def pairs_by_hand(slow, rows, names, heads):
    """Sums and numbers of cells of what each gene gives to each."""
    tokens = slow.named(names)
    sums, n = np.zeros((len(heads), len(names), len(names))), np.zeros((len(names), len(names)))
    for cell in rows:
        weights = weights_of(slow, cell)[heads]
        there = [(number, cell.index(token)) for number, token in enumerate(tokens) if token in cell]
        for one, query in there:
            for other, key in there:
                sums[:, one, other] += weights[:, query, key]
                n[one, other] += 1
    return sums, n


@pytest.mark.parametrize(
    ("heads", "numbers"), [("mean", range(6)), ("each", range(6)), ([(1, 2), (3, 1)], [1, 4])], ids=str
)
def test_pairs_of_named_genes_are_means_over_the_cells_that_have_both(cells, any_model, slow, heads, numbers):
    gfx.tl.attention(cells, model=any_model, genes=PAIRS, heads=heads, controls=None)
    sums, n = pairs_by_hand(slow, slow.tokens(cells), PAIRS, list(numbers))
    at = cells.var_names.get_indexer(PAIRS)
    assert (cells.varp["gfx_attention_n_cells"].toarray()[np.ix_(at, at)] == n).all()
    assert cells.varp["gfx_attention_n_cells"].sum() == n.sum()
    expected = np.divide(sums, n, out=np.zeros_like(sums), where=n > 0)
    found = cells.varp["gfx_attention"].toarray()[np.ix_(at, at)]
    np.testing.assert_allclose(found, expected.mean(axis=0), atol=1e-6)
    if heads == "each":
        result = cells.uns["gfx_attention"]
        assert result["pairs_genes"].tolist() == PAIRS
        np.testing.assert_allclose(result["pairs"][:, n > 0], expected[:, n > 0], atol=1e-6)
        assert np.isnan(result["pairs"][:, n == 0]).all()


def test_coexpression_is_the_correlation_of_normalised_counts(cells, toy_model):
    gfx.tl.attention(cells, model=toy_model, genes=PAIRS, controls=None, mask_obs=np.arange(24) < 20)
    counts = cells.X.toarray()[:20].astype(float)
    logs = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    at = cells.var_names.get_indexer(PAIRS)
    found, n = (cells.varp[f"gfx_attention_{part}"].toarray()[np.ix_(at, at)] for part in ("coexpression", "n_cells"))
    with np.errstate(invalid="ignore"):  # genes that no cell has
        expected = np.corrcoef(logs[:, at].T)
    np.testing.assert_allclose(found[n > 0], expected[n > 0], atol=1e-6)


@pytest.mark.parametrize("most_bytes", [1 << 30, 24 * 200 * 30])
def test_all_genes_keep_their_strongest_pairs_however_often_cells_are_read(cells, toy_model, monkeypatch, most_bytes):
    monkeypatch.setattr(_gene_pairs, "FEWEST_CELLS", 4)
    known = [name for name in cells.var_names if name.startswith("TOY")]
    named = cells.copy()
    gfx.tl.attention(named, model=toy_model, genes=known, controls=None)
    monkeypatch.setattr(_gene_pairs, "MOST_BYTES", most_bytes)
    gfx.tl.attention(cells, model=toy_model, genes=..., n_neighbors=3, controls=None)
    every, n = named.varp["gfx_attention"].toarray(), named.varp["gfx_attention_n_cells"].toarray()
    every[(n < 4) | np.eye(len(n), dtype=bool)] = 0
    found = cells.varp["gfx_attention"]
    for gene in range(cells.n_vars):
        row = found[[gene]]
        best = np.sort(every[gene])[::-1][:3]
        np.testing.assert_allclose(np.sort(row.data)[::-1], best[best > 0], atol=1e-6)
        np.testing.assert_allclose(row.data, every[gene, row.indices], atol=1e-6)
        np.testing.assert_array_equal(cells.varp["gfx_attention_n_cells"][[gene]].data, n[gene, row.indices])
    assert found.nnz > 100


def test_the_control_is_the_same_network_with_random_weights(cells, any_model, slow):
    """Of 24 cells it reads all."""
    gfx.tl.attention(cells, model=any_model, rng=3)
    device = torch.device("cpu")
    encoder = random_encoder(any_model.config, n_layers=LAYERS, seed=3, device=device, dtype=torch.float32)
    encoder.set_attn_implementation("eager")
    rows = slow.tokens(cells)
    with torch.no_grad():
        runs = [encoder(torch.tensor([tokens]), output_attentions=True).attentions for tokens in rows]
    weights = [np.concatenate([block[0].double().numpy() for block in run]) for run in runs]
    expected = by_gene(slow, rows, weights)
    for symbol, values in expected["received"].items():
        at = cells.var_names.get_loc(symbol)
        np.testing.assert_allclose(cells.varm["gfx_attention_random"][at], np.mean(values, axis=0), atol=1e-6)
        uniform = cells.var["gfx_attention_random_uniform"].iloc[at]
        np.testing.assert_allclose(uniform, np.mean(expected["uniform"][symbol]), rtol=1e-6)
    assert cells.uns["gfx_attention"]["random"]["entropy"].shape == (1, LAYERS, HEADS)


def test_the_control_reads_a_quarter_of_many_cells(cells, toy_model, monkeypatch):
    monkeypatch.setattr(gfx.tl._attention, "FEWEST_OF_CONTROL", 5)
    gfx.tl.attention(cells, model=toy_model)
    assert cells.uns["gfx_attention"]["random"]["of_n_cells"].tolist() == [6]
    again = cells.copy()
    gfx.tl.attention(again, model=toy_model)
    np.testing.assert_array_equal(again.varm["gfx_attention_random"], cells.varm["gfx_attention_random"])
    gfx.tl.attention(again, model=toy_model, rng=1)
    assert not np.array_equal(again.varm["gfx_attention_random"], cells.varm["gfx_attention_random"], equal_nan=True)


def test_the_order_of_cells_and_their_batches_change_nothing(cells, toy_model):
    how = {"model": toy_model, "genes": PAIRS, "groupby": "cell_type", "controls": None}
    shuffled = cells[np.random.default_rng(0).permutation(24)].copy()
    gfx.tl.attention(cells, **how)
    with gfx.settings.override(batch_tokens=70):
        gfx.tl.attention(shuffled, **how)
    for name in ("gfx_attention", "gfx_attention_given", "gfx_attention_groups", "gfx_attention_sd"):
        np.testing.assert_allclose(shuffled.varm[name], cells.varm[name], atol=1e-6)
    for name in ("gfx_attention", "gfx_attention_coexpression"):
        np.testing.assert_allclose(shuffled.varp[name].toarray(), cells.varp[name].toarray(), atol=1e-6)


BAD = {
    "no groups": ({"groupby": "empty"}, ValueError, r"`adata\.obs\['empty'\]` is missing for every cell"),
    "deleted with groups": (
        {"deleted": "TOY1", "groupby": "cell_type"},
        ValueError,
        "choose the cells of one group with `mask_obs`",
    ),
    "an unknown deleted gene": ({"deleted": "NOGENE"}, ValueError, "does not know .*NOGENE"),
    "deleted genes that no cell has": ({"deleted": ["TOY199", "TOY200"]}, ValueError, "No cell that is used has"),
    "no deleted gene": ({"deleted": []}, ValueError, "`deleted` is empty"),
    "a missing name": ({"genes": ["TOY1", np.nan]}, TypeError, "`genes` holds names of genes, found nan of type float"),
    "an unknown gene of pairs": ({"genes": ["TOY1", "NOGENE"]}, ValueError, "does not know .*NOGENE"),
    "genes that no cell has": (
        {"genes": ["TOY199", "TOY200"]},
        ValueError,
        "No cell that is used has any of the genes",
    ),
    "a layer out of range": ({"genes": PAIRS, "heads": [(4, 1)]}, ValueError, r"`heads` has \(4, 1\).*layer, 1 to 3"),
    "a head out of range": ({"genes": PAIRS, "heads": [(1, 0)]}, ValueError, r"`heads` has \(1, 0\).*head, 1 to 2"),
    "heads of half layers": ({"genes": PAIRS, "heads": [(1.0, 2)]}, ValueError, r"`heads` has \(1\.0, 2\)"),
    "heads as a number": ({"genes": PAIRS, "heads": 5}, ValueError, "`heads` is 'mean', 'each', or a list"),
    "one gene of pairs": ({"genes": ["TOY1"]}, ValueError, "`genes` names one gene"),
    "no heads": ({"genes": PAIRS, "heads": []}, ValueError, "`heads` is empty"),
    "heads by another name": ({"genes": PAIRS, "heads": "all"}, ValueError, "`heads` is 'mean', 'each', or a list"),
    "each head of all pairs": ({"genes": ..., "heads": "each"}, ValueError, "keeps pairs of named genes"),
    "no neighbors": ({"genes": ..., "n_neighbors": 0}, ValueError, "`n_neighbors` is 1 or more"),
    "another control": ({"controls": "random_sets"}, ValueError, "`controls` is one of"),
    "a missing donor": ({"donor_key": "some"}, ValueError, "names no donor for 3 cells"),
    "an unknown column": ({"groupby": "nothing"}, KeyError, "nothing"),
}


@pytest.mark.parametrize(("how", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_changes_nothing(cells, toy_model, slots, how, error, message):
    counts = cells.X.toarray()
    counts[:, cells.var_names.get_indexer(["TOY199", "TOY200"])] = 0
    cells.X = sparse.csr_matrix(counts)
    cells.obs["empty"] = np.nan
    cells.obs["some"] = pd.Series(["a"] * 21 + [None] * 3, index=cells.obs_names, dtype=object)
    before = slots(cells)
    with pytest.raises(error, match=message):
        gfx.tl.attention(cells, model=toy_model, **how)
    assert slots(cells) == before


@pytest.mark.parametrize("is_masked", [True, False])
def test_groups_of_which_no_cell_is_used_are_left_out_and_named(cells, toy_model, capsys, is_masked):
    """Those of unused categories, and those that a mask leaves out."""
    cells.obs["used"] = cells.obs["cell_type"].isin(["a", "c"]) if is_masked else True
    labels = cells.obs["cell_type"].astype(str).where(is_masked | (cells.obs["cell_type"] != "b"))
    cells.obs["group"] = pd.Categorical(labels, categories=["z", "c", "b", "a", "y"])
    how = {"model": toy_model, "mask_obs": "used", "controls": None}
    gfx.tl.attention(cells, groupby="group", **how)
    assert list(dict.fromkeys(cells.uns["gfx_attention"]["groups"])) == ["c", "a"] + [""] * (not is_masked)
    assert "No cell that is used belongs to ['z', 'b', 'y'] of `groupby='group'`" in capsys.readouterr().out
    for number, name in enumerate("ca"):
        cells.obs["used"] = cells.obs["cell_type"] == name
        gfx.tl.attention(cells, key_added=name, **how)
        np.testing.assert_allclose(cells.varm["gfx_attention_groups"][:, number], cells.varm[name], atol=1e-6)


def test_more_named_genes_than_memory_takes_are_refused_with_their_size(cells, toy_model, slots, monkeypatch):
    monkeypatch.setattr(_gene_pairs, "MOST_BYTES", 1000)
    before = slots(cells)
    with pytest.raises(ValueError, match=r"Pairs of 10 genes with `heads='each'` take 0\.0 GB\. Name 3 genes or fewer"):
        gfx.tl.attention(cells, model=toy_model, genes=PAIRS, heads="each")
    assert slots(cells) == before


def test_genes_that_left_the_object_leave_the_pairs(cells, toy_model):
    gfx.pp.tokenize(cells, model=toy_model)
    fewer = cells[:, [name not in {"TOY3", "TOY5"} for name in cells.var_names]].copy()
    gfx.tl.attention(fewer, model=toy_model, genes=PAIRS, heads="each", controls=None)
    kept = [name for name in PAIRS if name not in {"TOY3", "TOY5"}]
    assert fewer.uns["gfx_attention"]["pairs_genes"].tolist() == kept
    assert fewer.uns["gfx_attention"]["pairs"].shape == (6, 8, 8)
    assert set(fewer.var_names[np.unique(fewer.varp["gfx_attention"].nonzero()[0])]) <= set(kept)


@pytest.mark.parametrize(
    "heads", [iter([(1, 2), (1, 2)]), [[1, 2]], np.array([[1, 2]])], ids=["generator", "list", "array"]
)
def test_heads_may_come_in_any_kind_of_sequence(cells, toy_model, heads):
    expected = cells.copy()
    gfx.tl.attention(expected, model=toy_model, genes=PAIRS, heads=[(1, 2)], controls=None)
    gfx.tl.attention(cells, model=toy_model, genes=PAIRS, heads=heads, controls=None)
    assert cells.uns["gfx_attention"]["params"]["heads"] == ["1.2"]
    np.testing.assert_array_equal(cells.varp["gfx_attention"].toarray(), expected.varp["gfx_attention"].toarray())


def test_genes_that_no_cell_has_are_named(cells, toy_model, capsys):
    cells.X = sparse.csr_matrix(cells.X.multiply([name != "TOY8" for name in cells.var_names]))
    gfx.tl.attention(cells, model=toy_model, genes=PAIRS, controls=None)
    assert re.search(r"No pairs for \[.*'TOY8'.*\]: none of the cells has these genes\.", capsys.readouterr().out)


def test_the_record_names_what_was_asked_for(cells, toy_model):
    gfx.tl.attention(cells, model=toy_model, deleted="TOY3", genes=PAIRS, heads=[(1, 2)], rng=7, key_added="mine")
    params = cells.uns["mine"]["params"]
    assert params["heads"] == ["1.2"]
    assert params["rng"] == 7
    assert params["controls"] == ["random_weights"]
    assert len(params["deleted"]) == 1
    assert re.fullmatch(r"ENSG\d+|TOY.*", params["deleted"][0])

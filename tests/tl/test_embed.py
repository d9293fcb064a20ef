from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import sparse

import gfx

pytestmark = pytest.mark.usefixtures("in_float32")


def naive(slow, adata, pooling, hidden_layer=-2):
    rows = []
    for tokens in slow.tokens(adata):
        states = slow.states(tokens, hidden_layer)
        genes = [state for token, state in zip(tokens, states, strict=True) if slow.is_gene(token)]
        rows.append(states[0] if pooling == "cls" else np.mean(genes, axis=0))
    return np.array(rows)


@pytest.mark.parametrize("hidden_layer", [-1, -2, 0, 3])
def test_embedding_is_that_of_the_published_model(cells, any_model, slow, hidden_layer):
    for pooling in ("mean", "cls") if any_model.vocabulary.has_cls else ("mean",):
        gfx.tl.embed(cells, model=any_model, hidden_layer=hidden_layer, pooling=pooling)
        np.testing.assert_allclose(cells.obsm["X_gfx"], naive(slow, cells, pooling, hidden_layer), atol=1e-5)
        params = cells.uns["X_gfx"]["params"]
        assert (params["hidden_layer"], params["pooling"]) == (hidden_layer, pooling)


def test_pooling_follows_the_family(cells, any_model):
    gfx.tl.embed(cells, model=any_model)
    assert cells.uns["X_gfx"]["params"]["pooling"] == ("cls" if any_model.vocabulary.has_cls else "mean")


def test_defaults_are_those_of_the_official_software(cells, any_model, slow):
    """The last block but one; <cls> where there is one, else the mean."""
    gfx.tl.embed(cells, model=any_model)
    expected = naive(slow, cells, "cls" if any_model.vocabulary.has_cls else "mean")
    np.testing.assert_allclose(cells.obsm["X_gfx"], expected, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_embedding_does_not_depend_on_the_size_of_batches(cells, any_model, batch_tokens):
    gfx.tl.embed(cells, model=any_model, key_added="all")
    with gfx.settings.override(batch_tokens=batch_tokens):
        gfx.tl.embed(cells, model=any_model, key_added="few")
    np.testing.assert_allclose(cells.obsm["few"], cells.obsm["all"], atol=1e-5)


def test_order_of_cells(cells, any_model):
    order = np.random.default_rng(0).permutation(cells.n_obs)
    shuffled = cells[order].copy()
    for adata in (cells, shuffled):
        gfx.tl.embed(adata, model=any_model)
    np.testing.assert_allclose(shuffled.obsm["X_gfx"], cells.obsm["X_gfx"][order], atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_precision(cells, toy_model, dtype, tolerance):
    gfx.tl.embed(cells, model=toy_model, key_added="exact")
    with gfx.settings.override(dtype=dtype):
        gfx.tl.embed(cells, model=toy_model, key_added="rough")
    assert cells.uns["rough"]["params"]["dtype"] == dtype
    assert cells.obsm["rough"].dtype == np.float32
    assert not np.array_equal(cells.obsm["rough"], cells.obsm["exact"])
    np.testing.assert_allclose(cells.obsm["rough"], cells.obsm["exact"], atol=tolerance)


@pytest.mark.parametrize("is_wide", [False, True])
def test_precision_on_a_cpu_with_matrix_units(cells, toy_model, monkeypatch, is_wide):
    """bfloat16 if the model is wide enough to be faster in it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr("gfx._engine.device._WIDE", toy_model.hidden_size + (not is_wide))
    with gfx.settings.override(dtype=None, device="cpu"):
        gfx.tl.embed(cells, model=toy_model)
    assert cells.uns["X_gfx"]["params"]["dtype"] == ("bfloat16" if is_wide else "float32")


def test_a_device_that_torch_does_not_know_is_refused(cells, toy_model, slots):
    before = slots(cells)
    with (
        pytest.raises(ValueError, match=r"`device` is a device of torch.*banana"),
        gfx.settings.override(device="banana"),
    ):
        gfx.tl.embed(cells, model=toy_model)
    assert slots(cells) == before
    assert (gfx.settings.device, gfx.settings.dtype) == (None, "float32")


def test_cells_without_genes(cells, toy_model):
    cells.X = sparse.csr_matrix(cells.X.multiply(~np.isin(np.arange(24), [3, 20])[:, None]))
    with pytest.warns(UserWarning, match="2 of 24 cells have no gene that the model knows") as caught:
        gfx.tl.embed(cells, model=toy_model)
    assert caught[0].filename == __file__  # the warning points at the user's line
    assert np.flatnonzero(np.isnan(cells.obsm["X_gfx"]).any(axis=1)).tolist() == [3, 20]
    assert np.isnan(cells.obsm["X_gfx"][[3, 20]]).all()


def test_a_warning_made_an_error_leaves_everything_as_it_was(cells, toy_model, slots):
    cells.X = sparse.csr_matrix(cells.X.multiply(np.arange(24)[:, None] > 0))
    before = slots(cells)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="1 of 24 cells"):
            gfx.tl.embed(cells, model=toy_model)
    assert slots(cells) == before


def test_it_says_what_it_did(cells, toy_model, capsys):
    gfx.tl.embed(cells, model=toy_model)
    assert "embedded 24 cells with 'toy' in float32: added 'X_gfx' (adata.obsm, .uns)" in capsys.readouterr().out
    with gfx.settings.override(verbosity=0):
        gfx.tl.embed(cells, model=toy_model)
    assert capsys.readouterr().out == ""

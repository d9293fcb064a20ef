"""Names of results: ours, the user's, and those that would do harm."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest

import gfx
from gfx import _keys

MAKERS = (
    _keys.token_keys,
    _keys.embed_keys,
    _keys.embed_genes_keys,
    *(partial(_keys.perturbation_keys, function) for function in _keys.PERTURBATIONS),
    _keys.screen_keys,
    _keys.attention_keys,
    _keys.gene_class_keys,
    _keys.predicted_genes_keys,
    _keys.cell_class_keys,
    _keys.predicted_cells_keys,
)


@pytest.mark.parametrize("maker", MAKERS)
def test_every_default_slot_is_reserved(maker) -> None:
    slots = set(dataclasses.asdict(maker()).values())
    assert slots <= _keys._DEFAULTS


@pytest.mark.parametrize("maker", MAKERS)
def test_a_name_of_ones_own_names_every_slot(maker) -> None:
    for slot in dataclasses.asdict(maker("mine")).values():
        assert slot == "mine" or slot.startswith("mine_")
    assert maker("mine").uns == "mine"  # so that two functions cannot share a name unseen


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("key", "error"), [("", ValueError), (".", ValueError), ("a/b", ValueError), ("a\0b", ValueError), (5, TypeError)]
)
def test_names_that_files_cannot_hold(maker, key: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="key_added"):
        maker(key)


@pytest.mark.parametrize("maker", MAKERS)
def test_default_slots_of_other_functions_are_not_taken(maker) -> None:
    others = _keys._DEFAULTS - set(dataclasses.asdict(maker()).values())
    for slot in others:
        with pytest.raises(ValueError, match="another function writes"):
            maker(slot)


@pytest.mark.parametrize("maker", [_keys.cell_class_keys, _keys.predicted_cells_keys])
def test_each_task_has_a_column_behind_the_name(maker) -> None:
    assert maker("mine").of("cell_type") == "mine_cell_type"
    assert maker().of("tissue") == f"{maker().obs}_tissue"


def test_a_result_of_another_function_is_not_overwritten(toy_cells, toy_model) -> None:
    adata = toy_cells()
    gfx.tl.embed(adata, model=toy_model, key_added="mine")
    before = adata.obsm["mine"].copy()
    for call in (
        lambda: gfx.tl.attention(adata, model=toy_model, key_added="mine"),
        lambda: gfx.tl.embed_genes(adata, model=toy_model, key_added="mine"),
        lambda: gfx.tl.delete_genes(adata, "TOY3", model=toy_model, key_added="mine"),
        lambda: gfx.tl.overexpress_genes(adata, "TOY3", model=toy_model, key_added="mine"),
        lambda: gfx.tl.shift_genes(adata, "TOY3", quartiles=1, model=toy_model, key_added="mine"),
        lambda: gfx.tl.screen_genes(adata, model=toy_model, key_added="mine"),
        lambda: gfx.tl.classify_genes(adata, {"a": ["TOY1"], "b": ["TOY2"]}, model=toy_model, key_added="mine"),
        lambda: gfx.tl.classify_cells(adata, "cell_type", model=toy_model, key_added="mine"),
        lambda: gfx.pp.tokenize(adata, model=toy_model, key_added="mine"),
    ):
        with pytest.raises(ValueError, match=r"holds a result of `gfx.tl.embed`"):
            call()
    np.testing.assert_array_equal(adata.obsm["mine"], before)
    assert list(adata.varm) == []
    gfx.tl.embed(adata, model=toy_model, key_added="mine")  # its own result it may replace


def test_what_others_keep_is_not_overwritten(toy_cells, toy_model) -> None:
    adata = toy_cells()
    adata.uns["mine"] = {"a": 1}
    with pytest.raises(ValueError, match="gfx did not write"):
        gfx.tl.embed(adata, model=toy_model, key_added="mine")
    assert adata.uns["mine"] == {"a": 1}


def test_ways_to_perturb_do_not_overwrite_each_other(toy_cells, toy_model) -> None:
    adata = toy_cells(12)
    gfx.tl.delete_genes(adata, "TOY90", model=toy_model, key_added="mine", null=None)
    before = adata.obsm["mine"].copy()
    with pytest.raises(ValueError, match=r"holds a result of `gfx\.tl\.delete_genes`"):
        gfx.tl.overexpress_genes(adata, "TOY90", model=toy_model, key_added="mine", null=None)
    np.testing.assert_array_equal(adata.obsm["mine"], before)
    gfx.tl.overexpress_genes(adata, "TOY90", model=toy_model, null=None)
    np.testing.assert_array_equal(adata.obsm["mine"], before)

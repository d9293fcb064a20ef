"""Results: how slots are named, who owns them, how they are written, found again, and kept by files."""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import gfx
from gfx import _results
from gfx._results import TABLE, TASK, claim, find, key_of, slots_of

FUNCTIONS = list(TABLE)


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    return ad.AnnData(
        rng.random((6, 4), dtype=np.float32),
        obs=pd.DataFrame({"type": pd.Categorical(list("aabbcc"))}, index=[f"cell{i}" for i in range(6)]),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(4)]),
    )


def values(adata, function, key=None, tasks=("type",), **left_out):
    """Made-up values for all parts that a function may write; `left_out` names parts that it does not."""
    lengths = {"obs": (adata.n_obs,), "obsm": (adata.n_obs, 2), "var": (adata.n_vars,), "varm": (adata.n_vars, 2)}
    lengths |= {"varp": (adata.n_vars, adata.n_vars), "layers": adata.shape}
    return {
        element: {
            part: None if part in left_out.get(element, ()) else np.ones(lengths[element], dtype=np.float32)
            for given in parts
            for part in (tasks if given == TASK else (given,))
        }
        for element, parts in TABLE[function].parts.items()
    }


def write(adata, function, key=None, **left_out):
    slots = claim(adata, function, key).claim(["type"])
    slots.write("did it", params={"rng": 0}, **values(adata, function, **left_out))
    return slots


def everything(adata):
    """Copy all that an AnnData holds; newer ones have `X` among the layers, as `None`."""
    parts = {element: getattr(adata, element) for element in ("obs", "var", "obsm", "varm", "varp", "layers", "uns")}
    return {(element, name): part[name] for element, part in parts.items() for name in part if name is not None}


def same(one, other):
    return set(one) == set(other) and all(
        one[slot] is other[slot] or np.array_equal(one[slot], other[slot]) for slot in one
    )


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_default_slots_begin_with_the_default_key_and_are_reserved(function) -> None:
    key = key_of(function, None)
    for _, name in slots_of(function, key):
        assert name == key or name.startswith(f"{key}_")
        assert name in _results.RESERVED


def test_default_slots_of_two_functions_differ() -> None:
    slots = [slot for function in FUNCTIONS for slot in slots_of(function, key_of(function, None), ["type"])]
    assert len(slots) == len(set(slots))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_own_key_names_every_slot(function) -> None:
    slots = slots_of(function, key_of(function, "mine"), ["type"])
    assert all(name == "mine" or name.startswith("mine_") for _, name in slots)
    assert slots[-1] == ("uns", "mine")
    assert len(slots) == len(set(slots))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("key", "error"), [("", ValueError), (".", ValueError), ("a/b", ValueError), ("a\0b", ValueError), (5, TypeError)]
)
def test_keys_that_files_cannot_hold_are_refused(function, key, error) -> None:
    with pytest.raises(error, match="key_added"):
        key_of(function, key)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_default_slots_of_other_functions_are_refused_as_keys(function) -> None:
    own = {name for _, name in slots_of(function, key_of(function, None))}
    for name in _results.RESERVED - own:
        with pytest.raises(ValueError, match="another function writes"):
            key_of(function, name)


def test_columns_of_tasks_end_with_the_name_of_the_task() -> None:
    assert ("obs", "mine_cell_type") in slots_of("tl.classify_cells", "mine", ["cell_type"])
    assert slots_of("tl.classify_cells", "mine") == [("obsm", "mine"), ("obsm", "mine_fold"), ("uns", "mine")]


# --- what is somebody else's ----------------------------------------------------------------------------------------

TAKEN = [
    (function, element, name)
    for function in FUNCTIONS
    for element, name in slots_of(function, "mine", ["type"])
    if element != "uns"
]


@pytest.mark.parametrize(("function", "element", "name"), TAKEN)
@pytest.mark.parametrize("repeated", [False, True])
def test_a_slot_of_the_users_is_refused_by_name_and_nothing_changes(adata, function, element, name, repeated) -> None:
    if repeated:  # an earlier result of ours that did not write this slot does not make it ours
        part = name.removeprefix("mine").removeprefix("_")
        write(adata, function, "mine", **{element: (part,)})
    axis = adata.obs_names if element in {"obs", "obsm"} else adata.var_names
    values = {"layers": adata.X.copy(), "obs": 1.0, "var": 1.0, "varp": np.eye(len(axis))}
    values = values.get(element, np.zeros((len(axis), 3)))
    getattr(adata, element)[name] = values
    before = everything(adata)
    with pytest.raises(ValueError, match=re.escape(f"`adata.{element}[{name!r}]` holds a ") + ".*gfx did not write"):
        claim(adata, function, "mine").claim(["type"])
    assert same(everything(adata), before)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("entry", [{"a": 1}, None, {"params": {"function": "tl.other"}}, {"params": 3}])
def test_an_entry_of_uns_of_the_users_is_refused(adata, function, entry) -> None:
    adata.uns["mine"] = entry
    with pytest.raises(ValueError, match=re.escape("`adata.uns['mine']` holds a ")):
        claim(adata, function, "mine")


def test_a_result_of_another_function_is_refused_and_its_writer_named(adata) -> None:
    write(adata, "tl.embed_genes", "mine")
    for function in FUNCTIONS:
        if function != "tl.embed_genes":
            with pytest.raises(ValueError, match=r"`adata.uns\['mine'\]` holds a result of `gfx.tl.embed_genes`"):
                claim(adata, function, "mine")
    with pytest.raises(ValueError, match=r"`adata.varm\['mine_groups'\]` holds a result of `gfx.tl.embed_genes`"):
        claim(adata, "tl.attention", "mine_groups")


def test_columns_that_the_call_reads_are_not_written_over(adata) -> None:
    write(adata, "tl.classify_cells", "mine")
    slots = claim(adata, "tl.classify_cells", "mine")
    with pytest.raises(ValueError, match=r"`adata.obs\['mine_type'\]` is an input of this call"):
        slots.claim(["other"], reads=[("obs", "mine_type")])
    with pytest.raises(ValueError, match=r"`adata.obs\['mine_other'\]` is an input of this call"):
        slots.claim(["other"], reads=[("obs", "mine_other")])
    slots.claim(["type"], reads=[("obs", "type"), ("obs", None), ("obs", np.ones(6, dtype=bool)), ("var", "mine_type")])


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("key", [None, "mine"])
def test_all_slots_are_written_recorded_and_written_again(adata, function, key) -> None:
    before = set(everything(adata))
    slots = write(adata, function, key)
    wanted = set(slots_of(function, slots.key, ["type"]))
    assert set(everything(adata)) - before == wanted == slots.owned
    assert slots.uns["params"] == _results.record(function, rng=0)
    write(adata, function, key)
    assert set(everything(adata)) - before == wanted


@pytest.mark.parametrize(("function", "element", "name"), TAKEN)
def test_what_an_earlier_call_wrote_and_this_one_does_not_goes(adata, function, element, name) -> None:
    before = set(everything(adata))
    write(adata, function, "mine")
    part = name.removeprefix("mine").removeprefix("_")
    slots = write(adata, function, "mine", **{element: (part,)})
    wanted = set(slots_of(function, "mine", ["type"])) - {(element, name)}
    assert set(everything(adata)) - before == wanted == slots.owned


def test_columns_of_earlier_tasks_go(adata) -> None:
    write(adata, "tl.classify_cells")
    slots = claim(adata, "tl.classify_cells", None).claim(["other"])
    slots.write("did it", params={}, **values(adata, "tl.classify_cells", tasks=["other"]))
    assert list(adata.obs) == ["type", "gfx_cell_class_other"]


def test_a_slot_that_the_user_deleted_is_no_hindrance(adata) -> None:
    write(adata, "tl.embed_genes")
    del adata.varm["gfx_genes_groups"]
    write(adata, "tl.embed_genes", varm=("groups",))
    assert set(adata.varm) == {"gfx_genes", "gfx_genes_groups_n_cells"}


def test_a_part_that_the_table_lacks_is_an_error_before_anything_is_written(adata) -> None:
    before = everything(adata)
    with pytest.raises(KeyError, match="other"):
        claim(adata, "tl.embed", None).write("did it", params={}, obsm={"": np.ones((6, 2)), "other": np.ones((6, 2))})
    with pytest.raises(TypeError, match="Cannot store a object"):
        claim(adata, "tl.embed", None).write("did it", params={"a": object()}, obsm={"": np.ones((6, 2))})
    assert same(everything(adata), before)


def test_a_copy_is_written_and_returned(adata) -> None:
    before = everything(adata)
    slots = claim(adata, "tl.embed", None, copy=True)
    slots.write("did it", params={}, obsm={"": np.ones((6, 2))})
    assert "X_gfx" in slots.returned.obsm
    assert same(everything(adata), before)
    assert claim(adata, "tl.embed", None).returned is None


@pytest.mark.filterwarnings("ignore::anndata.ImplicitModificationWarning")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_views_are_written_and_stale_slots_go_from_them_as_well(adata, function) -> None:
    write(adata, function)
    part = adata[:4, :3]
    slots = claim(part, function, None).claim(["other"])
    tasks = values(adata[:4, :3], function, tasks=["other"])
    slots.write("did it", params={}, **tasks)
    found = {slot for slot in everything(part) if slot[1].startswith(slots.key)}
    assert found == slots.owned == set(slots_of(function, slots.key, ["other"]))


def test_one_line_tells_what_was_added(adata, capsys) -> None:
    with gfx.settings.override(verbosity=2):
        slots = claim(adata, "tl.embed_genes", None)
        slots.write("embedded genes", params={}, hint="Read it.", **values(adata, "tl.embed_genes"))
    assert capsys.readouterr().out == "embedded genes: added 'gfx_genes' (adata.varm, .var, .uns).\nRead it.\n"


# --- files and parts ------------------------------------------------------------------------------------------------


def through_h5ad(adata, folder):
    adata.write_h5ad(folder / "cells.h5ad")
    return ad.read_h5ad(folder / "cells.h5ad")


def through_zarr(adata, folder):
    adata.write_zarr(folder / "cells.zarr")
    return ad.read_zarr(folder / "cells.zarr")


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize(
    "through", [through_h5ad, through_zarr, lambda adata, _: adata.copy(), lambda adata, _: adata[1:, ::-1].copy()]
)
def test_ownership_outlives_files_copies_and_subsets(adata, through, tmp_path) -> None:
    before = {function: write(adata, function).owned for function in FUNCTIONS}
    other = through(adata, tmp_path)
    for function, owned in before.items():
        assert claim(other, function, None).owned == owned
        write(other, function)
        assert find(other, function, key=key_of(function, None)).owned == owned


def test_one_statement_makes_room_where_records_got_lost(adata) -> None:
    """As joins drop them: what the message says is enough, however many slots there are."""
    write(adata, "tl.delete_genes", varm=("sd", "n_cells"))
    del adata.uns["gfx_delete"]
    with pytest.raises(ValueError, match="of which it has lost the record") as refused:
        claim(adata, "tl.delete_genes", None)
    statement = re.search("run `(del .*)` first", str(refused.value)).group(1)
    exec(statement, {"adata": adata})
    claim(adata, "tl.delete_genes", None)
    assert not [name for name in adata.varm if name.startswith("gfx_delete")]


def test_what_lost_its_record_is_not_ours(adata) -> None:
    write(adata, "tl.embed")
    both = ad.concat([adata, adata], index_unique="-")
    with pytest.raises(ValueError, match=r"lost the record.*run `del adata\.obsm\['X_gfx'\]` first"):
        claim(both, "tl.embed", None)
    del both.obsm["X_gfx"]
    write(both, "tl.embed")


# --- reading --------------------------------------------------------------------------------------------------------


def test_parts_are_read_by_name(adata) -> None:
    write(adata, "tl.embed_genes", varm=("groups",))
    result = find(adata, "tl.embed_genes")
    assert result.read("varm").shape == (4, 2)
    assert result.read("var", "n_cells").tolist() == [1] * 4
    assert not result.has("varm", "groups")
    assert result.uns["params"]["rng"] == 0
    with pytest.raises(KeyError, match=r"gfx_genes_groups.*the call did not write it, or it got lost"):
        result.read("varm", "groups")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_where_there_is_no_result_the_call_that_makes_one_is_named(adata, function) -> None:
    with pytest.raises(KeyError, match=rf"Run `gfx\.{re.escape(function)}\(adata[^)]*\)` first"):
        find(adata, function)
    adata.uns["mine"] = {"a": 1}
    with pytest.raises(KeyError, match=rf"Did not find 'mine'.*{re.escape(function)}\(adata.*key_added='mine'\)"):
        find(adata, function, key="mine")


def test_the_default_key_is_left_out_of_the_call(adata) -> None:
    with pytest.raises(KeyError, match=r"Did not find 'X_gfx'.*Run `gfx\.tl\.embed\(adata\)` first"):
        find(adata, "tl.embed", key="X_gfx")


def test_without_a_key_the_default_one_is_read_or_else_the_only_one(adata) -> None:
    write(adata, "tl.delete_genes", "mine")
    assert find(adata, *_results.PERTURBATIONS).key == "mine"
    write(adata, "tl.delete_genes", "other")
    with pytest.raises(KeyError, match=r"several.*\['mine', 'other'\]"):
        find(adata, *_results.PERTURBATIONS)
    write(adata, "tl.shift_genes")
    found = find(adata, *_results.PERTURBATIONS)
    assert (found.key, found.function) == ("gfx_shift", "tl.shift_genes")
    write(adata, "tl.delete_genes")
    with pytest.raises(KeyError, match=r"several.*\['gfx_delete', 'gfx_shift', 'mine', 'other'\]"):
        find(adata, *_results.PERTURBATIONS)
    assert find(adata, "tl.delete_genes").key == "gfx_delete"
    assert find(adata, *_results.PERTURBATIONS, key="other").key == "other"


def test_a_result_of_another_function_is_not_read(adata) -> None:
    write(adata, "tl.embed", "mine")
    with pytest.raises(KeyError, match=r"'mine'.*written by `gfx\.tl\.embed`, not by `gfx\.tl\.attention`"):
        find(adata, "tl.attention", key="mine")
    with pytest.raises(KeyError, match=r"`gfx\.tl\.classify_genes` or `gfx\.tl\.classify_cells`.*Run one"):
        find(adata, *_results.CLASSIFICATIONS, key="mine")


# --- tools ----------------------------------------------------------------------------------------------------------

TOOLS = {
    "pp.tokenize": gfx.pp.tokenize,
    "tl.embed": gfx.tl.embed,
    "tl.embed_genes": gfx.tl.embed_genes,
    "tl.attention": gfx.tl.attention,
}
TAKEN_OF_TOOLS = [(function, *slot) for function in TOOLS for slot in slots_of(function, "mine")]


@pytest.mark.parametrize(("function", "element", "name"), TAKEN_OF_TOOLS)
def test_tools_refuse_a_slot_of_the_users_and_change_nothing(toy_cells, toy_model, function, element, name) -> None:
    cells = toy_cells(8)
    size = cells.n_obs if element in {"obs", "obsm"} else cells.n_vars
    shape = {"obs": (size,), "var": (size,), "varp": (size, size)}.get(element, (size, 3))
    getattr(cells, element)[name] = np.zeros(shape)
    before = everything(cells)
    with pytest.raises(ValueError, match=re.escape(f"`adata.{element}[{name!r}]` holds ")):
        TOOLS[function](cells, model=toy_model, key_added="mine")
    assert same(everything(cells), before)


def test_an_embedding_does_not_replace_a_pca(toy_cells, toy_model) -> None:
    cells = toy_cells(8)
    cells.obsm["X_pca"] = pca = np.ones((8, 2))
    with pytest.raises(ValueError, match=r"`adata.obsm\['X_pca'\]` holds a ndarray of shape \(8, 2\)"):
        gfx.tl.embed(cells, model=toy_model, key_added="X_pca")
    assert cells.obsm["X_pca"] is pca
    assert not cells.uns


def test_groups_of_an_earlier_embedding_go_and_those_of_the_users_stay(toy_cells, toy_model) -> None:
    cells = toy_cells(12)
    gfx.tl.embed_genes(cells, model=toy_model, groupby="cell_type")
    gfx.tl.embed_genes(cells, model=toy_model)
    assert list(cells.varm) == ["gfx_genes"]
    cells.varm["gfx_genes_groups"] = mine = np.ones((cells.n_vars, 2))
    with pytest.raises(ValueError, match=r"`adata.varm\['gfx_genes_groups'\]`"):
        gfx.tl.embed_genes(cells, model=toy_model)
    assert cells.varm["gfx_genes_groups"] is mine


def test_ways_to_perturb_do_not_overwrite_each_other(toy_cells, toy_model) -> None:
    cells = toy_cells(12)
    gfx.tl.delete_genes(cells, "TOY90", model=toy_model, key_added="mine", controls=None)
    before = cells.obsm["mine"].copy()
    with pytest.raises(ValueError, match=r"holds a result of `gfx\.tl\.delete_genes`"):
        gfx.tl.overexpress_genes(cells, "TOY90", model=toy_model, key_added="mine", controls=None)
    np.testing.assert_array_equal(cells.obsm["mine"], before)
    gfx.tl.overexpress_genes(cells, "TOY90", model=toy_model, controls=None)
    np.testing.assert_array_equal(cells.obsm["mine"], before)

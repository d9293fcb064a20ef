"""Effects by cell and gene, read from the store of a screen."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

import gfx
from gfx._run_store import RunStore

if TYPE_CHECKING:
    from pathlib import Path

    import anndata as ad
    from tests.conftest import ToyCells

    from gfx.models import Model

# The toy cells' states are drawn at random, and most of the time they are not separable.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out cells of")

STATES = {"groupby": "cell_type", "start": "b", "goal": "a"}


@dataclass(frozen=True)
class Screened:
    """Cells after a screen toward a goal, and its store."""

    adata: ad.AnnData
    store: Path

    def refused(self, text: str, adata: ad.AnnData | None = None, **chosen: Any) -> None:
        with pytest.raises(ValueError, match=text):
            gfx.get.screen_cells(self.adata if adata is None else adata, self.store, **chosen)


@pytest.fixture(scope="module")
def with_goal(toy_cells: ToyCells, toy_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Screened:
    adata, store = toy_cells(12), tmp_path_factory.mktemp("goal") / "store"
    gfx.tl.screen_genes(adata, model=toy_model, controls=None, store=store, **STATES)
    return Screened(adata, store)


@pytest.fixture(scope="module")
def without_goal(toy_cells: ToyCells, toy_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Screened:
    adata, store = toy_cells(6), tmp_path_factory.mktemp("no_goal") / "store"
    gfx.tl.screen_genes(adata, model=toy_model, controls=None, store=store, key_added="mine")
    return Screened(adata, store)


@pytest.fixture
def copied(with_goal: Screened, tmp_path: Path) -> Screened:
    """The same screen, to be spoilt."""
    return Screened(with_goal.adata.copy(), shutil.copytree(with_goal.store, tmp_path / "store"))


def test_each_gene_of_each_screened_cell_is_stored_and_nothing_else(
    without_goal: Screened, toy_cells: ToyCells, toy_model: Model
) -> None:
    effects = gfx.get.screen_cells(without_goal.adata, without_goal.store)
    assert effects.shape == without_goal.adata.shape
    assert (effects.format, effects.dtype, effects.has_canonical_format) == ("csr", np.float32, True)
    tokens = gfx.pp.tokenize(toy_cells(6), model=toy_model, copy=True).obsm["gfx_tokens"]
    names, symbols = without_goal.adata.var_names, toy_model.vocabulary.symbols
    for cell, row in enumerate(tokens):
        expected = {str(symbols[token]) for token in row if symbols[token]}
        assert set(names[effects.indices[effects.indptr[cell] : effects.indptr[cell + 1]]]) == expected
    assert (effects.data > 0).mean() > 0.99
    is_unknown = ~names.str.startswith("TOY")
    assert without_goal.adata.X[:, is_unknown].nnz > 0
    assert effects[:, is_unknown].nnz == 0


@pytest.mark.parametrize("measure", ["shift", "toward"])
def test_their_means_are_those_of_the_table(with_goal: Screened, measure: str) -> None:
    effects = gfx.get.screen_cells(with_goal.adata, with_goal.store, measure=measure)
    n_cells, table = effects.getnnz(axis=0), gfx.get.screen_df(with_goal.adata, min_cells=1).set_index("gene")
    means = pd.Series(effects.sum(axis=0).A1 / np.maximum(n_cells, 1), index=with_goal.adata.var_names)
    np.testing.assert_allclose(means[table.index], table[f"{measure}_mean"], rtol=1e-4, atol=1e-8)
    is_start = (with_goal.adata.obs["cell_type"] == "b").to_numpy()
    assert ((effects.getnnz(axis=1) > 0) == is_start).all()


def test_shift_is_read_unless_asked_otherwise(with_goal: Screened) -> None:
    shift, toward = (
        gfx.get.screen_cells(with_goal.adata, with_goal.store, measure=name) for name in ("shift", "toward")
    )
    assert (gfx.get.screen_cells(with_goal.adata, with_goal.store) != shift).nnz == 0
    assert (toward.data < 0).any()


def test_a_key_chooses_the_result(copied: Screened, without_goal: Screened) -> None:
    adata = copied.adata
    adata.uns["other"], adata.varm["other"] = adata.uns.pop("gfx_screen"), adata.varm.pop("gfx_screen")
    expected = gfx.get.screen_cells(adata, copied.store)  # the only result
    assert (gfx.get.screen_cells(adata, copied.store, key="other") != expected).nnz == 0
    with pytest.raises(KeyError, match=r"Run `gfx\.tl\.screen_genes\(adata\)` first"):
        gfx.get.screen_cells(adata, copied.store, key="gfx_screen")
    assert gfx.get.screen_cells(without_goal.adata, without_goal.store, key="mine").nnz > 0


def test_a_modality_of_a_mudata(with_goal: Screened, as_mudata: Any) -> None:
    other = with_goal.adata[:, :5].copy()
    other.var_names = [f"other {name}" for name in other.var_names]
    mdata = as_mudata({"rna": with_goal.adata, "other": other})
    found = gfx.get.screen_cells(mdata, str(with_goal.store), mod="rna")
    assert (found != gfx.get.screen_cells(with_goal.adata, with_goal.store)).nnz == 0


def test_genes_in_another_order_after_a_call_that_went_on(copied: Screened, toy_model: Model) -> None:
    """The store knows the genes of the last call."""
    order = np.random.default_rng(0).permutation(copied.adata.n_vars)
    shuffled = copied.adata[:, order].copy()
    copied.refused("other genes", shuffled)
    expected = gfx.get.screen_cells(copied.adata, copied.store)[:, order]
    gfx.tl.screen_genes(shuffled, model=toy_model, controls=None, store=copied.store, **STATES)
    assert (gfx.get.screen_cells(shuffled, copied.store) != expected).nnz == 0
    copied.refused("other genes")


def test_other_cells_and_genes_are_refused(with_goal: Screened) -> None:
    adata = with_goal.adata
    renamed = adata.copy()
    renamed.obs_names = [f"other{number}" for number in range(adata.n_obs)]
    for other in (adata[:6], adata[::-1], renamed):
        with_goal.refused("holds effects in other cells. Read it before cells are left out", other)
    renamed = adata.copy()
    renamed.var_names = [f"other{number}" for number in range(adata.n_vars)]
    for other in (adata[:, :20], renamed):
        with_goal.refused("holds effects of other genes. Read it before genes are left out", other)


def test_a_measure_that_was_not_made_is_refused(with_goal: Screened, without_goal: Screened) -> None:
    without_goal.refused(r"`measure` is one of \['shift'\] in this screen, found 'toward'", measure="toward")
    with_goal.refused(r"`measure` is one of \['toward', 'shift'\]", measure="exact_shift")


def test_a_store_of_another_screen_of_these_cells_is_refused(copied: Screened, toy_model: Model) -> None:
    adata = copied.adata
    chosen = {"model": toy_model, "controls": None, **STATES}
    gfx.tl.screen_genes(adata, positions="keep", rng=1, **chosen)
    copied.refused("holds a screen with another positions, rng than the result 'gfx_screen'")
    gfx.tl.screen_genes(adata, genes=["TOY90", "TOY48"], **chosen)
    copied.refused("lacks effects that the result 'gfx_screen' is made of, or has others")


def test_a_store_of_another_function_is_refused(copied: Screened) -> None:
    manifest = {"function": "tl.delete_genes"}
    other = Screened(copied.adata, RunStore.open(copied.store.with_name("other"), manifest).path)
    other.refused(r"holds a run of `gfx\.tl\.delete_genes`, not of `gfx\.tl\.screen_genes`")


def test_what_is_no_store_is_refused(with_goal: Screened, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        Screened(with_goal.adata, path).refused(r"is no store of gfx\. Give the `store` of the screen")


@pytest.mark.parametrize("block", ["model/0", "model/1"])
def test_missing_and_damaged_blocks_are_not_taken_for_zeros(copied: Screened, block: str) -> None:
    shutil.move(copied.store / block, copied.store.with_name("moved"))
    copied.refused(r"blocks are damaged, .* Call `gfx.tl.screen_genes` with this `store` again")
    shutil.move(copied.store.with_name("moved"), copied.store / block)
    gfx.get.screen_cells(copied.adata, copied.store)
    (copied.store / block / "token/c/0").unlink()
    copied.refused("blocks are damaged")


#: What takes the place of an array of effects, and what is said of it, if not by scipy in its own words.
NO_EFFECTS = {
    "no token": ({"token": None}, "'token'"),
    "no shift": ({"shift": None}, "'shift'"),
    "token beyond a vocabulary": ({"token": np.array([4, 2**62])}, "its tokens go from 4 to 4611686018427387904"),
    "token below 0": ({"token": np.array([4, -7])}, "its tokens go from -7 to"),
    "token as fraction": ({"token": np.array([4.0, 5.5])}, "its tokens go from"),
    "cell that is not there": ({"cell": np.array([0, 12])}, ""),
    "cell below 0": ({"cell": np.array([0, -1])}, ""),
    "fewer cells than tokens": ({"cell": np.array([0])}, ""),
    "a number": ({"shift": np.float32(1)}, ""),
}


@pytest.mark.parametrize("wrong", NO_EFFECTS)
def test_blocks_that_are_none_of_a_screen_are_refused(copied: Screened, wrong: str) -> None:
    changes, said = NO_EFFECTS[wrong]
    block = {"cell": np.array([0, 1]), "token": np.array([4, 5]), "shift": np.zeros(2, dtype=np.float32)} | changes
    RunStore(copied.store).write("model", 0, {name: array for name, array in block.items() if array is not None})
    copied.refused(rf"holds blocks that are none of a screen \(.*{said}.*\)\. Call `gfx\.tl\.screen_genes` again")


@pytest.mark.parametrize(
    "tokens", [None, np.zeros(3, dtype=np.int32), np.zeros(205), np.full(205, -2), np.full(205, 2**62)]
)
def test_a_store_that_does_not_say_which_genes_is_damaged(copied: Screened, tokens: np.ndarray | None) -> None:
    store = RunStore(copied.store)
    if tokens is None:
        shutil.rmtree(copied.store / "genes")
    else:
        store.write("genes", 0, store.read("genes", 0) | {"token": tokens})
    copied.refused(r"does not say which genes its effects are of: it is damaged\. Call `gfx\.tl\.screen_genes` again")


def test_a_store_of_another_configuration_is_refused(copied: Screened) -> None:
    copied.adata.uns["gfx_screen"]["params"]["config_sha256"] = "0" * 64
    copied.refused("holds a screen with another config_sha256 than the result 'gfx_screen'")


def test_without_a_result(toy_cells: ToyCells, with_goal: Screened) -> None:
    with pytest.raises(KeyError, match=r"Run `gfx\.tl\.screen_genes\(adata\)` first"):
        gfx.get.screen_cells(toy_cells(12), with_goal.store)

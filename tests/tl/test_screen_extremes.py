"""Screens of cells that are too long, too short, or too few, and calls that fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import sparse

import gfx
from gfx.tl._screen_job import ScreenJob

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import anndata as ad
    from tests.conftest import ToyCells

    from gfx.models import Model

    Slots = dict[str, Any]
    ReadSlots = Callable[[ad.AnnData], Slots]

    from gfx._core.screening import Screened
    from gfx.tl._screen_job import CellBlock

METHODS = pytest.mark.parametrize("method", ["exact", "first_order"])


def n_genes_read(model: Model) -> int:
    return model.max_length - model.vocabulary.n_specials


def by_rank(adata: ad.AnnData, model: Model) -> list[list[str]]:
    """Genes of each cell, highest first, all of them."""
    symbols = model.vocabulary.symbols
    medians = dict(zip(symbols, model.vocabulary.medians, strict=True))
    rows = []
    for counts in adata.X.toarray().astype(np.float64):
        value = {
            name: n / medians[name] for name, n in zip(adata.var_names, counts, strict=True) if n and name in medians
        }
        rows.append(sorted(value, key=lambda name: (-value[name], int(name[3:]))))
    return rows


@METHODS
def test_cells_longer_than_the_model_reads(toy_cells: ToyCells, any_model: Model, method: str) -> None:
    """What it reads is screened; what it does not read has no effect, and is not counted."""
    adata = toy_cells(30)
    gfx.tl.screen_genes(adata, model=any_model, method=method, n_probes=2, layers=True)
    room = n_genes_read(any_model)
    ranked = by_rank(adata, any_model)
    assert max(map(len, ranked)) > room > min(map(len, ranked))
    layer = adata.layers["gfx_screen"].toarray()
    n_cells = dict.fromkeys(adata.var_names, 0)
    for row, names in zip(layer, ranked, strict=True):
        assert set(adata.var_names[row != 0]) <= set(names[:room])
        # One or another gene may not matter at all.
        assert (row != 0).sum() > 0.9 * min(len(names), room)
        for name in names[:room]:
            n_cells[name] += 1
    assert adata.varm["gfx_screen"]["n_cells"].to_dict() == n_cells
    for name in ("TOY1", "TOY90"):
        at = adata.var_names.get_loc(name)
        found = layer[[name in names[:room] for names in ranked], at]
        np.testing.assert_allclose(adata.varm["gfx_screen"].loc[name, "shift_mean"], found.mean(), rtol=1e-5)


@METHODS
def test_one_gene(toy_cells: ToyCells, toy_model: Model, method: str) -> None:
    """It does what it does among all genes; there are no neighbours to hold it against."""
    every, one = toy_cells(30), toy_cells(30)
    gfx.tl.screen_genes(every, model=toy_model, method=method, n_probes=2)
    gfx.tl.screen_genes(one, genes=["TOY90"], model=toy_model, method=method, n_probes=2, layers=True)
    found = one.varm["gfx_screen"]
    columns = ["n_cells", "rank_mean", "shift_mean", "shift_sd", "random_weights_shift_mean"]
    np.testing.assert_allclose(found.loc["TOY90", columns], every.varm["gfx_screen"].loc["TOY90", columns], rtol=1e-4)
    assert found["n_cells"].sum() == found.loc["TOY90", "n_cells"] > 20
    assert found.filter(like="excess").isna().all(axis=None)
    assert one.layers["gfx_screen"].getnnz(axis=0).nonzero()[0].tolist() == [one.var_names.get_loc("TOY90")]
    table = gfx.get.screen_df(one, min_cells=1)
    assert table["gene"].tolist() == ["TOY90"]
    assert table[["shift_z", "shift_p", "shift_fdr"]].isna().all(axis=None)


@METHODS
def test_one_cell(toy_cells: ToyCells, toy_model: Model, method: str) -> None:
    several, one = toy_cells(30), toy_cells(30)[[3]].copy()
    arguments = {"model": toy_model, "method": method, "n_probes": 15, "layers": True}  # all there are: estimates hold
    gfx.tl.screen_genes(several, **arguments)
    gfx.tl.screen_genes(one, **arguments)
    found, expected = one.layers["gfx_screen"].toarray(), several.layers["gfx_screen"][[3]].toarray()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert set(one.varm["gfx_screen"]["n_cells"]) == {0, 1}
    assert (found > 0).sum() > 40


def cell_of(adata: ad.AnnData, *names: str) -> ad.AnnData:
    """One cell with a count of some genes."""
    counts = np.isin(adata.var_names, names).astype(np.float32)[None]
    one = adata[[0]].copy()
    one.X = sparse.csr_matrix(counts)
    return one


@METHODS
def test_a_cell_of_one_gene_cannot_lose_it(
    toy_cells: ToyCells, any_model: Model, slots: ReadSlots, method: str
) -> None:
    one = cell_of(toy_cells(2), "TOY90")
    before = slots(one)
    with pytest.raises(ValueError, match="No cell that is screened has any of the genes and another one beside it"):
        gfx.tl.screen_genes(one, model=any_model, method=method)
    assert slots(one) == before


@METHODS
def test_a_cell_of_two_genes_can_lose_either(
    toy_cells: ToyCells, any_model: Model, method: str, tmp_path: Path
) -> None:
    """Another cell of one gene, and one of none, are left out."""
    adata = toy_cells(3)
    rows = [cell_of(adata, *names).X for names in (["TOY90"], ["TOY90", "TOY48"], ["UNKNOWN1"])]
    adata.X = sparse.vstack(rows).tocsr()
    gfx.tl.screen_genes(adata, model=any_model, method=method, n_probes=2, layers=True, store=tmp_path / "store")
    assert (adata.layers["gfx_screen"].toarray() != 0).sum(axis=1).tolist() == [0, 2, 0]
    n_cells = adata.varm["gfx_screen"]["n_cells"]
    assert n_cells[n_cells > 0].to_dict() == {"TOY48": 1, "TOY90": 1}


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"method": "quick"}, ValueError),
        ({"operator": "drop"}, ValueError),
        ({"null": "shuffled"}, ValueError),
        ({"pooling": "max"}, ValueError),
        ({"pooling": "genes", "method": "first_order"}, ValueError),
        ({"n_probes": -1}, ValueError),
        ({"n_probes": 0, "method": "first_order"}, ValueError),
        ({"rng": "today"}, TypeError),
        ({"genes": ["NO_GENE"]}, ValueError),
        ({"hidden_layer": 9}, ValueError),
        ({"dtype": "int8"}, ValueError),
        ({"groupby": "nothing"}, KeyError),
        ({"groupby": "cell_type", "start": "a"}, ValueError),
        ({"groupby": "cell_type", "start": "a", "goal": "z"}, KeyError),
        ({"mask_obs": "nothing"}, KeyError),
        ({"mask_obs": np.zeros(24, bool)}, ValueError),
        ({"model": "no_model"}, (ValueError, KeyError, FileNotFoundError)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_call_changes_nothing(
    *,
    cells: ad.AnnData,
    toy_model: Model,
    slots: ReadSlots,
    tmp_path: Path,
    wrong: dict[str, Any],
    error: type[Exception],
) -> None:
    before = slots(cells)
    with pytest.raises(error):
        gfx.tl.screen_genes(cells, **{"model": toy_model, "store": tmp_path / "store", "layers": True, **wrong})
    assert slots(cells) == before
    assert not [*tmp_path.iterdir()]


def test_a_failure_amid_a_run_keeps_an_earlier_result(
    cells: ad.AnnData, toy_model: Model, slots: ReadSlots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second block: what was there before stays, and the store has the first."""
    gfx.tl.screen_genes(cells, model=toy_model, rng=1)
    before = slots(cells)
    run, n_runs = ScreenJob.run, []

    def stopped(self: ScreenJob, block: CellBlock) -> Screened:
        n_runs.append(1)
        if len(n_runs) > 2:
            raise KeyboardInterrupt
        return run(self, block)

    monkeypatch.setattr(ScreenJob, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        gfx.tl.screen_genes(cells, model=toy_model, layers=True, store=tmp_path / "store")
    monkeypatch.undo()
    assert slots(cells) == before
    assert [path.name for path in (tmp_path / "store/model/shift/c").iterdir()] == ["0"]
    whole = cells.copy()
    gfx.tl.screen_genes(cells, model=toy_model, layers=True, store=tmp_path / "store")
    gfx.tl.screen_genes(whole, model=toy_model, layers=True)
    assert slots(cells) == slots(whole)

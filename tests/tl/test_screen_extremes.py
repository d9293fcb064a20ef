"""Screens of cells that are too long, too short, or too few, and calls that fail or are stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import sparse

import gfx
from gfx._engine.tasks import Screen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import anndata as ad
    from tests.conftest import ToyCells
    from tests.tl.conftest import Screened

    from gfx.models import Model

    Slots = dict[str, Any]
    ReadSlots = Callable[[ad.AnnData], Slots]

METHODS = pytest.mark.parametrize("method", ["exact", gfx.tl.FirstOrder(n_probes=2)], ids=["exact", "first order"])


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
def test_what_a_long_cell_has_beyond_the_input_of_the_model_is_not_screened(
    toy_cells: ToyCells, any_model: Model, screen: Callable[..., Screened], method: Any
) -> None:
    adata = toy_cells(8)
    found = screen(adata, any_model, stored=True, method=method)
    room = n_genes_read(any_model)
    ranked = by_rank(adata, any_model)
    assert max(map(len, ranked)) > room > min(map(len, ranked))
    effects = found.effects()
    n_cells = dict.fromkeys(adata.var_names, 0)
    for row, names in zip(effects, ranked, strict=True):
        assert set(adata.var_names[~np.isnan(row)]) == set(names[:room])
        for name in names[:room]:
            n_cells[name] += 1
    assert (effects[~np.isnan(effects)] > 0).mean() > 0.9  # one or another gene may not matter at all
    assert found.table["n_cells"].to_dict() == n_cells
    for name in ("TOY1", "TOY90"):
        of_gene = effects[[name in names[:room] for names in ranked], adata.var_names.get_loc(name)]
        np.testing.assert_allclose(found.table.loc[name, "shift_mean"], of_gene.mean(), rtol=1e-5)


@METHODS
def test_one_gene_alone_has_no_others_to_be_compared_with(
    toy_cells: ToyCells, toy_model: Model, screen: Callable[..., Screened], method: Any
) -> None:
    """Its shifts are those that it has among all genes."""
    chosen = {"method": method, "controls": "random_weights"}
    every = screen(toy_cells(15), toy_model, **chosen)
    one = screen(toy_cells(15), toy_model, genes=["TOY90"], stored=True, **chosen)
    columns = ["n_cells", "rank_mean", "shift_mean", "shift_sd", "random_weights_shift_mean"]
    np.testing.assert_allclose(one.table.loc["TOY90", columns], every.table.loc["TOY90", columns], rtol=1e-4)
    assert one.table["n_cells"].sum() == one.table.loc["TOY90", "n_cells"] > 10
    assert one.table.filter(like="excess").isna().all(axis=None)
    stored = gfx.get.screen_cells(one.adata, one.store)
    assert stored.getnnz(axis=0).nonzero()[0].tolist() == [one.adata.var_names.get_loc("TOY90")]
    table = gfx.get.screen_df(one.adata, min_cells=1)
    assert table["gene"].tolist() == ["TOY90"]
    assert table[["shift_z", "shift_p", "shift_fdr"]].isna().all(axis=None)


@pytest.mark.parametrize("method", ["exact", gfx.tl.FirstOrder(n_probes=15)], ids=["exact", "all directions"])
def test_one_cell_alone(toy_cells: ToyCells, toy_model: Model, screen: Callable[..., Screened], method: Any) -> None:
    several = screen(toy_cells(6), toy_model, method=method, stored=True)
    one = screen(toy_cells(6)[[3]].copy(), toy_model, method=method, stored=True)
    np.testing.assert_allclose(one.effects()[0], several.effects()[3], atol=1e-6)
    assert set(one.table["n_cells"]) == {0, 1}
    assert (one.effects() > 0).sum() > 40


def cell_of(adata: ad.AnnData, *names: str) -> ad.AnnData:
    """One cell with a count of some genes."""
    counts = np.isin(adata.var_names, names).astype(np.float32)[None]
    one = adata[[0]].copy()
    one.X = sparse.csr_matrix(counts)
    return one


@METHODS
def test_a_cell_of_one_gene_cannot_lose_it(
    toy_cells: ToyCells, any_model: Model, slots: ReadSlots, method: Any
) -> None:
    one = cell_of(toy_cells(2), "TOY90")
    before = slots(one)
    with pytest.raises(ValueError, match="No cell that is screened has any of the genes and at least one other gene"):
        gfx.tl.screen_genes(one, model=any_model, method=method)
    assert slots(one) == before


@METHODS
def test_a_cell_of_two_genes_can_lose_either(
    toy_cells: ToyCells, any_model: Model, screen: Callable[..., Screened], method: Any
) -> None:
    """Another cell of one gene, and one of none, are left out."""
    adata = toy_cells(3)
    rows = [cell_of(adata, *names).X for names in (["TOY90"], ["TOY90", "TOY48"], ["UNKNOWN1"])]
    adata.X = sparse.vstack(rows).tocsr()
    found = screen(adata, any_model, method=method, stored=True)
    assert (~np.isnan(found.effects())).sum(axis=1).tolist() == [0, 2, 0]
    n_cells = found.table["n_cells"]
    assert n_cells[n_cells > 0].to_dict() == {"TOY48": 1, "TOY90": 1}


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"method": "quick"}, ValueError),
        ({"positions": "drop"}, ValueError),
        ({"controls": "shuffled"}, ValueError),
        ({"pooling": "max"}, ValueError),
        ({"pooling": "genes", "method": "first_order"}, ValueError),
        ({"method": gfx.tl.FirstOrder(n_probes=0)}, ValueError),
        ({"rng": "today"}, TypeError),
        ({"genes": ["NO_GENE"]}, ValueError),
        ({"hidden_layer": 9}, ValueError),
        ({"hidden_layer": 0}, ValueError),
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
        gfx.tl.screen_genes(cells, **{"model": toy_model, "store": tmp_path / "store", **wrong})
    assert slots(cells) == before
    assert not [*tmp_path.iterdir()]


def test_a_failure_amid_a_run_keeps_an_earlier_result(
    cells: ad.AnnData, toy_model: Model, slots: ReadSlots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third block: what was there before stays, and the store has the first two."""
    cells = cells[:8].copy()
    gfx.tl.screen_genes(cells, model=toy_model, genes="TOY90", rng=1)
    before = slots(cells)
    run, n_runs = Screen.run, []

    def stopped(self: Screen, *given: Any) -> Any:
        n_runs.append(1)
        if len(n_runs) > 2:
            raise KeyboardInterrupt
        return run(self, *given)

    monkeypatch.setattr(Screen, "run", stopped)
    chosen = {"model": toy_model, "controls": None}
    with pytest.raises(KeyboardInterrupt):
        gfx.tl.screen_genes(cells, store=tmp_path / "store", **chosen)
    monkeypatch.undo()
    assert slots(cells) == before
    assert {path.name for path in (tmp_path / "store/model").iterdir()} == {"0", "1"}
    whole = cells.copy()
    gfx.tl.screen_genes(cells, store=tmp_path / "store", **chosen)
    gfx.tl.screen_genes(whole, **chosen)
    assert slots(cells) == slots(whole)

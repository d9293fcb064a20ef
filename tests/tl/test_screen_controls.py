"""Controls of a screen, and estimates compared with exact results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import stats

import gfx
from gfx._core.screening import agreement, draw_checked
from gfx.tl.screen._run import CANDIDATES, CELLS_PER_CANDIDATE, FEWEST_CELLS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import ToyCells
    from tests.tl.conftest import Screened

    from gfx.models import Model

    Screen = Callable[..., Screened]

# The toy cells' states are drawn at random, and most of the time they are not separable.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out cells of")

STATES = {"groupby": "cell_type", "start": "b", "goal": "a"}
FIRST_ORDER = {"method": gfx.tl.FirstOrder(n_probes=2)}


@pytest.fixture(scope="module")
def screened(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> Screened:
    """15 cells, exactly, with the controls of a call that names none."""
    return screen(toy_cells(15), toy_model, controls=("random_weights", "baselines"))


@pytest.fixture(scope="module")
def estimated(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> Screened:
    """16 of 48 cells on their way to another state, by derivatives."""
    return screen(toy_cells(48), toy_model, stored=True, positions="keep", **STATES, **FIRST_ORDER)


# --- controls -------------------------------------------------------------------------------------------------------


def test_controls_run_unless_others_are_asked_for(toy_cells: ToyCells, toy_model: Model, screened: Screened) -> None:
    adata = toy_cells(15)
    gfx.tl.screen_genes(adata, model=toy_model)
    pd.testing.assert_frame_equal(adata.varm["gfx_screen"], screened.table)
    assert list(adata.uns["gfx_screen"]["params"]["controls"]) == ["random_weights", "baselines"]


def test_without_controls_nothing_else_is_run(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    found = screen(toy_cells(15), toy_model)
    assert found.table.columns.tolist() == ["n_cells", "rank_mean", "shift_mean", "shift_sd", "shift_excess"]
    result = found.adata.uns["gfx_screen"]
    assert set(result["controls"]["control"]) == {"rank"}
    assert "no p-value" in result["note"]
    assert list(result["params"]["controls"]) == []
    assert "n_probes" not in result["params"]
    assert result["approx"] is False


@pytest.mark.parametrize(
    ("controls", "columns"),
    [
        (["baselines"], ["detection", "expression_mean"]),
        ("random_weights", ["random_weights_shift_mean", "random_weights_shift_excess"]),
    ],
)
def test_each_control_can_be_asked_for_alone(
    *, toy_cells: ToyCells, toy_model: Model, screen: Screen, screened: Screened, controls: Any, columns: list[str]
) -> None:
    found = screen(toy_cells(15), toy_model, controls=controls)
    assert found.table.columns[5:].tolist() == columns
    pd.testing.assert_frame_equal(found.table, screened.table[found.table.columns])


def test_random_weights_are_those_of_an_untrained_model(
    *, screened: Screened, toy_cells: ToyCells, toy_model: Model, other_toy_folder: Path, screen: Screen
) -> None:
    """Another model of the same shape has the same; another seed has not."""
    columns = ["random_weights_shift_mean", "random_weights_shift_excess"]
    found = screen(toy_cells(15), gfx.models.load(other_toy_folder), controls="random_weights").table
    pd.testing.assert_frame_equal(found[columns], screened.table[columns])
    assert not np.allclose(found["shift_mean"], screened.table["shift_mean"], rtol=0.1, equal_nan=True)
    found = screen(toy_cells(15), toy_model, controls="random_weights", rng=1).table
    assert not np.allclose(found[columns], screened.table[columns], rtol=0.1, equal_nan=True)
    np.testing.assert_array_equal(found["shift_mean"], screened.table["shift_mean"])
    assert "a random-weights model" in screened.adata.uns["gfx_screen"]["note"]


def test_controls_correlate_rankings_of_genes(screened: Screened) -> None:
    table = screened.table.query("n_cells >= @FEWEST_CELLS")
    controls = screened.controls
    assert controls["measure"].unique().tolist() == ["shift"]
    columns = {
        "random_weights": "random_weights_shift_mean",
        "rank": "rank_mean",
        "expression": "expression_mean",
        "detection": "detection",
    }
    for control, column in columns.items():
        expected = stats.spearmanr(table["shift_mean"], table[column]).statistic
        assert controls.loc[(control, "spearman"), "value"] == pytest.approx(expected, abs=1e-6), control
        assert controls.loc[(control, "spearman"), "n"] == len(table)
    assert not {"exact", "state_axis"} & set(controls.index.get_level_values(0))


@pytest.mark.parametrize("method", [{}, FIRST_ORDER], ids=["exact", "first order"])
def test_few_cells_give_effects_of_genes_but_no_correlations_of_rankings(
    toy_cells: ToyCells, toy_model: Model, screen: Screen, method: dict[str, Any]
) -> None:
    found = screen(toy_cells(3), toy_model, controls=("random_weights", "baselines"), **method)
    assert found.table["shift_mean"].notna().sum() > 50
    controls = found.adata.uns["gfx_screen"]["controls"]
    assert controls.loc[controls["control"] != "exact", "value"].isna().all()
    if method:
        assert (found.table["exact_n_cells"] == 0).all()


# --- estimates ------------------------------------------------------------------------------------------------------


def test_estimates_are_reported_with_exact_results(
    estimated: Screened, toy_cells: ToyCells, toy_model: Model, screen: Screen
) -> None:
    result, table = estimated.adata.uns["gfx_screen"], estimated.table
    assert result["approx"] is True
    assert (result["params"]["method"], result["params"]["n_probes"]) == ("first_order", 2)
    exact = screen(toy_cells(48), toy_model, stored=True, positions="keep", **STATES)
    np.testing.assert_array_equal(table["n_cells"], exact.table["n_cells"])
    is_candidate = table["exact_n_cells"] > 0
    candidates = table[is_candidate]
    assert table["exact_n_cells"].dtype == np.int32
    assert 0 < len(candidates) <= CANDIDATES
    assert (candidates["n_cells"] >= FEWEST_CELLS).all()
    assert table.loc[~is_candidate, ["exact_shift_mean", "exact_toward_mean"]].isna().all(axis=None)
    in_all_cells = candidates["exact_n_cells"] == candidates["n_cells"]
    assert in_all_cells.any()
    for measure in ("shift", "toward"):
        found, expected = candidates[f"exact_{measure}_mean"], exact.table.loc[is_candidate, f"{measure}_mean"]
        np.testing.assert_allclose(found[in_all_cells], expected[in_all_cells], rtol=1e-3, atol=1e-7)
    estimates, effects = estimated.effects("toward"), exact.effects("toward")
    is_deleted = ~np.isnan(estimates)
    assert stats.spearmanr(estimates[is_deleted], effects[is_deleted]).statistic > 0.9


def test_candidates_are_run_in_as_many_cells_as_tell_them_from_others(
    toy_cells: ToyCells, toy_model: Model, screen: Screen
) -> None:
    """A gene that stands out farther, in units of its spread over cells, runs in fewer cells."""
    method = gfx.tl.FirstOrder(n_probes=15)
    found = screen(toy_cells(100), toy_model, positions="keep", method=method)
    table = found.table[(found.table["n_cells"] >= FEWEST_CELLS) & (found.table["exact_n_cells"] > 0)]
    fewest, most = CELLS_PER_CANDIDATE
    assert table["exact_n_cells"].between(fewest, most).mean() > 0.9  # the others are rare
    z = gfx.get.screen_df(found.adata).set_index("gene")
    excess = z["shift_excess"] - (z["shift_low"] + z["shift_high"]) / 2
    needed = np.ceil((2 * z["shift_sd"] / excess) ** 2).clip(fewest, most)[table.index]
    assert needed.nunique() > 3
    assert (table["exact_n_cells"] <= needed + 1).all()
    assert (np.abs(table["exact_n_cells"] - np.minimum(needed, table["n_cells"])) <= 1).mean() > 0.8
    assert stats.spearmanr(table["exact_shift_mean"], table["shift_mean"]).statistic > 0.6


@pytest.mark.parametrize("n_probes", [0, 12])
def test_checks_take_a_bounded_number_of_passes(
    toy_cells: ToyCells, toy_model: Model, screen: Screen, n_probes: int
) -> None:
    """At most half of those of the estimates, or 300, and never more than 1,500; a pass backward counts twice."""
    method = gfx.tl.FirstOrder(n_probes=n_probes)
    found = screen(toy_cells(480), toy_model, stored=True, positions="keep", method=method, **STATES)
    n_passes = 0
    for job in ("checked", "candidates"):
        for block in (found.store / job).iterdir():
            cell = np.asarray(zarr.open_group(block, mode="r")["cell"])
            n_passes += len(cell) + len(np.unique(cell))
    most = {0: 300, 12: 1500}[n_probes]  # of 160 cells: 160 * 3 / 2, and 160 * 27 / 2
    assert 0.5 * most < n_passes <= most
    controls = found.adata.uns["gfx_screen"]["controls"].query("control == 'exact'")
    assert (controls["n"] == most // 2 // 31).all()


def test_agreement_of_estimates_with_exact_results_is_a_control(estimated: Screened) -> None:
    controls = estimated.adata.uns["gfx_screen"]["controls"]
    exact = controls[controls["control"] == "exact"].set_index(["measure", "statistic"])
    assert exact.index.tolist() == [
        *(("shift", "spearman"), ("shift", "precision"), ("toward", "spearman"), ("toward", "precision"))
    ]
    assert (exact["n"] == 4).all()
    assert exact.loc[("toward", "spearman"), "value"] > 0.9
    assert 0 < exact.loc[("shift", "spearman"), "value"] < 1


def test_cells_that_tell_nothing_are_not_counted(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    """Of at most five genes none is among the largest tenth; cells with fewer than three have no correlation."""
    genes = ["TOY90", "TOY171", "TOY48", "TOY165", "TOY137"]
    found = screen(toy_cells(12), toy_model, genes=genes, stored=True, **FIRST_ORDER)
    controls = found.adata.uns["gfx_screen"]["controls"].query("control == 'exact'").set_index("statistic")
    assert controls.loc["precision", "n"] == 0
    assert np.isnan(controls.loc["precision", "value"])
    n_genes = (~np.isnan(found.effects())).sum(axis=1)
    assert 0 < controls.loc["spearman", "n"] <= min((n_genes > 2).sum(), 4)


def test_agreement_in_some_genes_is_that_of_cells_screened_whole(
    estimated: Screened, toy_cells: ToyCells, toy_model: Model, screen: Screen
) -> None:
    """The mean over many draws of genes is that over the whole cells; precision to a hundredth in cells so small."""
    whole_cells = screen(toy_cells(48), toy_model, stored=True, positions="keep", **STATES)
    effects = {
        measure: [
            [row[~np.isnan(row)] for row in found.effects(measure) if not np.isnan(row).all()]
            for found in (estimated, whole_cells)
        ]
        for measure in ("shift", "toward")
    }
    rng, n_cells = np.random.default_rng(0), len(effects["shift"][0])
    for measure, (estimates, exact) in effects.items():
        whole = np.mean([agreement(*pair) for pair in zip(estimates, exact, strict=True)], axis=0)
        draws = []
        for _ in range(100):
            sampled = []
            for cell in range(n_cells):
                weight = draw_checked(np.stack([effects[name][0][cell] for name in effects]), rng)
                of_drawn = np.where(weight > 0, exact[cell], np.nan)
                sampled.append(agreement(estimates[cell], of_drawn, weight))
            draws.append(np.nanmean(sampled, axis=0))
        assert np.std(draws, axis=0).max() < 0.05, measure
        np.testing.assert_array_less(np.abs(np.mean(draws, axis=0) - whole), 3 * stats.sem(draws) + [0, 0.01])


def test_estimates_that_do_not_agree_are_warned_of(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    """All genes behind a deleted one close up by a position, which is far where positions were drawn at random."""
    with pytest.warns(UserWarning, match=r"correlate with exact results only at Spearman .*Use `method='exact'`"):
        screen(toy_cells(24), toy_model, positions="close", **STATES, **FIRST_ORDER)


def test_more_probes_estimate_more_precisely(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    def spearman(n_probes: int) -> float:
        method = gfx.tl.FirstOrder(n_probes=n_probes)
        return screen(toy_cells(6), toy_model, positions="keep", method=method).controls["value"]["exact", "spearman"]

    assert spearman(1) < spearman(15) > 0.9
    assert spearman(15) == spearman(1000)  # there are no more directions


def test_the_method_by_name_is_that_of_eight_probes(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    named = screen(toy_cells(6), toy_model, method="first_order")
    given = screen(toy_cells(6), toy_model, method=gfx.tl.FirstOrder(n_probes=8))
    pd.testing.assert_frame_equal(named.table, given.table)
    assert named.adata.uns["gfx_screen"]["params"]["n_probes"] == 8


def test_without_probes_shifts_are_left_out(toy_cells: ToyCells, toy_model: Model, screen: Screen) -> None:
    method = gfx.tl.FirstOrder(n_probes=0)
    chosen = {"method": method, "positions": "keep", "controls": "random_weights"}
    found = screen(toy_cells(72), toy_model, stored=True, **chosen, **STATES)
    assert not [name for name in found.table if "shift" in name and not name.startswith("exact_")]
    assert found.table["n_cells"].max() >= FEWEST_CELLS
    assert np.isfinite(found.effects("toward")).any()
    assert gfx.get.screen_df(found.adata, min_cells=5)["toward_p"].notna().any()
    with pytest.raises(ValueError, match=r"`measure` is one of \['toward'\] in this screen, found 'shift'"):
        found.effects("shift")
    with pytest.raises(ValueError, match=r"`FirstOrder\(n_probes=0\)` estimates no shifts"):
        screen(toy_cells(6), toy_model, method=method)

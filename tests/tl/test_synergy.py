"""Genes perturbed together, against the same genes one by one."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import gfx
from gfx._engine import run

#: In nearly all of the toy cells, in some, in some.
GENE, OTHER, THIRD = "TOY90", "TOY48", "TOY165"
PAIR, TRIPLE = f"{GENE}+{OTHER}", f"{GENE}+{OTHER}+{THIRD}"
MEASURES = ("on_shifts", "on_vectors")

delete_genes = partial(gfx.tl.delete_genes, controls=None)


def slow_excess(slow, rows, names, kind, pooling):
    """By cell: together, the sum of shifts, and the shift by the sum of displacements."""
    genes, found = slow.named(names), {}
    for at, row in enumerate(rows):
        if kind == "overexpress" or set(genes) <= set(row):

            def run(some, row=row):
                return slow.effect(row, slow.edited(row, some, kind), some, pooling)

            together, singles = run(genes), [run([gene]) for gene in genes]
            start = together.vectors[0]
            expected = start + sum(single.vectors[1] - single.vectors[0] for single in singles)
            composed = 1 - start @ expected / np.linalg.norm(start) / np.linalg.norm(expected)
            end = together.vectors[1]
            displaced = 1 - start @ end / np.linalg.norm(start) / np.linalg.norm(end)
            found[at] = together.shift, sum(single.shift for single in singles), displaced, composed
    return pd.DataFrame(found, index=["together", "summed", "displaced", "composed"]).T


def with_excess(found):
    return found.assign(
        on_shifts=found["together"] - found["summed"], on_vectors=found["displaced"] - found["composed"]
    )


@pytest.fixture
def kinds_of_cells(cells):
    """Full cells and short ones, that have the genes or lack them."""
    counts = cells.X.toarray()
    counts[::5, cells.var_names.get_loc(GENE)] = 0
    counts[4:8, 100:180] = 0
    cells.X = sparse.csr_matrix(counts)
    return cells


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
@pytest.mark.parametrize("pooling", ["genes", "mean", "auto"])
def test_it_is_the_genes_one_by_one(kinds_of_cells, any_model, slow, kind, pooling):
    if pooling == "auto" and slow.pooling == "mean":
        pytest.skip("the mean, which is tested by name")
    cells = kinds_of_cells
    call = getattr(gfx.tl, f"{kind}_genes")
    call(
        cells,
        [GENE, (GENE, OTHER), (GENE, OTHER, THIRD)],
        model=any_model,
        pooling=pooling,
        controls=None,
        key_added="x",
    )
    found = cells.uns["x"]["synergy"]
    assert found["perturbation"].tolist() == [PAIR, TRIPLE]
    how = slow.pooling if pooling == "auto" else pooling
    for _, row in found.iterrows():
        expected = with_excess(slow_excess(slow, slow.tokens(cells), row["perturbation"].split("+"), kind, how))
        assert row["n_cells"] == len(expected) > 5
        for name in ("together", "summed", "displaced", "composed", *MEASURES):
            assert row[f"{name}_mean"] == pytest.approx(expected[name].mean(), abs=1e-5)
        assert row["interval_over"] == "cells"
        for name in MEASURES:
            # The bootstrap is about as wide as the normal interval, and no p-value comes from it.
            half = 1.96 * expected[name].std(ddof=0) / np.sqrt(len(expected))
            assert row[f"{name}_low"] < row[f"{name}_mean"] < row[f"{name}_high"]
            assert (row[f"{name}_high"] - row[f"{name}_low"]) / 2 == pytest.approx(half, rel=0.2)
            assert np.isnan([row[f"{name}_z"], row[f"{name}_p"]]).all()
    assert found["on_shifts_mean"].abs().min() > 1e-4
    if kind == "overexpress":
        assert {len(row) for row in slow.tokens(cells)} > {64}  # some cells lose genes at the end
    together = np.nanmean(cells.obsm["x"].astype(float), axis=0)[1:]
    np.testing.assert_allclose(found["together_mean"], together)


def test_genes_that_are_also_deleted_by_themselves(cells, toy_model):
    """The sum of shifts is that of the deletions by hand, in the cells that have both."""
    delete_genes(cells, [GENE, OTHER, (GENE, OTHER)], model=toy_model)
    shift = cells.obsm["gfx_delete"].astype(float)
    both = ~np.isnan(shift[:, 2])
    found = cells.uns["gfx_delete"]["synergy"]
    assert found["summed_mean"].item() == pytest.approx(shift[both, :2].sum(axis=1).mean(), rel=1e-5)
    delete_genes(cells, [GENE, OTHER], model=toy_model)
    assert "synergy" not in cells.uns["gfx_delete"]


def test_intervals_over_donors(cells, any_model, slow):
    delete_genes(cells, (GENE, OTHER), model=any_model, donor_key="donor")
    how = slow.pooling
    expected = with_excess(slow_excess(slow, slow.tokens(cells), [GENE, OTHER], "delete", how))
    row = cells.uns["gfx_delete"]["synergy"].iloc[0]
    assert row["interval_over"] == "donors"
    donor = cells.obs["donor"].to_numpy()[expected.index]
    for name in MEASURES:
        means = expected[name].groupby(donor).mean()
        assert len(means) == 4
        interval = stats.ttest_1samp(means, 0).confidence_interval()
        assert row[f"{name}_mean"] == pytest.approx(expected[name].mean(), abs=1e-6)
        np.testing.assert_allclose(row[[f"{name}_low", f"{name}_high"]].tolist(), interval, atol=1e-5)


def test_one_donor_has_no_interval(cells, toy_model):
    cells.obs["donor"] = "only"
    delete_genes(cells, (GENE, OTHER), model=toy_model, donor_key="donor")
    row = cells.uns["gfx_delete"]["synergy"].iloc[0]
    assert np.isnan([row[f"{name}_{end}"] for name in MEASURES for end in ("low", "high")]).all()


def test_random_pairs(toy_cells, any_model, slow):
    """Their excess, cell by cell beside that of the pair; z and p are the place of the pair among them."""
    few = toy_cells(8)
    gfx.tl.delete_genes(few, [GENE, (GENE, OTHER)], model=any_model, controls="random_sets", n_random=10)
    how, rows = slow.pooling, slow.tokens(few)
    own = with_excess(slow_excess(slow, rows, [GENE, OTHER], "delete", how))
    sets = few.uns["gfx_delete"]["random_sets"].set_index("perturbation")
    assert sets.loc[GENE, ["on_shifts_difference", "on_vectors_difference"]].isna().all(axis=None)
    sets = sets.loc[PAIR]
    assert len(sets) == 10
    genes = slow.named([GENE, OTHER])
    for _, row in sets.iterrows():
        others = slow.named(row["genes"].split("+"))
        cells = [
            at
            for at in own.index
            if all(
                b in rows[at] and abs(rows[at].index(b) - rows[at].index(a)) <= 10
                for a, b in zip(genes, others, strict=True)
            )
        ]
        assert row["n_cells"] == len(cells)
        its = with_excess(slow_excess(slow, [rows[at] for at in cells], row["genes"].split("+"), "delete", how))
        for name in MEASURES:
            difference = its[name].mean() - own.loc[cells, name].mean()
            assert row[f"{name}_difference"] == pytest.approx(difference, abs=1e-5)
    found = few.uns["gfx_delete"]["synergy"].iloc[0]
    for name in MEASURES:
        differences = sets[f"{name}_difference"]
        z = -differences.mean() / differences.std()
        others = [np.delete(differences.to_numpy(), at) for at in range(10)]
        each = [(one - rest.mean()) / rest.std(ddof=1) for one, rest in zip(differences, others, strict=True)]
        above, below = (each >= z).sum(), (each <= z).sum()
        assert found[f"{name}_z"] == pytest.approx(z)
        assert found[f"{name}_p"] == pytest.approx(min(1, 2 * (1 + min(above, below)) / 11))


def test_p_is_pooled_over_sets_of_one_size(cells, toy_model):
    """Pairs among the random pairs beside all of them, a triple among random triples."""
    genes = [(GENE, OTHER), (GENE, OTHER, THIRD), (GENE, THIRD), GENE]
    gfx.tl.delete_genes(cells, genes, model=toy_model, controls="random_sets", n_random=8)
    found, sets = cells.uns["gfx_delete"]["synergy"], cells.uns["gfx_delete"]["random_sets"]
    assert found["perturbation"].tolist() == [PAIR, TRIPLE, f"{GENE}+{THIRD}"]
    size = found["perturbation"].str.count(r"\+")
    for name in MEASURES:
        z, each = [], []
        for perturbation in found["perturbation"]:
            values = sets.loc[sets["perturbation"] == perturbation, f"{name}_difference"].to_numpy()
            z.append(-values.mean() / values.std(ddof=1))
            rest = [np.delete(values, at) for at in range(8)]
            each.append([(one - o.mean()) / o.std(ddof=1) for one, o in zip(values, rest, strict=True)])
        for at in range(3):
            pool = np.concatenate([each[other] for other in range(3) if size[other] == size[at]])
            place = stats.norm.ppf(stats.t.cdf(z[at] / np.sqrt(1 + 1 / 8), df=7))
            pool = stats.norm.ppf(stats.t.cdf(pool / np.sqrt(1 + 1 / 7), df=6))
            expected = min(1, 2 * (1 + min((pool >= place).sum(), (pool <= place).sum())) / (len(pool) + 1))
            assert found[f"{name}_z"][at] == pytest.approx(z[at])
            assert found[f"{name}_p"][at] == pytest.approx(expected)


def test_intervals_do_not_depend_on_what_else_is_perturbed(cells, toy_model):
    """The bootstrap follows the seed and the genes."""
    delete_genes(cells, (GENE, OTHER), model=toy_model, key_added="alone", rng=1)
    delete_genes(cells, [(GENE, THIRD), (GENE, OTHER)], model=toy_model, key_added="both", rng=1)
    alone, both = (cells.uns[key]["synergy"].set_index("perturbation").loc[PAIR] for key in ("alone", "both"))
    ends = [f"{name}_{end}" for name in MEASURES for end in ("low", "high")]
    np.testing.assert_allclose(both[ends].tolist(), alone[ends].tolist(), rtol=1e-3)


def test_pairs_of_genes_that_are_shifted(cells, toy_model):
    gfx.tl.shift_genes(cells, [GENE, OTHER, (GENE, OTHER)], by=("quartiles", 3), model=toy_model, controls=None)
    shift = cells.obsm["gfx_shift"].astype(float)
    both = ~np.isnan(shift[:, 2])
    found = cells.uns["gfx_shift"]["synergy"]
    assert found["summed_mean"].item() == pytest.approx(shift[both, :2].sum(axis=1).mean(), rel=1e-5)
    assert found["together_mean"].item() == pytest.approx(shift[both, 2].mean(), rel=1e-5)


def test_pairs_in_the_start_alone(cells, toy_model):
    with_states = {"groupby": "condition", "start": "sick", "goal": "healthy"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gfx.tl._states.LOWEST_AUC", 0)  # the toy cells' states are drawn at random
        delete_genes(cells, (GENE, OTHER), model=toy_model, key_added="x", **with_states)
    sick = cells[cells.obs["condition"] == "sick"].copy()
    delete_genes(sick, (GENE, OTHER), model=toy_model)
    found, expected = cells.uns["x"]["synergy"], sick.uns["gfx_delete"]["synergy"]
    means = [column for column in found if column.endswith("_mean")]
    np.testing.assert_allclose(found[["n_cells", *means]], expected[["n_cells", *means]], atol=1e-6)


def test_genes_of_sets_that_run_anyway_run_once(cells, toy_model, monkeypatch):
    compute, runs = run._compute, []

    def counting(task, block, *args):
        runs.append(len(block.given["set"]))
        return compute(task, block, *args)

    monkeypatch.setattr(run, "_compute", counting)
    delete_genes(cells, [(GENE, OTHER), GENE, (OTHER, THIRD)], model=toy_model)
    first, _, second = ~np.isnan(cells.obsm["gfx_delete"]).T
    assert first.sum() > second.sum() > 0
    of_other, of_third = (first | second).sum(), second.sum()
    assert sum(runs) == cells.uns["gfx_delete"]["table"]["n_cells"].sum() + of_other + of_third

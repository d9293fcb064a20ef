from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from transformers import BertForMaskedLM

import gfx
from gfx._engine import run
from gfx.models._vocabulary_file import write_vocabulary

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"

#: Most tests are about effects, not about their controls.
delete_genes = partial(gfx.tl.delete_genes, controls=None)


PERTURBED = {GENE: (GENE,), f"{GENE}+{OTHER}": (GENE, OTHER)}


WITH_STATES = {"groupby": "condition", "start": "sick", "goal": "healthy"}


def place(slow, row, name):
    wanted = slow.named([name])[0]
    return row.index(wanted) if wanted in row else None


def fitting(slow, rows, mine, others, perturbed):
    """Cells in which each gene of a random set stands within ten ranks of the perturbed one."""

    def near(row, gene, other):
        return place(slow, row, other) is not None and abs(place(slow, row, other) - place(slow, row, gene)) <= 10

    return [at for at in np.flatnonzero(perturbed) if all(map(partial(near, rows[at]), mine, others))]


class Controlled:
    """A run on so few cells that every random set is perturbed in each cell that it fits, and the same by hand."""

    def __init__(self, adata, model, slow, **arguments):
        self.adata, self.slow = adata, slow
        gfx.tl.delete_genes(
            adata,
            list(PERTURBED.values()),
            model=model,
            controls="random_sets",
            n_random=12,
            rng=2,
            donor_key="donor",
            **arguments,
        )
        self.result = adata.uns["gfx_delete"]
        self.rows = slow.tokens(adata)
        self.table = self.result["random_sets"]
        sets = {frozenset(genes.split("+")): tuple(genes.split("+")) for genes in self.table["genes"]}
        by_hand = adata.copy()
        delete_genes(by_hand, list(sets.values()), model=model, key_added="by_hand", **arguments)
        column = {key: at for at, key in enumerate(sets)}
        #: Each set: the perturbation's number, its genes, cells, and their shifts, also toward states.
        self.runs = []
        for name, genes in zip(self.table["perturbation"], self.table["genes"].str.split("+"), strict=True):
            number, at = list(PERTURBED).index(name), column[frozenset(genes)]
            perturbed = ~np.isnan(adata.obsm["gfx_delete"][:, number])
            cells = fitting(slow, self.rows, PERTURBED[name], genes, perturbed)
            moved = [by_hand.obsm["by_hand"][cells, at]]
            if arguments:
                moved += [*by_hand.obsm["by_hand_states"][cells, at].T]
            self.runs.append((number, genes, cells, moved))

    def rank(self, row, genes):
        specials = 2 * self.slow.vocabulary.has_cls
        places = np.array([place(self.slow, self.rows[row], gene) for gene in genes]) - specials / 2
        return places.mean() / (len(self.rows[row]) - specials - 1)


@pytest.fixture(scope="module", params=[{}, WITH_STATES], ids=["plain", "states"])
def controlled(request, toy_cells, any_model, slow):
    adata = toy_cells(16 if request.param else 8)
    return Controlled(adata, any_model, slow, **request.param)


def test_random_sets_are_what_deleting_them_gives(controlled):
    table = controlled.table
    assert table["perturbation"].tolist() == [name for name in PERTURBED for _ in range(12)]
    for at, (number, genes, cells, moved) in enumerate(controlled.runs):
        assert table["n_cells"][at] == len(cells) > 0
        assert not set(genes) & set(list(PERTURBED.values())[number])
        assert table["rank_mean"][at] == pytest.approx(
            np.mean([controlled.rank(row, genes) for row in cells]), abs=1e-6
        )
        assert table["shift_mean"][at] == pytest.approx(moved[0].mean(), abs=1e-6)
        own = controlled.adata.obsm["gfx_delete"][cells, number]
        assert table["difference"][at] == pytest.approx((moved[0] - own).mean(), abs=1e-6)
        if "random_states" in controlled.result:
            states = controlled.result["random_states"]
            for state, values in zip(controlled.result["states"], moved[1:], strict=True):
                row = states[states["state"] == state].iloc[at]
                column = controlled.result["states"].tolist().index(state)
                own = controlled.adata.obsm["gfx_delete_states"][cells, number, column]
                assert row["toward_mean"] == pytest.approx(values.mean(), abs=1e-6)
                assert row["toward_difference"] == pytest.approx((values - own).mean(), abs=1e-6)
    assert table["difference"].abs().max() > 1e-3
    for _, sets in table.groupby("perturbation"):
        assert sets["genes"].is_unique


def slow_z(differences):
    """Of the perturbation among its random sets, and of each of these among the others."""
    z = -differences.mean() / differences.std(ddof=1)
    others = [np.delete(differences, at) for at in range(len(differences))]
    each = [(one - rest.mean()) / rest.std(ddof=1) for one, rest in zip(differences, others, strict=True)]
    return z, np.array(each)


def on_one_scale(z, n):
    """A z from n sets, as far out as a normal variable would be."""
    return stats.norm.ppf(stats.t.cdf(z / np.sqrt(1 + 1 / n), df=n - 1))


def assert_beside(row, sets, differences, effect, prefix=""):
    """`sets` are the random sets of the perturbation, and no other is of its size."""
    z, each = slow_z(differences)
    place, places = on_one_scale(z, 12), on_one_scale(each, 11)
    above, below = (places >= place).sum(), (places <= place).sum()
    assert row[f"{prefix}n_random"] == len(differences) == 12
    assert row[f"{prefix}random_n_cells"] == np.median(sets["n_cells"])
    assert row[f"{prefix}random_mean"] == pytest.approx(effect + differences.mean())
    assert row[f"{prefix}random_sd"] == pytest.approx(differences.std(ddof=1))
    assert row[f"{prefix}z"] == pytest.approx(z)
    assert row[f"{prefix}p"] == pytest.approx(min(1, 2 * (1 + min(above, below)) / 13))


def test_place_among_random_sets(controlled):
    for _, row in controlled.result["table"].iterrows():
        sets = controlled.table[controlled.table["perturbation"] == row["perturbation"]]
        assert_beside(row, sets, sets["difference"].to_numpy(), row["shift_mean"])
    for _, row in controlled.result.get("state_table", pd.DataFrame()).iterrows():
        sets = controlled.table[controlled.table["perturbation"] == row["perturbation"]]
        states = controlled.result["random_states"]
        mine = (states["perturbation"] == row["perturbation"]) & (states["state"] == row["state"])
        differences = states.loc[mine, "toward_difference"].to_numpy()
        assert_beside(row, sets, differences, row["toward_mean"], "toward_")


def test_p_is_pooled_over_perturbations_of_one_size(cells, toy_model):
    genes = [GENE, OTHER, "TOY21", "TOY165", (GENE, OTHER), (GENE, "TOY21")]
    delete_genes(cells, genes, model=toy_model, controls="random_sets", n_random=8, **WITH_STATES)
    result, sizes = cells.uns["gfx_delete"], np.array([1, 1, 1, 1, 2, 2])

    def expected(sets, column):
        found = [slow_z(of[column].to_numpy()) for _, of in sets.groupby("perturbation", sort=False)]
        for (z, _), size in zip(found, sizes, strict=True):
            pool = np.concatenate([each for (_, each), other in zip(found, sizes, strict=True) if other == size])
            place, pool = on_one_scale(z, 8), on_one_scale(pool, 7)
            yield min(1, 2 * (1 + min((pool >= place).sum(), (pool <= place).sum())) / (len(pool) + 1))

    np.testing.assert_allclose(result["table"]["p"], [*expected(result["random_sets"], "difference")])
    for state in ("healthy", "sick"):
        of_state = result["state_table"].query(f"state == '{state}'")
        sets = result["random_states"].query(f"state == '{state}'")
        np.testing.assert_allclose(of_state["toward_p"], [*expected(sets, "toward_difference")])


def test_excess_over_random_sets_by_donor(controlled):
    donor = controlled.adata.obs["donor"].astype(str).to_numpy()

    def excess(mine, number, own, which):
        for _, row in mine.iterrows():
            pairs = [
                own[cell] - value
                for at, _, cells, moved in controlled.runs
                for cell, value in zip(cells, moved[which], strict=True)
                if at == number and donor[cell] == row["donor"]
            ]
            yield np.mean(pairs) if pairs else np.nan

    donors = controlled.result["donors"]
    for number, name in enumerate(PERTURBED):
        mine = donors[donors["perturbation"] == name]
        expected = [*excess(mine, number, controlled.adata.obsm["gfx_delete"][:, number], 0)]
        np.testing.assert_allclose(mine["shift_excess"], expected, atol=1e-6)
        assert np.isfinite(expected).sum() >= 2
        for at, state in enumerate(controlled.result.get("states", [])):
            states = controlled.result["donor_states"]
            mine = states[(states["perturbation"] == name) & (states["state"] == state)]
            expected = [*excess(mine, number, controlled.adata.obsm["gfx_delete_states"][:, number, at], at + 1)]
            np.testing.assert_allclose(mine["toward_excess"], expected, atol=1e-6)


def test_other_genes_when_random_sets_are_deleted(controlled):
    slow = controlled.slow
    for number in range(2):
        shifts = {}
        for at, genes, cells, _ in controlled.runs:
            if at == number:
                rows = [row if place in cells else [] for place, row in enumerate(controlled.rows)]
                for effect in slow.effects(rows, genes).values():
                    for name, value in effect.genes.items():
                        shifts.setdefault(name, []).append(value)
        runs = [shifts.get(name, []) for name in controlled.adata.var_names]
        assert {0, 4, 5} <= set(map(len, runs))
        # The mean of fewer than five runs says little.
        expected = [np.mean(values) if len(values) >= 5 else np.nan for values in runs]
        np.testing.assert_allclose(controlled.adata.varm["gfx_delete_null"][:, number], expected, atol=1e-5)


@pytest.mark.parametrize("n_random", [3, np.int64(7)])
def test_a_number_of_random_sets(cells, toy_model, n_random):
    delete_genes(cells, [GENE, OTHER], model=toy_model, controls="random_sets", n_random=n_random)
    assert cells.uns["gfx_delete"]["table"]["n_random"].tolist() == [n_random, n_random]
    assert (cells.uns["gfx_delete"]["random_sets"]["n_cells"] <= 8).all()
    assert cells.uns["gfx_delete"]["params"]["n_random"] == n_random


def test_all_controls_run_by_default(cells, toy_model):
    gfx.tl.delete_genes(cells, GENE, model=toy_model)
    result = cells.uns["gfx_delete"]
    n_cells = result["table"]["n_cells"].item()
    assert len(result["random_sets"]) == n_cells - np.ceil(n_cells / 4) < 50
    assert (result["random_sets"]["n_cells"] == 1).all()
    assert "n_random" not in result["params"]
    assert result["params"]["controls"] == ["parts", "random_sets", "random_weights", "baselines"]
    assert {"random_weights", "rank", "detection"} < set(result["controls"]["control"])


@pytest.mark.parametrize("genes", [[GENE], [GENE, (GENE, OTHER), "TOY21"], ...], ids=["one", "some", "all"])
def test_controls_take_at_most_as_many_passes_as_perturbations_and_500(cells, toy_model, monkeypatch, genes):
    """However many perturbations there are, rare ones too; beside the parts, a second pass of the perturbations."""
    compute, n = run._compute, []

    def counting(task, block, *args):
        if "set" in block.given:
            n.append(len(block.given["set"]))
        return compute(task, block, *args)

    monkeypatch.setattr(run, "_compute", counting)
    delete_genes(cells, genes, model=toy_model, key_added="alone")
    own = sum(n)
    gfx.tl.delete_genes(cells, genes, model=toy_model)
    assert own < sum(n) - own <= 2 * own + 500  # the perturbations again, and their controls
    table, sets = cells.uns["gfx_delete"]["table"], cells.uns["gfx_delete"]["random_sets"]
    for name, n_cells in table[["perturbation", "n_cells"]].itertuples(index=False):
        n_sets = (sets["perturbation"] == name).sum()
        assert min(n_cells // 2, 1) <= n_sets <= min(n_cells, 50)


def test_without_random_sets_none_are_counted(cells, toy_model):
    delete_genes(cells, GENE, model=toy_model, controls=["baselines", "random_weights"])
    result = cells.uns["gfx_delete"]
    assert "n_random" not in result["params"]
    assert "random_sets" not in result
    assert result["table"]["n_random"].tolist() == [0]
    assert result["params"]["controls"] == ["random_weights", "baselines"]  # in their order, whatever was given


@pytest.mark.parametrize("states", [{}, WITH_STATES], ids=["plain", "states"])
def test_random_genes_do_not_stand_out(toy_cells, toy_model, states):
    """Nor over donors."""
    adata = toy_cells(60)
    start = (adata.obs["condition"] == "sick").to_numpy()
    often = np.asarray((adata[start, :200].X > 0).sum(axis=0)).ravel() >= 14
    genes = np.random.default_rng(1).choice(adata.var_names[:200][often], 40, replace=False)
    delete_genes(adata, genes, model=toy_model, controls="random_sets", n_random=20, donor_key="donor", **states)
    table = gfx.get.deletion_df(adata, min_cells=5)
    prefix = "toward_" if states else ""
    if states:
        table = table[table["role"] == "goal"]
    most = stats.binom.ppf(0.999, 40, [0.05, 0.2])
    for p in (f"{prefix}p", "donor_p"):
        assert table[p].notna().all()
        assert (table[p] <= 0.05).sum() <= most[0]
        assert (table[p] <= 0.2).sum() <= most[1]
    assert abs(table[f"{prefix}z"].mean()) < 0.5


def changed(model, folder, change):
    """The model with other weights, in a folder of its own."""
    network = BertForMaskedLM.from_pretrained(model.folder)
    with torch.no_grad():
        change(network)
    network.save_pretrained(folder)
    write_vocabulary(model.vocabulary, folder)
    return gfx.models.load(folder)


def test_a_gene_that_matters_stands_out(cells, toy_model, tmp_path):
    """In a model for which all genes are nearly the same, but for one."""
    planted = int(toy_model.vocabulary.resolve([GENE])[0])

    def level(network):
        words = network.bert.embeddings.word_embeddings.weight
        kept = words[planted].clone()
        words *= 0.01
        words[planted] = kept
        network.bert.embeddings.position_embeddings.weight *= 0.01

    model = changed(toy_model, tmp_path / "level", level)
    delete_genes(cells, [GENE, OTHER], model=model, controls="random_sets", n_random=19, donor_key="donor")
    first, plain = gfx.get.deletion_df(cells).itertuples()
    assert first.perturbation == GENE
    assert first.z > 5
    # 19 random genes beside each of the two; beside the other one the gene itself may be one of them.
    itself = (cells.uns["gfx_delete"]["random_sets"]["genes"] == GENE).sum()
    assert itself <= 1
    assert first.p == pytest.approx(2 * (1 + itself) / 39)
    assert abs(plain.z) < 2
    assert first.donor_p < 0.001
    assert plain.donor_p > 0.05

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import gfx

TARGETS = {"direct": ["TOY48", "TOY165", "TOY192", "TOY137"], "indirect": ["TOY88", "TOY80", "TOY75", "TOY47", "TOY48"]}


@pytest.fixture(scope="module")
def deleted(toy_cells, toy_model):
    """With random sets, and under another name without."""
    adata = toy_cells(30)
    gfx.tl.delete_genes(adata, ["TOY90", "TOY171"], model=toy_model, n_random=9)
    gfx.tl.delete_genes(adata, ["TOY90", "TOY171"], model=toy_model, controls=None, key_added="plain")
    return adata


@pytest.mark.parametrize(("key", "effect"), [("gfx_delete", "excess"), ("plain", "shift")])
def test_it_is_the_rank_sum_test_over_genes(deleted, key, effect):
    table = gfx.get.target_effects_df(deleted, TARGETS, key=key)
    assert (table["effect"] == effect).all()
    rows = table.set_index(["perturbation", "targets", "others"])
    assert len(rows) == 2 * (2 * 2 + 1)
    for number, name in enumerate(["TOY90", "TOY171"]):
        values = dict(zip(deleted.var_names, deleted.varm[key][:, number].astype(float), strict=True))
        if effect == "excess":
            random = dict(zip(deleted.var_names, deleted.varm[f"{key}_null"][:, number].astype(float), strict=True))
            with np.errstate(divide="ignore", invalid="ignore"):
                values = {gene: np.log2(value / random[gene]) for gene, value in values.items()}
        n_cells = dict(zip(deleted.var_names, deleted.varm[f"{key}_n_cells"][:, number].tolist(), strict=True))
        values = {gene: value for gene, value in values.items() if n_cells[gene] >= 10 and np.isfinite(value)}
        if effect == "excess":
            usual = np.median(list(values.values()))
            values = {gene: value - usual for gene, value in values.items()}
        in_any = set().union(*TARGETS.values())
        rest = [gene for gene in values if gene not in in_any]
        direct, indirect = ([gene for gene in TARGETS[label] if gene in values] for label in TARGETS)
        assert len(direct) > 2
        compared = {
            ("direct", "all other genes"): (direct, rest),
            ("indirect", "all other genes"): (indirect, rest),
            ("direct", "indirect"): (direct, [gene for gene in indirect if gene not in direct]),
        }
        for (label, others), (mine, theirs) in compared.items():
            row, a, b = rows.loc[name, label, others], [values[g] for g in mine], [values[g] for g in theirs]
            assert (row["n_targets"], row["n_others"]) == (len(a), len(b))
            assert row["median_targets"] == pytest.approx(np.median(a), abs=1e-7)
            assert row["median_others"] == pytest.approx(np.median(b), abs=1e-7)
            assert row["p"] == pytest.approx(stats.mannwhitneyu(a, b).pvalue)
            assert row["auc"] == pytest.approx(np.mean([(x > y) + (x == y) / 2 for x in a for y in b]))
        matched = rows.loc[name, "direct", "matched genes"]
        assert matched["n_targets"] == len(direct)
        if effect == "excess":
            # The nearest by both ranks, summed, and those that are as near as the tenth.
            known = list(values)
            ranks = [stats.rankdata([of[gene] for gene in known]) for of in (n_cells, random)]
            place = dict(zip(known, np.transpose(ranks), strict=True))
            apart = {g: {o: abs(place[o] - place[g]).sum() for o in rest} for g in direct}
            tenth = {g: sorted(apart[g].values())[9] for g in direct}
            nearest = {o for o in rest for g in direct if apart[g][o] <= tenth[g]}
            assert matched["n_others"] == len(nearest)
            continue
        # Beside each target, those that are seen in the nearest number of cells, by its rank.
        rank = dict(zip(values, stats.rankdata([n_cells[gene] for gene in values]), strict=True))
        tenth = {g: sorted(abs(rank[g] - rank[o]) for o in rest)[9] for g in direct}
        nearest = {o for o in rest for g in direct if abs(rank[g] - rank[o]) <= tenth[g]}
        assert matched["n_others"] == len(nearest)
    np.testing.assert_allclose(table["fdr"], stats.false_discovery_control(table["p"]))


def test_matched_genes_are_those_seen_as_often(deleted):
    """Genes whose number of cells is one of a kind leave no choice of whom to match."""
    adata = deleted.copy()
    shift = np.linspace(0, 1, 205) ** 2
    adata.varm["plain"][:, 0] = shift
    adata.varm["plain_n_cells"][:, 0] = np.arange(205) + 100
    table = gfx.get.target_effects_df(adata, {"x": ["TOY50", "TOY100"]}, perturbation="TOY90", key="plain")
    matched = table.set_index("others").loc["matched genes"]
    # Of either, the five before it, and the five behind it.
    others = [*range(44, 49), *range(50, 55), *range(94, 99), *range(100, 105)]
    assert matched["n_others"] == 20
    assert matched["median_others"] == pytest.approx(np.median(shift[others]), abs=1e-6)
    assert matched["p"] == pytest.approx(stats.mannwhitneyu(shift[[49, 99]], shift[others]).pvalue)


def test_matched_genes_move_as_far_under_random_sets(deleted):
    """Of the genes seen in as many cells, those beside it in the shift under random sets, not in their own."""
    adata = deleted.copy()
    shift = np.random.default_rng(0).uniform(0.1, 1, 205)
    random = np.linspace(0.1, 1, 205)
    adata.varm["gfx_delete"][:, 0], adata.varm["gfx_delete_null"][:, 0] = shift, random
    adata.varm["gfx_delete_n_cells"][:, 0] = np.where(np.arange(205) % 2, 100, 20)
    table = gfx.get.target_effects_df(adata, {"x": ["TOY50", "TOY101"]}, perturbation="TOY90")
    matched = table.set_index("others").loc["matched genes"]
    # Every second gene is seen as often: of these, the five before either, and the five behind it.
    others = [*range(39, 49, 2), *range(51, 61, 2), *range(90, 100, 2), *range(102, 112, 2)]
    excess = np.log2(shift / random)
    excess -= np.median(excess)
    assert matched["n_others"] == 20
    assert matched["median_others"] == pytest.approx(np.median(excess[others]), abs=1e-5)
    assert matched["p"] == pytest.approx(stats.mannwhitneyu(excess[[49, 100]], excess[others]).pvalue)


def test_random_genes_do_not_differ_from_matched_ones_in_as_many_cells(deleted):
    """Where many genes are in as many cells, those that are matched are not the ones with the largest effects."""
    adata, p_values, rng = deleted.copy(), [], np.random.default_rng(0)
    adata.varm["plain_n_cells"][:, 0] = np.where(np.arange(205) % 2, 30, 20)
    for _ in range(100):
        adata.varm["plain"][:, 0] = rng.uniform(0.1, 1, 205)
        random_genes = adata.var_names[rng.permutation(205)[:12]]
        table = gfx.get.target_effects_df(adata, {"x": random_genes}, perturbation="TOY90", key="plain")
        matched = table.set_index("others").loc["matched genes"]
        assert matched["n_others"] == 193
        p_values.append(matched["p"])
    assert (np.array(p_values) < 0.05).mean() < 0.15
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_small_sets_have_the_p_values_that_so_few_genes_allow(deleted):
    """Of three genes against three others, all larger, one order of 20 is as extreme at either end."""
    adata = deleted.copy()
    adata.varm["plain"][:, 0] = np.linspace(0.1, 1, 205)
    adata.varm["plain_n_cells"][:, 0] = 30
    sets = {"large": ["TOY198", "TOY199", "TOY200"], "small": ["TOY1", "TOY2", "TOY3"]}
    table = gfx.get.target_effects_df(adata, sets, perturbation="TOY90", key="plain")
    row = table.set_index(["targets", "others"]).loc["large", "small"]
    assert (row["auc"], row["p"]) == (1, pytest.approx(2 / 20))


def test_one_perturbation(deleted):
    every = gfx.get.target_effects_df(deleted, TARGETS)
    one = gfx.get.target_effects_df(deleted, TARGETS, perturbation="TOY171")
    assert set(one["perturbation"]) == {"TOY171"}
    columns = [column for column in one if column != "fdr"]
    expected = every[every["perturbation"] == "TOY171"].reset_index(drop=True)
    assert one[columns].equals(expected[columns])
    for tests in (one, every):  # fewer tests
        np.testing.assert_allclose(tests["fdr"], stats.false_discovery_control(tests["p"]))


def test_a_set_of_one_gene_is_no_test(deleted):
    table = gfx.get.target_effects_df(deleted, {"one": ["TOY48"], "more": TARGETS["direct"]}, perturbation="TOY90")
    one = table[table["targets"] == "one"]
    assert one["n_targets"].tolist() == [1, 1, 1]
    assert one[["auc", "p", "fdr"]].isna().all(axis=None)
    assert one["median_targets"].notna().all()
    rest = table[table["targets"] == "more"]
    np.testing.assert_allclose(rest["fdr"], stats.false_discovery_control(rest["p"]))


def test_no_gene_in_so_many_cells(deleted):
    table = gfx.get.target_effects_df(deleted, TARGETS, min_cells=1000)
    assert table.empty
    assert {"perturbation", "targets", "others", "p", "fdr"} <= set(table)


WRONG = {
    "nothing": ({}, ValueError, r"`targets` maps names to genes, such as \{.*found \{\}"),
    "a list": (["TOY48"], ValueError, r"`targets` maps names to genes.*found \['TOY48'\]"),
    "other names": (
        {"direct": ["MYH6", "MYH7"]},
        ValueError,
        r"None of the 2 genes of 'direct', such as \['MYH6', 'MYH7'\], is in `adata\.var_names`, such as \['TOY1', ",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_targets_that_cannot_be(deleted, wrong):
    targets, error, text = WRONG[wrong]
    with pytest.raises(error, match=text):
        gfx.get.target_effects_df(deleted, targets)


def test_no_such_perturbation_or_result(deleted):
    with pytest.raises(KeyError, match=r"Did not find the perturbation 'TOY9'\. Did you mean 'TOY90'"):
        gfx.get.target_effects_df(deleted, TARGETS, perturbation="TOY9")
    with pytest.raises(KeyError, match="Did not find 'other'"):
        gfx.get.target_effects_df(deleted, TARGETS, key="other")

"""Tables of attention against what is stored, and statistics against their definitions."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score

import gfx
from gfx._core.statistics import between_groups

LAYERS, HEADS = 3, 2
NAMED = [f"TOY{number}" for number in range(1, 31)]


@pytest.fixture(scope="module", params=[None, "mine"])
def key(request):
    return request.param


@pytest.fixture(scope="module")
def adata(toy_cells, toy_model, key):
    adata = toy_cells(18)
    adata.obs["half"] = np.where(np.arange(18) < 8, "a", "b")
    gfx.tl.attention(adata, model=toy_model, key_added=key, groupby="half", genes=NAMED, heads="each")
    return adata


def test_attention_df(adata, key):
    slot = key or "gfx_attention"
    columns = ["gene", "layer", "head", "attention", "sd", "uniform", "ratio", "n_cells", "rank", "random"]
    for statistic, part in (("received", ""), ("given", "_given")):
        table = gfx.get.attention_df(adata, statistic=statistic, key=key)
        assert table.columns.tolist() == [name for name in columns if statistic == "received" or name != "random"]
        seen = adata.var[f"{slot}_n_cells"] > 0
        assert len(table) == seen.sum() * LAYERS * HEADS
        assert not table.isna().any(axis=None)
        for row in table.sample(50, random_state=0).itertuples():
            at, head = adata.var_names.get_loc(row.gene), (row.layer - 1) * HEADS + row.head - 1
            assert row.attention == adata.varm[f"{slot}{part}"][at, head]
            assert row.sd == adata.varm[f"{slot}{part}_sd"][at, head]
            assert row.uniform == adata.var[f"{slot}{part}_uniform"].iloc[at]
            assert row.rank == adata.var[f"{slot}_rank"].iloc[at] + 1
            assert row.n_cells == adata.var[f"{slot}_n_cells"].iloc[at]
            assert row.ratio == pytest.approx(row.attention / row.uniform)
            if statistic == "received":
                assert row.random == adata.varm[f"{slot}_random"][at, head]


@pytest.mark.parametrize("statistic", ["received", "given"])
def test_attention_of_a_group_is_that_of_its_cells(toy_cells, toy_model, statistic):
    """Over all its donors."""
    cells = toy_cells(18)
    cells.obs["half"] = np.where(np.arange(18) < 8, "a", "all")
    cells.obs["donor"] = np.arange(18) % 3
    alone = cells.copy()
    gfx.tl.attention(cells, model=toy_model, groupby="half", donor_key="donor", controls=None)
    gfx.tl.attention(alone, model=toy_model, mask_obs=(cells.obs["half"] == "all").to_numpy(), controls=None)
    found = gfx.get.attention_df(cells, group="all", statistic=statistic)
    expected = gfx.get.attention_df(alone, statistic=statistic).drop(columns="rank")
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-3, atol=1e-5)
    heads = gfx.get.attention_heads_df(cells, group="all")
    np.testing.assert_allclose(heads, gfx.get.attention_heads_df(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("min_cells", [0, 4, 1000])
def test_genes_of_few_cells_are_left_out(adata, key, min_cells):
    table = gfx.get.attention_df(adata, key=key, min_cells=min_cells)
    enough = adata.var[f"{key or 'gfx_attention'}_n_cells"] >= max(min_cells, 1)
    assert len(table) == enough.sum() * LAYERS * HEADS
    assert set(table["gene"]) == set(adata.var_names[enough])


def test_attention_ranks_df(adata, key):
    result = adata.uns[key or "gfx_attention"]
    table = gfx.get.attention_ranks_df(adata, key=key)
    assert table.columns.tolist() == ["layer", "head", "rank", "attention", "uniform", "ratio", "n_cells"]
    assert len(table) == result["ranks"].size
    for row in table.sample(50, random_state=0).itertuples():
        assert row.attention == result["ranks"][row.layer - 1, row.head - 1, row.rank - 1]
        assert row.uniform == result["ranks_uniform"][row.rank - 1]
        assert row.n_cells == result["ranks_n_cells"][row.rank - 1]
        assert row.ratio == pytest.approx(row.attention / row.uniform)
    assert table["rank"].min() == 1
    assert table.loc[table["rank"] == 1, "n_cells"].eq(18).all()


@pytest.mark.parametrize("group", [None, "a", "b"])
def test_attention_bands_df(adata, key, group):
    result = adata.uns[key or "gfx_attention"]
    at, names = [None, "a", "b"].index(group), result["band_names"].tolist()
    table = gfx.get.attention_bands_df(adata, group=group, key=key)
    used = [name for name, n in zip(names, result["n_in_band"][at], strict=True) if n]
    assert len(table) == LAYERS * HEADS * len(used) ** 2
    for row in table.sample(50, random_state=0).itertuples():
        one, other = names.index(row.gives), names.index(row.receives)
        assert row.attention == result["bands"][at, row.layer - 1, row.head - 1, one, other]
        assert row.random == result["random"]["bands"][0, row.layer - 1, row.head - 1, one, other]
        assert row.uniform == result["bands_uniform"][at, one, other]
        assert row.n_positions == result["n_in_band"][at, one]
        assert row.ratio == pytest.approx(row.attention / row.uniform)


@pytest.mark.parametrize("group", [None, "a", "b"])
def test_attention_heads_df(adata, key, group):
    result, at = adata.uns[key or "gfx_attention"], [None, "a", "b"].index(group)
    table = gfx.get.attention_heads_df(adata, group=group, key=key)
    assert table.columns.tolist() == [
        *("layer", "head", "entropy", "distance", "special", "distance_uniform"),
        *("entropy_random", "distance_random", "special_random"),
    ]
    for row in table.itertuples():
        for name in ("entropy", "distance", "special"):
            assert getattr(row, name) == result[name][at, row.layer - 1, row.head - 1]
            assert getattr(row, f"{name}_random") == result["random"][name][0, row.layer - 1, row.head - 1]
        assert row.distance_uniform == result["distance_uniform"][at]
    assert len(table) == LAYERS * HEADS
    assert table["entropy"].between(0, 1).all()


def test_tables_agree_with_each_other(adata, key):
    """A cell's attention goes to genes and special tokens: by gene and by rank it adds up to the same."""
    by_gene, by_rank = gfx.get.attention_df(adata, key=key), gfx.get.attention_ranks_df(adata, key=key)
    special = gfx.get.attention_heads_df(adata, key=key).set_index(["layer", "head"])["special"]
    for table in (by_gene, by_rank):
        total = (table["attention"] * table["n_cells"]).groupby([table["layer"], table["head"]]).sum() / 18
        np.testing.assert_allclose(total, 1 - special, atol=1e-5)


def test_gene_sets_are_compared_with_all_and_with_similar_genes(adata, key):
    slot = key or "gfx_attention"
    sets = {"few": NAMED[:8], "others": [f"TOY{number}" for number in range(60, 90)]}
    table = gfx.get.attention_heads_df(adata, gene_sets=sets, min_cells=3, key=key)
    assert len(table) == LAYERS * HEADS * 2
    seen = (adata.var[f"{slot}_n_cells"] >= 3).to_numpy()
    names, n_cells = adata.var_names[seen], adata.var[f"{slot}_n_cells"].to_numpy()[seen]
    similar = np.column_stack([np.log(adata.var[f"{slot}_rank"].to_numpy()[seen] + 1), np.log(n_cells)])
    similar = similar / similar.std(axis=0)
    ratios = {
        "": adata.varm[slot][seen] / adata.var[f"{slot}_uniform"].to_numpy()[seen, None],
        "_random": adata.varm[f"{slot}_random"][seen] / adata.var[f"{slot}_random_uniform"].to_numpy()[seen, None],
    }
    for row in table.itertuples():
        in_set = names.isin(sets[row.gene_set])
        assert row.n_genes == in_set.sum()
        head = (row.layer - 1) * HEADS + row.head - 1
        for suffix, values in ratios.items():
            own, others = values[in_set, head].astype(float), values[~in_set, head].astype(float)
            auc = np.mean([np.mean(others < value) + np.mean(others == value) / 2 for value in own])
            assert getattr(row, f"auc{suffix}") == pytest.approx(auc)
            shares = []
            ranks = stats.rankdata(values[:, head].astype(float))
            for value, place in zip(ranks[in_set], similar[in_set], strict=True):
                nearest = np.argsort(np.linalg.norm(similar[~in_set] - place, axis=1))[:50]
                apart = similar[~in_set][nearest] - place
                fit = LinearRegression().fit(np.hstack([apart, apart**2]), ranks[~in_set][nearest])
                left = ranks[~in_set][nearest] - fit.predict(np.hstack([apart, apart**2]))
                shares.append(np.mean(left < value - fit.intercept_))
            assert getattr(row, f"auc_matched{suffix}") == pytest.approx(np.mean(shares), abs=0.01)
            if not suffix:
                assert row.p == pytest.approx(stats.mannwhitneyu(own, others).pvalue)
    np.testing.assert_allclose(table["fdr"], stats.false_discovery_control(table["p"]))
    np.testing.assert_allclose(table["fdr_matched"], stats.false_discovery_control(table["p_matched"]))
    for name, of_set in table.groupby("gene_set"):
        most = abs(of_set["auc_matched_random"] - 0.5).max()
        expected = (of_set["fdr_matched"] < 0.05) & (abs(of_set["auc_matched"] - 0.5) > most)
        assert of_set["remains"].tolist() == expected.tolist(), name


def test_attention_layers_df(adata, key):
    result, table = adata.uns[key or "gfx_attention"], gfx.get.attention_layers_df(adata, key=key)
    assert table["layer"].tolist() == [1, 2, 3]
    for suffix, of in (("", result), ("_random", result["random"])):
        n = of["n_in_band"][0][1:]
        for row in table.itertuples():
            assert getattr(row, f"entropy{suffix}") == pytest.approx(of["entropy"][0, row.layer - 1].mean())
            profiles = []
            for bands in (*of["bands"][0, row.layer - 1], of["bands_uniform"][0]):
                received = np.array([np.nansum(bands[1:, key] * n) for key in range(1, len(bands))])
                profiles.append(received / received.sum())
            *heads, uniform = profiles
            bits = [stats.entropy(profile, base=2) for profile in heads]
            breadth = np.mean([2**entropy for entropy in bits]) / 2 ** stats.entropy(uniform, base=2)
            assert getattr(row, f"breadth{suffix}") == pytest.approx(breadth, rel=1e-5)
            diversity = stats.entropy(np.mean(heads, axis=0), base=2) - np.mean(bits)
            assert getattr(row, f"diversity{suffix}") == pytest.approx(diversity, abs=1e-6)
            top = np.mean([profile[:5].sum() for profile in heads]) / uniform[:5].sum()
            assert getattr(row, f"top{suffix}") == pytest.approx(top, rel=1e-5)


def test_differences_over_cells_are_those_of_welch(adata, key):
    """Intervals from means and deviations; without donors there is no p."""
    slot = key or "gfx_attention"
    table = gfx.get.attention_difference_df(adata, group="b", reference="a", min_cells=3, key=key)
    assert table.columns.tolist() == [
        *("gene", "layer", "head", "ratio", "reference", "difference", "low", "high"),
        *("n_cells", "n_cells_reference"),
    ]
    n = adata.varm[f"{slot}_groups_n_cells"]
    assert len(table) == (n.min(axis=1) >= 3).sum() * LAYERS * HEADS
    uniform = adata.varm[f"{slot}_groups_uniform"].astype(float)[..., None]
    mean, sd = adata.varm[f"{slot}_groups"] / uniform, adata.varm[f"{slot}_groups_sd"] / uniform
    for row in table.sample(50, random_state=0).itertuples():
        at, head = adata.var_names.get_loc(row.gene), (row.layer - 1) * HEADS + row.head - 1
        samples = [(mean[at, unit, head], sd[at, unit, head] ** 2 / (n[at, unit] - 1), n[at, unit]) for unit in (1, 0)]
        (one, of_one, n_one), (other, of_other, n_other) = samples
        df = (of_one + of_other) ** 2 / (of_one**2 / (n_one - 1) + of_other**2 / (n_other - 1))
        half = stats.t.ppf(0.975, df) * np.sqrt(of_one + of_other)
        assert row.difference == pytest.approx(one - other, abs=1e-5)
        assert (row.low, row.high) == pytest.approx((one - other - half, one - other + half), rel=1e-4, abs=1e-5)
        assert (row.n_cells, row.n_cells_reference) == (n_one, n_other)


@pytest.fixture(scope="module", params=["paired", "apart"])
def with_donors(request, toy_cells, toy_model):
    """Each donor in both groups, or in one of them."""
    adata = toy_cells(36)
    half = np.arange(36) % 2
    adata.obs["half"] = np.array(["a", "b"])[half]
    donors = np.arange(36) // 2 % 3
    adata.obs["donor"] = [
        f"{donor}{'' if request.param == 'paired' else of}" for donor, of in zip(donors, half, strict=True)
    ]
    gfx.tl.attention(adata, model=toy_model, groupby="half", donor_key="donor", controls=None)
    return request.param, adata


def test_differences_over_donors_are_those_of_scipy(with_donors):
    kind, adata = with_donors
    table = gfx.get.attention_difference_df(adata, group="b", reference="a", min_cells=6)
    uns, n = adata.uns["gfx_attention"], adata.varm["gfx_attention_groups_n_cells"]
    ratios = adata.varm["gfx_attention_groups"] / adata.varm["gfx_attention_groups_uniform"][..., None].astype(float)
    units = {group: np.flatnonzero(uns["groups"] == group) for group in "ab"}
    n_tested = 0
    for row in table.itertuples():
        at, head = adata.var_names.get_loc(row.gene), (row.layer - 1) * HEADS + row.head - 1
        values = {group: ratios[at, of, head] for group, of in units.items()}
        if n[at].min() == 0:  # tested below with missing donors
            continue
        n_tested += 1
        test = stats.ttest_rel if kind == "paired" else stats.ttest_ind
        found = test(values["b"], values["a"], **({} if kind == "paired" else {"equal_var": False}))
        interval = found.confidence_interval()
        assert row.difference == pytest.approx(values["b"].mean() - values["a"].mean(), abs=1e-5)
        assert row.p == pytest.approx(found.pvalue, rel=1e-3)
        assert (row.low, row.high) == pytest.approx(tuple(interval), rel=1e-3, abs=1e-5)
        assert row.n_donors == (3 if kind == "paired" else 6)
    assert n_tested > 20
    np.testing.assert_allclose(table["fdr"].dropna(), stats.false_discovery_control(table["p"].dropna()))


def test_what_a_deletion_changes_is_paired_by_cell(toy_cells, toy_model):
    adata = toy_cells(30)
    gfx.tl.attention(adata, model=toy_model, deleted="TOY3")
    table = gfx.get.attention_difference_df(adata, min_cells=5)
    mean, sd = adata.varm["gfx_attention_groups"], adata.varm["gfx_attention_groups_sd"]
    n, uniform = (adata.varm[f"gfx_attention_groups_{part}"] for part in ("n_cells", "uniform"))
    for row in table.sample(50, random_state=0).itertuples():
        at, head = adata.var_names.get_loc(row.gene), (row.layer - 1) * HEADS + row.head - 1
        half = stats.t.ppf(0.975, n[at, 2] - 1) * sd[at, 2, head] / np.sqrt(n[at, 2] - 1)
        assert row.difference == pytest.approx(
            mean[at, 1, head] / uniform[at, 1] - mean[at, 0, head] / uniform[at, 0], abs=1e-5
        )
        assert row.high - row.low == pytest.approx(2 * half, rel=1e-3)
        assert row.ratio - row.reference == pytest.approx(row.difference, abs=1e-5)
        assert row.random == adata.varm["gfx_attention_random_change"][at, head]
        assert row.to_deleted == adata.varm["gfx_attention_to_deleted"][at, head]
    assert "p" not in table
    with pytest.raises(ValueError, match="Leave `group` and `reference` out"):
        gfx.get.attention_difference_df(adata, group="deleted", reference="intact")


def test_attention_pairs_df(adata, key):
    slot = key or "gfx_attention"
    table, result = gfx.get.attention_pairs_df(adata, key=key), adata.uns[slot]
    assert len(table) == adata.varp[slot].nnz
    starts = np.array([1, 6, 11, 21, 51, 101, 201, 501, 1001, 2001])
    with np.errstate(invalid="ignore"):
        by_bands = result["bands"][0].reshape(-1, 11, 11).mean(axis=0) / result["bands_uniform"][0]
    for row in table.sample(50, random_state=0).itertuples():
        at = adata.var_names.get_loc(row.gene), adata.var_names.get_loc(row.attends_to)
        assert row.attention == adata.varp[slot][at]
        assert row.n_cells == adata.varp[f"{slot}_n_cells"][at]
        assert row.coexpression == adata.varp[f"{slot}_coexpression"][at]
        bands = [
            max(i for i, start in enumerate(starts, 1) if adata.var[f"{slot}_rank"].iloc[i_gene] + 1 >= start)
            for i_gene in at
        ]
        assert row.expected == pytest.approx(row.uniform * by_bands[tuple(bands)], rel=1e-5)
        assert row.ratio == pytest.approx(row.attention / row.expected)
    assert table.groupby("gene", sort=False)["attention"].agg(lambda values: values.is_monotonic_decreasing).all()
    one = gfx.get.attention_pairs_df(adata, genes="TOY5", key=key)
    pd.testing.assert_frame_equal(one, table[table["gene"] == "TOY5"].reset_index(drop=True))


def test_edges_are_ranked_by_attention_and_by_what_needs_none(adata, key):
    slot = key or "gfx_attention"
    rng = np.random.default_rng(1)
    edges = pd.DataFrame({"source": rng.choice(NAMED[:6], 40), "target": rng.choice(NAMED, 40)}).drop_duplicates()
    edges = pd.concat([edges, pd.DataFrame({"source": ["TOY1"], "target": ["UNKNOWN"]})])
    # Every candidate of this source is an edge: it is no source that a ranking can be measured by.
    edges = pd.concat([edges, pd.DataFrame({"source": NAMED[8], "target": NAMED})])
    table = gfx.get.attention_edges_df(adata, edges, min_cells=4, key=key)
    assert len(table) == 2 * (LAYERS * HEADS + 2) + 1
    assert table["auroc"].is_monotonic_decreasing
    at = adata.var_names.get_indexer(NAMED)
    dense = {part: adata.varp[f"{slot}{part}"].toarray()[np.ix_(at, at)] for part in ("", "_n_cells", "_coexpression")}
    pairs = gfx.get.attention_pairs_df(adata, key=key).set_index(["gene", "attends_to"])["expected"]
    expected = pairs.unstack().reindex(index=NAMED, columns=NAMED).to_numpy()
    heads = adata.uns[slot]["pairs"]
    matrices = {("attention", None, None): dense[""], ("ranks", None, None): expected}
    matrices |= {("attention", i // HEADS + 1, i % HEADS + 1): heads[i] for i in range(LAYERS * HEADS)}
    for row in table.itertuples():
        if row.score == "coexpression":
            values = abs(dense["_coexpression"])
        else:
            layer, head = (None if pd.isna(value) else int(value) for value in (row.layer, row.head))
            values = matrices[row.score, layer, head]
            values = values if row.direction == "source" else values.T
        areas, precisions, n_edges = [], [], 0
        for number, source in enumerate(NAMED):
            candidates = [i for i in range(30) if i != number and dense["_n_cells"][number, i] >= 4]
            truth = np.array([((edges["source"] == source) & (edges["target"] == NAMED[i])).any() for i in candidates])
            if not 0 < truth.sum() < len(truth):
                continue
            n_edges += truth.sum()
            scores = values[number, candidates]
            areas.append(roc_auc_score(truth, scores))
            best = np.argsort(-scores, kind="stable")[: truth.sum()]
            precisions.append(truth[best].mean() / truth.mean())
        assert (row.n_sources, row.n_edges) == (len(areas), n_edges)
        assert row.auroc == pytest.approx(np.mean(areas))
        assert row.auroc_low <= row.auroc <= row.auroc_high
        if row.score != "ranks":  # which tie
            assert row.early_precision == pytest.approx(np.mean(precisions))


def test_an_attention_that_knows_the_edges_finds_them(adata, key):
    slot, known = key or "gfx_attention", adata.copy()
    at = adata.var_names.get_indexer(NAMED)
    n = adata.varp[f"{slot}_n_cells"].toarray()[np.ix_(at, at)]
    targets = {source: np.setdiff1d(np.flatnonzero(n[source]), [source])[-4:] for source in range(3)}
    edges = pd.DataFrame(
        [(NAMED[source], NAMED[target]) for source, of in targets.items() for target in of],
        columns=["source", "target"],
    )
    attention = known.varp[slot].tolil()
    for source, target in edges.itertuples(index=False):
        attention[known.var_names.get_loc(source), known.var_names.get_loc(target)] = 1.0
    known.varp[slot] = attention.tocsr()
    table = gfx.get.attention_edges_df(known, edges, min_cells=1, key=key)
    first = table[table["layer"].isna() & (table["score"] == "attention")].set_index("direction")
    assert first.loc["source", ["auroc", "auroc_low", "auroc_high"]].tolist() == [1, 1, 1]
    assert first.loc["source", "early_precision"] == pytest.approx(
        np.mean([(np.count_nonzero(n[number]) - 1) / 4 for number in range(3)])
    )


def test_questions_that_a_result_cannot_answer_name_what_it_has(adata, key, toy_cells, toy_model):
    with pytest.raises(ValueError, match=r"has the groups \['a', 'b'\], found `group='c'`"):
        gfx.get.attention_heads_df(adata, group="c", key=key)
    with pytest.raises(ValueError, match=r"two different groups of \['a', 'b'\], found 'a' and None"):
        gfx.get.attention_difference_df(adata, group="a", key=key)
    with pytest.raises(ValueError, match="`statistic` is one of"):
        gfx.get.attention_df(adata, statistic="entropy", key=key)
    with pytest.raises(ValueError, match=r"The gene set 'one' has 1 of the \d+ genes"):
        gfx.get.attention_heads_df(adata, gene_sets={"one": ["TOY1"]}, min_cells=1, key=key)
    with pytest.raises(ValueError, match=r"The gene set 'unknown' has 0 of"):
        gfx.get.attention_heads_df(adata, gene_sets={"unknown": ["A", "B"]}, min_cells=1, key=key)
    with pytest.raises(ValueError, match="compared over all cells"):
        gfx.get.attention_heads_df(adata, gene_sets={"few": NAMED}, group="a", key=key)
    with pytest.raises(ValueError, match=r"no attention given by \['TOY150'\]"):
        gfx.get.attention_pairs_df(adata, genes="TOY150", key=key)
    with pytest.raises(KeyError, match="needs the columns 'source' and 'target'"):
        gfx.get.attention_edges_df(adata, pd.DataFrame({"tf": [], "target": []}), key=key)
    nothing = pd.DataFrame({"source": ["X"], "target": ["Y"]})
    with pytest.raises(ValueError, match="0 of 1 edges are between named genes"):
        gfx.get.attention_edges_df(adata, nothing, key=key)
    plain = toy_cells(18)
    gfx.tl.attention(plain, model=toy_model, controls=None, genes=..., n_neighbors=2)
    with pytest.raises(ValueError, match=r"has no groups|two different groups of"):
        gfx.get.attention_difference_df(plain, group="a", reference="b")
    with pytest.raises(ValueError, match="among named genes"):
        gfx.get.attention_edges_df(plain, nothing)
    gfx.tl.attention(plain, model=toy_model, controls=None)
    with pytest.raises(KeyError, match="no attention from gene to gene"):
        gfx.get.attention_pairs_df(plain)


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_tables_of_a_file_are_those_of_the_object(adata, key, tmp_path, kind):
    path = tmp_path / f"cells.{kind}"
    getattr(adata, f"write_{kind}")(path)
    again = getattr(ad, f"read_{kind}")(path)
    edges = pd.DataFrame([(one, other) for one in NAMED[:8] for other in NAMED[8::2]], columns=["source", "target"])
    for name, how in {
        "attention_df": {"group": "b"},
        "attention_heads_df": {"group": "a"},
        "attention_layers_df": {},
        "attention_ranks_df": {},
        "attention_bands_df": {},
        "attention_difference_df": {"group": "b", "reference": "a", "min_cells": 3},
        "attention_pairs_df": {},
        "attention_edges_df": {"edges": edges, "min_cells": 1},
    }.items():
        found, expected = (getattr(gfx.get, name)(of, key=key, **how) for of in (again, adata))
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_differences_are_those_of_ratios_to_uniform_attention(toy_cells, toy_model):
    """Of shallow cells each gene receives more, but not more than uniform attention gives."""
    cells = toy_cells(20)
    gfx.tl.attention(cells, model=toy_model, groupby="condition", controls=None)
    table = gfx.get.attention_difference_df(cells, group="sick", reference="healthy", min_cells=4)
    means = {
        of: gfx.get.attention_df(cells, group=of).set_index(["gene", "layer", "head"])["ratio"]
        for of in ("sick", "healthy")
    }
    expected = (means["sick"] - means["healthy"]).reindex(pd.MultiIndex.from_frame(table[["gene", "layer", "head"]]))
    np.testing.assert_allclose(table["difference"], expected, atol=1e-5)


def test_most_donors_have_to_be_in_both_groups_to_be_compared_with_themselves():
    rng = np.random.default_rng(0)
    mean = {"one": rng.normal(size=(1, 5, 1)), "other": rng.normal(size=(1, 5, 1))}
    sd, n = ({of: np.full((1, 5, *shape), value) for of in mean} for value, shape in ((1.0, (1,)), (9, ())))
    named = {"one": np.array(list("abcde")), "other": np.array(list("abxyz"))}
    found = between_groups(mean, sd, n, group="one", reference="other", donors=named)
    welch = stats.ttest_ind(mean["one"].ravel(), mean["other"].ravel(), equal_var=False)
    assert found["n_donors"].item() == 8  # a and b are in both groups
    assert found["p"].item() == pytest.approx(welch.pvalue)
    named["other"] = np.array(list("abcdz"))
    found = between_groups(mean, sd, n, group="one", reference="other", donors=named)
    paired = stats.ttest_rel(mean["one"].ravel()[:4], mean["other"].ravel()[:4])
    assert found["n_donors"].item() == 4
    assert found["p"].item() == pytest.approx(paired.pvalue)

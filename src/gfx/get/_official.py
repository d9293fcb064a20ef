"""The statistics of the official software, from finished results.

Names, columns, formulae and order are those of its `InSilicoPerturberStats`, for comparison with published results.
Tables come without its column of tokens; ties in its order are broken by Ensembl id, as its tokens are numbered. Values
are cells × perturbations, NaN where a cell was not perturbed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
from scipy.special import ndtr

from gfx._adata import gene_column, gene_names
from gfx._core.arguments import did_you_mean
from gfx._core.gene_names import name_kind
from gfx._core.statistics import false_discovery_rate
from gfx._docs import shared
from gfx._results import PERTURBATIONS, find

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from mudata import MuData

    from gfx._results import Slots

#: Size of the random sample that each gene is compared with, where there are more values.
N_RANDOM = 100_000

#: False discovery rate below which a gene is called significant.
ALPHA = 0.05

Method = Literal["goal_state_shift", "vs_null", "mixture", "aggregate", "gene_shifts"]
_METHODS: tuple[str, ...] = get_args(Method)


@shared()
def official_statistics_df(
    adata: AnnData | MuData,
    method: Method,
    *,
    null_key: str | None = None,
    key: str | None = None,
    mod: str | None = None,
) -> pd.DataFrame:
    """Compute the statistics of a perturbation as Geneformer's own software does :cite:p:`Theodoris2023`.

    For comparison with published results: names of columns, formulae and order of rows are those of its
    `InSilicoPerturberStats`. Elsewhere gfx tabulates shifts (1 - cosine); these tables hold cosines, so 1 means no
    shift. Their p-values take cells for independent samples, which cells of one donor are not, so they fall with the
    number of cells; and a gene may differ from all other genes together by its rank alone. For effects compared with
    controls use :func:`gfx.get.deletion_df`.

    Statistics are those of the cells that `adata` has now, except for the rows of genes in ``"gene_shifts"``, which are
    those of all perturbed cells.

    Cost: seconds for ten thousand perturbations of a thousand cells. Memory: up to a dozen times the cells ×
    perturbations. ``"gene_shifts"`` has one row for each perturbation and each gene that it met.

    Parameters
    ----------
    {after_perturbing}
    method
        The mode of the official software:

        ``"goal_state_shift"``
            Does a gene shift cells toward the goal more than all genes together do? A rank-sum test against the pool
            of all values, or 100,000 of them drawn with a fixed seed. For a single perturbation only its mean shifts.
            Needs states.
        ``"vs_null"``
            Does a perturbation shift these cells more than those of `null_key`? A rank-sum test.
        ``"mixture"``
            Which perturbations have an impact? A mixture of two normal distributions over their mean cosines (there
            ``mixture_model``), of which the one with the lower mean has impact.
        ``"aggregate"``
            The cosine of every cell (there ``aggregate_data``).
        ``"gene_shifts"``
            Mean and population standard deviation of the cosine of each remaining gene (there
            ``aggregate_gene_shifts``).
    null_key
        For ``"vs_null"``: the `key_added` of the same perturbations in control cells.
    {key}
    {mod}

    Returns
    -------
    The official table without its index and its tokens. `Gene_name` is the name of the perturbation; genes of a set are
    joined by "+", and so are their ids in `Ensembl_ID`. Perturbations of genes that no cell has are left out.

    ``"goal_state_shift"``
        `Gene_name`, `Ensembl_ID`, `Shift_to_goal_end`, `Shift_to_alt_end_<state>`, `Goal_end_vs_random_pval`,
        `Alt_end_vs_random_pval_<state>`, `Goal_end_FDR`, `Alt_end_FDR_<state>`, `N_Detections`, `Sig` (1 if
        `Goal_end_FDR` < 0.05); of one perturbation the shifts only.
    ``"vs_null"``
        `Gene_name`, `Ensembl_ID`, `Test_avg_shift`, `Null_avg_shift`, `Test_vs_null_avg_shift`, `Test_vs_null_pval`,
        `Test_vs_null_FDR`, `N_Detections_test`, `N_Detections_null`, `Sig`.
    ``"mixture"``
        `Gene_name`, `Ensembl_ID`, `Test_avg_shift`, `Impact_component`, `Impact_component_percent`, `N_Detections`.
    ``"aggregate"``
        `Cosine_sim`, `Gene`; one row a perturbation and cell.
    ``"gene_shifts"``
        `Gene_name`, `Ensembl_ID`, `Affected`, `Affected_gene_name`, `Affected_Ensembl_ID`, `Cosine_sim_mean`,
        `Cosine_sim_stdev`, `N_Detections`; `Affected` is ``"cell_emb"`` for whole cells, else the Ensembl id.

    Raises
    ------
    ValueError
        No such method; no `null_key`, or one that `method` does not use; a null without any of the perturbations; no
        states; too few perturbations for a mixture.
    KeyError
        No such result, several of them and no `key`, or one that lacks what the method needs.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1", "CD74"], model="mini", controls=None)
    >>> gfx.get.official_statistics_df(adata, "mixture").columns.tolist()
    ['Gene_name', 'Ensembl_ID', 'Test_avg_shift', 'Impact_component', 'Impact_component_percent', 'N_Detections']
    """
    if method not in _METHODS:
        msg = f"`method` is one of {list(_METHODS)}, found {method!r}.{did_you_mean(str(method), _METHODS)}"
        raise ValueError(msg)
    result = find(adata, *PERTURBATIONS, key=key, mod=mod)
    genes = _perturbed(result)
    if method == "vs_null":
        return vs_null(genes, _cosines(result), _null_cosines(result, genes, null_key))
    if null_key is not None:
        msg = f"`null_key={null_key!r}` is for `method='vs_null'`, found {method!r}. Leave `null_key` out."
        raise ValueError(msg)
    match method:
        case "goal_state_shift":
            shifts, params = _state_shifts(result), result.uns["params"]
            goal = shifts.pop(str(params["goal"]))
            del shifts[str(params["start"])]
            return goal_state_shift(genes, goal, shifts)
        case "mixture":
            return mixture(genes, _cosines(result))
        case "aggregate":
            return aggregate(genes, _cosines(result))
        case _:
            affected = _affected(result.adata, result.uns["params"].get("gene_ids"))
            # Columns of one gene hold the same values: each gene once, as the official software has it.
            ids = affected["Ensembl_ID"].fillna("")
            once = ~(ids.duplicated() & (ids != "")).to_numpy()
            shift, sd, n = (result.read("varm", part)[once] for part in ("", "sd", "n_cells"))
            of_genes = {"mean": 1 - shift.astype(np.float64), "sd": sd, "n": n}
            return gene_shifts(genes, _cosines(result), affected[once], of_genes)


# --- what a result holds --------------------------------------------------------------------------------------------


def _perturbed(result: Slots) -> pd.DataFrame:
    """Name what was perturbed: `Gene_name` and `Ensembl_ID`."""
    columns = {"Gene_name": result.names("perturbations"), "Ensembl_ID": result.names("ensembl_ids")}
    return pd.DataFrame(columns, dtype=object)


def _cosines(result: Slots) -> np.ndarray:
    """Cosine of each cell before and after, float64 `(n_obs, n_perturbations)`."""
    return 1 - result.read("obsm").astype(np.float64)


def _state_shifts(result: Slots) -> dict[str, np.ndarray]:
    """Change of each cell's cosine to each state, `(n_obs, n_perturbations)`."""
    states = result.names("states")
    if not states:
        msg = (
            f"`adata.uns[{result.key!r}]` has no states, so no goal to shift toward. Run `gfx.{result.function}"
            "(adata, ..., groupby=..., start=..., goal=...)`, or use `method='aggregate'` or `method='mixture'`."
        )
        raise ValueError(msg)
    toward = result.read("obsm", "states")
    return {state: toward[:, :, at] for at, state in enumerate(states)}


def _null_cosines(test: Slots, genes: pd.DataFrame, null_key: str | None) -> np.ndarray:
    """Cosines of the same perturbations under another key, NaN where it lacks them."""
    if null_key is None:
        msg = (
            "`method='vs_null'` compares with the same perturbations in control cells; found no `null_key`. "
            f"Run `gfx.{test.function}(adata, ..., key_added='null')` on them, then give `null_key='null'`."
        )
        raise ValueError(msg)
    null = find(test.adata, *PERTURBATIONS, key=null_key)
    if null.key == test.key:
        msg = f"`null_key={null_key!r}` is the result to be compared itself. Give the key of another one."
        raise ValueError(msg)
    of_null = _perturbed(null)
    column = pd.Index(of_null["Ensembl_ID"]).get_indexer(genes["Ensembl_ID"])
    if (column < 0).all():
        msg = (
            f"`null_key={null_key!r}` has none of the perturbations {genes['Gene_name'].tolist()[:5]}; it has "
            f"{of_null['Gene_name'].tolist()[:5]}. Run the same perturbations in both."
        )
        raise ValueError(msg)
    return np.where(column >= 0, _cosines(null)[:, column], np.nan)


def _affected(adata: AnnData, gene_ids: str | None) -> pd.DataFrame:
    """Name each gene of the AnnData: `Gene_name` and `Ensembl_ID`, missing where none is known."""
    columns = [gene_column(adata.var, name) for name in (gene_ids, "ensembl_id") if name in adata.var.columns]
    ids = np.full(adata.n_vars, np.nan, dtype=object)
    for names in (*columns, adata.var.index):
        texts = gene_names(names)
        is_id = np.array([name_kind(text) == "Ensembl" for text in texts], dtype=bool)
        if is_id.any():
            ids[is_id] = [text.partition(".")[0] for text in texts[is_id]]
            break
    return pd.DataFrame({"Gene_name": adata.var_names.to_numpy(dtype=object), "Ensembl_ID": ids})


# --- one function a mode --------------------------------------------------------------------------------------------


def goal_state_shift(genes: pd.DataFrame, goal: np.ndarray, alternatives: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Compare each gene's shifts toward a state with those of all genes together, its own included.

    Two-sided rank-sum test, normal approximation without corrections. A single perturbation is compared with nothing:
    the table has its mean shifts only. `goal` and `alternatives` are changes of each cell's cosine to a state. Of more
    than `N_RANDOM` values, that many are drawn without replacement, anew for each state.
    """
    rng = np.random.default_rng(42)
    if len(genes) == 1:
        values = {"Shift_to_goal_end": goal} | {f"Shift_to_alt_end_{name}": of for name, of in alternatives.items()}
        return pd.DataFrame({column: _means([_present(of[:, 0])]) for column, of in values.items()})
    table, *shifts_of_ends = _detected(genes, goal, *alternatives.values())
    mean, p, fdr = {}, {}, {}
    ends = [("Goal_end", ""), *(("Alt_end", f"_{name}") for name in alternatives)]
    for (end, suffix), shifts in zip(ends, shifts_of_ends, strict=True):
        pool = np.concatenate([np.empty(0), *shifts])
        if len(pool) > N_RANDOM:
            pool = rng.choice(pool, N_RANDOM, replace=False)
        pool.sort()
        p_values = np.array([_rank_sum_p_value(pool, sample) for sample in shifts], dtype=np.float64)
        mean[f"Shift_to_{end.lower()}{suffix}"] = _means(shifts)
        p[f"{end}_vs_random_pval{suffix}"] = p_values
        fdr[f"{end}_FDR{suffix}"] = false_discovery_rate(p_values)
    table = table.assign(**mean, **p, **fdr, N_Detections=_counts(shifts_of_ends[0]))
    return _with_significance(table, "Goal_end_FDR", effect="Shift_to_goal_end")


def vs_null(genes: pd.DataFrame, test: np.ndarray, null: np.ndarray) -> pd.DataFrame:
    """Compare the cosines of each perturbation with those of the same perturbation in control cells.

    Two-sided rank-sum test, normal approximation without corrections. A perturbation without null values has a p-value
    of 1, and counts among the tests.
    """
    table, test_values, null_values = _detected(genes, test, null)
    both = zip(test_values, null_values, strict=True)
    p_values = np.array([_rank_sum_p_value(np.sort(random), sample) for sample, random in both], dtype=np.float64)
    p_values[np.isnan(p_values)] = 1
    test_mean, null_mean = _means(test_values), _means(null_values)
    table = table.assign(
        Test_avg_shift=test_mean,
        Null_avg_shift=null_mean,
        Test_vs_null_avg_shift=test_mean - null_mean,
        Test_vs_null_pval=p_values,
        Test_vs_null_FDR=false_discovery_rate(p_values),
        N_Detections_test=_counts(test_values),
        N_Detections_null=_counts(null_values),
    )
    return _with_significance(table, "Test_vs_null_FDR", effect="Test_vs_null_avg_shift")


def mixture(genes: pd.DataFrame, cosines: np.ndarray) -> pd.DataFrame:
    """Sort perturbations into those with impact and those without, by a mixture of two normals over their means.

    The component of the lower cosine has impact, whichever order the fit gives them in. A value outside both means
    belongs to the nearer one; one between them to the more likely component.
    """
    from sklearn.mixture import GaussianMixture

    table, values = _detected(genes, cosines)
    averages, n_cells = _means(values), _counts(values)
    n_different = len(np.unique(averages))
    if n_different < 2:
        msg = (
            f"A mixture of two components needs perturbations of at least two different averages; found {len(values)} "
            f"with {n_different}. Perturb more genes."
        )
        raise ValueError(msg)
    fit = GaussianMixture(n_components=2, random_state=0).fit(averages[:, None])
    low, high = np.sort(fit.means_[:, 0])

    def has_impact(x: np.ndarray) -> np.ndarray:
        is_low = fit.predict(x[:, None]) == np.argmin(fit.means_[:, 0])
        return ((x <= high) & ((x < low) | is_low)).astype(np.int64)

    number = np.repeat(np.arange(len(values)), n_cells)
    table = table.assign(
        Test_avg_shift=averages,
        Impact_component=has_impact(averages),
        Impact_component_percent=100 * np.bincount(number, has_impact(np.concatenate(values))) / n_cells,
        N_Detections=n_cells,
    )
    return _sorted(table, ["Impact_component", "Test_avg_shift"], ascending=[False, True])


def aggregate(genes: pd.DataFrame, cosines: np.ndarray) -> pd.DataFrame:
    """List every value, cell after cell, perturbations in the order given."""
    perturbation, cell = np.nonzero(~np.isnan(cosines.T))
    names = genes["Gene_name"].to_numpy(dtype=object)
    return pd.DataFrame({"Cosine_sim": cosines[cell, perturbation], "Gene": names[perturbation]})


def gene_shifts(
    genes: pd.DataFrame, cosines: np.ndarray, affected: pd.DataFrame, of_genes: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Tabulate the cosines of whole cells and of each remaining gene: mean and population sd over cells.

    Whole cells come first (`Affected` is ``"cell_emb"``), then genes (`Affected` is the Ensembl id, where the official
    software writes a token), each sorted by cosine, ascending. `affected` names the genes, `of_genes` has the `mean`
    and `sd` of their cosines and the number of cells, `n`, `(n_genes, n_perturbations)`.
    """
    cells, values = _detected(genes, cosines)
    cells = cells.assign(
        Affected="cell_emb",
        Affected_gene_name=np.nan,
        Affected_Ensembl_ID=np.nan,
        Cosine_sim_mean=_means(values),
        Cosine_sim_stdev=[of_cells.std() for of_cells in values],
        N_Detections=_counts(values),
    ).astype({"Affected_gene_name": object, "Affected_Ensembl_ID": object})
    gene, at = np.nonzero(of_genes["n"] > 0)
    ids = affected["Ensembl_ID"].to_numpy(dtype=object)[gene]
    shifts = genes.iloc[at].assign(
        Affected=ids,
        Affected_gene_name=affected["Gene_name"].to_numpy(dtype=object)[gene],
        Affected_Ensembl_ID=ids,
        Cosine_sim_mean=of_genes["mean"][gene, at].astype(np.float64),
        Cosine_sim_stdev=of_genes["sd"][gene, at].astype(np.float64),
        N_Detections=of_genes["n"][gene, at].astype(np.int64),
    )
    parts = [_sorted(part, ["Cosine_sim_mean"], ascending=[True]) for part in (cells, shifts) if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else cells


# --- shared ---------------------------------------------------------------------------------------------------------


def _detected(genes: pd.DataFrame, *values: np.ndarray) -> tuple[pd.DataFrame, *tuple[list[np.ndarray], ...]]:
    """Name the perturbations that any cell has by the first values, and list the values of each, in order of ids.

    The order, which is that of tokens, matters where a mixture is fitted or values are drawn.
    """
    order = np.argsort(genes["Ensembl_ID"].to_numpy(dtype=object), kind="stable")
    kept = order[~np.isnan(values[0]).all(axis=0)[order]]
    table = genes[["Gene_name", "Ensembl_ID"]].iloc[kept].reset_index(drop=True)
    return table, *([_present(of[:, column]) for column in kept] for of in values)


def _present(values: np.ndarray) -> np.ndarray:
    """Return values in float64, without missing ones."""
    return values[~np.isnan(values)].astype(np.float64)


def _means(values: list[np.ndarray]) -> np.ndarray:
    return np.array([of_cells.mean() if len(of_cells) else np.nan for of_cells in values], dtype=np.float64)


def _counts(values: list[np.ndarray]) -> np.ndarray:
    return np.array([len(of_cells) for of_cells in values], dtype=np.int64)


def _rank_sum_p_value(pool: np.ndarray, sample: np.ndarray) -> float:
    """Test a sample against a sorted pool, as :func:`scipy.stats.ranksums` does, without ranking the pool anew.

    The rank sum of a sample exceeds its expectation by the number of its pairs with the pool that are above, less half
    of all pairs, ties counting half. NaN where either is empty.
    """
    n, m = len(pool), len(sample)
    if not (n and m):
        return np.nan
    sample = np.sort(sample)  # neighbours are looked up together: nearly twice as fast
    below, not_above = (np.searchsorted(pool, sample, side).sum() for side in ("left", "right"))
    excess = (below + not_above) / 2 - n * m / 2
    return 2 * ndtr(-abs(excess) / np.sqrt(n * m * (n + m + 1) / 12))


def _with_significance(table: pd.DataFrame, fdr: str, *, effect: str) -> pd.DataFrame:
    table = table.assign(Sig=(table[fdr] < ALPHA).astype(np.int64))
    return _sorted(table, ["Sig", effect, fdr], ascending=[False, False, True])


def _sorted(table: pd.DataFrame, by: list[str], *, ascending: list[bool]) -> pd.DataFrame:
    """Sort, ties by Ensembl id."""
    ties = [column for column in ("Ensembl_ID", "Affected_Ensembl_ID") if column in table]
    return table.sort_values(by + ties, ascending=ascending + [True] * len(ties), kind="stable", ignore_index=True)

"""The statistics of the official software on perturbed cells, from arrays: cells × perturbations, NaN where none.

Names, columns, formulae and order are those of its `InSilicoPerturberStats`, for comparison with what was published.
Tables come without its column of tokens; ties in its order are broken by Ensembl id, as its tokens are numbered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import ndtr

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Of more values than these, that many are drawn to compare each gene with.
N_RANDOM = 100_000

#: False discovery rate below which a gene is called significant.
ALPHA = 0.05


# --- one function a mode --------------------------------------------------------------------------------------------


def goal_state_shift(
    genes: pd.DataFrame,
    goal: np.ndarray,
    alternatives: Mapping[str, np.ndarray],
    *,
    n_random: int = N_RANDOM,
    rng: int | np.random.Generator = 42,
) -> pd.DataFrame:
    """Compare each gene's shifts towards a state with those of all genes together, its own included.

    Two-sided rank-sum test, normal approximation without corrections; Benjamini-Hochberg over genes.

    Parameters
    ----------
    genes
        `Gene_name` and `Ensembl_ID` of each perturbation.
    goal
        Change of each cell's cosine to the goal, `(n_cells, n_perturbations)`.
    alternatives
        The same towards each alternative state, by its name.
    n_random
        Of more values than these, that many are drawn at random without replacement, for each state anew.
    rng
        Seed or generator of the draw.

    Returns
    -------
    One row a perturbation that any cell has; significant ones first, then the largest shift first.
    """
    rng = np.random.default_rng(rng)
    table, kept = _detected(genes, goal)
    ends = {"Goal_end": goal[:, kept]}
    ends |= {f"Alt_end|{name}": values[:, kept] for name, values in alternatives.items()}
    mean, p, fdr = {}, {}, {}
    for end, values in ends.items():
        what, bar, name = end.partition("|")
        suffix = f"_{name}" if bar else ""
        shifts = _by_perturbation(values)
        mean[f"Shift_to_{what.lower()}{suffix}"] = _means(shifts)
        p_values = _rank_sum_p_values(_pool(shifts, n_random, rng), shifts)
        p[f"{what}_vs_random_pval{suffix}"] = p_values
        fdr[f"{what}_FDR{suffix}"] = _false_discovery_rates(p_values)
    table = table.assign(**mean, **p, **fdr, N_Detections=_counts(ends["Goal_end"]))
    return _with_significance(table, "Goal_end_FDR", effect="Shift_to_goal_end")


def goal_state_shift_of_one(goal: np.ndarray, alternatives: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Average the shifts of the only perturbation there is: with nothing to compare, nothing is tested.

    Parameters
    ----------
    goal
        Change of each cell's cosine to the goal, `(n_cells,)`.
    alternatives
        The same towards each alternative state, by its name.

    Returns
    -------
    One row, one column a state.
    """
    shifts = {"Shift_to_goal_end": goal} | {f"Shift_to_alt_end_{name}": values for name, values in alternatives.items()}
    means = {column: _means(_by_perturbation(values[:, None])) for column, values in shifts.items()}
    return pd.DataFrame(means)


def vs_null(genes: pd.DataFrame, test: np.ndarray, null: np.ndarray) -> pd.DataFrame:
    """Compare the cosines of each perturbation with those of the same perturbation in cells of no interest.

    Two-sided rank-sum test, normal approximation without corrections; Benjamini-Hochberg over perturbations. One
    without null values has a p-value of 1, and counts among the tests.

    Parameters
    ----------
    genes
        `Gene_name` and `Ensembl_ID` of each perturbation.
    test, null
        Cosines between perturbed and unperturbed cells, `(n_cells, n_perturbations)`; numbers of cells may differ.

    Returns
    -------
    One row a perturbation that any test cell has; significant ones first, then the largest difference first.
    """
    table, kept = _detected(genes, test)
    test, null = test[:, kept], null[:, kept]
    test_values, null_values = _by_perturbation(test), _by_perturbation(null)
    pairs = zip(test_values, null_values, strict=True)
    p_values = np.array([_rank_sum_p_values(np.sort(random), [values])[0] for values, random in pairs])
    p_values[np.isnan(p_values)] = 1
    test_mean, null_mean = _means(test_values), _means(null_values)
    table = table.assign(
        Test_avg_shift=test_mean,
        Null_avg_shift=null_mean,
        Test_vs_null_avg_shift=test_mean - null_mean,
        Test_vs_null_pval=p_values,
        Test_vs_null_FDR=_false_discovery_rates(p_values),
        N_Detections_test=_counts(test),
        N_Detections_null=_counts(null),
    )
    return _with_significance(table, "Test_vs_null_FDR", effect="Test_vs_null_avg_shift")


def mixture(genes: pd.DataFrame, cosines: np.ndarray) -> pd.DataFrame:
    """Sort perturbations into those with impact and those without, by a mixture of two normals over their averages.

    The component of the lower cosine is the one with impact, whichever order the fit gives them in. A value outside
    both means belongs to the nearer one; one between them to the component that is the more likely.

    Parameters
    ----------
    genes
        `Gene_name` and `Ensembl_ID` of each perturbation.
    cosines
        Cosines between perturbed and unperturbed cells, `(n_cells, n_perturbations)`.

    Returns
    -------
    One row a perturbation that any cell has; those with impact first, then the lowest cosine first.

    Raises
    ------
    ValueError
        Fewer than two different averages.
    """
    from sklearn.mixture import GaussianMixture

    table, kept = _detected(genes, cosines)
    values = _by_perturbation(cosines[:, kept])
    averages = _means(values)
    if len(np.unique(averages)) < 2:
        msg = (
            f"A mixture of two components needs perturbations of at least two different averages; found {len(values)} "
            f"with {len(np.unique(averages))}. Perturb more genes."
        )
        raise ValueError(msg)
    fit = GaussianMixture(n_components=2, random_state=0).fit(averages[:, None])
    centres = fit.means_[:, 0]
    low = int(np.argmin(centres))

    def has_impact(x: np.ndarray) -> np.ndarray:
        is_low = fit.predict(x[:, None]) == low
        return ((x <= centres.max()) & ((x < centres.min()) | is_low)).astype(np.int64)

    of = np.repeat(np.arange(len(values)), [len(one) for one in values])
    with_impact = np.bincount(of, weights=has_impact(np.concatenate(values)), minlength=len(values))
    n_cells = _counts(cosines[:, kept])
    table = table.assign(
        Test_avg_shift=averages,
        Impact_component=has_impact(averages),
        Impact_component_percent=100 * with_impact / n_cells,
        N_Detections=n_cells,
    )
    return _sorted(table, ["Impact_component", "Test_avg_shift"], ascending=[False, True])


def aggregate(genes: pd.DataFrame, cosines: np.ndarray) -> pd.DataFrame:
    """List every value of every perturbation, cell after cell.

    Parameters
    ----------
    genes
        `Gene_name` and `Ensembl_ID` of each perturbation.
    cosines
        Cosines between perturbed and unperturbed cells, `(n_cells, n_perturbations)`.

    Returns
    -------
    One row a perturbation and cell, perturbations in the order given.
    """
    values = _by_perturbation(cosines)
    names = np.repeat(genes["Gene_name"].to_numpy(dtype=object), [len(one) for one in values])
    return pd.DataFrame({"Cosine_sim": np.concatenate([np.empty(0), *values]), "Gene": names})


def gene_shifts(
    genes: pd.DataFrame,
    cosines: np.ndarray,
    *,
    affected: pd.DataFrame,
    affected_cosines: np.ndarray,
    affected_sd: np.ndarray,
    n_affected: np.ndarray,
) -> pd.DataFrame:
    """Tabulate the cosines of whole cells and of each remaining gene: mean and population sd over cells.

    Parameters
    ----------
    genes
        `Gene_name` and `Ensembl_ID` of each perturbation.
    cosines
        Cosines between perturbed and unperturbed cells, `(n_cells, n_perturbations)`.
    affected
        `Gene_name` and `Ensembl_ID` of each gene that may be affected.
    affected_cosines, affected_sd
        Mean and population sd over cells of each gene's cosine, `(n_genes, n_perturbations)`.
    n_affected
        Cells behind them; those of no cell are left out.

    Returns
    -------
    Whole cells first (`Affected` is ``"cell_emb"``), then genes (`Affected` is the Ensembl id, where the official
    software writes a token), each the lowest cosine first.
    """
    perturbed, kept = _detected(genes, cosines)
    values = _by_perturbation(cosines[:, kept])
    cells = perturbed.assign(
        Affected="cell_emb",
        Affected_gene_name=np.nan,
        Affected_Ensembl_ID=np.nan,
        Cosine_sim_mean=_means(values),
        Cosine_sim_stdev=[one.std() for one in values],
        N_Detections=_counts(cosines[:, kept]),
    ).astype({"Affected_gene_name": object, "Affected_Ensembl_ID": object})
    gene, at = np.nonzero(n_affected > 0)
    shifts = genes.iloc[at].reset_index(drop=True)
    shifts = shifts.assign(
        Affected=affected["Ensembl_ID"].to_numpy(dtype=object)[gene],
        Affected_gene_name=affected["Gene_name"].to_numpy(dtype=object)[gene],
        Affected_Ensembl_ID=affected["Ensembl_ID"].to_numpy(dtype=object)[gene],
        Cosine_sim_mean=affected_cosines[gene, at].astype(np.float64),
        Cosine_sim_stdev=affected_sd[gene, at].astype(np.float64),
        N_Detections=n_affected[gene, at].astype(np.int64),
    )
    parts = [_sorted(part, ["Cosine_sim_mean"], ascending=[True]) for part in (cells, shifts) if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else cells


# --- shared ---------------------------------------------------------------------------------------------------------


def _detected(genes: pd.DataFrame, values: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the names of perturbations that any cell has, by Ensembl id as tokens are, and where they stand.

    The order matters where a mixture is fitted or values are drawn.
    """
    order = np.argsort(genes["Ensembl_ID"].to_numpy(dtype=object), kind="stable")
    has_cells = ~np.isnan(values).all(axis=0)
    kept = order[has_cells[order]]
    return genes[["Gene_name", "Ensembl_ID"]].iloc[kept].reset_index(drop=True), kept


def _by_perturbation(values: np.ndarray) -> list[np.ndarray]:
    """Return the values of each perturbation, float64, without what is missing."""
    return [column[~np.isnan(column)].astype(np.float64) for column in values.T]


def _means(values: list[np.ndarray]) -> np.ndarray:
    return np.array([one.mean() if len(one) else np.nan for one in values], dtype=np.float64)


def _counts(values: np.ndarray) -> np.ndarray:
    return np.sum(~np.isnan(values), axis=0, dtype=np.int64)


def _pool(values: list[np.ndarray], n_random: int, rng: np.random.Generator) -> np.ndarray:
    """Put all values together, sorted; of too many, draw some."""
    pool = np.concatenate([np.empty(0), *values])
    if len(pool) > n_random:
        pool = rng.choice(pool, n_random, replace=False)
    return np.sort(pool)


def _rank_sum_p_values(pool: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    """Test sets of values against a sorted pool: what :func:`scipy.stats.ranksums` gives, without sorting for each.

    The rank sum of a set exceeds its expectation by as much as its values are above those of the pool more often than
    below, ties counting half. NaN where either is empty.
    """
    p_values = np.full(len(values), np.nan)
    for at, one in enumerate(values):
        n, m = len(pool), len(one)
        if n and m:
            one = np.sort(one)  # noqa: PLW2901 # neighbours are looked up together: nearly twice as fast
            below, not_above = np.searchsorted(pool, one, "left").sum(), np.searchsorted(pool, one, "right").sum()
            excess = (below + not_above) / 2 - n * m / 2
            p_values[at] = 2 * ndtr(-abs(excess) / np.sqrt(n * m * (n + m + 1) / 12))
    return p_values


def _false_discovery_rates(p_values: np.ndarray) -> np.ndarray:
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p_values, method="bh")) if len(p_values) else p_values


def _with_significance(table: pd.DataFrame, fdr: str, *, effect: str) -> pd.DataFrame:
    table = table.assign(Sig=(table[fdr] < ALPHA).astype(np.int64))
    return _sorted(table, ["Sig", effect, fdr], ascending=[False, False, True])


def _sorted(table: pd.DataFrame, by: list[str], *, ascending: list[bool]) -> pd.DataFrame:
    """Sort, ties by Ensembl id."""
    ties = [column for column in ("Ensembl_ID", "Affected_Ensembl_ID") if column in table]
    return table.sort_values(by + ties, ascending=ascending + [True] * len(ties), kind="stable", ignore_index=True)

"""What there is to tell of each kind of result: controls first, then effects, then what follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gfx import get, pl
from gfx._adata import gene_column, gene_names, name_place, open_counts, row_blocks
from gfx._core.manifest import fingerprint, fingerprint_of_rows
from gfx._core.screening import LOWEST_AGREEMENT
from gfx._core.statistics import LOWEST_AUC, spearman
from gfx._report._page import Section, Table, draw, pairs, tabulate, written
from gfx._results import Slots, made_by
from gfx.get._screen import FDR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from anndata import AnnData

#: Rank correlation from which a control is said to explain a ranking: half of the variance of the ranks.
EXPLAINED = 0.7

#: Cells below which an effect is not tabulated, donors below which there is no test, random cells that tell little.
_MIN_CELLS, _MIN_DONORS, _FEW = 10, 3, 2

#: Rows of a table at either end, other genes, groups, perturbations in a figure, and names in a sentence.
_ENDS, _OTHERS, _GROUPS, _DRAWN, _NAMED = 15, 10, 3, 20, 10

_MEASURES = {"shift": "the shift", "toward": "the shift toward the goal"}

#: Baselines, at the beginning of a sentence.
_BASELINES = {
    "detection": "The fraction of cells with a gene",
    "expression": "Mean expression",
    "logfc": "The fold change between the states",
}

_CELLS_ARE_NO_REPLICATES = (
    "Cells are not replicates: nothing here says whether other donors would show the same. {remedy}"
)

_NO_EXPERIMENT = (
    "What an experiment would measure. In a published comparison, no foundation model predicted measured perturbations "
    "better than simple baselines did (Ahlmann-Eltze et al., Nature Methods 2025, doi:10.1038/s41592-025-02772-6)."
)


# --- all results ----------------------------------------------------------------------------------------------------


def sections(adata: AnnData, keys: list[str], names: str | None) -> list[Section]:
    """Tell of each result, kinds in the order of `_TOLD`."""
    labels = gene_names(gene_column(adata.var, names))
    results = [Slots(adata, made_by(adata.uns[key]), key) for key in keys]
    order = list(_TOLD)
    results.sort(key=lambda result: (order.index(result.function), result.key))
    return [_told(result, names, labels) for result in results]


def _told(result: Slots, names: str | None, labels: np.ndarray) -> Section:
    title, tell = _TOLD[result.function]
    section = Section(result.key, result.function, title, dict(sorted(result.uns["params"].items())))
    if section.params.get("model") == "mini":
        section.warnings.append(
            "The model is mini, which is meant for first trials, teaching and tests, not for findings."
        )
    lost = [
        f"adata.{element}[{str(name)!r}]"
        for element, written_there in result.uns.get("slots", {}).items()
        for name in np.atleast_1d(written_there)
        if str(name) not in getattr(result.adata, element)
    ]
    if lost:
        section.warnings.append(
            f"This result is incomplete, so nothing of it is shown: {', '.join(lost)} got lost, as anndata.concat "
            'drops varm unless called with merge="same".'
        )
    else:
        tell(section, result, names, labels)
    return section


def overview(adata: AnnData, told: list[Section]) -> Table:
    """Say in short what the results are of."""
    models = {(section.params.get("model"), section.params.get("vocabulary")) for section in told} - {(None, None)}
    names = ", ".join(f"{model} (vocabulary {vocabulary})" for model, vocabulary in sorted(models, key=str))
    rows = {"cells": adata.n_obs, "genes": adata.n_vars, "models": names}
    return pairs({name: value for name, value in rows.items() if value != ""})


def checksums(adata: AnnData, told: list[Section]) -> dict[str, Table]:
    """Identify the cells, their tokens and the models."""
    rows: dict[str, object] = {
        "sha256 of cell names": fingerprint(adata.obs_names.to_numpy(dtype=object)),
        "sha256 of gene names": fingerprint(adata.var_names.to_numpy(dtype=object)),
    }
    for layer, use_raw in sorted({(s.params.get("layer"), bool(s.params.get("use_raw"))) for s in told}, key=str):
        try:
            matrix = open_counts(adata, layer=layer, use_raw=use_raw)
        except (KeyError, ValueError):
            rows[f"values in {name_place(layer, use_raw=use_raw)[1]}"] = "no longer in this object"
        else:
            rows[f"sha256 of the values in {matrix.where}"] = fingerprint_of_rows(row_blocks(matrix.x))
    tables = {"Cells and genes": pairs(rows)}
    for key, entry in sorted(adata.uns.items()):
        if made_by(entry) == "pp.tokenize":
            report = {name: value for name, value in sorted(entry.get("report", {}).items()) if value not in ("", 0)}
            if key in adata.obsm:
                report["sha256 of tokens"] = fingerprint(np.asarray(adata.obsm[key]))
            tables[f"Tokens: {key}"] = pairs({name.replace("_", " "): value for name, value in report.items()})
    models = pd.DataFrame(
        {
            "model": section.params.get("model"),
            "vocabulary": section.params.get("vocabulary"),
            "sha256 of weights": section.params.get("weights_sha256"),
            "of configuration": section.params.get("config_sha256"),
            "of vocabulary": section.params.get("vocabulary_sha256"),
        }
        for section in told
    ).drop_duplicates()
    return tables | {"Models": tabulate(models.dropna(how="all"))}


def _listed(names: Iterable[str]) -> str:
    """Write names one behind the other, as many as can be read."""
    named = [str(name) for name in names]
    return ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED:,} more" if len(named) > _NAMED else "")


def _some(table: pd.DataFrame, columns: str) -> pd.DataFrame:
    """Keep those of the named columns that there are."""
    return table[[name for name in columns.split() if name in table]]


def _ends(table: pd.DataFrame, sorted_by: str, columns: str | None = None) -> Table:
    """Tabulate both ends of a sorted table."""
    shown = table if columns is None else _some(table, columns)
    if len(table) <= 2 * _ENDS:
        return tabulate(shown, f"Sorted by {sorted_by}.")
    below = f"Sorted by {sorted_by}; the first and the last {_ENDS} of {len(table):,} genes."
    return tabulate(pd.concat([shown.head(_ENDS), shown.tail(_ENDS)]), below)


# --- perturbations and screens --------------------------------------------------------------------------------------


def _perturbation(section: Section, result: Slots, names: str | None, labels: np.ndarray) -> None:
    adata, key, params = result.adata, result.key, section.params
    table = get.deletion_df(adata, key=key, min_cells=_MIN_CELLS)
    prefix, measure = ("toward_", "toward") if "state" in table else ("", "shift")
    of_goal = table[table["role"] == "goal"] if prefix else table
    place = f"cells of the state {params['start']}" if prefix else "cells"
    toward = f", and their shift toward {params['goal']} was measured" if prefix else ""
    n, n_cells = len(of_goal), int(of_goal["n_cells"].max())
    section.summary = f"{n:,} perturbation{'s' * (n != 1)} in up to {n_cells:,} {place}{toward}. "
    section.summary += _hits(of_goal, prefix, "perturbation")
    controls = get.controls_df(adata, key=key)
    has_random = f"{prefix}z" in table and bool(table[f"{prefix}z"].notna().any())
    section.warnings += _missing(controls, [str(name) for name in np.atleast_1d(params.get("controls", []))])
    section.warnings += _failed(controls)
    section.warnings += _few(of_goal, params.get("donor_key"), has_random=has_random)
    section.add("Controls", _readings(controls))
    if "genes_of_all_ranks" in result.uns:
        section.add("Effect and rank", draw(pl.rank_trend, adata, key=key, min_cells=1))
    section.parts += _effect_tables(table, prefix, has_random=has_random)
    title = "Effects beside random sets" if has_random else "Effects on cells"
    section.add(title, draw(pl.deletion, adata, key=key, n_top=_DRAWN, min_cells=1))
    if "synergy" in result.uns:
        synergy = get.synergy_df(adata, key=key).drop(columns=["displaced_mean", "composed_mean"])
        for title, other in (
            ("beyond the sum of their shifts", "on_vectors"),
            ("beyond the sum of their displacements", "on_shifts"),
        ):
            of_measure = synergy[[name for name in synergy if not name.startswith(other)]]
            section.add(f"Genes together, {title}", tabulate(of_measure))
        section.add("", draw(pl.synergy, adata, key=key, n_top=_DRAWN, min_cells=1))
    first = str(of_goal["perturbation"].iloc[0])
    others = get.gene_effects_df(adata, first, key=key).drop(columns="perturbation")
    others["gene"] = others["gene"].map(dict(zip(adata.var_names, labels, strict=True)))
    if len(others):
        section.add(f"Other genes that shift most when {first} is perturbed", tabulate(others, most=_OTHERS))
    _conclude_perturbation(section, measure, has_random=has_random)


def _effect_tables(table: pd.DataFrame, prefix: str, *, has_random: bool) -> list[tuple[str, Table]]:
    """Tabulate effects; in several tables, because one of all columns is wider than a screen."""
    random = "n_random random_n_cells random_weights_shift_mean"
    shift = f"shift_mean random_mean z p fdr {random}"
    toward = "toward_mean toward_random_mean toward_z toward_p toward_fdr toward_without_mean"
    measured = toward if prefix else shift
    columns = f"perturbation state role n_cells {measured} rank_mean detection expression_mean logfc"
    note = f"Sorted by z-score, descending. {table.attrs['note']}" if has_random else table.attrs["note"]
    tables = [("Effects", tabulate(_some(table, columns), note))]
    if "n_donors" in table:
        columns = "perturbation state role n_donors donor_mean donor_low donor_high donor_p donor_fdr"
        tables.append(("Effects over donors", tabulate(_some(table, columns))))
    if prefix:
        of_goal = table[table["role"] == "goal"]
        tables.append(("Shifts in any direction", tabulate(_some(of_goal, f"perturbation n_cells {shift}"))))
    return tables


def _conclude_perturbation(section: Section, measure: str, *, has_random: bool) -> None:
    if has_random:
        section.may.append(
            f"For this model and these cells: {_MEASURES[measure]} differs from that of rank-matched random gene sets "
            f"where the FDR is small. With a z-score near 0, the effect is that of any gene of this rank."
        )
    else:
        section.may.append(
            "How far this model's embedding shifts; without random sets, not whether a gene shifts it more than others."
        )
    section.may_not += [
        _NO_EXPERIMENT,
        "That a gene causes a state. A marker gene helps define its own state, so that perturbing it shifts cells away "
        "from that state by definition.",
    ]


def _screen(section: Section, result: Slots, names: str | None, labels: np.ndarray) -> None:
    adata, key, params = result.adata, result.key, section.params
    table = get.screen_df(adata, key=key, names=names)
    measure = "toward" if "toward_mean" in table else "shift"
    toward = f" of the state {params['start']}, toward {params['goal']}" if measure == "toward" else ""
    how = "Effects are first-order estimates" if table.attrs["approx"] else "Effects are exact"
    section.summary = (
        f"Genes were deleted from cells one at a time, and {len(table):,} of them in at least {_MIN_CELLS} cells"
        f"{toward}. {how}. {_hits(table, f'{measure}_', 'gene')}"
    )
    controls = get.controls_df(adata, key=key)
    section.warnings += _missing(controls, ["random_sets", "donors", *np.atleast_1d(params.get("controls", []))])
    section.warnings += _failed(controls)
    section.warnings.append(
        _CELLS_ARE_NO_REPLICATES.format(
            remedy="Pass hits to gfx.tl.delete_genes with donor_key for a test over donors."
        )
    )
    section.add("Controls", _readings(controls))
    section.add("Effects by rank", draw(pl.screen, adata, key=key, names=names))
    columns = " ".join(
        f"{name}_mean {name}_excess {name}_low {name}_high {name}_z {name}_p {name}_fdr random_weights_{name}_mean "
        f"exact_{name}_mean"
        for name in dict.fromkeys((measure, "shift"))
    )
    columns = f"gene n_cells rank_mean {columns} exact_n_cells detection expression_mean logfc"
    if measure == "toward":
        columns = columns.replace(" shift_excess shift_low shift_high", "")
    section.parts += [("Genes", _ends(table, "z-score, descending", columns)), ("", table.attrs["note"])]
    groups = result.names("groups")[:_GROUPS]
    if groups:
        section.add(f"In groups of {params.get('groupby')}", draw(pl.screen, adata, groups, key=key, names=names))
    section.may.append(
        "Which genes this model's embedding of these cells depends on more than on genes of similar rank"
        + (", and whether a random-weights model gives such z-scores." if f"{measure}_p" in table else ".")
    )
    section.may_not += [
        _NO_EXPERIMENT,
        "That a gene drives the state. A marker gene helps define its own state, so that deleting it shifts cells away "
        "from that state by definition.",
    ]


def _hits(table: pd.DataFrame, prefix: str, what: str) -> str:
    """Say how many effects differ from their null."""
    fdr = f"{prefix}fdr"
    if fdr not in table or table[fdr].isna().all():
        return "There are no p-values."
    n = int((table[fdr] <= FDR).sum())
    if n:
        return f"{n:,} {what}{'s' * (n != 1)} differ{'s' * (n == 1)} from the null at an FDR of {FDR}."
    return f"No {what} differs from the null at an FDR of {FDR}; the smallest FDR is {written(table[fdr].min())}."


def _missing(controls: pd.DataFrame, ran: Iterable[str]) -> list[str]:
    """Say which controls were not run, and what is not known without them."""
    present, ran = set(controls["control"]), set(ran)
    warnings = []
    if "random_sets" not in ran:
        warnings.append(
            "No rank-matched random gene sets were run, so that no effect has a null: a large shift may be that of any "
            "gene of this rank."
        )
    if "random_weights" not in present:
        warnings.append(
            "No random-weights model was run: whether the ranking depends on what the model has learnt is not known."
        )
    if present.isdisjoint(_BASELINES):
        warnings.append("No baselines were run: whether expression alone explains the effects is not known.")
    return warnings


def _explains(value: float) -> bool:
    return abs(value) >= EXPLAINED


#: When a control explains the effects or shows that they mean little, and what is to be said then.
_FAILURES: dict[tuple[str, str], tuple[Callable[[float], bool], str]] = {
    ("random_weights", "spearman"): (
        lambda value: value >= EXPLAINED,
        "A random-weights model ranks genes by {effect} in almost the same way (Spearman {value:.2f}), so that the "
        "ranking does not depend on what the model has learnt.",
    ),
    ("rank", "spearman"): (
        _explains,
        "The rank of a gene explains {effect} (Spearman {value:.2f}): the largest effects are those of certain ranks, "
        "whichever genes these are. Read z-scores, not means.",
    ),
    **{
        (name, "spearman"): (
            _explains,
            f"{baseline} explains {{effect}} (Spearman {{value:.2f}}): this ranking needs no model.",
        )
        for name, baseline in _BASELINES.items()
    },
    ("exact", "spearman"): (
        lambda value: value < LOWEST_AGREEMENT,
        "Estimates of {effect} correlate with exact ones only at Spearman {value:.2f} in a cell. Use method='exact'.",
    ),
    ("state_axis", "auc"): (
        lambda value: not value >= LOWEST_AUC,  # nor where it could not be tested
        "Held-out cells or donors of start and goal are hardly separable, or this could not be tested (AUC "
        "{value:.2f}; chance is 0.5): {effect} means little.",
    ),
}


def _failed(controls: pd.DataFrame) -> list[str]:
    """Say which controls explain the effects, or show that these mean little."""
    warnings = []
    for row in controls.to_dict("records"):
        fails, warning = _FAILURES.get((row["control"], row["statistic"]), (None, ""))
        if row["control"] == "exact" and row["measure"] == "shift":
            continue  # in single cells, estimates of the shift are noisy by design
        if fails is not None and fails(row["value"]):
            warnings.append(warning.format(effect=_MEASURES[row["measure"]], value=row["value"]))
    return warnings


def _few(table: pd.DataFrame, donor_key: object, *, has_random: bool) -> list[str]:
    """Say where there are too few cells, random sets or donors."""
    warnings = []
    if rare := table.loc[table["n_cells"] < _MIN_CELLS, "perturbation"].tolist():
        warnings.append(f"In fewer than {_MIN_CELLS} cells, and therefore without a result: {_listed(rare)}.")
    if has_random and len(thin := table.loc[table["random_n_cells"] <= _FEW, "perturbation"]):
        warnings.append(
            f"The random sets of {_listed(thin)} were run in one or two cells each: their z-scores can only "
            "show large effects."
        )
    if donor_key is None:
        warnings.append(_CELLS_ARE_NO_REPLICATES.format(remedy="Name donors with donor_key for tests over donors."))
    elif (n := int(table["n_donors"].max())) < _MIN_DONORS:
        warnings.append(f"There are {n} donors, too few to say what others would show.")
    return warnings


#: How to read a row of the controls; "{of}" is what is measured.
_READINGS = {
    ("random_weights", "spearman"): "near 1: the random-weights model ranks genes in the same way",
    ("random_weights", "spearman_perturbations"): "the same over the perturbations of this call",
    (
        "random_weights",
        "rank_spearman",
    ): "near 1 or -1: in the random-weights model, shifts follow the rank of the gene",
    ("random_weights", "rank_slope"): "change of the log shift from the first rank to the last, with random weights",
    ("rank", "spearman"): "near 1 or -1: effects follow the rank of the gene, whichever gene it is",
    ("rank", "slope"): "change of the log shift from the first rank to the last",
    ("detection", "spearman"): "near 1 or -1: the fraction of cells with the gene predicts the effect",
    ("expression", "spearman"): "near 1 or -1: mean expression predicts the effect",
    ("logfc", "spearman"): "near 1 or -1: the fold change between the states predicts the effect",
    ("exact", "spearman"): "near 1: within a cell, estimates rank genes as exact deletions do",
    ("exact", "precision"): "fraction of the largest estimates that are large exactly, too",
    ("state_axis", "auc"): "0.5 is chance; near 1: held-out cells or donors of start and goal are separable",
}


def _readings(controls: pd.DataFrame) -> Table | str:
    """Tabulate controls, each with how to read it."""
    if controls.empty:
        return "No control was run."
    rows = zip(controls["control"], controls["statistic"], strict=True)
    partial = "the same, given the other baselines"
    return tabulate(controls.assign(reading=[_READINGS.get(row, partial) for row in rows]), most=len(controls))


# --- classification -------------------------------------------------------------------------------------------------


def _classification(section: Section, result: Slots, names: str | None, labels: np.ndarray) -> None:
    adata, key, params = result.adata, result.key, section.params
    of = "gene" if section.function == "tl.classify_genes" else "cell"
    table = get.classification_df(adata, key=key)
    metric = "auc" if of == "gene" else "macro_f1"
    main = table[(table["unit"] == of) & (table["metric"] == metric)]
    told = [_compared(task, rows.set_index("method"), metric) for task, rows in main.groupby("task", sort=False)]
    section.summary = " ".join(summary for summary, _ in told)
    for _, warnings in told:
        section.warnings += warnings
    if of == "cell" and params.get("donor_key") is None:
        remedy = "Hold out donors with donor_key: cells of one donor are alike, so that held-out cells are no new ones."
        section.warnings.append(_CELLS_ARE_NO_REPLICATES.format(remedy=remedy))
    compared = tabulate(table, table.attrs["note"], most=len(table))
    section.add("Held-out performance, the model and its controls", compared)
    for task in main["task"].unique():
        of_task = {"task": str(task), "key": key}
        section.add(f"ROC curves: {task}", draw(pl.roc, adata, **of_task))
        section.add(f"Confusion: {task}", draw(pl.confusion, adata, **of_task))
        if get.learning_curve_df(adata, key=key).query("task == @task")["n_cells"].nunique() > 1:
            section.add(f"Learning curve: {task}", draw(pl.learning_curve, adata, **of_task))
    if of == "gene":
        _add_scores(section, result, names)
    section.may.append(
        f"How well held-out {of}s of this data set are classified, and how much is due to pretraining: what the "
        "model has in excess of random weights and of baselines."
    )
    section.may_not.append(
        f"How well {of}s of other studies are classified. An accuracy that a baseline reaches, too, needs no model. "
        "Repeats are not replicates."
    )


def _compared(task: str, rows: pd.DataFrame, metric: str) -> tuple[str, list[str]]:
    """Compare the model with its controls in one task."""
    model, name = rows.loc["model"], {"auc": "AUC", "macro_f1": "macro F1"}[metric]
    summary = f"{task}: {name} {model['mean']:.2f}"
    if np.isfinite(model["low"]):
        summary += f" (95 % interval {model['low']:.2f} to {model['high']:.2f})"
    baselines = rows.drop(index=[method for method in ("model", "random_weights") if method in rows.index])
    warnings = []
    lowest = model["low"] if np.isfinite(model["low"]) else model["mean"]
    if "random_weights" in rows.index:
        random = rows.at["random_weights", "mean"]
        summary += f", random weights {random:.2f}"
        if random >= lowest:
            warnings.append(
                f"{task}: the random-weights model reaches {random:.2f}, within the interval of the model or above: "
                "pretraining contributes nothing that these data show."
            )
    else:
        warnings.append(f"{task}: no random-weights model was run: what pretraining contributes is not known.")
    if len(baselines):
        value, best = baselines["mean"].max(), str(baselines["mean"].idxmax()).replace("_", " ")
        summary += f", best baseline ({best}) {value:.2f}"
        if value >= lowest:
            warnings.append(
                f"{task}: the baseline {best} reaches {value:.2f}, within the interval of the model or above: no such "
                "model is needed for this task."
            )
    else:
        warnings.append(f"{task}: no baselines were run: whether a simple method does as well is not known.")
    return f"{summary}.", warnings


def _add_scores(section: Section, result: Slots, names: str | None) -> None:
    scores = get.gene_scores_df(result.adata, key=result.key, names=names)
    if "in_training" in scores:
        scores = scores[~scores["in_training"].astype(bool)].drop(columns="in_training")
    section.add("Scores of genes", draw(pl.gene_scores, result.adata, key=result.key, names=names))
    section.add("", _ends(scores, "the score of the last class, descending"))


def _predicted_genes(section: Section, result: Slots, names: str | None, labels: np.ndarray) -> None:
    scores = get.gene_scores_df(result.adata, key=result.key, min_cells=1)
    counts = scores["predicted"].value_counts(sort=False)
    n_trained = int(scores["in_training"].sum())
    section.summary = (
        f"{len(scores):,} genes scored: {_counted(counts)}. {n_trained:,} of them were in the training set."
    )
    section.warnings.append(_NOT_EVALUATED)
    if not n_trained:
        section.warnings.append("The classifier does not record its training genes: some scores may be no predictions.")
    _add_scores(section, result, names)
    section.may.append("What this classifier says about genes that it was not trained on.")
    section.may_not.append("That a gene is of the predicted class: every gene receives one of the known classes.")


def _predicted_cells(section: Section, result: Slots, names: str | None, labels: np.ndarray) -> None:
    for task in result.uns["tasks"]:
        counts = result.read("obs", str(task)).astype("category").value_counts(sort=False)
        section.summary += f"{task}: {_counted(counts)}. "
        table = pd.DataFrame({"class": counts.index.astype(str), "cells": counts.to_numpy()})
        section.add(f"Predicted classes: {task}", tabulate(table.assign(share=counts.to_numpy() / counts.sum())))
    section.warnings.append(_NOT_EVALUATED)
    section.may.append("Which of its classes this classifier gives each cell.")
    section.may_not.append(
        "That a cell is of the predicted class: cells of a class absent from training receive one of the known classes."
    )


_NOT_EVALUATED = (
    "Predictions are not compared with anything here. gfx.tl.classify_genes and gfx.tl.classify_cells evaluate such a "
    "classifier by cross-validation, beside random weights and baselines."
)


def _counted(counts: pd.Series) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


# --- attention and embeddings ---------------------------------------------------------------------------------------


def _attention(section: Section, result: Slots, names: str | None, labels: np.ndarray) -> None:
    adata, key, uns = result.adata, result.key, result.uns
    genes = _attention_of_genes(result, labels)
    shape = f"{uns['n_layers']} network layers with {uns['n_heads']} heads each"
    section.summary = f"Attention of {shape}, mean over {uns['n_cells']:,} cells."
    if "random" not in uns:
        section.warnings.append(
            "No random-weights model was run: whether attention depends on what the model has learnt is not known."
        )
    by_rank = spearman(genes["ratio"].to_numpy(), genes["rank"].to_numpy())
    if abs(by_rank) >= EXPLAINED:
        section.warnings.append(
            f"The rank of a gene explains the attention that it receives (Spearman {by_rank:.2f}): the genes that "
            "receive most are those of certain ranks."
        )
    columns = "layer entropy entropy_random distance distance_random special special_random"
    section.add(
        "Controls: network layers beside random weights",
        tabulate(_some(get.attention_layers_df(adata, key=key), columns)),
    )
    section.add("Heads and ranks", draw(pl.attention, adata, key=key))
    section.add("Bands of ranks", draw(pl.attention_bands, adata, key=key))
    below = f"The {_DRAWN} genes with the largest ratio of {len(genes):,} in at least {_MIN_CELLS} cells."
    section.add("Genes that receive most attention", tabulate(genes.head(_DRAWN), below))
    _add_difference(section, result)
    if result.has("varp"):
        pairs_of = get.attention_pairs_df(adata, key=key)
        first = pairs_of["gene"].iloc[0] if len(pairs_of) else None
        for column in ("gene", "attends_to"):
            pairs_of[column] = pairs_of[column].map(dict(zip(adata.var_names, labels, strict=True)))
        section.add("Pairs of genes", tabulate(pairs_of.groupby("gene", sort=False).head(_OTHERS)))
        if first is not None:
            section.add("", draw(pl.attention_neighbors, adata, first, key=key))
    section.may.append("Where the heads of this model attend, beside uniform attention, ranks and random weights.")
    section.may_not.append(
        "Regulation, or that one gene acts on another. In a systematic evaluation, attention mirrored co-expression, "
        "and simple properties of genes predicted perturbations better (Kendiukhov 2026, arXiv:2602.17532)."
    )


def _attention_of_genes(result: Slots, labels: np.ndarray) -> pd.DataFrame:
    """One row a gene, means over all heads: the table of all heads would have hundreds of rows for each gene."""
    table = pd.DataFrame(
        {
            "gene": labels,
            "n_cells": result.read("var", "n_cells").to_numpy(),
            "rank": result.read("var", "rank").to_numpy(),
            "attention": result.read("varm").mean(axis=1),
            "uniform": result.read("var", "uniform").to_numpy(),
        }
    )
    table["ratio"] = table["attention"] / table["uniform"]
    if result.has("varm", "random"):
        random = result.read("varm", "random").mean(axis=1)
        table["random_ratio"] = random / result.read("var", "random_uniform").to_numpy()
    table = table[table["n_cells"] >= _MIN_CELLS]
    return table.sort_values("ratio", ascending=False, kind="stable", ignore_index=True)


def _add_difference(section: Section, result: Slots) -> None:
    """Draw what a deletion changes, or how the first two groups differ."""
    params, of = section.params, {}
    if "deleted" not in params:
        groups = result.names("of")[1:]
        if len(groups) < 2:
            return
        of = {"group": groups[1], "reference": groups[0]}
    if "donor_key" not in params:
        remedy = "Name donors with donor_key for tests over donors."
        section.warnings.append(_CELLS_ARE_NO_REPLICATES.format(remedy=remedy))
    title = f"Difference between {of['group']} and {of['reference']}" if of else "What the deletion changes"
    section.add(title, draw(pl.attention_difference, result.adata, key=result.key, min_cells=_MIN_CELLS, **of))


def _embedding(section: Section, result: Slots, names: str | None, labels: np.ndarray) -> None:
    of, element = ("cells", "obsm") if section.function == "tl.embed" else ("genes", "varm")
    vectors = result.read(element)
    n = int(np.isfinite(vectors[:, 0]).sum())
    section.summary = f"{n:,} of {len(vectors):,} {of} embedded as vectors of {vectors.shape[1]:,} numbers."
    section.warnings.append(
        "An embedding has no control of its own. Without fine-tuning, such embeddings were often worse than highly "
        "variable genes or scVI (Kedzierska et al., Genome Biology 2025, doi:10.1186/s13059-025-03574-x)."
    )
    section.may.append(f"Which {of} are alike to this model.")
    remedy = (
        "gfx.tl.classify_cells with a linear probe compares it with PCA on your labels, with held-out donors."
        if of == "cells"
        else "gfx.tl.classify_genes with a linear probe compares it with baselines on your labels, with held-out genes."
    )
    section.may_not.append(f"That it separates what you are interested in better than a simple method does. {remedy}")


#: Kinds of results in the order of the page: their title, and what tells of them.
_TOLD: dict[str, tuple[str, Callable]] = {
    "tl.delete_genes": ("Deleted genes", _perturbation),
    "tl.overexpress_genes": ("Overexpressed genes", _perturbation),
    "tl.shift_genes": ("Shifted genes", _perturbation),
    "tl.screen_genes": ("Screen", _screen),
    "tl.classify_genes": ("Classified genes, held out", _classification),
    "tl.classify_cells": ("Classified cells, held out", _classification),
    "tl.predict_genes": ("Predicted classes of genes", _predicted_genes),
    "tl.predict_cells": ("Predicted classes of cells", _predicted_cells),
    "tl.attention": ("Attention", _attention),
    "tl.embed": ("Embedded cells", _embedding),
    "tl.embed_genes": ("Embedded genes", _embedding),
}

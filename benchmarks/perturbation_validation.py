"""Whether genes deleted in silico tell what is known of them: `python benchmarks/perturbation_validation.py DATA`.

DATA is a folder of reference data: `cells/eval/pbmc3k_10x.h5ad`, `cells/train/friedman2018_ipsc_cardiac_d2_d5.h5ad`,
`cells/perturb/norman2019_mcfaline2023_500hvg.h5ad` and `genes/collectri_human.tsv`. Prints JSON. Four questions, each
beside what needs no model:

- blood: does deleting a gene that marks a lineage move cells of that lineage more than others, beside random genes of
  the same rank in the same cells? Baselines: random weights, and how much more the gene is expressed there.
- calibration: are genes drawn at random called special as rarely as p promises?
- heart: do known targets of cardiac factors move farther than genes seen in as many cells, in cells of day 5? Do the
  factors move cells of day 2 towards day 5, brought to the front, and back when deleted? Do pairs cooperate?
- measured: does a gene brought to the front in control cells move them towards the cells in which it was activated,
  rather than towards those of other genes? Baselines: no change, the mean of all other
  perturbed cells, random weights. And can control and perturbed cells be told apart at all?

About 40 minutes on a core with `mini`; `--only blood` and so on asks one question, `--figures FOLDER` draws.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from itertools import combinations
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from embedding_quality import random_twin, tokens
from scipy import stats

import gfx

LINEAGES = {
    "T": ("CD4 T", "CD8 T"),
    "B": ("B",),
    "monocytes": ("Monocytes",),
    "NK": ("NK",),
}
MARKERS = {
    "T": ("CD3D", "CD3E", "IL7R", "LDHB"),
    "B": ("CD79A", "CD79B", "MS4A1", "CD74"),
    "monocytes": ("LYZ", "S100A8", "S100A9", "CST3", "FCN1"),
    "NK": ("NKG7", "GNLY", "GZMB", "PRF1"),
}
FACTORS = ("GATA4", "TBX5", "NKX2-5", "HAND1", "HAND2", "MEF2C", "ISL1", "GATA6", "MEIS2")
PAIRED = ("GATA4", "HAND1", "ISL1")
N_CELLS = 60
#: The factors are rarer, and the cells longer.
HEART_CELLS = 100
MIN_TARGETS = 5
N_CALIBRATION = 200


def some_cells(adata: ad.AnnData, rows: np.ndarray, n: int = N_CELLS) -> ad.AnnData:
    rows = np.flatnonzero(rows)
    rng = np.random.default_rng(0)
    return adata[np.sort(rng.choice(rows, min(n, len(rows)), replace=False))].copy()


def controls(adata: ad.AnnData, key: str | None = None) -> dict[str, float]:
    table = gfx.get.controls_df(adata, key=key)
    return {f"{row.control}: {row.measure}, {row.statistic}": rounded(row.value) for row in table.itertuples()}


def rounded(value: float, digits: int = 3) -> float | None:
    return None if not np.isfinite(value) else round(float(value), digits)


# --- blood ---------------------------------------------------------------------------------------------------------


def blood(folder: Path, model: str | None, figures: Path | None) -> dict[str, object]:
    """Delete every marker in the cells of every lineage."""
    adata = ad.read_h5ad(folder / "cells/eval/pbmc3k_10x.h5ad")
    lineage = lineage_of(adata.obs["cell_type"].astype(str).to_numpy())
    genes = [gene for of in MARKERS.values() for gene in of if gene in adata.var_names]
    rows, report = [], {}
    for name in LINEAGES:
        cells = some_cells(adata, lineage == name)
        gfx.tl.delete_genes(cells, genes, model=model)
        rows.append(gfx.get.deletion_df(cells).assign(lineage=name))
        report[f"controls in {name}"] = controls(cells)
        if figures is not None:
            save(gfx.pl.deletion(cells, show=False), figures / f"blood_{name}.png")
    table = pd.concat(rows, ignore_index=True)
    table["own"] = [
        table_gene in MARKERS[name] for table_gene, name in zip(table["perturbation"], table["lineage"], strict=True)
    ]
    report["markers"] = [
        compare_lineages(of) | {"gene": gene} for gene, of in table.groupby("perturbation", sort=False)
    ]
    found = pd.DataFrame(report["markers"])
    for value in ("z", "shift", "shift_random_weights", "expression"):
        pair = found[[f"{value}_own", f"{value}_others"]].dropna().astype(float)
        own, others = pair.to_numpy().T
        report[f"own lineage above others, {value}"] = {
            "genes": len(pair),
            "above": int((own > others).sum()),
            "p": rounded(stats.binomtest(int((own > others).sum()), max(len(pair), 1)).pvalue, 4)
            if len(pair)
            else None,
        }
    kept = table.dropna(subset=["z"])
    report["mean z of markers in their own lineage"] = rounded(kept.loc[kept["own"], "z"].mean())
    report["mean z of markers in other lineages"] = rounded(kept.loc[~kept["own"], "z"].mean())
    return report


def lineage_of(cell_type: np.ndarray) -> np.ndarray:
    out = np.full(len(cell_type), "", dtype=object)
    for name, parts in LINEAGES.items():
        for part in parts:
            out[np.char.find(cell_type.astype(str), part) >= 0] = name
    return out


def compare_lineages(of_gene: pd.DataFrame) -> dict[str, float | None]:
    """One gene in its own lineage, and in the others with enough cells, weighted by their number."""
    own, others = of_gene[of_gene["own"]], of_gene[~of_gene["own"]].dropna(subset=["z"])
    columns = {
        "z": "z",
        "shift": "shift_mean",
        "shift_random_weights": "random_weights_shift_mean",
        "expression": "expression_mean",
    }
    out: dict[str, float | None] = {}
    for name, column in columns.items():
        digits = 12 if "shift" in name else 3
        out[f"{name}_own"] = rounded(own[column].mean(), digits) if len(own) else None
        out[f"{name}_others"] = (
            rounded(np.average(others[column], weights=others["n_cells"]), digits) if len(others) else None
        )
    return out


# --- calibration ---------------------------------------------------------------------------------------------------


def calibration(folder: Path, model: str | None, figures: Path | None) -> dict[str, object]:
    """Delete genes drawn at random: as many are called special as p promises, and none follows the rank."""
    adata = ad.read_h5ad(folder / "cells/eval/pbmc3k_10x.h5ad")
    lineage = lineage_of(adata.obs["cell_type"].astype(str).to_numpy())
    cells = some_cells(adata, lineage == "T")
    detected = np.asarray((cells.X > 0).mean(axis=0)).ravel()
    known = gfx.models.load(model or "mini").vocabulary.resolve(cells.var_names) >= 0
    often = cells.var_names[known & (detected >= 0.1)]
    genes = np.random.default_rng(0).choice(often, N_CALIBRATION, replace=False).tolist()
    gfx.tl.delete_genes(cells, genes, model=model)
    table = gfx.get.deletion_df(cells, min_cells=1)
    shift, rank, z, p = (table[column].to_numpy() for column in ("shift_mean", "rank_mean", "z", "p"))
    n_sets = np.where(np.isfinite(p), table["n_random"], 0)
    strata = {"3 to 9": (n_sets > 2) & (n_sets < 10), "10 to 29": (n_sets > 9) & (n_sets < 30), "30 to 50": n_sets > 29}
    return {
        "random genes": int(np.isfinite(z).sum()),
        "mean z": rounded(np.nanmean(z)),
        "sd of z": rounded(np.nanstd(z, ddof=1)),
        "share with p at most 0.1": rounded(np.nanmean(p <= 0.1)),
        "genes without p": int(np.isnan(p).sum()),
        "share with p at most 0.1, by number of random sets": {
            name: [int(of.sum()), rounded(np.mean(p[of] <= 0.1))] for name, of in strata.items() if of.any()
        },
        "genes by p, in tenths": np.histogram(p[np.isfinite(p)], np.linspace(0, 1, 11))[0].tolist(),
        "fdr below 0.05": int((table["fdr"] < 0.05).sum()),
        "Spearman of shift with rank": rounded(stats.spearmanr(shift, rank, nan_policy="omit").statistic),
        "Spearman of z with rank": rounded(stats.spearmanr(z, rank, nan_policy="omit").statistic),
        "Spearman of context with rank": rounded(
            stats.spearmanr(table["context_mean"], rank, nan_policy="omit").statistic
        ),
        "controls": controls(cells),
    }


# --- heart ---------------------------------------------------------------------------------------------------------


def heart(folder: Path, model: str | None, figures: Path | None) -> dict[str, object]:
    """Delete cardiac factors and ask for their targets; move cells between days; delete pairs."""
    adata = ad.read_h5ad(folder / "cells/train/friedman2018_ipsc_cardiac_d2_d5.h5ad")
    edges = pd.read_csv(folder / "genes/collectri_human.tsv", sep="\t")
    day = adata.obs["day"].astype(str)
    late = some_cells(adata, (day == "day5").to_numpy(), 2 * HEART_CELLS)
    known = [gene for gene in FACTORS if gene in late.var_names]
    report: dict[str, object] = {}

    pairs = list(combinations([gene for gene in PAIRED if gene in known], 2))
    gfx.tl.delete_genes(late, [*known, *pairs], model=model)
    report["deleted on day 5"] = records(
        gfx.get.deletion_df(late),
        (
            "perturbation",
            "n_cells",
            "shift_mean",
            "composition_mean",
            "position_mean",
            "context_mean",
            "rank_mean",
            "random_mean",
            "z",
            "p",
            "fdr",
        ),
    )
    report["controls on day 5"] = controls(late)
    report["pairs"] = records(
        gfx.get.synergy_df(late),
        (
            "perturbation",
            "n_cells",
            "on_shifts_mean",
            "on_shifts_z",
            "on_shifts_p",
            "on_vectors_mean",
            "on_vectors_low",
            "on_vectors_high",
            "on_vectors_z",
            "on_vectors_p",
        ),
    )
    report["targets"] = targets(late, known, edges)
    with tempfile.TemporaryDirectory() as twin:
        random = random_twin(gfx.models.load(model or "mini"), Path(twin), seed=0)
        gfx.tl.delete_genes(late, known, model=random, key_added="random_weights")
    report["targets, random weights"] = targets(late, known, edges, key="random_weights")
    if figures is not None:
        save(gfx.pl.deletion(late, show=False), figures / "heart_deletion.png")
        if gfx.get.synergy_df(late)["on_vectors_mean"].notna().any():
            save(gfx.pl.synergy(late, show=False)[0], figures / "heart_synergy.png")
        of = targets_of("GATA4", edges)
        save(gfx.pl.gene_effects(late, "GATA4", targets={"known targets": of}, show=False), figures / "heart_genes.png")

    both = some_cells(adata, np.ones(adata.n_obs, dtype=bool), 3 * HEART_CELLS)
    columns = (
        "perturbation",
        "n_cells",
        "toward_mean",
        "toward_random_mean",
        "toward_z",
        "toward_p",
        "toward_fdr",
        "logfc",
    )
    for tool, start, goal in (("overexpress_genes", "day2", "day5"), ("delete_genes", "day5", "day2")):
        getattr(gfx.tl, tool)(both, known, model=model, groupby="day", start=start, goal=goal, key_added=tool)
        table = gfx.get.deletion_df(both, key=tool)
        report[f"{tool}, {start} to {goal}"] = records(table[table["role"] == "goal"], columns)
        report[f"controls, {tool}"] = controls(both, tool)
        if figures is not None:
            save(gfx.pl.deletion(both, key=tool, show=False), figures / f"heart_{tool}.png")
    return report


def targets_of(factor: str, edges: pd.DataFrame) -> list[str]:
    return sorted(set(edges.loc[edges["source"] == factor, "target"]) - {factor})


def targets(
    adata: ad.AnnData, factors: list[str], edges: pd.DataFrame, key: str | None = None
) -> list[dict[str, object]]:
    """Compare known targets of each factor with other genes, and with genes seen in as many cells."""
    rows = []
    for factor in factors:
        genes = [gene for gene in targets_of(factor, edges) if gene in adata.var_names]
        if not genes or factor not in set(gfx.get.gene_effects_df(adata, key=key)["perturbation"]):
            continue
        table = gfx.get.target_effects_df(adata, {"targets": genes}, perturbation=factor, key=key)
        by = {row.others: row for row in table.itertuples()}
        if by["all other genes"].n_targets < MIN_TARGETS:
            continue
        rows.append(
            {
                "factor": factor,
                "n_targets": int(by["all other genes"].n_targets),
                **{f"auc against {name}": rounded(row.auc) for name, row in by.items()},
                **{f"p against {name}": rounded(row.p, 4) for name, row in by.items()},
            }
        )
    return rows


# --- measured ------------------------------------------------------------------------------------------------------


def measured(folder: Path, model: str | None, figures: Path | None) -> dict[str, object]:
    """Bring activated genes to the front in control cells, and ask which measured cells they then resemble."""
    adata = ad.read_h5ad(folder / "cells/perturb/norman2019_mcfaline2023_500hvg.h5ad")
    adata = adata[(adata.obs["dataset"] == "norman19").to_numpy()].copy()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str)
    names = sorted(set(adata.obs["perturbation"]) - {"control"})
    vocabulary = gfx.models.load(model or "mini").vocabulary
    single = [name for name in names if "+" not in name and vocabulary.resolve([name])[0] >= 0]
    gfx.pp.tokenize(adata, model=model or "mini", gene_ids="ensembl_id")
    report: dict[str, object] = {
        "genes a cell, median": int(np.median(adata.obs["gfx_tokens_n"])) - 2 * vocabulary.has_cls,
        "perturbations": len(single),
    }
    rows, areas = [], []
    for gene in single:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that states cannot be told apart is what is asked here
            gfx.tl.overexpress_genes(
                adata,
                gene,
                model=model,
                groupby="perturbation",
                start="control",
                goal=gene,
                controls=None,
                key_added="one",
            )
        table = gfx.get.deletion_df(adata, key="one")
        alternatives = table[table["role"] != "start"].set_index("state")["toward_mean"]
        alternatives = alternatives[[name for name in alternatives.index if "+" not in name]]
        rank = int((alternatives > alternatives[gene]).sum()) + 1
        areas.append(gfx.get.controls_df(adata, key="one").set_index("control").loc["state_axis", "value"])
        rows.append(
            {
                "gene": gene,
                "auc control against perturbed": rounded(areas[-1]),
                "toward its own": rounded(alternatives[gene], 5),
                "rank among perturbations": rank,
            }
        )
    found = pd.DataFrame(rows)
    n = len(alternatives)
    report["genes"] = rows
    report["median AUC of control against perturbed cells"] = rounded(np.median(areas))
    report["mean reciprocal rank"] = rounded((1 / found["rank among perturbations"]).mean())
    report["mean reciprocal rank by chance"] = rounded(np.mean(1 / np.arange(1, n + 1)))
    report["moves towards its own (no change would be 0)"] = int((found["toward its own"] > 0).sum())
    control = adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()
    gfx.tl.overexpress_genes(control, single, model=model)
    report["controls"] = controls(control)
    report["agreement of displacements, median cosine with the measured one"] = displacements(adata, single, model)
    return report


def displacements(adata: ad.AnnData, single: list[str], model: str | None) -> dict[str, float | None]:
    """Compare the displacement of control cells in silico with the measured one, in the same embedding."""
    with gfx.settings.override(dtype="float32"):
        gfx.tl.embed(adata, model=model)
    where = adata.obs["perturbation"].to_numpy()
    means = {name: adata.obsm["X_gfx"][where == name].mean(axis=0) for name in [*single, "control"]}
    measured = np.array([means[name] - means["control"] for name in single])
    others = np.array([np.delete(measured, at, axis=0).mean(axis=0) for at in range(len(single))])
    loaded = gfx.models.load(model or "mini")
    control = adata[where == "control"].copy()
    in_silico = overexpressed(control, single, loaded)
    with tempfile.TemporaryDirectory() as folder:
        random = overexpressed(control, single, random_twin(loaded, Path(folder), seed=0))
    return {
        "no change": 0.0,
        "mean of the other perturbations": median_cosine(measured, others),
        "model": median_cosine(measured, in_silico),
        "model, of another perturbation": median_cosine(measured, np.roll(in_silico, 1, axis=0)),
        "random weights": median_cosine(measured, random),
    }


def overexpressed(adata: ad.AnnData, genes: list[str], model: gfx.models.Model) -> np.ndarray:
    """Mean displacement of cells by each gene at the front, `(n_genes, d)`."""
    from gfx._core.edits import Edits
    from gfx._engine.device import choose_device
    from gfx._engine.encoder import load_encoder
    from gfx._engine.perturb import run_edits

    vocabulary, device = model.vocabulary, choose_device(None)
    encoder = load_encoder(model.weights, model.config, n_layers=model.n_layers - 1, device=device, dtype=torch.float32)
    ids, lengths = tokens(adata, model)
    rows, sets = np.flatnonzero(lengths > vocabulary.n_specials), vocabulary.resolve(genes).astype(np.int64)[:, None]
    cell, which = np.tile(rows, len(genes)), np.repeat(np.arange(len(genes)), len(rows))
    how = "cls" if vocabulary.has_cls else "mean"
    edits = Edits("overexpress", list(sets), cell, which)
    effects = run_edits(encoder, ids, lengths, vocabulary, edits, how=how, positions="close", keep_vectors=True)
    vectors = effects["vectors"]
    moved = vectors[:, 1] - vectors[:, 0]
    return np.stack([moved[which == at].mean(axis=0) for at in range(len(genes))])


def median_cosine(one: np.ndarray, other: np.ndarray) -> float | None:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return rounded(np.median((one * other).sum(axis=1) / lengths))


# --- all -----------------------------------------------------------------------------------------------------------


def records(table: pd.DataFrame, columns: tuple[str, ...]) -> list[dict[str, object]]:
    return [
        {name: rounded(value, 6) if isinstance(value, float) else value for name, value in row.items()}
        for row in table[[c for c in columns if c in table]].to_dict("records")
    ]


def save(ax: object, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = ax.get_figure(root=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


QUESTIONS = {"blood": blood, "calibration": calibration, "heart": heart, "measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="a published name or a folder; the embedded model if left out")
    parser.add_argument("--only", choices=QUESTIONS, help="one question alone")
    parser.add_argument("--figures", type=Path, help="folder for pictures")
    given = parser.parse_args()
    if given.figures is not None:
        import matplotlib as mpl

        mpl.use("agg")
    report: dict[str, object] = {"benchmark": "perturbation validation", "model": given.model or "mini"}
    with gfx.settings.override(verbosity=1):
        for name, ask in QUESTIONS.items():
            if given.only in (None, name):
                report[name] = ask(given.data, given.model, given.figures)
                print(json.dumps({name: report[name]}), file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

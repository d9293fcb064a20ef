"""The gene tasks of the 2023 paper: `python benchmarks/paper_gene_tasks.py LABELS CELLS [CELLS ...] [--model V1-10M]`.

LABELS is a table with the columns `task`, `class`, `ensembl_id`. CELLS are h5ad files with raw counts and
`var["ensembl_id"]`, from which cells are drawn together; or, alone, the paper's own cells, tokens of the V1 vocabulary
(`ctheodoris/Genecorpus-30M`, `example_input_files/gene_classification`): a `.dataset` folder or an `.arrow` file of it.
Each may be an address, `https://.../dataset.arrow#sha256=...`, fetched by pooch once and verified; what the paper's
files must hash to is on their pages, not here, for we have not seen them. The model is fetched and verified likewise.

Prints JSON. For each task: the published AUC, per occurrence; and ours, per occurrence and per gene, mean and standard
deviation over seeds, beside random weights, expression, and the majority; and per occurrence over the folds of one
seed, weighted by points of the ROC curve like the paper's, but on a grid of 101. `--learning-curve 1000 1500 2000 2500
5000` is the paper's NOTCH1 series (0.59, 0.64, 0.73, 0.77, 0.80; 0.81 with 10,000).

With V1-10M and the paper's cells, hours on a GPU: `--method fine_tune --seeds 1`. Here, `--model mini` on cells that
stand in for the paper's; a linear head takes about half an hour on two cores for all tasks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pooch
import pyarrow as pa
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

import gfx
from gfx._results import Slots, key_of

#: AUC and its standard deviation as published, per occurrence, with V1-10M; and which class comes second.
PUBLISHED = {
    "dosage_sensitivity_TFs": (0.91, 0.02, "Dosage-insensitive TFs"),
    "n1_network": (0.81, 0.06, "n1_peripheral"),
    "n1_target": (0.81, 0.07, None),
    "bivalent_vs_no_methyl": (0.93, 0.07, None),
    "bivalent_vs_lys4_only": (0.88, 0.09, None),
    "tf_regulatory_range": (0.74, 0.08, None),
}
#: Taught with the genes of one task, tested on those of another, genome-wide; the published AUC.
GENOME_WIDE = {"bivalent_vs_lys4_only_genomewide": ("bivalent_vs_lys4_only", 0.78)}


def local(source: str) -> Path:
    """Path of a file; one with an address is fetched, and must have the hash that stands behind it."""
    if "://" not in source:
        return Path(source)
    address, _, digest = source.partition("#")
    if not digest.startswith("sha256="):
        msg = f"{address} comes without its hash: append #sha256=..., as the page of the file gives it."
        raise SystemExit(msg)
    digest = digest.removeprefix("sha256=")
    name = f"{digest[:12]}-{address.rpartition('/')[2]}"
    return Path(pooch.retrieve(address, f"sha256:{digest}", name, pooch.os_cache("gfx-benchmarks"), progressbar=True))


def read_labels(table: pd.DataFrame, task: str) -> dict[str, list[str]]:
    """Genes of each class; genes in two classes, as two of the published lists have, are left out of both."""
    rows = table[table["task"] == task]
    classes = rows.groupby("ensembl_id")["class"].nunique()
    rows = rows[~rows["ensembl_id"].isin(classes.index[classes > 1])]
    return {str(name): sorted(set(genes)) for name, genes in rows.groupby("class", sort=False)["ensembl_id"]}


def read_cells(files: list[Path], n_cells: int, seed: int = 0) -> ad.AnnData:
    """Draw cells from h5ad files, each file as often as it has cells; genes by Ensembl id, counts of doubles summed."""
    parts = []
    for file in files:
        adata = ad.read_h5ad(file)
        ids = adata.var["ensembl_id"].astype(str).to_numpy()
        known = np.flatnonzero(np.char.startswith(ids.astype(str), "ENSG"))
        names, column = np.unique(ids[known], return_inverse=True)
        to_gene = csr_matrix((np.ones(len(known), np.float32), (np.arange(len(known)), column)))
        part = ad.AnnData(csr_matrix(adata.X[:, known] @ to_gene), var=pd.DataFrame(index=names))
        part.obs_names = [f"{file.stem}:{name}" for name in adata.obs_names]
        part.obs["source"] = file.stem
        parts.append(part)
    n_all = sum(part.n_obs for part in parts)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(n_all)[:n_cells])
    first = np.cumsum([0, *(part.n_obs for part in parts)])
    some = []
    for part, start in zip(parts, first[:-1], strict=True):
        rows = chosen[(chosen >= start) & (chosen < start + part.n_obs)] - start
        if len(rows):
            some.append(part[rows])
    return ad.concat(some, join="outer", fill_value=0)


def read_dataset(dataset: Path, model: gfx.models.Model, n_cells: int, seed: int = 42) -> ad.AnnData:
    """Read tokens that the official software wrote, as if `gfx.pp.tokenize` had; there are no counts."""
    tables = []
    for file in [dataset] if dataset.suffix == ".arrow" else sorted(dataset.glob("*.arrow")):
        with pa.memory_map(str(file)) as source:
            tables.append(pa.ipc.open_stream(source).read_all().select(["input_ids"]))
    rows = pa.concat_tables(tables)["input_ids"].combine_chunks()
    chosen = np.random.default_rng(seed).permutation(len(rows))[:n_cells]
    some = [np.asarray(rows[int(at)].as_py()) for at in chosen]
    lengths = np.array([len(row) for row in some])
    ids = np.full((len(some), lengths.max()), model.vocabulary.pad, dtype=model.vocabulary.token_dtype)
    for at, row in enumerate(some):
        ids[at, : len(row)] = row
    is_gene = ~model.vocabulary.is_special
    adata = ad.AnnData(
        obs=pd.DataFrame(index=chosen.astype(str)), var=pd.DataFrame(index=model.vocabulary.ids[is_gene])
    )
    vocabulary = {"vocabulary": model.vocabulary.name, "vocabulary_sha256": model.vocabulary.sha256}
    Slots(adata, "pp.tokenize", key_of("pp.tokenize", None)).write(
        "read the tokens", params=vocabulary | {"max_length": model.max_length}, obsm={"": ids}, obs={"n": lengths}
    )
    return adata


def over_folds(metrics: pd.DataFrame, roc: pd.DataFrame) -> dict[str, float]:
    """Mean and standard deviation of the AUC per occurrence over the folds of the first seed, weighted as published.

    The weight of a fold is the number of points of its curve; curves are kept on a grid, so these are distinct rates.
    """
    areas = metrics[(metrics["metric"] == "auc") & (metrics["unit"] == "occurrence") & (metrics["method"] == "model")]
    areas = areas[areas["repeat"] == 0].set_index("fold")["value"]
    curves = roc[(roc["unit"] == "occurrence") & (roc["method"] == "model") & (roc["repeat"] == 0)]
    weights = curves.groupby("fold")["tpr"].nunique().reindex(areas.index).to_numpy(dtype=float)
    weights /= weights.sum()
    mean = float(weights @ areas.to_numpy())
    return {"mean": round(mean, 3), "sd": round(float(np.sqrt(weights @ (areas.to_numpy() - mean) ** 2)), 3)}


def classify(adata: ad.AnnData, labels: dict[str, list[str]], args: argparse.Namespace, **how: object) -> None:
    """Classify genes by the model and the method that were asked for."""
    given = {"model": args.model, "method": args.method, "max_cells": args.max_cells}
    gfx.tl.classify_genes(adata, labels, unknown="drop", **given, **how)


def run_task(
    adata: ad.AnnData, labels: dict[str, list[str]], second: str | None, args: argparse.Namespace
) -> dict[str, object]:
    """Classify the genes of one task; the class that is scored comes second."""
    if second is not None:
        labels = {name: labels[name] for name in sorted(labels, key=lambda name: name == second)}
    start = time.perf_counter()
    classify(adata, labels, args, n_repeats=args.seeds, learning_curve=args.learning_curve)
    seconds = time.perf_counter() - start
    result = adata.uns["gfx_gene_class"]
    summary = result["summary"]
    auc = summary[summary["metric"] == "auc"]
    return {
        "genes": {name: int((adata.var["gfx_gene_class"] == name).sum()) for name in labels},
        "scored": int((adata.var["gfx_gene_class_n_cells"] > 0).sum()),
        "cells": int(result["params"]["n_cells"]),
        "seconds": round(seconds),
        **{
            f"{row.method}, per {row.unit}": {
                "auc": round(row.mean, 3),
                "sd": None if np.isnan(row.sd) else round(row.sd, 3),
                **({} if np.isnan(row.low) else {"interval": [round(row.low, 3), round(row.high, 3)]}),
            }
            for row in auc.itertuples()
            if row.method != "majority"
        },
        "over folds of one seed, weighted by distinct rates of the ROC curve": over_folds(
            result["metrics"], result["roc"]
        ),
        **({"learning curve, per gene": of_few_cells(adata)} if args.learning_curve else {}),
    }


def of_few_cells(adata: ad.AnnData) -> dict[str, float]:
    """AUC per gene by the number of cells that were learnt from."""
    curve = gfx.get.learning_curve_df(adata)
    rows = curve[(curve["metric"] == "auc") & (curve["unit"] == "gene") & (curve["method"] == "model")]
    return {str(n): round(mean, 3) for n, mean in zip(rows["n_cells"], rows["mean"], strict=True)}


def run_genome_wide(
    adata: ad.AnnData, labels: dict[str, list[str]], wide: dict[str, list[str]], args: argparse.Namespace
) -> dict[str, object]:
    """Teach with all genes of one task, and tell the others of the genome; beside how many cells have a gene."""
    with tempfile.TemporaryDirectory() as folder:
        how = {"model": args.model, "method": args.method, "max_cells": args.max_cells, "unknown": "drop"}
        gfx.tl.predict_genes(adata, gfx.models.fine_tune_genes(adata, labels, folder, **how))
    class_of = {gene: at for at, name in enumerate(labels) for gene in wide[name]}
    genes = adata.var_names.to_series().map(class_of)
    scores = adata.varm["gfx_predicted_genes"][:, 1]
    others = ~adata.var["gfx_predicted_genes_in_training"].to_numpy() & genes.notna().to_numpy() & ~np.isnan(scores)
    truth, n_cells = genes[others], adata.var["gfx_predicted_genes_n_cells"][others]
    return {
        "genes": int(others.sum()),
        "model, per gene": {"auc": round(roc_auc_score(truth, scores[others]), 3)},
        "detection, per gene": {"auc": round(roc_auc_score(truth, n_cells), 3)},
    }


def report(args: argparse.Namespace) -> None:
    """Ask all questions, and print what comes out."""
    warnings.filterwarnings("ignore", message="Variable names are not unique")
    table = pd.read_csv(args.labels)
    model = gfx.models.load(args.model)
    if args.cells[0].suffix in {".dataset", ".arrow"}:
        adata = read_dataset(args.cells[0], model, args.max_cells)
    else:
        adata = read_cells(args.cells, args.max_cells)
        gfx.pp.tokenize(adata, model=model)
    told: dict[str, object] = {"model": model.name, "method": args.method, "seeds": args.seeds}
    for task in args.tasks:
        if task in GENOME_WIDE:
            taught, area = GENOME_WIDE[task]
            found = run_genome_wide(adata, read_labels(table, taught), read_labels(table, task), args)
            published = {"auc": area}
        else:
            area, sd, second = PUBLISHED[task]
            found = run_task(adata, read_labels(table, task), second, args)
            published = {"auc": area, "sd": sd}
            if args.figures is not None:
                args.figures.mkdir(parents=True, exist_ok=True)
                drawn = gfx.pl.roc(adata, figsize=(4.5, 4), show=False)
                drawn.figure.savefig(args.figures / f"{task}.png", dpi=150, bbox_inches="tight")
        told[task] = {"published, V1-10M fine-tuned": published, **found}
        print(json.dumps({task: told[task]}), flush=True)
    print(json.dumps(told, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=local)
    parser.add_argument("cells", type=local, nargs="+")
    parser.add_argument("--model", default="V1-10M")
    parser.add_argument("--method", default="fine_tune", choices=["fine_tune", "linear_probe"])
    parser.add_argument("--tasks", nargs="+", default=[*PUBLISHED, *GENOME_WIDE])
    parser.add_argument("--max-cells", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--figures", type=Path, help="folder for pictures of ROC curves")
    parser.add_argument(
        "--learning-curve", type=int, nargs="+", help="numbers of cells, as in the paper's NOTCH1 series"
    )
    args = parser.parse_args()
    with gfx.settings.override(verbosity=1):  # what is printed is JSON
        report(args)


if __name__ == "__main__":
    main()

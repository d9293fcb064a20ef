"""Classifiers on real cells, and a linear head against a naive loop: `python benchmarks/classification.py DATA`.

DATA is a folder of reference data with `cells/eval`, `cells/train` and `genes/paper_gene_labels.csv.gz`. Prints JSON:

- cells: macro-F1 and AUC of cell types held out with the embedded model, beside random weights, logistic regression on
  variable genes and on principal components, and the majority; five seeds; whole batches or donors held out where a
  set has them; and how they grow with the number of cells to learn from.
- speed: dosage sensitivity of transcription factors from `--cells` cells of `--length` tokens. The naive loop is what
  scripts do: for each of five folds, the token-classification model in float32 through batches of 12, one pass with the
  recipe of the paper, then all cells again to score. gfx: `method="linear_probe"`, with one pass for all folds. Cells
  per second from start to AUC, and both AUCs. The naive loop runs on `--naive-cells` of the cells.

`--only cells` and so on asks one question. About 40 minutes on two cores; nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from paper_gene_tasks import read_cells, read_labels
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

import gfx

#: Labelled cells: the file, the column to learn, the batches or donors to hold out, and points of a learning curve.
SETS = {
    "blood": ("eval/pbmc3k_10x", "cell_type", None, (100, 300, 1000)),
    "lung lines, protocols held out": ("eval/tian2019_sc_mixology_lung_lines", "cell_type", "protocol", (50, 150, 400)),
    "tumour dendritic cells, patients held out": ("train/zilionis2019_lung_dc", "cell_type", "patient", (50, 150, 400)),
}
MODEL = "mini"
BATCH, RATE, WARM_UP, DECAY = 12, 5e-5, 500, 1e-3
TASK = "dosage_sensitivity_TFs"


def classify_set(data: Path, name: str, seeds: int) -> dict[str, object]:
    """Classify one set, with its learning curve."""
    file, column, batch, points = SETS[name]
    adata = ad.read_h5ad(data / "cells" / f"{file}.h5ad")
    adata.var_names = adata.var["ensembl_id"].astype(str)
    n_splits = 5 if batch is None else min(5, adata.obs[batch].nunique())
    counts = adata.obs[column].value_counts()
    mask = adata.obs[column].isin(counts.index[counts >= n_splits]).to_numpy()
    start = time.perf_counter()
    gfx.tl.classify_cells(
        adata,
        column,
        donor_key=batch,
        model=MODEL,
        method="linear_probe",
        mask_obs=mask,
        n_splits=n_splits,
        n_repeats=seeds,
        learning_curve=points,
    )
    table = gfx.get.learning_curve_df(adata)
    found: dict[str, object] = {"cells": int(mask.sum()), "folds": n_splits}
    found["seconds"] = round(time.perf_counter() - start)
    for (method, n), rows in table.groupby(["method", "n_cells"], sort=False):
        values = rows.set_index("metric")
        row = {metric: round(values.loc[metric, "mean"], 3) for metric in ("macro_f1", "auc")}
        row["macro_f1_sd"] = round(values.loc["macro_f1", "sd"], 3)
        if not np.isnan(values.loc["macro_f1", "low"]):
            row["macro_f1_interval"] = [round(values.loc["macro_f1", end], 3) for end in ("low", "high")]
        found[f"{method}, {n} cells"] = row
    return found


def naive(ids: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Fine-tune and score fold by fold; seconds, and the mean AUC per occurrence."""
    from transformers import BertForTokenClassification, get_linear_schedule_with_warmup

    model = gfx.models.load(MODEL)
    longest = int(lengths.max())
    start, areas = time.perf_counter(), []
    for train, held in StratifiedKFold(5, shuffle=True, random_state=0).split(tokens, truth):
        torch.manual_seed(0)
        network = BertForTokenClassification.from_pretrained(model.folder, num_labels=2)
        for block in network.bert.encoder.layer[: model.n_layers - 2]:
            block.requires_grad_(requires_grad=False)
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
        n_steps = -(-len(ids) // BATCH)
        schedule = get_linear_schedule_with_warmup(optimizer, min(WARM_UP, int(0.6 * n_steps)), n_steps)
        class_of = np.full(len(model.vocabulary), -100)
        class_of[tokens[train]] = truth[train]
        scored, scores = [], []
        for learns in (True, False):
            network.train(learns)
            for first in range(0, len(ids), BATCH):
                rows = slice(first, first + BATCH)
                padded = np.zeros((len(ids[rows]), longest), dtype=np.int64)
                for at, (row, n) in enumerate(zip(ids[rows], lengths[rows], strict=True)):
                    padded[at, :n] = row[:n]
                mask = torch.from_numpy((padded != 0).astype(np.int64))
                batch = torch.from_numpy(padded)
                if learns:
                    labels = torch.from_numpy(np.where(padded != 0, class_of[padded], -100))
                    network(batch, attention_mask=mask, labels=labels).loss.backward()
                    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    continue
                with torch.inference_mode():
                    found = network(batch, attention_mask=mask).logits.softmax(-1)[..., 1].numpy()
                at = np.isin(padded, tokens[held])
                scored.append(padded[at])
                scores.append(found[at])
        is_second = np.isin(np.concatenate(scored), tokens[truth == 1])
        areas.append(roc_auc_score(is_second, np.concatenate(scores)))
    return time.perf_counter() - start, float(np.mean(areas))


def compare_speed(data: Path, n_cells: int, n_naive: int, length: int) -> dict[str, object]:
    """Time both from tokens to AUC on cells of one length: thinned to it, and those shorter left out."""
    model = gfx.models.load(MODEL)
    adata = read_cells(sorted((data / "cells" / "train").glob("*.h5ad")), 10**9)
    gfx.pp.tokenize(adata, model=model)
    lengths = adata.obs["gfx_tokens_n"].to_numpy()
    # Where too few cells are that long, they stand in more than once, thinned to other genes each time.
    long = np.flatnonzero(lengths >= length)
    rng = np.random.default_rng(0)
    chosen = rng.choice(long, n_cells, replace=len(long) < n_cells)
    ids = np.zeros((n_cells, length), dtype=adata.obsm["gfx_tokens"].dtype)
    for at, cell in enumerate(chosen):
        inner = np.sort(rng.choice(np.arange(1, lengths[cell] - 1), length - 2, replace=False))
        ids[at] = adata.obsm["gfx_tokens"][cell][[0, *inner, lengths[cell] - 1]]
    some = ad.AnnData(
        obs=pd.DataFrame({"gfx_tokens_n": length}, index=np.arange(n_cells).astype(str)),
        var=pd.DataFrame(index=model.vocabulary.ids[~model.vocabulary.is_special]),
    )
    some.obsm["gfx_tokens"] = ids
    some.uns["gfx_tokens"] = {"params": adata.uns["gfx_tokens"]["params"]}
    labels = read_labels(pd.read_csv(data / "genes" / "paper_gene_labels.csv.gz"), TASK)
    how = {"model": model, "unknown": "drop", "method": "linear_probe", "n_repeats": 1, "controls": None}
    rates: dict[str, object] = {"tokens": length, "cells that are long enough": len(long)}
    for n in dict.fromkeys((n_naive, n_cells)):
        part = some[:n].copy()
        start = time.perf_counter()
        gfx.tl.classify_genes(part, labels, max_cells=n, **how)
        seconds = time.perf_counter() - start
        table = gfx.get.classification_df(part)
        areas = table[table["metric"] == "auc"].set_index("unit")["mean"].round(3).to_dict()
        rates[f"linear head, {n} cells"] = {"seconds": round(seconds, 1), "cells_per_s": round(n / seconds, 1), **areas}
    resolved = {name: model.vocabulary.resolve(genes) for name, genes in labels.items()}
    tokens = np.concatenate([found[found >= 0] for found in resolved.values()]).astype(np.int64)
    truth = np.concatenate([np.full((found >= 0).sum(), at) for at, found in enumerate(resolved.values())])
    seen = np.isin(tokens, ids[:n_naive])
    seconds, area = naive(ids[:n_naive], np.full(n_naive, length), tokens[seen], truth[seen])
    rates[f"naive loop, {n_naive} cells"] = {
        "seconds": round(seconds, 1),
        "cells_per_s": round(n_naive / seconds, 2),
        "occurrence": round(area, 3),
    }
    fast = rates[f"linear head, {n_naive} cells"]["seconds"]
    rates["times as fast"] = round(seconds / fast, 1)
    return rates


def report(args: argparse.Namespace) -> None:
    """Ask all questions, and print what comes out."""
    warnings.filterwarnings("ignore", message="Variable names are not unique")
    found: dict[str, object] = {}
    if args.only != "speed":
        for name in SETS:
            found[name] = classify_set(args.data, name, args.seeds)
            print(json.dumps({name: found[name]}), flush=True)
    if args.only != "cells":
        found["speed"] = compare_speed(args.data, args.cells, args.naive_cells, args.length)
    print(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=["cells", "speed"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--naive-cells", type=int, default=360)
    parser.add_argument("--length", type=int, default=1000)
    args = parser.parse_args()
    with gfx.settings.override(verbosity=1):  # what is printed is JSON
        report(args)


if __name__ == "__main__":
    main()

"""How well nearest neighbours in an embedding name the cell type: `python benchmarks/embedding_quality.py DATA`.

DATA is a folder of h5ad files with raw counts, `var["ensembl_id"]` and `obs["cell_type"]`, which no model was trained
on. Beside the model: PCA of log-normalised variable genes fitted on the same cells, and the same network with random
weights (two seeds). Macro-F1 of 10 nearest neighbours by cosine, five-fold cross-validation, five seeds of the
folds; prints JSON. Where `obs` has one of the columns in BATCHES, whole batches are held out instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
from sklearn.metrics import f1_score
from sklearn.model_selection import LeaveOneGroupOut, StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

import gfx

BATCHES = ("donor", "protocol", "batch")
MIN_CELLS = 10
#: Pooling and hidden layer; the first is what `tl.embed` does by itself for a model with <cls>.
VARIANTS = (("auto", -2), ("mean", -2), ("cls", -1))
N_SEEDS = 5
N_TWINS = 2


def random_twin(model: gfx.models.Model, folder: Path, seed: int) -> Path:
    """Write the model's configuration with weights drawn anew."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from gfx.models._vocabulary_file import write_vocabulary

    torch.manual_seed(seed)
    BertForMaskedLM(BertConfig(**model.config)).save_pretrained(folder)
    write_vocabulary(model.vocabulary, folder)
    return folder


def macro_f1(x: np.ndarray, labels: np.ndarray, batch: np.ndarray | None) -> list[float]:
    neighbours = KNeighborsClassifier(10, metric="cosine")
    if batch is not None:
        predicted = cross_val_predict(neighbours, x, labels, cv=LeaveOneGroupOut(), groups=batch)
        return [f1_score(labels, predicted, average="macro")]
    folds = [StratifiedKFold(5, shuffle=True, random_state=seed) for seed in range(N_SEEDS)]
    return [f1_score(labels, cross_val_predict(neighbours, x, labels, cv=fold), average="macro") for fold in folds]


def pca(adata: ad.AnnData) -> np.ndarray:
    cells = adata.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=2000)
    sc.pp.pca(cells, n_comps=50, mask_var="highly_variable")
    return cells.obsm["X_pca"]


def compare(adata: ad.AnnData, model: gfx.models.Model, twins: list[Path]) -> dict[str, object]:
    counts = adata.obs["cell_type"].value_counts()
    adata = adata[adata.obs["cell_type"].isin(counts.index[counts >= MIN_CELLS])].copy()
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    column = next((name for name in BATCHES if name in adata.obs), None)
    batch = None if column is None else adata.obs[column].astype(str).to_numpy()
    gfx.pp.tokenize(adata, model=model, gene_ids="ensembl_id")
    embeddings: dict[str, list[np.ndarray]] = {"PCA-50, same cells": [pca(adata)]}
    for pooling, hidden_layer in VARIANTS:
        gfx.tl.embed(adata, model=model, hidden_layer=hidden_layer, pooling=pooling)
        embeddings[f"{model.name}, {pooling}, layer {hidden_layer}"] = [adata.obsm["X_gfx"]]
    embeddings["random weights"] = []
    for twin in twins:
        gfx.tl.embed(adata, model=twin)
        embeddings["random weights"].append(adata.obsm["X_gfx"])
    report: dict[str, object] = {"cells": adata.n_obs, "cell_types": len(set(labels)), "held_out": column or "folds"}
    for name, vectors in embeddings.items():
        scores = [score for x in vectors for score in macro_f1(x, labels, batch)]
        report[name] = {"macro_f1": round(float(np.mean(scores)), 3), "sd": round(float(np.std(scores)), 3)}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="a published name or a folder; the embedded model if left out")
    given = parser.parse_args()
    model = gfx.models.load(given.model or "mini")
    report = {}
    with tempfile.TemporaryDirectory() as folder, gfx.settings.override(verbosity=1):
        twins = [random_twin(model, Path(folder) / str(seed), seed) for seed in range(N_TWINS)]
        for path in sorted(given.data.glob("*.h5ad")):
            report[path.stem] = compare(ad.read_h5ad(path), model, twins)
            print(json.dumps({path.stem: report[path.stem]}), file=sys.stderr)
    print(json.dumps({"benchmark": "embedding quality", "model": model.name, **report}, indent=1))


if __name__ == "__main__":
    main()

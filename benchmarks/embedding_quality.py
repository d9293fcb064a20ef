"""How well nearest neighbours in an embedding name the cell type: `python benchmarks/embedding_quality.py DATA`.

DATA is a folder of h5ad files with raw counts, `var["ensembl_id"]` and `obs["cell_type"]`, which no model was trained
on. With `--corpus TRAIN`, the folder of h5ad files that the model was trained on, also: PCA fitted on the corpus and
projected, and what gene embeddings start at, the principal components of co-expression: the mean of a cell's gene
vectors, and the cell's place among the components. With `--held-out FILE` besides, the labelled ones among the held-out
cells are a further set. FILE is the `pretraining.json` of the model, or npz: for every file of the corpus, by its stem,
the rows that training did not see.

Each set: macro-F1 of 10 nearest neighbours by cosine. Where `obs` has one of the columns in BATCHES, each batch is
named by the others, on five draws of 90 % of the cells; elsewhere five-fold cross-validation, five times. Random
weights are drawn five times, and judged, beside the model, on a part of the cells. Prints JSON; about ten minutes on a
core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score, silhouette_score
from sklearn.metrics.pairwise import cosine_distances
from sklearn.model_selection import LeaveOneGroupOut, StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

import gfx

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gfx.models.pretraining._coexpression import Coexpression

BATCHES = ("donor", "patient", "Patient", "protocol", "batch", "sample")
MIN_CELLS = 10
N_VARIABLE = 2000
N_NEIGHBOURS = 10
N_SEEDS = 5
#: Share of the cells in each draw where whole batches are held out: there is one way to do that, hence no other spread.
DRAWN_SHARE = 0.9
#: Cells of a set that random weights embed: five networks on all cells would take longer than all the rest.
TWIN_CELLS = 400
MIXING_NEIGHBOURS = 15
#: Pooling and hidden layer, all read from one pass; which of them `tl.embed` uses depends on the model's family.
VARIANTS = (("cls", -2), ("mean", -2), ("cls", -1), ("mean", -1))
GOAL = 0.95

PCA_SAME, PCA_CORPUS = "PCA-50, same cells", "PCA-50 of the corpus"
SVD_MEAN, SVD_RANK = "mean of SVD gene vectors", "mean of SVD gene vectors, weighted by rank"
SVD_PLACE = "place among the SVD's components"
TWIN, TWIN_REFERENCE = "random weights", "model on the cells of random weights"


# --- the corpus ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Cells a model was trained on: tokens, log-normalised counts of its genes `(n_cells, n_tokens)`, origin."""

    ids: np.ndarray
    lengths: np.ndarray
    log_counts: sparse.csr_matrix
    source: np.ndarray
    cell_type: np.ndarray

    @cached_property
    def projection(self) -> tuple[np.ndarray, PCA]:
        """The most variable genes of all cells together, as tokens, and PCA-50 of them."""
        pooled = ad.AnnData(self.log_counts)
        pooled.uns["log1p"] = {"base": None}
        n = min(N_VARIABLE, pooled.n_vars)
        genes = np.flatnonzero(sc.pp.highly_variable_genes(pooled, n_top_genes=n, inplace=False)["highly_variable"])
        return genes, PCA(50, svd_solver="covariance_eigh").fit(self.log_counts[:, genes].toarray())


@dataclass(frozen=True)
class HeldOut:
    """Cells that training did not see, by the stem of their file.

    `pretraining.json` numbers the cells that can be learnt from, an npz file all rows.
    """

    rows: Mapping[str, np.ndarray]
    counts_learnable: bool = False

    def mask(self, stem: str, learnable: np.ndarray) -> np.ndarray:
        """Which cells of a file are held out, bool `(n_obs,)`."""
        out = np.zeros(len(learnable), dtype=bool)
        rows = self.rows.get(stem, np.zeros(0, dtype=np.int64))
        out[np.flatnonzero(learnable)[rows] if self.counts_learnable else rows] = True
        return out


def read_held_out(file: Path | None) -> HeldOut:
    """Read which cells are held out; without a file, none."""
    if file is None:
        return HeldOut({})
    if file.suffix == ".json":
        by_source = json.loads(file.read_text())["held_out"]  # "3: name.h5ad" -> numbers of cells
        rows = {
            Path(name.partition(": ")[2]).stem: np.array(cells, dtype=np.int64) for name, cells in by_source.items()
        }
        return HeldOut(rows, counts_learnable=True)
    with np.load(file) as stored:
        return HeldOut({stem: stored[stem].astype(np.int64) for stem in stored.files})


def read_corpus(folder: Path, model: gfx.models.Model, held_out: HeldOut) -> tuple[Corpus, dict[str, ad.AnnData]]:
    """Read the cells that were learnt from, and those held out, by the stem of their file."""
    files = {path.stem: path for path in sorted(folder.glob("*.h5ad"))}
    unknown = sorted(set(held_out.rows) - set(files))
    if unknown or not files:
        msg = f"Cells of {unknown} are held out, but {folder} holds {sorted(files)}: is it the corpus of this model?"
        raise ValueError(msg)
    parts, kept = [], {}
    for stem, path in files.items():
        adata = ad.read_h5ad(path)
        ids, lengths = tokens(adata, model)
        learnable = lengths >= model.vocabulary.n_specials + 2  # a gene alone has no context
        out = held_out.mask(stem, learnable)
        if out.any():
            kept[stem] = adata[out].copy()
        learnt = np.flatnonzero(learnable & ~out)
        cell_type = adata.obs["cell_type"].astype(str) if "cell_type" in adata.obs else [""] * adata.n_obs
        parts.append(
            (
                np.pad(ids[learnt], ((0, 0), (0, model.max_length - ids.shape[1]))),
                lengths[learnt],
                log_counts(adata[learnt], model.vocabulary),
                np.full(len(learnt), stem, dtype=object),
                np.asarray(cell_type, dtype=object)[learnt],
            )
        )
    ids, lengths, counts, source, cell_type = zip(*parts, strict=True)
    corpus = Corpus(
        np.concatenate(ids),
        np.concatenate(lengths),
        sparse.vstack(counts, format="csr"),
        np.concatenate(source),
        np.concatenate(cell_type),
    )
    return corpus, kept


def pooled(parts: Mapping[str, ad.AnnData]) -> ad.AnnData | None:
    """Put the labelled cells of several files into one set; a type that two files have counts as two.

    Few cells of each file are held out, too few to be judged by themselves.
    """
    labelled = {}
    for stem, cells in parts.items():
        if "cell_type" in cells.obs:
            ids = cells.var["ensembl_id"].astype(str)
            usable = ((ids != "") & ~ids.duplicated()).to_numpy()
            part = ad.AnnData(cells.X[:, usable], var=pd.DataFrame(index=ids[usable].to_numpy()))
            part.obs["cell_type"] = (stem + ": " + cells.obs["cell_type"].astype(str)).to_numpy()
            labelled[stem] = part
    if not labelled:
        return None
    together = ad.concat(labelled, join="outer", index_unique="-")
    together.var["ensembl_id"] = together.var_names.to_numpy()
    return together


def tokens(adata: ad.AnnData, model: gfx.models.Model) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths of the cells."""
    gfx.pp.tokenize(adata, model=model, gene_ids="ensembl_id")
    return adata.obsm["gfx_tokens"], adata.obs["gfx_tokens_n"].to_numpy()


def log_counts(adata: ad.AnnData, vocabulary: object) -> sparse.csr_matrix:
    """Log of counts per 10,000 of all genes, one column per token; genes that stand twice are summed."""
    token = vocabulary.resolve(adata.var["ensembl_id"].astype(str))
    known = np.flatnonzero(token >= 0)
    to_token = sparse.csr_matrix(
        (np.ones(len(known), np.float32), (known, token[known])), shape=(adata.n_vars, len(vocabulary))
    )
    counts = sparse.csr_matrix(adata.X, dtype=np.float32)
    total = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.divide(1e4, total, out=np.zeros_like(total), where=total > 0)
    return (sparse.diags(scale).astype(np.float32) @ counts @ to_token).log1p().tocsr()


def components(corpus: Corpus, model: gfx.models.Model, seed: int) -> Coexpression:
    """Principal components of co-expression, at which gene embeddings start before training."""
    from gfx.models.pretraining._coexpression import find_coexpression

    rows = token_rows(corpus.ids, corpus.lengths)
    return find_coexpression(rows, np.arange(len(rows)), model.vocabulary, model.hidden_size, seed)


def token_rows(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Tokens of each cell without padding."""
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


# --- embeddings ----------------------------------------------------------------------------------------------------


def random_twin(model: gfx.models.Model, folder: Path, seed: int) -> gfx.models.Model:
    """Write the model's configuration with weights drawn anew."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from gfx.models._vocabulary_file import write_vocabulary

    torch.manual_seed(seed)
    BertForMaskedLM(BertConfig(**model.config)).save_pretrained(folder)
    write_vocabulary(model.vocabulary, folder)
    return gfx.models.load(folder)


def default_variant(model: gfx.models.Model) -> tuple[str, int]:
    """Pooling and hidden layer of `tl.embed` if nothing else is asked for."""
    return ("cls" if model.vocabulary.has_cls else "mean"), -2


def embed_variants(model: gfx.models.Model, ids: np.ndarray, lengths: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """Do what `tl.embed` does for all VARIANTS, in one pass instead of four."""
    from gfx._engine.device import choose_device, choose_dtype
    from gfx._engine.encoder import load_encoder
    from gfx._engine.forward import run_cells
    from gfx._engine.pooling import pool, special_tokens

    device = choose_device(None)
    dtype = choose_dtype(None, device, model.hidden_size)
    encoder = load_encoder(model.weights, model.config, n_layers=model.n_layers, device=device, dtype=dtype)
    special = special_tokens(model.vocabulary, device)
    variants = [variant for variant in VARIANTS if model.vocabulary.has_cls or variant[0] == "mean"]

    def forward(encoder, tokens, valid):
        mask = None if bool(valid.all()) else valid.long()
        hidden = encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        return {(how, layer): pool(hidden[layer], valid & ~special[tokens], how) for how, layer in variants}

    out = {variant: np.full((len(lengths), model.hidden_size), np.nan, np.float32) for variant in variants}
    for batch in run_cells(encoder, ids, lengths, forward=forward):
        for variant, vectors in batch.output.items():
            out[variant][batch.rows] = vectors.cpu().numpy()
    return out


def pca(adata: ad.AnnData) -> np.ndarray:
    cells = ad.AnnData(adata.X, obs=adata.obs[[]], var=adata.var[[]]).copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=min(N_VARIABLE, cells.n_vars))
    sc.pp.pca(cells, n_comps=min(50, cells.n_obs - 1), mask_var="highly_variable")
    return cells.obsm["X_pca"]


def mean_vectors(ids: np.ndarray, vectors: np.ndarray, vocabulary: object, *, by_rank: bool) -> np.ndarray:
    """Mean of the gene vectors over a cell's tokens; by rank, weights fall from 1 at the top towards 0."""
    cell, place = np.nonzero(~vocabulary.is_special[ids])
    n_genes = np.bincount(cell, minlength=len(ids))
    weight = 1 - (place - vocabulary.first_gene) / n_genes[cell] if by_rank else np.ones(len(cell))
    matrix = sparse.csr_matrix((weight.astype(np.float32), (cell, ids[cell, place])), shape=(len(ids), len(vectors)))
    return (matrix @ vectors) / np.asarray(matrix.sum(axis=1))


# --- scores --------------------------------------------------------------------------------------------------------


def batch_column(adata: ad.AnnData) -> str | None:
    """Find the first column of batches by which most cells can be named: their type occurs in another batch, too."""
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    for column in BATCHES:
        if column in adata.obs:
            batch = adata.obs[column].astype(str).to_numpy()
            if np.isin(labels, shared_types(labels, batch)).mean() > 0.5:
                return column
    return None


def shared_types(labels: np.ndarray, batch: np.ndarray) -> list[str]:
    """Types in more than one batch; the others cannot be named by other batches."""
    return [name for name in np.unique(labels) if len(np.unique(batch[labels == name])) > 1]


def transfer(distances: np.ndarray, labels: np.ndarray, batch: np.ndarray | None, seed: int) -> float:
    """Macro-F1 of the types that neighbours in other folds, or in other batches, give to the cells."""
    neighbours = KNeighborsClassifier(N_NEIGHBOURS, metric="precomputed")
    if batch is None:
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        return float(f1_score(labels, cross_val_predict(neighbours, distances, labels, cv=folds), average="macro"))
    n = len(labels)
    drawn = np.sort(np.random.default_rng(seed).choice(n, round(DRAWN_SHARE * n), replace=False))
    distances, labels, batch = distances[np.ix_(drawn, drawn)], labels[drawn], batch[drawn]
    predicted = cross_val_predict(neighbours, distances, labels, cv=LeaveOneGroupOut(), groups=batch)
    types = shared_types(labels, batch)
    scored = np.isin(labels, types)
    return float(f1_score(labels[scored], predicted[scored], labels=types, average="macro", zero_division=0))


def batch_mixing(distances: np.ndarray, labels: np.ndarray, batch: np.ndarray) -> float | None:
    """Entropy of the batches among the 15 nearest cells of the same type, over that among cells of the type at random.

    0: neighbours share the batch; 1: they are as mixed as chance has it. Entropy among neighbours, not a silhouette of
    the batches, for the silhouette follows the distances between whole clouds, and label transfer goes by neighbours.
    Within a type, for types are not spread evenly over batches: to part them is no fault. Against random cells, for
    15 of them have less entropy than the type as a whole.
    """
    rng = np.random.default_rng(0)
    observed = expected = 0.0
    for name in shared_types(labels, batch):
        rows = np.flatnonzero(labels == name)
        if len(rows) < 2 * MIXING_NEIGHBOURS:
            continue
        among = distances[np.ix_(rows, rows)] + np.diag(np.full(len(rows), np.inf))  # no cell is its own neighbour
        nearest = np.argpartition(among, MIXING_NEIGHBOURS, axis=1)[:, :MIXING_NEIGHBOURS]
        _, own = np.unique(batch[rows], return_inverse=True)
        observed += _entropy(own[nearest]).sum()
        expected += np.mean([_entropy(rng.permutation(own)[nearest]).sum() for _ in range(N_SEEDS)])
    return None if expected == 0 else observed / expected


def _entropy(codes: np.ndarray) -> np.ndarray:
    share = (codes[:, :, None] == np.arange(codes.max() + 1)).mean(axis=1)
    return -(share * np.log(np.maximum(share, 1e-12))).sum(axis=1)


def score(draws: Sequence[np.ndarray], labels: np.ndarray, batch: np.ndarray | None) -> dict[str, float | None]:
    """Judge an embedding: mean and standard deviation over seeds of folds (or draws of cells) times draws of it."""
    f1, silhouettes, mixing = [], [], []
    for x in draws:
        distances = cosine_distances(x)
        f1 += [transfer(distances, labels, batch, seed) for seed in range(N_SEEDS)]
        silhouettes.append(silhouette_score(distances, labels, metric="precomputed"))
        if batch is not None:
            mixing.append(batch_mixing(distances, labels, batch))
    mixed = [value for value in mixing if value is not None]
    return {
        "macro_f1": round(float(np.mean(f1)), 4),
        "sd": round(float(np.std(f1)), 4),
        "silhouette": round(float(np.mean(silhouettes)), 3),
        "batch_mixing": round(float(np.mean(mixed)), 3) if mixed else None,
    }


def some_of_each(labels: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Draw at most `n` cells: MIN_CELLS of each type, the rest by the size of the types."""
    if len(labels) <= n:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    types, sizes = np.unique(labels, return_counts=True)
    beyond = sizes - MIN_CELLS
    wanted = MIN_CELLS + np.floor(beyond * max(n - MIN_CELLS * len(types), 0) / beyond.sum()).astype(int)
    rows = [rng.choice(np.flatnonzero(labels == t), k, replace=False) for t, k in zip(types, wanted, strict=True)]
    return np.sort(np.concatenate(rows))


def is_above(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether the means differ by more than the larger spread."""
    return one["macro_f1"] - other["macro_f1"] > max(one["sd"], other["sd"])


def compare(
    adata: ad.AnnData,
    model: gfx.models.Model,
    twins: Sequence[gfx.models.Model],
    corpus: Corpus | None,
    starts: Sequence[Coexpression],
) -> dict[str, object]:
    """Judge every embedding of one set of cells."""
    ids, lengths = tokens(adata, model)
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    types, sizes = np.unique(labels, return_counts=True)
    kept = (lengths > 0) & np.isin(labels, types[sizes >= MIN_CELLS])
    adata, ids, lengths, labels = adata[kept].copy(), ids[kept], lengths[kept], labels[kept]
    if len(set(labels)) < 2:
        return {"skipped": f"{adata.n_obs} cells in {len(set(labels))} types of at least {MIN_CELLS} cells"}
    column = batch_column(adata)
    batch = None if column is None else adata.obs[column].astype(str).to_numpy()

    own = embed_variants(model, ids, lengths)
    default = default_variant(model)
    embeddings = {f"model, {how}, layer {layer}": [own[how, layer]] for how, layer in own}
    model_name = f"model, {default[0]}, layer {default[1]}"
    embeddings[PCA_SAME] = [pca(adata)]
    if corpus is not None:
        genes, fitted = corpus.projection
        embeddings[PCA_CORPUS] = [fitted.transform(log_counts(adata, model.vocabulary)[:, genes].toarray())]
        for name, by_rank in ((SVD_MEAN, False), (SVD_RANK, True)):
            embeddings[name] = [mean_vectors(ids, one.vectors, model.vocabulary, by_rank=by_rank) for one in starts]
        rows = token_rows(ids, lengths)
        embeddings[SVD_PLACE] = [np.stack([one.cell_vector(row) for row in rows]) for one in starts]
    scores = {name: score(draws, labels, batch) for name, draws in embeddings.items()}

    part = some_of_each(labels, TWIN_CELLS)
    part_batch = None if batch is None else batch[part]
    random = [embed_variants(twin, ids[part], lengths[part]) for twin in twins]
    for how, layer in dict.fromkeys([default, ("mean", -2)]):
        scores[f"{TWIN}, {how}, layer {layer}"] = score([x[how, layer] for x in random], labels[part], part_batch)
        scores[f"{TWIN_REFERENCE}, {how}, layer {layer}"] = score([own[how, layer][part]], labels[part], part_batch)
    suffix = f", {default[0]}, layer {default[1]}"
    svd = [scores[name] for name in (SVD_MEAN, SVD_RANK) if name in scores]
    return {
        "cells": adata.n_obs,
        "cell_types": len(set(labels)),
        "held_out": "five folds" if column is None else f"each {column}",
        "cells_for_random_weights": len(part),
        "default": model_name,
        "ratio_to_pca": round(scores[model_name]["macro_f1"] / scores[PCA_SAME]["macro_f1"], 3),
        "above_random_weights": is_above(scores[TWIN_REFERENCE + suffix], scores[TWIN + suffix]),
        "above_svd_mean": all(is_above(scores[model_name], one) for one in svd) if svd else None,
        "embeddings": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--corpus", type=Path, help="folder of the h5ad files that the model was trained on")
    parser.add_argument("--held-out", type=Path, help="pretraining.json, or npz: what training did not see")
    parser.add_argument("--model", help="a published name or a folder; the embedded model if left out")
    given = parser.parse_args()
    if given.held_out is not None and given.corpus is None:
        parser.error("--held-out names rows of the files in --corpus, which is missing")
    sets = {path.stem: path for path in sorted(given.data.glob("*.h5ad"))}
    if not sets:
        parser.error(f"no h5ad file in {given.data}")
    model = gfx.models.load(given.model or "mini")
    report: dict[str, object] = {
        "benchmark": "embedding quality",
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "seeds": N_SEEDS,
        "random_weights": f"{N_SEEDS} draws, on at most {TWIN_CELLS} cells of a set",
        "goal_ratio_to_pca": GOAL,
    }
    with tempfile.TemporaryDirectory() as folder, gfx.settings.override(verbosity=1):
        twins = [random_twin(model, Path(folder) / str(seed), seed) for seed in range(N_SEEDS)]
        corpus, held_out, starts = None, {}, []
        if given.corpus is not None:
            corpus, held_out = read_corpus(given.corpus, model, read_held_out(given.held_out))
            starts = [components(corpus, model, seed) for seed in range(N_SEEDS)]
            report["corpus_cells"] = len(corpus.lengths)
        read = {name: (lambda path=path: ad.read_h5ad(path)) for name, path in sets.items()}
        together = pooled(held_out)
        if together is not None:
            read["held-out cells of the corpus"] = lambda: together
        if given.held_out is None:
            report["held_out_cells"] = "skipped: no --held-out file says which cells training did not see"
        report["sets"] = {}
        for name, cells in read.items():
            report["sets"][name] = compare(cells(), model, twins, corpus, starts)
            print(json.dumps({name: report["sets"][name]}), file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

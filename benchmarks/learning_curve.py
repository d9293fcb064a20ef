"""How good a small model gets from how many cells.

    python benchmarks/learning_curve.py --corpus TRAIN --eval DIR --out FOLDER

TRAIN is a folder of h5ad files to pretrain on, DIR one with `pbmc3k_10x.h5ad`, which no model sees; all with raw counts
and `var["ensembl_id"]`, the latter with `obs["cell_type"]`. FOLDER receives one folder for each pretrained model, the
JSON and the plot. Models that are there already are not trained again.

Pretraining cells: random ones of the corpus; *relevant* ones, from files of the same tissue (blood); *irrelevant* ones,
from files of other tissues. Only these differ: vocabulary, size, number of steps, start (from the co-expression of
those very cells) and rate are the same. Tumours with many infiltrating immune cells are in neither group. Each model
is also judged before its first step, for the start depends on the cells, too. With few steps, training sees only a part
of many cells, while the start has seen them all.

Quality: macro-F1 of the cell types by 10 nearest neighbours, five folds; by a logistic regression on 5 to 100 labelled
cells a type (at most half of a type's cells), tested on all others; each on five draws. The encoder stays frozen:
fine-tuning it end to end is not measured here. And top-1 of masked genes. Beside it: PCA-50 of the same cells,
log-normalised, and random weights. About half an hour on a core.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from embedding_quality import MIN_CELLS, N_SEEDS, pca, random_twin, transfer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.metrics.pairwise import cosine_distances

import gfx

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.figure import Figure

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.examples import MaskedCells

RELEVANT = ("zheng2017*", "frozen_pbmc*", "mimitou*", "pbmc_5k_10k*")
#: Without the lung tumours: as many of their cells show CD45 as of sorted blood cells.
IRRELEVANT = ("moncada2020*", "friedman2018*", "li2017*", "camp2015*", "darmanis2015*", "cimseq*")
#: A little smaller than `mini`, for there are many models to train.
CONFIG = {"num_hidden_layers": 3, "max_position_embeddings": 512}
SETTINGS_FILE, RESULT_FILE, PLOT_FILE = "settings.json", "learning_curve.json", "learning_curve.png"
LABELLED = (5, 10, 20, 50, 100)
MASKED_CELLS = 300
PCA_SAME, TWIN = "PCA-50, same cells", "random weights"
COLOURS = {"random": "C0", "relevant": "C2", "irrelevant": "C3"}


# --- pretraining ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One model: which cells it is pretrained on, for how many steps."""

    kind: str
    n_cells: int
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.n_cells}-seed{self.seed}" + ("" if self.steps else "-start")


def files_of(corpus: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of the corpus that match one of the patterns."""
    return sorted({path for pattern in patterns for path in corpus.glob(f"{pattern}.h5ad")})


def draw(files: Sequence[Path], n: int, seed: int) -> dict[str, ad.AnnData]:
    """Draw cells of all files together; with the same seed the fewer are among the more."""
    cells = [ad.read_h5ad(path) for path in files]
    first = np.cumsum([0, *(one.n_obs for one in cells)])
    if n > first[-1]:
        msg = f"{n:,} cells wanted, but {len(files)} files hold {first[-1]:,}."
        raise ValueError(msg)
    rows = np.sort(np.random.default_rng(seed).permutation(first[-1])[:n])
    drawn = {}
    for path, one, start in zip(files, cells, first[:-1], strict=True):
        own = rows[(rows >= start) & (rows < start + one.n_obs)] - start
        if len(own):
            drawn[path.stem] = ad.AnnData(one.X[own], var=one.var[["ensembl_id"]])
    return drawn


def pretrained(run: Run, files: Sequence[Path], vocabulary: Vocabulary, out: Path, given: argparse.Namespace) -> Path:
    """Pretrain a model, unless that was done before."""
    folder = out / run.name
    if (folder / "cells.json").exists():  # written last
        return folder
    drawn = draw(files, run.n_cells, run.seed)
    gfx.models.pretrain(
        list(drawn.values()),
        folder,
        vocabulary=vocabulary,
        gene_ids="ensembl_id",
        config=CONFIG,
        start_from="coexpression",
        cell_weight=5.0,
        curriculum=[(given.tokens, 1)],
        training={
            "max_steps": max(run.steps, 1),  # instead of passes over the cells
            "learning_rate": 1e-3 if run.steps else 0.0,
            "lr_scheduler_type": "cosine",
            "bf16": True,
            "use_cpu": True,
            "eval_strategy": "no",
            "save_strategy": "no",
        },
        rng=run.seed,
    )
    (folder / "cells.json").write_text(json.dumps({stem: one.n_obs for stem, one in drawn.items()}, indent=1))
    return folder


def keep_to_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Note how the models in a folder are made; refuse to mix them with others."""
    file, text = out / SETTINGS_FILE, json.dumps(settings, indent=1)
    if file.exists() and file.read_text() != text:
        msg = f"{out} holds models made with other settings: {file.read_text()}. Give another folder."
        raise ValueError(msg)
    file.write_text(text)


# --- quality -------------------------------------------------------------------------------------------------------


def cells_to_name(path: Path) -> tuple[ad.AnnData, np.ndarray]:
    """Cells of types that are frequent enough to be learnt, and the types."""
    adata = ad.read_h5ad(path)
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    types, sizes = np.unique(labels, return_counts=True)
    kept = np.isin(labels, types[sizes >= MIN_CELLS])
    return adata[kept].copy(), labels[kept]


def embedding(adata: ad.AnnData, folder: Path) -> np.ndarray:
    """Embed cells as `tl.embed` does, or take what was made before."""
    file = folder / "embedding.npy"
    if not file.exists():
        cells = ad.AnnData(adata.X, var=adata.var[["ensembl_id"]])
        gfx.pp.tokenize(cells, model=folder, gene_ids="ensembl_id")
        gfx.tl.embed(cells, model=folder)
        np.save(file, cells.obsm["X_gfx"])
    return np.load(file)


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"macro_f1": round(float(np.mean(values)), 4), "sd": round(float(np.std(values)), 4)}


def by_neighbours(x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    distances = cosine_distances(x)
    return summary([transfer(distances, labels, None, seed) for seed in range(N_SEEDS)])


def by_head(x: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Fit a linear head on some labelled cells of each type; name all others."""
    return {str(n): summary([head_once(x, labels, n, seed) for seed in range(N_SEEDS)]) for n in LABELLED}


def head_once(x: np.ndarray, labels: np.ndarray, n_labelled: int, seed: int) -> float:
    """Macro-F1 on the cells without a label."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(labels == name)) for name in np.unique(labels)]
    labelled = np.concatenate([own[: min(n_labelled, len(own) // 2)] for own in rows])
    others = np.setdiff1d(np.arange(len(labels)), labelled)
    x = x - x.mean(axis=0)
    x = x / np.sqrt((x**2).mean())  # all columns by one number: else the last principal components count like the first
    head = LogisticRegression(max_iter=5000).fit(x[labelled], labels[labelled])
    return float(f1_score(labels[others], head.predict(x[others]), average="macro", zero_division=0))


def masked_genes(folder: Path, cells: MaskedCells) -> dict[str, float]:
    """Loss and accuracy at naming masked genes of cells that no model saw."""
    from gfx._engine.pretraining import masked_accuracy, read_model

    trained = gfx.models.load(folder)
    scores = masked_accuracy(read_model(trained.weights, trained.config), cells)
    return {name: round(value, 4) for name, value in scores.items()}


def masked_cells(path: Path, vocabulary: Vocabulary, folder: Path) -> MaskedCells:
    """Some cells with the same genes masked for every model."""
    from gfx._engine.examples import MaskedCells
    from gfx.models.pretraining._shards import encode_sources
    from gfx.models.pretraining._sources import find_sources

    rows = encode_sources(find_sources(path, "ensembl_id"), vocabulary, CONFIG["max_position_embeddings"], folder)
    some = np.sort(np.random.default_rng(0).permutation(len(rows))[:MASKED_CELLS])
    return MaskedCells(rows, some, vocabulary, seed=0, hide_all=True)


# --- the plot ------------------------------------------------------------------------------------------------------


def plot(report: Mapping[str, Any]) -> Figure:
    """Draw quality against pretraining cells, and against labelled cells."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True, layout="constrained")
    models = pd.DataFrame(report["models"])
    models["f1"] = [one["macro_f1"] for one in models["neighbours"]]
    for (kind, steps), rows in models.groupby(["kind", "steps"], sort=False):
        curve = rows.groupby("n_cells")["f1"].agg(["mean", "std"]).fillna(0)
        look = {"marker": "o"} if steps else {"marker": "o", "markerfacecolor": "white", "linestyle": ":"}
        name = f"{kind}, {steps} steps" if steps else f"{kind}, start"
        left.errorbar(curve.index, curve["mean"], curve["std"], color=COLOURS[kind], capsize=3, label=name, **look)
    for (name, one), line in zip(report["baselines"].items(), ("--", ":"), strict=True):
        left.axhline(one["neighbours"]["macro_f1"], color="0.3", linewidth=1, linestyle=line, label=name)
    left.set_xscale("log")
    sizes = sorted(set(models["n_cells"]))
    apart = [n for n, before in zip(sizes, [0, *sizes], strict=False) if n > 1.5 * before]  # labels must not overlap
    left.set_xticks(apart, [f"{n:,}" for n in apart])
    left.minorticks_off()
    left.set_xlabel("cells pretrained on")
    left.set_ylabel("macro-F1 of cell types, 10 nearest neighbours")
    left.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))

    for kind, rows in models[models["steps"] > 0].groupby("kind", sort=False):
        ends = sorted({rows["n_cells"].min(), rows["n_cells"].max()})
        for n_cells, line in zip(ends, (":", "-")[-len(ends) :], strict=True):
            heads = rows.loc[rows["n_cells"] == n_cells, "head"]
            _draw_heads(right, heads, COLOURS[kind], line, f"{n_cells:,} {kind}")
    for (name, one), line in zip(report["baselines"].items(), ("--", ":"), strict=True):
        _draw_heads(right, [one["head"]], "0.3", line, name)
    right.set_xscale("log")
    right.set_xticks(LABELLED, LABELLED)
    right.minorticks_off()
    right.set_xlabel("labelled cells of each type")
    right.set_ylabel("macro-F1 of cell types, linear head")
    right.tick_params(labelleft=True)
    right.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def _draw_heads(
    ax: Any, heads: Sequence[Mapping[str, Mapping[str, float]]], colour: str, line: str, label: str
) -> None:
    mean = [np.mean([head[str(n)]["macro_f1"] for head in heads]) for n in LABELLED]
    spread = [np.mean([head[str(n)]["sd"] for head in heads]) for n in LABELLED]
    ax.errorbar(LABELLED, mean, spread, color=colour, linestyle=line, marker="o", markersize=4, capsize=2, label=label)


# --- all of it -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", default="pbmc3k_10x", help="the file of --eval whose cells are named")
    parser.add_argument("--genes", type=Path, help="table with an `ensembl_id` column: genes to choose from")
    parser.add_argument("--random", type=int, nargs="*", default=[250, 1000, 4000, 16000], help="cells of the corpus")
    parser.add_argument("--chosen", type=int, nargs="*", default=[1000, 3500], help="relevant and irrelevant cells")
    parser.add_argument("--relevant", nargs="+", default=RELEVANT, help="files of the corpus, without .h5ad")
    parser.add_argument("--irrelevant", nargs="+", default=IRRELEVANT)
    parser.add_argument("--seeds", type=int, default=1, help="draws of the cells to pretrain on")
    parser.add_argument("--steps", type=int, default=150, help="of 32 cells, for every model")
    parser.add_argument("--tokens", type=int, default=128, help="of a cell, while training")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    genes = None if given.genes is None else pd.read_csv(given.genes, sep="\t")["ensembl_id"].tolist()
    corpus = files_of(given.corpus, ["*"])
    vocabulary = gfx.models.build_vocabulary(corpus, name="learning curve", gene_ids="ensembl_id", genes=genes)
    how = {"steps": given.steps, "cells_a_step": 32, "tokens_a_cell": given.tokens, "config": CONFIG}
    groups = {
        "random": corpus,
        "relevant": files_of(given.corpus, given.relevant),
        "irrelevant": files_of(given.corpus, given.irrelevant),
    }
    files = {kind: [path.stem for path in paths] for kind, paths in groups.items() if kind != "random"}
    keep_to_settings(given.out, how | {"vocabulary": vocabulary.sha256, "set": given.set, "files": files})
    path = given.eval / f"{given.set}.h5ad"
    adata, labels = cells_to_name(path)
    hidden = masked_cells(path, vocabulary, given.out / "tokens")

    report: dict[str, Any] = {
        "benchmark": "learning curve",
        "set": given.set,
        "cells": len(labels),
        "cell_types": len(set(labels)),
        "encoder": "frozen; a linear head is fitted on its embeddings, it is not fine-tuned end to end",
        "pretraining": how | {"genes": vocabulary.n_genes, "cells_seen_at_most": given.steps * how["cells_a_step"]},
        "files": files,
        "seeds": given.seeds,
        "draws_of_folds_and_labelled_cells": N_SEEDS,
        "models": [],
    }
    sizes = {"random": given.random, "relevant": given.chosen, "irrelevant": given.chosen}
    for seed in range(given.seeds):
        for run in [Run(kind, n, seed, steps) for steps in (given.steps, 0) for kind in groups for n in sizes[kind]]:
            folder = pretrained(run, groups[run.kind], vocabulary, given.out, given)
            found = judge(partial(embedding, adata, folder), labels)
            report["models"].append(asdict(run) | found | {"masked_gene": masked_genes(folder, hidden)})
            print(json.dumps(report["models"][-1]), file=sys.stderr, flush=True)
    twin = given.out / "random-weights"
    if not twin.exists():
        random_twin(gfx.models.load(folder), twin, 0)
    report["baselines"] = {
        PCA_SAME: judge(partial(pca, adata), labels),
        TWIN: judge(partial(embedding, adata, twin), labels),
    }
    (given.out / RESULT_FILE).write_text(json.dumps(report, indent=1))
    plot(report).savefig(given.out / PLOT_FILE, dpi=150)
    print(json.dumps(report, indent=1))


def judge(embed: Callable[[], np.ndarray], labels: np.ndarray) -> dict[str, Any]:
    x = embed()
    return {"neighbours": by_neighbours(x, labels), "head": by_head(x, labels)}


if __name__ == "__main__":
    main()

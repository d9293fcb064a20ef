"""Train the embedded model `mini` on the corpus: `python benchmarks/train_mini.py CORPUS FOLDER --genes TABLE`.

CORPUS is a folder of h5ad files with raw counts, Ensembl ids in `var["ensembl_id"]`, and, in some, labels in
`obs["cell_type"]`. A stopped run goes on from its last checkpoint. About 50 minutes on one core. The embedding is
measured along the way, on the labelled ones among the held-out cells: 10 nearest neighbours, five-fold, macro-F1.
`--card` draws the curves, `--ship` writes the weights as they lie in the wheel.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from embedding_quality import pooled, read_corpus, read_held_out
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

import gfx

if TYPE_CHECKING:
    import anndata as ad

#: bfloat16 is faster on any CPU of the last years, with attention in float32 where that is slow.
TRAINING = {
    "bf16": True,
    "use_cpu": True,
    "lr_scheduler_type": "cosine",
    "eval_steps": 500,
    "save_steps": 500,
    "save_total_limit": 20,
}
BATCH = 32
FEWEST_OF_A_TYPE = 5


def labelled_held_out(folder: Path, corpus: Path) -> ad.AnnData:
    """Collect the held-out cells that have a label."""
    model = gfx.models.load(folder)
    _, held_out = read_corpus(corpus, model, read_held_out(folder / "pretraining.json"))
    cells = pooled(held_out)
    often = cells.obs["cell_type"].value_counts()
    return cells[cells.obs["cell_type"].isin(often.index[often >= FEWEST_OF_A_TYPE])].copy()


def quality(cells: ad.AnnData, model: gfx.models.Model) -> float:
    """Name each held-out cell by its neighbours in the embedding; macro-F1."""
    cells = gfx.tl.embed(cells, model=model, copy=True)
    neighbours = KNeighborsClassifier(10, metric="cosine", weights="distance")
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    folds = StratifiedKFold(FEWEST_OF_A_TYPE, shuffle=True, random_state=0)
    return float(
        f1_score(labels, cross_val_predict(neighbours, cells.obsm["X_gfx"], labels, cv=folds), average="macro")
    )


def measure(folder: Path, corpus: Path) -> pd.DataFrame:
    """Measure every checkpoint that is there, and the finished model."""
    cells, vocabulary = labelled_held_out(folder, corpus), gfx.models.load(folder).vocabulary
    table = folder / "quality.csv"
    done = pd.read_csv(table) if table.is_file() else pd.DataFrame(columns=["stage", "step", "macro_f1"])
    found = sorted(folder.glob("stages/*/checkpoint-*/trainer_state.json"), key=lambda f: f.stat().st_mtime)
    for checkpoint in (file.parent for file in found):
        stage, step = int(checkpoint.parent.name), int(checkpoint.name.rpartition("-")[2])
        if not ((done["stage"] == stage) & (done["step"] == step)).any():
            model = gfx.models.load(checkpoint, vocabulary=vocabulary)
            done.loc[len(done)] = [stage, step, quality(cells, model)]
            done.to_csv(table, index=False)
    print(f"{cells.n_obs} labelled held-out cells of {cells.obs['cell_type'].nunique()} types")
    print(done.to_string(index=False))
    return done


def draw(folder: Path, measured: pd.DataFrame, path: Path) -> None:
    """Draw losses, accuracy beside its baselines, and the quality of the embedding, over the cells seen."""
    import matplotlib.pyplot as plt

    report = json.loads((folder / "pretraining.json").read_text())
    stage = np.cumsum([entry["step"] < before for entry, before in _with_the_step_before(report["history"])])
    history = pd.DataFrame(report["history"]).assign(stage=stage)
    steps = history.groupby("stage")["step"].max()
    before = steps.cumsum().shift(fill_value=0)

    def cells_seen(table: pd.DataFrame) -> pd.Series:
        return (table["step"] + table["stage"].map(before)) * BATCH / 1000

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for column, label in (("loss", "training, both objectives"), ("eval_loss", "held-out cells, masked genes")):
        part = history.dropna(subset=[column])
        panels[0].plot(cells_seen(part), part[column], label=label)
    panels[0].set(title="Loss", ylabel="nats", xlabel="cells seen, thousands")
    part = history.dropna(subset=["eval_top_10"])
    panels[1].plot(cells_seen(part), 100 * part["eval_top_10"], label="mini", color="C0")
    panels[1].axhline(100 * report["rank_baseline"]["top_10"], color="0.5", ls="--", label="by rank")
    panels[1].set(
        title="Masked genes of held-out cells", ylabel="among the first 10 (%)", xlabel="cells seen, thousands"
    )
    panels[2].plot(cells_seen(measured), measured["macro_f1"], marker="o", ms=4, color="C0")
    panels[2].set(
        title="Cell types of held-out cells", ylabel="macro-F1 of 10 neighbours", xlabel="cells seen, thousands"
    )
    for panel in panels[:2]:
        panel.legend(frameon=False, fontsize=8)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _with_the_step_before(history: list[dict]) -> list[tuple[dict, int]]:
    return list(zip(history, [0, *[entry["step"] for entry in history]], strict=False))


def ship(trained: Path, folder: Path) -> None:
    """Write a trained model as it lies in the wheel: float16, nothing but weights, configuration and vocabulary."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half() for name, tensor in load_file(trained / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    for name in ("config.json", "vocabulary.tsv.gz"):
        shutil.copyfile(trained / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--genes", type=Path, help="table with an `ensembl_id` column: genes to choose from")
    parser.add_argument("--passes", type=float, default=5, help="over all cells, at 256 tokens each")
    parser.add_argument("--card", type=Path, help="where to draw the curves")
    parser.add_argument("--ship", type=Path, help="where to write the finished model in float16")
    given = parser.parse_args()
    sources = sorted(given.corpus.glob("*.h5ad"))
    genes = None if given.genes is None else pd.read_csv(given.genes, sep="\t")["ensembl_id"].tolist()
    vocabulary = gfx.models.build_vocabulary(sources, name="mini", gene_ids="ensembl_id", genes=genes)
    print(vocabulary)
    gfx.models.pretrain(
        sources,
        given.folder,
        vocabulary=vocabulary,
        gene_ids="ensembl_id",
        start_from="coexpression",
        cell_weight=5.0,
        held_out=0.02,
        curriculum=((256, given.passes),),
        training=TRAINING,
    )
    if given.card is not None:
        draw(given.folder, measure(given.folder, given.corpus), given.card)
    if given.ship is not None:
        ship(given.folder, given.ship)


if __name__ == "__main__":
    main()

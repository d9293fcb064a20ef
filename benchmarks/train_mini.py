"""Train the embedded model `mini` on the corpus: `python benchmarks/train_mini.py CORPUS FOLDER --genes TABLE`.

CORPUS is a folder of h5ad files with raw counts and Ensembl ids in `var["ensembl_id"]`. A stopped run goes on from
its last checkpoint. About an hour on two cores.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pandas as pd

import gfx


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
        held_out=0.02,
        curriculum=((256, 3), (1024, 0.5)),
        training={"bf16": True, "use_cpu": True, "learning_rate": 8e-4, "eval_steps": 1000},
    )
    if given.ship is not None:
        ship(given.folder, given.ship)


if __name__ == "__main__":
    main()

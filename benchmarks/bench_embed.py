"""Cell embedding against a naive loop, in one run: `python benchmarks/bench_embed.py [--model NAME] [--cells N]`.

The naive loop is what most scripts do: the masked-LM model with its head, float32, all hidden states kept, batches of
cells in the order they come, padded to the longest of the batch. Prints JSON: cells per second of both, their ratio,
how far the vectors are apart, and the peak memory of each (each measured in a process of its own).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
from scipy import sparse

import gfx

BATCH = 32
V1_TOKENS = 25_426
SHAPES = {
    # V1-10M's shape with random weights; `mini` is read from the package.
    "V1-shape": {
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": 2048,
    },
}


def make_cells(n_cells: int, vocabulary: gfx.models.Model, seed: int = 0) -> ad.AnnData:
    """Counts with as uneven numbers of detected genes as tissues have: log-normal around 700."""
    rng = np.random.default_rng(seed)
    n_genes = vocabulary.n_genes
    detected = np.clip(rng.lognormal(np.log(700), 0.5, n_cells), 100, 4000).astype(int)
    columns = np.concatenate([rng.choice(n_genes, n, replace=False) for n in detected])
    counts = rng.geometric(0.5, len(columns)).astype(np.float32)
    x = sparse.csr_matrix((counts, columns, np.concatenate([[0], np.cumsum(detected)])), shape=(n_cells, n_genes))
    adata = ad.AnnData(x)
    adata.var_names = vocabulary.ids[~vocabulary.is_special].astype(str)
    return adata


def random_model(folder: Path, shape: dict[str, int]) -> Path:
    """Write a model with random weights and as many tokens as V1 has; those that `mini` lacks stand for no gene."""
    from transformers import BertConfig, BertForMaskedLM

    from gfx._core.vocabulary import Vocabulary
    from gfx.models._vocabulary_file import write_vocabulary

    known = gfx.models.load("mini").vocabulary
    n_more = V1_TOKENS - len(known)
    vocabulary = Vocabulary(
        name="V1-size",
        ids=np.concatenate([known.ids, [f"none-{number}" for number in range(n_more)]]).astype(object),
        medians=np.concatenate([known.medians, np.ones(n_more)]),
        symbols=np.concatenate([known.symbols, [""] * n_more]).astype(object),
        aliases=known.aliases,
    )
    BertForMaskedLM(BertConfig(vocab_size=V1_TOKENS, hidden_act="relu", **shape)).save_pretrained(folder)
    write_vocabulary(vocabulary, folder)
    return folder


def naive(folder: Path, ids: np.ndarray, lengths: np.ndarray, *, cls: bool) -> np.ndarray:
    import torch
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(folder, output_hidden_states=True).eval()
    out = []
    with torch.no_grad():
        for start in range(0, len(ids), BATCH):
            n = lengths[start : start + BATCH]
            tokens = torch.tensor(ids[start : start + BATCH, : n.max()].astype(np.int64))
            mask = torch.arange(int(n.max()))[None] < torch.tensor(n)[:, None]
            hidden = model(input_ids=tokens, attention_mask=mask.long()).hidden_states[-2]
            if cls:
                out.append(hidden[:, 0].numpy())
            else:
                mask[:, 0] = False
                mask[torch.arange(len(n)), torch.tensor(n) - 1] = False
                out.append(((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy())
    return np.concatenate(out)


def measure(which: str, name: str, n_cells: int, result: Path) -> None:
    """Run one contender in this process."""
    model = gfx.models.load(Path(name))
    adata = make_cells(n_cells, model.vocabulary)
    gfx.pp.tokenize(adata, model=model)
    ids, lengths = adata.obsm["gfx_tokens"], adata.obs["gfx_tokens_n"].to_numpy()
    gfx.settings.dtype = None if which == "naive" else which.removeprefix("gfx-")
    gfx.tl.embed(adata[:BATCH].copy(), model=model)  # warm up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if which == "naive":
        vectors = naive(model.folder, ids, lengths, cls=True)
    else:
        gfx.tl.embed(adata, model=model)
        vectors = adata.obsm["X_gfx"]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.save(result, vectors)
    print(json.dumps({"seconds": seconds, "peak_mb": peak / 1024, "before_mb": before / 1024}))


def compare(name: str, folder: Path, n_cells: int) -> dict[str, object]:
    runs, vectors = {}, {}
    for which in ("naive", "gfx-float32", "gfx-bfloat16"):
        result = folder / f"{name}-{which}.npy"
        call = [sys.executable, __file__, "--measure", which, "--folder", str(folder / name), "--cells", str(n_cells)]
        environment = os.environ | {"GFX_VERBOSITY": "1"}
        out = subprocess.run(
            [*call, "--result", str(result)], check=True, capture_output=True, text=True, env=environment
        )
        runs[which] = json.loads(out.stdout.strip().splitlines()[-1])
        vectors[which] = np.load(result)
    reference = vectors["naive"]

    def cosine_gap(a: np.ndarray) -> float:
        a, b = a.astype(np.float64), reference.astype(np.float64)
        return float((1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).max())

    report: dict[str, object] = {"cells": n_cells}
    for which, run in runs.items():
        report[which] = {
            "cells_per_second": round(n_cells / run["seconds"], 1),
            "times_naive": round(runs["naive"]["seconds"] / run["seconds"], 2),
            "peak_mb": round(run["peak_mb"]),
            "largest_cosine_gap_to_naive": cosine_gap(vectors[which]),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=256)
    parser.add_argument("--measure")
    parser.add_argument("--folder")
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.folder, given.cells, given.result)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "mini").symlink_to(gfx.models.load("mini").folder)
        report = {"mini": compare("mini", folder, given.cells)}
        for name, shape in SHAPES.items():
            random_model(folder / name, shape)
            report[name] = compare(name, folder, given.cells)
    print(json.dumps({"benchmark": "embed", "cores": os.cpu_count(), **report}, indent=1))


if __name__ == "__main__":
    main()

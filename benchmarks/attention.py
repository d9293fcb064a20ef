"""Attention summed over cells compared with a naive loop, in one run: `python benchmarks/attention.py`.

The naive loop asks transformers for all attention weights (`output_attentions=True`, which needs eager attention) and
adds up what each gene receives; in batches of 8 cells, and cell by cell, which is faster on a CPU. The model has
V1-10M's shape and number of tokens, with random weights; cells are of equal length. Prints JSON: cells per second of
`gfx.tl.attention` without its control, alone and with the pairs of 500 named genes, of both loops, and of
`gfx.tl.embed` through the same layers (means over genes); peak memory beyond that before, each in a process of its own.
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

import numpy as np
from bench_embed import SHAPES, make_cells, random_model

import gfx

LENGTHS = (512, 2048)
NAIVE = ("naive-batches", "naive-cells")
#: Tokens of the cells that each contender reads.
N_TOKENS = {"naive-batches": 1 << 14, "naive-cells": 1 << 14, "attention": 1 << 15, "pairs": 1 << 15, "embed": 1 << 15}
#: Genes whose pairs are kept, and runs of which the fastest counts.
N_NAMED, N_TIMES = 500, 3


def naive(model: gfx.models.Model, ids: np.ndarray, batch: int) -> np.ndarray:
    """Mean attention that each gene receives, from cells of equal length, `(n_tokens, n_layers * n_heads)`."""
    import torch
    from transformers import BertModel

    encoder = BertModel.from_pretrained(model.folder, attn_implementation="eager", add_pooling_layer=False).eval()
    sums = np.zeros((len(model.vocabulary), model.n_layers * model.config["num_attention_heads"]))
    counts = np.zeros(len(sums))
    with torch.no_grad():
        for start in range(0, len(ids), batch):
            cells = ids[start : start + batch].astype(np.int64)
            attentions = encoder(input_ids=torch.tensor(cells), output_attentions=True).attentions
            received = torch.cat([weights.mean(2) for weights in attentions], dim=1)  # (cells, layers * heads, length)
            for cell, values in zip(cells, received.numpy(), strict=True):
                sums[cell] += values.T
                counts[cell] += 1
    return sums / np.maximum(counts, 1)[:, None]


def measure(which: str, folder: Path, length: int, result: Path) -> None:
    """Run one contender in this process."""
    model = gfx.models.load(folder)
    adata = make_cells(N_TOKENS[which] // length, model.vocabulary, length=length)
    gfx.pp.tokenize(adata, model=model)
    gfx.settings.dtype = "float32"
    call = {
        "naive-batches": lambda: naive(model, adata.obsm["gfx_tokens"], 8),
        "naive-cells": lambda: naive(model, adata.obsm["gfx_tokens"], 1),
        "attention": lambda: gfx.tl.attention(adata, model=model, controls=None),
        "pairs": lambda: gfx.tl.attention(adata, model=model, controls=None, genes=adata.var_names[:N_NAMED].tolist()),
        "embed": lambda: gfx.tl.embed(adata, model=model, hidden_layer=-1, pooling="mean"),
    }[which]
    gfx.tl.embed(adata[:2].copy(), model=model)  # warm up
    if which == "pairs":
        some = adata.var_names[adata.X[0].indices[:2]].tolist()
        gfx.tl.attention(adata[:2].copy(), model=model, controls=None, genes=some)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(N_TIMES):
        start = time.perf_counter()
        found = call()
        times.append(time.perf_counter() - start)
    seconds = min(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The first cells are the same for all: they are compared where both have read them.
    if which == "attention":
        few = make_cells(N_TOKENS["naive-cells"] // length, model.vocabulary, length=length)
        gfx.tl.attention(few, model=model, controls=None)
        found = few.varm["gfx_attention"]
    elif which.startswith("naive"):
        found = found[~model.vocabulary.is_special]
    if which not in {"embed", "pairs"}:
        np.save(result, found)
    told = {"cells_per_second": N_TOKENS[which] / length / seconds}
    print(json.dumps(told | {"peak_mb": peak / 1024, "more_mb": (peak - before) / 1024}))


def run_alone(which: str, folder: Path, length: int, result: Path) -> dict[str, float]:
    call = [sys.executable, __file__, "--measure", which, "--folder", str(folder), "--length", str(length)]
    call += ["--result", str(result)]
    out = subprocess.run(call, check=True, capture_output=True, text=True, env=os.environ | {"GFX_VERBOSITY": "1"})
    return json.loads(out.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--length", type=int)
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.folder, given.length, given.result)
        return
    report = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_model(folder / "model", SHAPES["V1-shape"])
        for length in LENGTHS:
            results = {which: folder / f"{which}-{length}.npy" for which in N_TOKENS}
            runs = {which: run_alone(which, folder / "model", length, results[which]) for which in N_TOKENS}
            speed = {which: run["cells_per_second"] for which, run in runs.items()}
            ours, theirs = np.load(results["attention"]), np.load(results["naive-cells"])
            seen = ~np.isnan(ours[:, 0])
            report[length] = {
                "runs": runs,
                "times_naive": {which: speed["attention"] / speed[which] for which in NAIVE},
                "times_time_of_embed": speed["embed"] / speed["attention"],
                "times_without_pairs": speed["attention"] / speed["pairs"],
                "share_of_naive_memory": {
                    which: runs["attention"]["more_mb"] / runs[which]["more_mb"] for which in NAIVE
                },
                "largest_difference": float(np.abs(ours[seen] - theirs[seen]).max()),
            }
    print(json.dumps({"benchmark": "attention", "cores": os.cpu_count(), **report}, indent=1))


if __name__ == "__main__":
    main()

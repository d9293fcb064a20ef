"""Cell embedding compared with a naive loop, in one run: `python benchmarks/bench_embed.py [--cells N]`.

The naive loop is what most scripts do: the masked-LM model with its head, float32, all hidden states kept, batches of
cells in the order they come, padded to the longest of the batch. Prints JSON: cells per second of both, their ratio,
how far the vectors are apart, and the peak memory of each (each measured in a process of its own), for cells of uneven
lengths; and for cells of equal lengths the ratio, and the share of the measured peak of matrix products that the
products of the network reach in float32, products that give `<cls>` alone left out.
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
LENGTHS = (128, 512, 1024, 2048)
#: Tokens of the cells of equal length that each contender embeds.
N_TOKENS = {"naive": 1 << 14, "gfx-float32": 1 << 16}
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


def make_cells(n_cells: int, vocabulary: gfx.models.Model, seed: int = 0, *, length: int | None = None) -> ad.AnnData:
    """Counts of cells of so many tokens, or with as uneven numbers of genes as tissues have: log-normal around 700."""
    rng = np.random.default_rng(seed)
    n_genes = vocabulary.n_genes
    if length is None:
        detected = np.clip(rng.lognormal(np.log(700), 0.5, n_cells), 100, 4000).astype(int)
    else:
        detected = np.full(n_cells, length - vocabulary.n_specials)
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


def matmul_peak(dtype: object) -> float:
    """Giga operations per second in the best of some large products of matrices."""
    import torch

    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (8192, 1024, 1024), (16384, 256, 768)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        a @ b
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            best = max(best, 2e-9 * rows * inner * columns / (time.perf_counter() - start))
    return best


def layer_gflop(config: dict[str, int], length: int) -> float:
    """Products of matrices in one layer, for a cell of so many tokens."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    return 1e-9 * (2 * length * width * (4 * width + 2 * inner) + 4 * length**2 * width)


def measure(which: str, name: str, n_cells: int, result: Path, length: int | None) -> None:
    """Run one contender in this process."""
    import torch

    model = gfx.models.load(Path(name))
    adata = make_cells(n_cells, model.vocabulary, length=length)
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
    told = {"seconds": seconds, "peak_mb": peak / 1024, "before_mb": before / 1024}
    if length is not None and which != "naive":
        # Of the layers up to the one before the last, the last gives `<cls>` alone.
        gflops = layer_gflop(model.config, length) * (model.n_layers - 2) * n_cells / seconds
        told["share_of_peak"] = gflops / matmul_peak(torch.float32)
    print(json.dumps(told))


def run_alone(which: str, folder: Path, n_cells: int, result: Path, length: int | None = None) -> dict[str, float]:
    call = [sys.executable, __file__, "--measure", which, "--folder", str(folder), "--cells", str(n_cells)]
    call += ["--result", str(result), *([] if length is None else ["--length", str(length)])]
    out = subprocess.run(call, check=True, capture_output=True, text=True, env=os.environ | {"GFX_VERBOSITY": "1"})
    return json.loads(out.stdout.strip().splitlines()[-1])


def compare_by_length(folder: Path, result: Path) -> dict[int, dict[str, float]]:
    """Cells of equal length."""
    report = {}
    for length in LENGTHS:
        runs = {which: run_alone(which, folder, n // length, result, length) for which, n in N_TOKENS.items()}
        speed = {which: N_TOKENS[which] / length / run["seconds"] for which, run in runs.items()}
        report[length] = {
            "cells_per_second": round(speed["gfx-float32"], 1),
            "times_naive": round(speed["gfx-float32"] / speed["naive"], 2),
            "share_of_peak": round(runs["gfx-float32"]["share_of_peak"], 2),
        }
    return report


def compare(name: str, folder: Path, n_cells: int) -> dict[str, object]:
    runs, vectors = {}, {}
    for which in ("naive", "gfx-float32", "gfx-bfloat16"):
        result = folder / f"{name}-{which}.npy"
        runs[which] = run_alone(which, folder / name, n_cells, result)
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
    report["by_length"] = compare_by_length(folder / name, folder / "x.npy")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=256)
    parser.add_argument("--measure")
    parser.add_argument("--folder")
    parser.add_argument("--result", type=Path)
    parser.add_argument("--length", type=int)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.folder, given.cells, given.result, given.length)
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

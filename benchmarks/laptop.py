"""The README's four lines as a newcomer runs them: `python benchmarks/laptop.py DATA [--cells N]`.

DATA is an h5ad file with raw counts, such as pbmc3k; 400 of its cells are drawn. The lines run one after the other in
this process, with their defaults, and the deletion also without controls. Prints JSON: for each line the wall time in
seconds, passes (a cell that the network reads once), and the share of the measured peak of matrix products that the
products of these passes reach; and the time of all four, also as it would be with 150 GFLOP/s. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import torch
from screen import matmul_peak

import gfx

if TYPE_CHECKING:
    from collections.abc import Callable

GENES = ["CD3D", ("CD3D", "CD3E")]
GFLOPS_OF_A_LAPTOP = 150


class Passes:
    """Counts passes of the network, and the products in them, as the runner computes blocks of cells."""

    def __init__(self) -> None:
        from gfx._engine import run

        self.n, self.gflop, compute = 0, 0.0, run._compute

        def counting(task: object, cells: object, *args: object) -> object:
            self.add(task, cells)
            return compute(task, cells, *args)

        run._compute = counting

    def add(self, task: object, cells: object) -> None:
        """Count the layers of each pass; where `<cls>` is compared alone, the last one takes next to nothing."""
        whole = task.network.n_layers
        short = whole - (getattr(task, "pooling", None) == "cls")
        lengths, layers = cells.lengths, np.full(len(cells.lengths), short)
        if "set" in cells.given:
            lengths = lengths[cells.given["cell"]]
            is_own = cells.given.get("own", np.ones(len(lengths), dtype=bool))
            layers = np.where(is_own & ("group" in cells.given), whole, short)
            if task.split and task.positions == "close":
                lengths = np.concatenate([lengths, lengths[is_own]])
                layers = np.concatenate([layers, np.full(is_own.sum(), short)])
        self.n += len(lengths)
        self.gflop += sum(map(products, [task.network.config] * len(lengths), lengths.tolist(), layers.tolist()))


def products(config: dict[str, int], length: int, n_layers: int) -> float:
    """Products of matrices in some layers, in giga operations."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    return 2e-9 * n_layers * length * (4 * width**2 + 2 * width * inner + 2 * length * width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cells", type=int, default=400)
    parser.add_argument("--model", default="mini")
    given = parser.parse_args()
    whole = ad.read_h5ad(given.data)
    rows = np.sort(np.random.default_rng(0).permutation(whole.n_obs)[: given.cells])
    adata = whole[rows].copy()
    peak, passes = matmul_peak(torch.float32), Passes()
    how = {"model": given.model}
    lines: dict[str, Callable[[], object]] = {
        "tokenize": lambda: gfx.pp.tokenize(adata, **how),
        "embed": lambda: gfx.tl.embed(adata, **how),
        "delete_genes, no controls": lambda: gfx.tl.delete_genes(adata, GENES, controls=None, key_added="alone", **how),
        "delete_genes": lambda: gfx.tl.delete_genes(adata, GENES, **how),
        "attention": lambda: gfx.tl.attention(adata, **how),
    }
    report: dict[str, object] = {"benchmark": "laptop", "peak_gflops": round(peak, 1)}
    total = 0.0
    for name, line in lines.items():
        passes.n, passes.gflop, start = 0, 0.0, time.perf_counter()
        line()
        seconds = time.perf_counter() - start
        total += seconds if name != "delete_genes, no controls" else 0
        report[name] = {
            "seconds": round(seconds, 1),
            "passes": passes.n,
            "share_of_peak": round(passes.gflop / seconds / peak, 2),
        }
        print(json.dumps({name: report[name]}), flush=True)
    report |= {
        "cells": adata.n_obs,
        "mean_tokens": round(float(adata.obs["gfx_tokens_n"].mean()), 1),
        "four_lines": round(total, 1),
        "four_lines_at_150_gflops": round(total * peak / GFLOPS_OF_A_LAPTOP, 1),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

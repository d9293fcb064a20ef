"""How fast `gfx.pp.tokenize` is, and how much memory it takes, against the plain loop one would write with numpy.

    python benchmarks/bench_tokenize.py [n_cells]

(A script called tokenize.py would hide the standard module of that name from everything run in this folder.)

Prints JSON. Every figure comes from the same run: cells per second from AnnData in to tokens in `obsm`, after a first
call that compiles; the plain loop on a part of the same cells; peak memory of a process that does nothing else.
"""

from __future__ import annotations

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
import pandas as pd
import psutil
from scipy import sparse

import gfx
from gfx._core.vocabulary import SPECIALS, Vocabulary
from gfx.models._vocabulary_file import write_vocabulary

N_GENES, N_DETECTED, INPUT_SIZE = 20_000, 2_000, 4_096
N_PLAIN = 1_000
REPEATS = 3
MB = 1e6


def write_model(folder: Path) -> None:
    """Write a model that knows every gene; only its vocabulary and input size matter here."""
    from safetensors.numpy import save_file

    ids = [f"ENSG{n:011d}" for n in range(N_GENES)]
    names = np.array([*SPECIALS, *ids], dtype=object)
    medians = np.random.default_rng(0).lognormal(1, 1, N_GENES)
    vocabulary = Vocabulary("benchmark", names, np.r_[np.full(len(SPECIALS), np.nan), medians], np.full(len(names), ""))
    write_vocabulary(vocabulary, folder)
    config = {
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "max_position_embeddings": INPUT_SIZE,
        "num_hidden_layers": 1,
        "hidden_size": 2,
        "num_attention_heads": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {
            "bert.embeddings.word_embeddings.weight": np.zeros((len(vocabulary), 2), np.float32),
            "bert.embeddings.position_embeddings.weight": np.zeros((INPUT_SIZE, 2), np.float32),
            "bert.encoder.layer.0.output.dense.bias": np.zeros(2, np.float32),
        },
        folder / "model.safetensors",
    )


def write_counts(folder: Path, n_cells: int) -> None:
    """Write a CSR matrix of int32 counts as three arrays, so that reading it takes no more memory than it has."""
    rng = np.random.default_rng(0)
    indices, n_stored = [], []
    for _ in range(n_cells):
        columns = np.flatnonzero(rng.random(N_GENES, dtype=np.float32) < N_DETECTED / N_GENES).astype(np.int32)
        indices.append(columns)
        n_stored.append(len(columns))
    np.save(folder / "indices.npy", np.concatenate(indices))
    np.save(folder / "indptr.npy", np.r_[0, np.cumsum(n_stored)].astype(np.int32))
    np.save(folder / "data.npy", rng.geometric(0.4, sum(n_stored)).astype(np.int32))


def read_cells(folder: Path) -> ad.AnnData:
    arrays = [np.load(folder / f"{name}.npy") for name in ("data", "indices", "indptr")]
    x = sparse.csr_matrix(tuple(arrays), shape=(len(arrays[2]) - 1, N_GENES), copy=False)
    return ad.AnnData(x, var=pd.DataFrame(index=[f"ENSG{n:011d}" for n in range(N_GENES)]))


def plain_loop(x: sparse.csr_matrix, tokens: np.ndarray, medians: np.ndarray) -> list[np.ndarray]:
    """Rank the genes of every cell as one would without a library."""
    encoded = []
    for cell in range(x.shape[0]):
        stored = slice(x.indptr[cell], x.indptr[cell + 1])
        columns, counts = x.indices[stored], x.data[stored]
        values = counts / counts.sum() * 10_000 / medians[columns]
        ranked = tokens[columns[np.argsort(-values)]]
        encoded.append(np.r_[2, ranked[: INPUT_SIZE - 2], 3])
    return encoded


def measure_memory(folder: Path) -> dict[str, float]:
    """Run in a process of its own; in MB."""
    model = gfx.models.load(folder)
    process = psutil.Process()
    tiny = ad.AnnData(
        sparse.csr_matrix(np.ones((2, N_GENES), np.int32)),
        var=pd.DataFrame(index=[f"ENSG{n:011d}" for n in range(N_GENES)]),
    )
    gfx.pp.tokenize(tiny, model=model)
    del tiny
    baseline = process.memory_info().rss
    adata = read_cells(folder)
    before = process.memory_info().rss
    highest_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gfx.pp.tokenize(adata, model=model)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    matrix = adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes
    tokens = adata.obsm["gfx_tokens"].nbytes
    return {
        "libraries_and_compiled_code_mb": baseline / MB,
        "input_mb": matrix / MB,
        "tokens_mb": tokens / MB,
        "resident_before_call_mb": before / MB,
        "peak_before_call_mb": highest_before / MB,
        "peak_mb": highest / MB,
        "over_input_and_tokens_mb": (highest - baseline - matrix - tokens) / MB,
    }


def main(n_cells: int) -> None:
    gfx.settings.verbosity = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        write_counts(folder, n_cells)
        command = [sys.executable, __file__, "--memory", str(folder)]
        memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        adata = read_cells(folder)
        model = gfx.models.load(folder)
        model.provenance()  # hashes the weights while they are there
    begin = time.perf_counter()
    gfx.pp.tokenize(adata[:64].copy(), model=model)
    first = time.perf_counter() - begin

    times = []
    for _ in range(REPEATS):
        fresh = ad.AnnData(adata.X, var=adata.var)
        begin = time.perf_counter()
        gfx.pp.tokenize(fresh, model=model)
        times.append(time.perf_counter() - begin)
    part = adata.X[:N_PLAIN]
    tokens = model.vocabulary.resolve(adata.var_names)
    begin = time.perf_counter()
    plain = plain_loop(part, tokens, model.vocabulary.medians[tokens])
    plain_rate = len(plain) / (time.perf_counter() - begin)
    # The loop leaves the order of equal values open; everything else has to be the same.
    ours = fresh.obsm["gfx_tokens"]
    agreeing = np.mean([np.array_equal(np.sort(row), np.sort(ours[i, : len(row)])) for i, row in enumerate(plain)])

    rate = n_cells / float(np.median(times))
    figures = {
        "n_cells": n_cells,
        "n_genes": N_GENES,
        "genes_per_cell": round(adata.X.nnz / n_cells),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "first_call_s": first,
        "cells_per_s": rate,
        "plain_loop_cells_per_s": plain_rate,
        "ratio": rate / plain_rate,
        "cells_with_the_same_genes": float(agreeing),
        "memory": memory,
        "goals_met": {"ratio_at_least_10": rate / plain_rate >= 10, "memory": memory["over_input_and_tokens_mb"] < 200},
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        gfx.settings.verbosity = 0
        print(json.dumps(measure_memory(Path(sys.argv[2]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)

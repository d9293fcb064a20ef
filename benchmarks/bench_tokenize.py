"""How fast `gfx.pp.tokenize` is, and how much memory it takes, in memory and from disk.

    python benchmarks/bench_tokenize.py [n_cells]

(A script called tokenize.py would hide the standard module of that name from everything run in this folder.)

Prints JSON. Every figure comes from the same run: cells per second from AnnData in to tokens in `obsm`, after a first
call that compiles; the plain loop one would write with numpy, with a stable and with numpy's default sort, on a part of
the same cells; the same cells in files, tokenized from there and, in turn, read into memory by anndata alone; peak
memory of processes that do nothing else. Processor time stands beside the time on the clock, for a machine that has
other things to do. The files have just been written, so the system still holds them: what is measured is anndata's,
h5py's and zarr's work, not that of a disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import psutil
import zarr
from scipy import sparse

import gfx
from gfx._core.vocabulary import SPECIALS, Vocabulary
from gfx.models._vocabulary_file import write_vocabulary

N_GENES, N_DETECTED, INPUT_SIZE = 20_000, 2_000, 4_096
N_PLAIN = 1_000
REPEATS = 5
MB = 1e6
FILES = ("cells.h5ad", "cells_gzip.h5ad", "cells.zarr")


class Stopwatch:
    """The best of several times, on the clock and of the processors."""

    def __init__(self) -> None:
        self.clock, self.processors = float("inf"), float("inf")

    def __enter__(self) -> None:
        self.begin = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.clock = min(self.clock, time.perf_counter() - self.begin[0])
        self.processors = min(self.processors, time.process_time() - self.begin[1])

    def rates(self, n_cells: int) -> dict[str, float]:
        return {"cells_per_s": n_cells / self.clock, "processor_us_per_cell": self.processors / n_cells * 1e6}


def write_model(folder: Path) -> None:
    """Write a model that knows every gene; only its vocabulary and input size matter here."""
    from transformers import BertConfig, BertForMaskedLM

    ids = [f"ENSG{n:011d}" for n in range(N_GENES)]
    names = np.array([*SPECIALS, *ids], dtype=object)
    medians = np.random.default_rng(0).lognormal(1, 1, N_GENES)
    vocabulary = Vocabulary("benchmark", names, np.r_[np.full(len(SPECIALS), np.nan), medians], np.full(len(names), ""))
    write_vocabulary(vocabulary, folder)
    small = {"num_hidden_layers": 1, "hidden_size": 2, "num_attention_heads": 1, "intermediate_size": 2}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=INPUT_SIZE, hidden_act="relu", **small)
    BertForMaskedLM(config).save_pretrained(folder)


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
    indptr = np.load(folder / "indptr.npy")
    x = sparse.csr_matrix((len(indptr) - 1, N_GENES), dtype=np.int32)
    x.data, x.indices, x.indptr = np.load(folder / "data.npy"), np.load(folder / "indices.npy"), indptr
    return ad.AnnData(x, var=pd.DataFrame(index=[f"ENSG{n:011d}" for n in range(N_GENES)]))


def write_files(adata: ad.AnnData, folder: Path) -> None:
    """Write the cells as float32, as most files hold counts."""
    cells = ad.AnnData(adata.X.astype(np.float32), var=adata.var)
    cells.write_h5ad(folder / "cells.h5ad")
    cells.write_h5ad(folder / "cells_gzip.h5ad", compression="gzip")
    cells.write_zarr(folder / "cells.zarr")


def open_file(path: Path) -> ad.AnnData:
    """Open cells whose counts stay on disk."""
    if path.suffix == ".h5ad":
        return ad.read_h5ad(path, backed="r")
    group = zarr.open_group(path, mode="r")
    return ad.AnnData(ad.io.sparse_dataset(group["X"]), var=ad.io.read_elem(group["var"]))


def time_file(path: Path, model: gfx.models.Model) -> dict[str, object]:
    """Measure in turn: reading alone, tokenizing what was read, and tokenizing from the file."""
    reading, in_memory, from_file = Stopwatch(), Stopwatch(), Stopwatch()
    for _ in range(REPEATS):
        with reading:
            cells = (ad.read_h5ad if path.suffix == ".h5ad" else ad.read_zarr)(path)
        with in_memory:
            gfx.pp.tokenize(cells, model=model)
        with from_file:
            gfx.pp.tokenize(open_file(path), model=model)
    watches = {"read": reading, "tokenize_in_memory": in_memory, "tokenize": from_file}
    figures = {name: watch.rates(cells.n_obs) for name, watch in watches.items()}
    # The two run at the same time, so that the slower one decides, as far as there are processors for both.
    slower = max(reading.clock, in_memory.clock)
    return figures | {"over_read": reading.clock / from_file.clock, "over_slower": slower / from_file.clock}


def plain_loop(x: sparse.csr_matrix, tokens: np.ndarray, medians: np.ndarray, kind: str) -> list[np.ndarray]:
    """Rank the genes of every cell as one would without a library, on the arrays of the matrix."""
    encoded = []
    for cell in range(x.shape[0]):
        stored = slice(x.indptr[cell], x.indptr[cell + 1])
        columns, counts = x.indices[stored], x.data[stored]
        values = counts / counts.sum() * 10_000 / medians[columns]
        ranked = tokens[columns[np.argsort(-values, kind=kind)]]
        encoded.append(np.r_[2, ranked[: INPUT_SIZE - 2], 3])
    return encoded


def time_plain_loop(adata: ad.AnnData, model: gfx.models.Model, kind: str) -> dict[str, float]:
    """Measure the loop, and the share of cells in which it gives exactly our tokens."""
    tokens = model.vocabulary.resolve(adata.var_names)
    part = adata.X[:N_PLAIN]
    medians = model.vocabulary.medians[tokens]
    watch = Stopwatch()
    for _ in range(REPEATS):
        with watch:
            plain = plain_loop(part, tokens, medians, kind)
    ours = adata.obsm["gfx_tokens"]
    same = np.mean([np.array_equal(row, ours[i, : len(row)]) for i, row in enumerate(plain)])
    return watch.rates(N_PLAIN) | {"cells_with_our_tokens": float(same)}


def peak() -> int:
    """Highest resident memory of this process; `getrusage` would start from that of the process it came from."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure_memory(folder: Path, file: str | None = None) -> dict[str, float]:
    """Tokenize cells in memory, or in a file, in a process of its own; in MB."""
    model = gfx.models.load(folder)
    process = psutil.Process()
    tiny = ad.AnnData(
        sparse.csr_matrix(np.ones((2, N_GENES), np.int32)),
        var=pd.DataFrame(index=[f"ENSG{n:011d}" for n in range(N_GENES)]),
    )
    gfx.pp.tokenize(tiny, model=model)
    del tiny
    baseline = process.memory_info().rss
    adata = read_cells(folder) if file is None else open_file(folder / file)
    before = process.memory_info().rss
    highest_before = peak()
    gfx.pp.tokenize(adata, model=model)
    highest = peak()
    matrix = 0 if file else adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes
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


def memory_of_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(n_cells: int) -> None:
    gfx.settings.verbosity = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        write_counts(folder, n_cells)
        adata = read_cells(folder)
        write_files(adata, folder)
        model = gfx.models.load(folder)
        model.provenance()  # hashes the weights while they are there
        begin = time.perf_counter()
        gfx.pp.tokenize(adata[:64].copy(), model=model)
        first = time.perf_counter() - begin
        files = {file: time_file(folder / file, model) for file in FILES}
        memory = memory_of_process(folder)
        for file in FILES:
            files[file]["memory"] = memory_of_process(folder, file)

    watch = Stopwatch()
    for _ in range(REPEATS):
        fresh = ad.AnnData(adata.X, var=adata.var)
        with watch:
            gfx.pp.tokenize(fresh, model=model)
    ours = watch.rates(n_cells)
    # Our order of equal values is defined. A loop that defines it, too, sorts stably; numpy's default sort is faster on
    # processors with AVX-512, and leaves the order of equal values to them.
    stable, unstable = time_plain_loop(fresh, model, "stable"), time_plain_loop(fresh, model, "quicksort")
    for loop in (stable, unstable):
        loop["ratio"] = ours["cells_per_s"] / loop["cells_per_s"]
    figures = {
        "n_cells": n_cells,
        "n_genes": N_GENES,
        "genes_per_cell": round(adata.X.nnz / n_cells),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "first_call_s": first,
        "tokenize": ours,
        "plain_loop": stable,
        "plain_loop_unstable": unstable,
        "memory": memory,
        "files": files,
        "goals_met": {
            "ten_times_the_plain_loop": stable["ratio"] >= 10,
            "under_200_mb_over_input_and_tokens": all(
                of_process["over_input_and_tokens_mb"] < 200
                for of_process in (memory, *(figures["memory"] for figures in files.values()))
            ),
            "four_fifths_of_reading": {file: figures["over_read"] >= 0.8 for file, figures in files.items()},
        },
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        gfx.settings.verbosity = 0
        print(json.dumps(measure_memory(Path(sys.argv[2]), *sys.argv[3:])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)

"""Screens of more cells than fit in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata.io import sparse_dataset
from scipy import sparse
from transformers import BertConfig, BertForMaskedLM

from gfx._core.vocabulary import SPECIALS, Vocabulary
from gfx.models._vocabulary_file import write_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

N_GENES, LONGEST = 600, 512

CHILD = """
import json, resource, sys
import anndata as ad
import h5py
import gfx

adata = ad.read_h5ad(sys.argv[1], backed="r")
gfx.tl.screen_genes(adata, method=gfx.tl.FirstOrder(n_probes=1), **json.loads(sys.argv[2]))
assert adata.isbacked
assert adata.varm["gfx_screen"]["n_cells"].sum() > 400 * adata.n_obs / 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of width 8, input size 512, 600 genes."""
    vocabulary = Vocabulary(
        name="small",
        ids=np.array([*SPECIALS[:2], *(f"ENSG{n:011d}" for n in range(N_GENES))], dtype=object),
        medians=np.array([np.nan, np.nan, *np.random.default_rng(0).lognormal(1, 1, N_GENES)]),
        symbols=np.array(["", "", *(f"G{n}" for n in range(N_GENES))], dtype=object),
        aliases={},
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=LONGEST,
        pad_token_id=vocabulary.pad,
        hidden_act="relu",
        **sizes,
    )
    folder = tmp_path_factory.mktemp("models") / "small"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder)
    write_vocabulary(vocabulary, folder)
    return folder


def write_cells(path: Path, n_cells: int, *, at_once: int = 2000) -> None:
    """Write cells of some 540 genes each, a few at a time."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"state": pd.Categorical(np.array(["a", "b"])[np.arange(n_cells) % 2])})
    obs.index = [f"cell{at}" for at in range(n_cells)]
    var = pd.DataFrame(index=[f"ENSG{n:011d}" for n in range(N_GENES)])

    def some() -> sparse.csr_matrix:
        return sparse.csr_matrix(rng.poisson(2.5, (at_once, N_GENES)).astype(np.float32))

    ad.AnnData(some(), var=var).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        stored = sparse_dataset(file["X"])
        for _ in range(n_cells // at_once - 1):
            stored.append(some())
        del file["obs"]
        ad.io.write_elem(file, "obs", obs)


def peak(path: Path, **arguments: object) -> int:
    """Bytes of memory that a process takes at most."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(path), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("with_goal", [False, True])
def test_memory_grows_with_tokens_alone(model: Path, tmp_path: Path, with_goal: bool) -> None:
    """100,000 cells on disk take what their tokens take, two bytes each, and less than 1,000 bytes a cell beside.

    These are names of cells and the like, and what the allocator does not give back; a second copy of the tokens would
    take more.
    """
    arguments = {"model": str(model), "controls": None}
    arguments |= {"groupby": "state", "start": "a", "goal": "b"} if with_goal else {}
    sizes, peaks = np.array([10_000, 100_000]), []
    for n_cells in sizes:
        path = tmp_path / f"{n_cells}.h5ad"
        write_cells(path, n_cells)
        peaks.append(peak(path, store=str(tmp_path / f"{n_cells}.zarr"), **arguments))
        path.unlink()
    assert np.diff(peaks)[0] < np.diff(sizes)[0] * (2 * LONGEST + 1000)

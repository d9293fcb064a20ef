"""Files with random damage: each is our own error that names it, or is as good as it was; never a crash."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gfx

if TYPE_CHECKING:
    from tests.conftest import ToyCells

    from gfx._core.vocabulary import Vocabulary

CHILD = Path(__file__).with_name("damaged_files_child.py")


@pytest.fixture
def whole(toy_folder: Path, toy_vocabulary: Vocabulary, toy_cells: ToyCells, tmp_path: Path) -> Path:
    """A model, one with weights as a pickle, one with pickled dictionaries, two classifiers, a store, and cells."""
    shutil.copytree(toy_folder, tmp_path / "model")
    shutil.copytree(toy_folder, tmp_path / "pickled")
    torch.save(load_file(toy_folder / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    dictionaries = Path(shutil.copytree(toy_folder, tmp_path / "dictionaries"))
    (dictionaries / "vocabulary.tsv.gz").unlink()
    medians = dict(zip(toy_vocabulary.ids[4:], map(np.float64, toy_vocabulary.medians[4:]), strict=True))
    for name, content in (("token_dictionary", toy_vocabulary.token_of), ("gene_median_dictionary", medians)):
        (dictionaries / f"{name}.pkl").write_bytes(pickle.dumps(content))
    cells = toy_cells(6)
    cells.var_names = cells.var["ensembl_id"].tolist()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    train = {"model": tmp_path / "model", "method": "linear_probe"}
    gfx.models.fine_tune_cells(cells, "cell_type", tmp_path / "of_cells", **train)
    labels = {"low": cells.var_names[:100].tolist(), "high": cells.var_names[100:200].tolist()}
    gfx.models.fine_tune_genes(cells, labels, tmp_path / "of_genes", **train)
    gfx.tl.embed(cells, model=tmp_path / "model", store=tmp_path / "store")
    return tmp_path


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")
def test_files_with_random_damage_are_one_error_that_names_them_or_are_whole(whole: Path, seed: int) -> None:
    """In a process of its own, with a gigabyte and 20 seconds for each file."""
    number = 10_000 if seed else 250
    done = subprocess.run(
        [sys.executable, CHILD, whole, str(seed), str(number)], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ended = {line["case"]: line["wrong"] for line in lines if "wrong" in line}
    files = {line["case"]: line["file"] for line in lines if "file" in line}
    wrong = [f"{case}, {files[case]}: {ended.get(case, 'crashed or hung')}" for case in files if ended.get(case, "!")]
    assert not wrong, "\n".join(wrong[:5])
    assert len(ended) == number, done.stderr[-2000:]
    assert {file.partition("/")[0] for file in files.values()} == {
        *("model", "pickled", "dictionaries", "of_genes", "of_cells", "store")
    }

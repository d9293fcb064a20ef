"""Shared by all tests: where real data is, a toy vocabulary, toy models in the published layout, toy cells."""

from __future__ import annotations

import ast
import gzip
import json
import shutil
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from gfx._core.vocabulary import SPECIALS, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mudata import MuData

    from gfx.models import Model

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
N_GENES = 200


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real and reference data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data: the folder {SHARED.name!r} is not beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Reference outputs of the official software."""
    return shared / "data" / "golden"


@pytest.fixture(scope="session")
def real_cells(shared: Path) -> RealCells:
    """Read real cells by their path under `data/cells`, such as ``"eval/pbmc3k_10x"``; symbols are the index."""

    def read(name: str) -> ad.AnnData:
        return ad.read_h5ad(shared / "data" / "cells" / f"{name}.h5ad")

    return read


def _official(shared: Path, name: str, corpus: str) -> Vocabulary:
    folder = shared / "data" / "official"
    read = {"keep_default_na": False, "na_values": {"median": [""]}, "float_precision": "round_trip"}
    table = pd.read_csv(folder / f"vocab_{corpus}.csv.gz", **read)
    names = pd.read_csv(folder / f"gene_name_id_dict_{corpus}.csv.gz", keep_default_na=False)
    mapping = pd.read_csv(folder / f"ensembl_mapping_dict_{corpus}.csv.gz", keep_default_na=False)
    aliases = dict(zip(names["symbol"].str.upper(), names["ensembl_id"], strict=True))
    aliases |= dict(zip(mapping["key"], mapping["ensembl_id"], strict=True))
    return Vocabulary(
        name=name,
        ids=table["ensembl_id"].to_numpy(dtype=object),
        medians=table["median"].to_numpy(dtype=np.float64),
        symbols=table["symbol"].to_numpy(dtype=object),
        aliases=aliases,
    )


@pytest.fixture(scope="session")
def official_v1(shared: Path) -> Vocabulary:
    """Published vocabulary of the 30M family, read from text."""
    return _official(shared, "V1", "gc30M")


@pytest.fixture(scope="session")
def official_v2(shared: Path) -> Vocabulary:
    """Published vocabulary of the 104M family, read from text."""
    return _official(shared, "V2", "gc104M")


# --- toys -----------------------------------------------------------------------------------------------------------


def make_vocabulary(*, n_genes: int = N_GENES, with_cls: bool = True, name: str = "toy", seed: int = 0) -> Vocabulary:
    """Name genes ENSG00000000001..., symbols TOY1..., aliases OLDTOY1...; ENSG00000999999 is gene 1, retired."""
    specials = list(SPECIALS if with_cls else SPECIALS[:2])
    ids = [f"ENSG{n:011d}" for n in range(1, n_genes + 1)]
    medians = np.random.default_rng(seed).lognormal(1, 1, n_genes)
    aliases = {f"OLDTOY{n}": name for n, name in enumerate(ids, start=1)} | {"ENSG00000999999": ids[0]}
    return Vocabulary(
        name=name,
        ids=np.array(specials + ids, dtype=object),
        medians=np.concatenate([np.full(len(specials), np.nan), medians]),
        symbols=np.array([""] * len(specials) + [f"TOY{n}" for n in range(1, n_genes + 1)], dtype=object),
        aliases=aliases,
    )


@pytest.fixture(scope="session")
def toy_vocabulary() -> Vocabulary:
    """200 genes, with ``<cls>`` and ``<eos>``."""
    return make_vocabulary()


@pytest.fixture(scope="session")
def toy_vocabulary_v1() -> Vocabulary:
    """200 genes, without ``<cls>`` and ``<eos>``."""
    return make_vocabulary(with_cls=False, name="toy-v1")


def write_toy_model(folder: Path, vocabulary: Vocabulary, *, max_length: int = 64, seed: int = 0) -> Path:
    """Write a random BERT with 3 blocks of width 16 as a published folder: config, safetensors, vocabulary."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from gfx.models._vocabulary_file import write_vocabulary

    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=max_length,
        hidden_act="relu",
        pad_token_id=vocabulary.pad,
        initializer_range=0.3,  # wide, so that cells and genes differ visibly
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_vocabulary(vocabulary, folder)
    return folder


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory, toy_vocabulary: Vocabulary) -> Path:
    """Folder of a random model with special tokens, input size 64."""
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_vocabulary)


@pytest.fixture(scope="session")
def toy_folder_v1(tmp_path_factory: pytest.TempPathFactory, toy_vocabulary_v1: Vocabulary) -> Path:
    """Folder of a random model without special tokens, input size 64."""
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy-v1", toy_vocabulary_v1, seed=1)


@pytest.fixture(scope="session")
def toy_model(toy_folder: Path) -> Model:
    """Random model with special tokens: 3 blocks, width 16, input size 64, 200 genes."""
    from gfx.models import load

    return load(toy_folder)


@pytest.fixture(scope="session")
def toy_model_v1(toy_folder_v1: Path) -> Model:
    """Random model without special tokens: 3 blocks, width 16, input size 64, 200 genes."""
    from gfx.models import load

    return load(toy_folder_v1)


class RealCells(Protocol):
    """How `real_cells` is called."""

    def __call__(self, name: str) -> ad.AnnData: ...


class ToyCells(Protocol):
    """How `toy_cells` is called."""

    def __call__(self, n_cells: int = 60, *, n_unknown: int = 5, seed: int = 0) -> ad.AnnData: ...


@pytest.fixture(scope="session")
def toy_cells() -> ToyCells:
    """Make cells of the toy vocabulary's genes (symbols as index, `var["ensembl_id"]`), and some unknown genes.

    X: CSR float32 counts, about 30 to 90 detected genes a cell, the same cells for the same seed.
    obs: `cell_type` (a, b, c), `condition` (sick, healthy), `donor` (d1 to d4).
    """

    def make(n_cells: int = 60, *, n_unknown: int = 5, seed: int = 0) -> ad.AnnData:
        rng = np.random.default_rng(seed)
        n_genes = N_GENES + n_unknown
        rate = rng.lognormal(-1.2, 1.2, n_genes) * rng.lognormal(0, 0.4, (n_cells, 1))
        x = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
        known = range(1, N_GENES + 1)
        unknown = range(1, n_unknown + 1)
        var = pd.DataFrame(
            {"ensembl_id": [f"ENSG{n:011d}" for n in known] + [f"ENSG{90000 + n:011d}" for n in unknown]},
            index=[f"TOY{n}" for n in known] + [f"UNKNOWN{n}" for n in unknown],
        )
        obs = pd.DataFrame(
            {
                "cell_type": pd.Categorical(np.array(["a", "b", "c"])[np.arange(n_cells) % 3]),
                "condition": pd.Categorical(np.where(np.arange(n_cells) % 2, "healthy", "sick")),
                "donor": pd.Categorical(np.array(["d1", "d2", "d3", "d4"])[np.arange(n_cells) // 2 % 4]),
            },
            index=[f"cell{i}" for i in range(n_cells)],
        )
        return ad.AnnData(x, obs=obs, var=var)

    return make


@pytest.fixture
def as_mudata() -> Iterator[type[MuData]]:
    """MuData that behaves the same in all versions while the test runs: nothing is pulled from the modalities."""
    import mudata

    with mudata.set_options(pull_on_update=False):
        yield mudata.MuData


# --- reference outputs of the official software ---------------------------------------------------------------------


@dataclass(frozen=True)
class GoldenRun:
    """A random model, cells, and what the official software made of them.

    Its cells follow `order`, longest first; our rows are `ids` and `lengths` as given.
    """

    folder: Path
    vocabulary: Vocabulary
    ids: np.ndarray
    lengths: np.ndarray
    order: np.ndarray
    state: np.ndarray
    expected: dict[str, Any]

    @property
    def tokens(self) -> list[int]:
        """Tokens of genes."""
        return np.flatnonzero(~self.vocabulary.is_special).tolist()

    @property
    def pooling(self) -> str:
        """How the official runs turned a cell into a vector."""
        return "cls" if self.vocabulary.has_cls else "mean"

    def embedding(self, mode: str, layer: int) -> pd.DataFrame:
        """Official embedding: `mode` cell, cls or gene; `layer` 0 is the last block, -1 the one before."""
        table = pd.read_csv(self.folder / f"emb_{mode}_layer{layer}.csv", index_col=0)
        return table[[str(at) for at in range(16)]]

    def run(self, name: str, kind: str = "cell_embs") -> dict[tuple, list[float]]:
        """Values of a run by the tokens they belong to; keys are tuples, cells follow `order`."""
        return _by_tokens(self.expected["isp"][f"{name}/{kind}"])

    def run_states(self, name: str, state: str) -> dict[tuple, list[float]]:
        """Values of a run towards one state."""
        return _by_tokens(self.expected["isp"][f"{name}/cell_embs"][state])


def _by_tokens(values: dict[str, list[float]]) -> dict[tuple, list[float]]:
    return {ast.literal_eval(key): found for key, found in values.items()}


@pytest.fixture(scope="session", params=["v1style", "v2style"])
def golden_run(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> GoldenRun:
    """Reference runs without and with special tokens, their model in a folder that `gfx.models.load` reads."""
    from gfx.models._vocabulary_file import write_vocabulary

    source = golden / request.param
    expected = json.loads(gzip.decompress((source / "expected.json.gz").read_bytes()))
    names = sorted(expected["token_dictionary"], key=expected["token_dictionary"].get)
    vocabulary = Vocabulary(
        name=request.param,
        ids=np.array(names, dtype=object),
        medians=np.array([np.nan if name in SPECIALS else 1.0 for name in names]),
        symbols=np.array([""] * len(names), dtype=object),
    )
    folder = tmp_path_factory.mktemp("golden") / request.param
    shutil.copytree(source, folder)
    write_vocabulary(vocabulary, folder)
    lengths = np.array([len(cell) for cell in expected["cells"]], dtype=np.int32)
    ids = np.zeros((len(lengths), lengths.max()), dtype=np.uint16)
    for row, cell in zip(ids, expected["cells"], strict=True):
        row[: len(cell)] = cell
    return GoldenRun(
        folder=folder,
        vocabulary=vocabulary,
        ids=ids,
        lengths=lengths,
        order=np.argsort(-lengths, kind="stable"),
        state=np.array(expected["state"]),
        expected=expected,
    )


# --- training that is stopped ---------------------------------------------------------------------------------------


class Stopped(BaseException):
    """What ends a run from outside, like Ctrl-C."""


@dataclass(frozen=True)
class StopInStep:
    """Count forward passes of training from the call on, and raise `stopped` in one of them."""

    monkeypatch: pytest.MonkeyPatch
    model: type
    forward: Any
    stopped: type[BaseException] = Stopped

    def __call__(self, step: int) -> list[int]:
        steps, forward, stopped = [], self.forward, self.stopped

        @wraps(forward)
        def counted(self, *args, **kwargs):
            if self.training:
                steps.append(1)
                if len(steps) == step:
                    raise stopped
            return forward(self, *args, **kwargs)

        self.monkeypatch.setattr(self.model, "forward", counted)
        return steps


@pytest.fixture
def stop_in_step(monkeypatch: pytest.MonkeyPatch) -> StopInStep:
    """Stop training in a step of one's choice."""
    from gfx._engine.masked_model import MaskedGeneModel

    return StopInStep(monkeypatch, MaskedGeneModel, MaskedGeneModel.forward)

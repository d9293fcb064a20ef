"""Shared by all tests: where real data is, a toy vocabulary, toy models in the published layout, toy cells."""

from __future__ import annotations

import ast
import gc
import gzip
import json
import os
import random
import shutil
import threading
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import wraps
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

# Tiny models wait for their threads longer than they compute, and sums depend on how many threads share them. Set
# before numba and torch load; pytest's workers and the processes that a test starts inherit it.
os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"

import anndata as ad
import hypothesis
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx
from gfx._core.vocabulary import SPECIALS, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mudata import MuData

    from gfx.models import Model

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
N_GENES = 200


@pytest.fixture
def in_float32():
    """Compute in float32 on every machine, whether or not it has fast bfloat16."""
    with gfx.settings.override(dtype="float32"):
        yield


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
    exact = {"median": lambda text: float(text or "nan")}  # pandas before 3 is off by a last bit
    table = pd.read_csv(folder / f"vocab_{corpus}.csv.gz", keep_default_na=False, converters=exact)
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


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Dask on two workers that are threads of this process."""
    distributed = pytest.importorskip("distributed")
    arguments = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with distributed.LocalCluster(processes=False, **arguments) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.fixture(scope="session")
def random_states() -> Callable[[], list[Any]]:
    """Read the states of all generators of random numbers that are the user's."""

    def read() -> list[Any]:
        import torch

        name, keys, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate()]

    return read


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
    torch = pytest.importorskip("torch", reason="a toy model is made by torch")
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


@pytest.fixture(scope="session", params=["V1", "V2"])
def like_published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model with a published vocabulary and its input size, and few small layers."""
    vocabulary = request.getfixturevalue(f"official_{request.param.lower()}")
    length = {"V1": 2048, "V2": 4096}[request.param]
    return write_toy_model(tmp_path_factory.mktemp("models") / request.param, vocabulary, max_length=length)


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

    pulls = hasattr(mudata, "set_options")  # before mudata 0.4
    with mudata.set_options(pull_on_update=False) if pulls else nullcontext():
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


# --- a server of files ------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """What a server holds and was asked for. `together`: that many must ask for a file before it is sent."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    together: dict[str, threading.Barrier] = field(default_factory=dict)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve `hub.files` on this machine; the first `hub.broken[path]` answers to a path stop half-way."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.removeprefix("/")
            hub.asked[path] += 1
            if path in hub.together:
                hub.together[path].wait(timeout=60)
            body = hub.files.get(path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            half = hub.asked[path] <= hub.broken[path]
            self.wfile.write(body[: len(body) // 2] if half else body)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()
    with warnings.catch_warnings():  # answers that were given up are left open; let go of them while nobody minds
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


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


@pytest.fixture(scope="module", autouse=True)
def garbage_of_this_file_alone() -> None:
    """Let later collections pass over what is there: each training collects several times, most of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def stop_in_step(monkeypatch: pytest.MonkeyPatch) -> StopInStep:
    """Stop training in a step of one's choice."""
    from gfx._engine.pretraining import MaskedGeneModel

    return StopInStep(monkeypatch, MaskedGeneModel, MaskedGeneModel.forward)


# --- made-up results of classifiers ---------------------------------------------------------------------------------

#: Mean scores of made-up methods; "auc" is their AUC, and other metrics are as high.
SCORES = {"expression": 0.66, "majority": 0.5, "model": 0.82, "random_weights": 0.58}


class Classified(Protocol):
    """How `classified` is called."""

    def __call__(
        self,
        adata: ad.AnnData,
        function: str,
        *,
        key: str | None = None,
        tasks: dict[str, list[str]] | None = None,
        groups: list[str] | None = None,
    ) -> ad.AnnData: ...


def _measured(tasks: dict[str, list[str]], units: list[str], rng: np.random.Generator) -> pd.DataFrame:
    """Values of every task, unit, method, number of cells, seed, fold and metric."""
    rows = [
        (task, unit, method, n_cells, seed, fold, metric, score - 20 / n_cells + rng.normal(0, 0.02), 40)
        for task in tasks
        for unit in units
        for method, score in SCORES.items()
        for n_cells in (100, 500, 2000)
        for seed in range(3)
        for fold in range(5)
        for metric in ("auc", "accuracy", "macro_f1")
    ]
    columns = ["task", "unit", "method", "n_cells", "repeat", "fold", "metric", "value", "n"]
    return pd.DataFrame(rows, columns=columns)


def _summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds of means over folds; an interval at the largest number of cells."""
    by = ["task", "unit", "method", "n_cells", "metric"]
    seeds = metrics.groupby([*by, "repeat"], sort=False)["value"].mean()
    table = seeds.groupby(by, sort=False).agg(["mean", "std"]).reset_index().rename(columns={"std": "sd"})
    has_interval = (table["n_cells"] == 2000) & (table["unit"] != "occurrence")
    for name, away in (("low", -0.05), ("high", 0.05)):
        table[name] = (table["mean"] + away).where(has_interval)
    return table.assign(n_repeats=3, n=40)


def _curves(tasks: dict[str, list[str]], units: list[str], rng: np.random.Generator) -> pd.DataFrame:
    """ROC curves whose area is the AUC of the method, but for some noise; of two classes the second one alone."""
    fpr = np.linspace(0, 1, 101)
    parts = []
    for task, classes in tasks.items():
        for unit in units:
            for method, score in SCORES.items():
                for seed in range(3):
                    for fold in range(5):
                        for name in classes[1:] if len(classes) == 2 else classes:
                            auc = score + rng.normal(0, 0.02)
                            curve = {"task": task, "unit": unit, "method": method, "repeat": seed, "fold": fold}
                            curve |= {"class": name, "fpr": fpr, "tpr": fpr ** (1 / auc - 1)}
                            parts.append(pd.DataFrame(curve))
    return pd.concat(parts, ignore_index=True)


def _pairs(tasks: dict[str, list[str]], unit: str, rng: np.random.Generator) -> pd.DataFrame:
    """Numbers of each pair of classes; more on the diagonal, and no pair of the first and the last class."""
    rows = [
        (task, unit, method, true, predicted, n)
        for task, classes in tasks.items()
        for method, score in SCORES.items()
        for true in classes
        for predicted in classes
        for n in [
            score * 30
            if true == predicted
            else 0.0
            if (true, predicted) == (classes[0], classes[-1])
            else rng.integers(1, 9) / 3
        ]
    ]
    return pd.DataFrame(rows, columns=["task", "unit", "method", "true", "predicted", "n"])


def _probabilities(n: int, n_classes: int, rng: np.random.Generator) -> np.ndarray:
    values = rng.dirichlet(np.ones(n_classes), n)
    return values.astype(np.float32)


def _of_genes(
    n_vars: int, classes: list[str], rng: np.random.Generator, *, held_out: bool
) -> dict[str, dict[str, Any]]:
    """Make what is known of each gene; the last 6 have no score, and the 4 before are in 5 cells."""
    scores, sd = _probabilities(n_vars, len(classes), rng), rng.uniform(0, 0.2, (n_vars, len(classes)))
    n_cells = rng.integers(10, 60, n_vars).astype(np.int32)
    n_cells[-10:-6], n_cells[-6:] = 5, 0
    scores[-6:] = sd[-6:] = np.nan
    best = np.where(n_cells > 0, scores.argmax(axis=1), -1)
    varm, var = {"": scores, "sd": sd.astype(np.float32)}, {"n_cells": n_cells}
    if held_out:
        given = np.where(n_cells > 0, rng.integers(0, len(classes), n_vars), -1)
        var[""] = pd.Categorical.from_codes(given, classes)
        var["predicted"] = pd.Categorical.from_codes(best, classes)
        varm["fold"] = np.where(given[:, None] >= 0, rng.integers(0, 5, (n_vars, 3)), -1).astype(np.int16)
    else:
        var[""] = pd.Categorical.from_codes(best, classes)
        var["in_training"] = rng.uniform(size=n_vars) < 0.3
    return {"varm": varm, "var": var}


def _of_groups(n_vars: int, groups: list[str], n_classes: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    n_cells = rng.integers(0, 30, (n_vars, len(groups))).astype(np.int32)
    scores = np.stack([_probabilities(n_vars, n_classes, rng) for _ in groups], axis=1)
    scores[n_cells == 0] = np.nan
    return {"groups": scores, "groups_n_cells": n_cells}


def _of_cells(
    n_obs: int, tasks: dict[str, list[str]], rng: np.random.Generator, *, held_out: bool
) -> dict[str, dict[str, Any]]:
    parts = {task: _probabilities(n_obs, len(classes), rng) for task, classes in tasks.items()}
    obsm = {"": np.concatenate(list(parts.values()), axis=1)}
    obs = {task: pd.Categorical.from_codes(parts[task].argmax(axis=1), classes) for task, classes in tasks.items()}
    if held_out:
        obsm["fold"] = rng.integers(0, 5, (n_obs, 3)).astype(np.int16)
    return {"obsm": obsm, "obs": obs}


@pytest.fixture(scope="session")
def classified() -> Classified:
    """Write what `tl.classify_genes`, `tl.classify_cells` and their `predict_` twins write; made up, no model runs.

    Three seeds, five folds, 100, 500 and 2,000 cells trained on; scores of methods in `SCORES`.
    """
    from gfx._results import Slots, key_of

    def write(
        adata: ad.AnnData,
        function: str,
        *,
        key: str | None = None,
        tasks: dict[str, list[str]] | None = None,
        groups: list[str] | None = None,
    ) -> ad.AnnData:
        rng = np.random.default_rng(1)
        own, genes = function.startswith("tl.classify"), function.endswith("genes")
        tasks = tasks or {"labels": ["tolerant", "sensitive"]}
        given = {"tasks": {task: np.array(classes, dtype=object) for task, classes in tasks.items()}}
        if genes:
            (classes,) = tasks.values()
            parts = _of_genes(adata.n_vars, classes, rng, held_out=own)
        else:
            parts = _of_cells(adata.n_obs, tasks, rng, held_out=own)
        if groups:
            parts["varm"] |= _of_groups(adata.n_vars, groups, len(classes), rng)
            given["groups"] = np.array(groups, dtype=object)
        if own:
            units = ["gene", "occurrence"] if genes else ["cell"]
            metrics = _measured(tasks, units, rng)
            given |= {"metrics": metrics, "summary": _summary(metrics), "roc": _curves(tasks, units, rng)}
            given |= {"confusion": _pairs(tasks, units[0], rng), "note": f"{units[0]}s were held out in 5 folds."}
        with gfx.settings.override(verbosity=0):
            Slots(adata, function, key_of(function, key)).write("made up", params={}, uns=given, **parts)
        return adata

    return write

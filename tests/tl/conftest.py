"""Toy cells with every slot filled, a way to see which slots changed, and a slow reference for cells of counts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy import sparse

import gfx

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import anndata as ad

    from gfx.models import Model


@pytest.fixture
def cells(toy_cells) -> ad.AnnData:
    """24 cells whose every kind of slot holds something that is not ours."""
    adata = toy_cells(24)
    rng = np.random.default_rng(0)
    adata.layers["doubled"] = adata.X * 2
    adata.obsm["X_pca"] = rng.normal(size=(adata.n_obs, 3))
    adata.varm["PCs"] = rng.normal(size=(adata.n_vars, 3))
    adata.obsp["distances"] = sparse.eye_array(adata.n_obs, format="csr")
    adata.varp["correlations"] = sparse.eye_array(adata.n_vars, format="csr")
    adata.uns["neighbors"] = {"params": {"method": "umap"}, "connectivities_key": "connectivities"}
    adata.uns["title"] = "cells"
    adata.raw = adata.copy()
    return adata


def content(value: Any) -> Any:
    """What is in a slot, in a form that `==` compares."""
    if value is None or isinstance(value, str | int):
        return value
    if sparse.issparse(value):
        value = value.tocoo()
        return value.shape, str(value.dtype), value.data.tobytes(), value.row.tobytes(), value.col.tobytes()
    if isinstance(value, pd.DataFrame):
        return {column: content(value[column]) for column in value}, value.index.tolist()
    if isinstance(value, pd.Series | pd.Index):
        if pd.api.types.is_numeric_dtype(value):
            return content(value.to_numpy())
        return str(value.dtype), value.astype(object).tolist()
    if hasattr(value, "items"):
        return {key: content(entry) for key, entry in value.items()}
    value = np.asarray(value)
    return value.shape, str(value.dtype), value.tolist() if value.dtype == object else value.tobytes()


@pytest.fixture(scope="session")
def slots() -> Callable[[ad.AnnData], dict[str, Any]]:
    """Everything in an AnnData, by slot."""

    def read(adata: ad.AnnData) -> dict[str, Any]:
        found = {"X": content(adata.X), "obs_names": content(adata.obs_names), "var_names": content(adata.var_names)}
        if adata.raw is not None:
            found |= {"raw": content(adata.raw.X), "raw.var": content(adata.raw.var)}
        for name in ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"):
            held: Mapping[str, Any] = getattr(adata, name)
            found |= {f"{name}:{key}": content(held[key]) for key in held if key is not None}
        return found

    return read


class SlowModel:
    """Ranks counts by hand and runs the published model on one cell at a time."""

    def __init__(self, model: Model) -> None:
        from transformers import BertForMaskedLM

        self.vocabulary = model.vocabulary
        self.bert = BertForMaskedLM.from_pretrained(model.folder, attn_implementation="eager").eval()
        self._seen: dict[tuple[int, ...], Any] = {}
        self.room = self.bert.config.max_position_embeddings - 2 * self.vocabulary.has_cls

    def tokens(self, adata: ad.AnnData) -> list[list[int]]:
        """Encode the toy cells' symbols, TOY<n>."""
        offset = int(self.vocabulary.is_special.sum())
        rows = []
        for counts in np.asarray(adata.X.todense(), dtype=np.float64):
            value = {
                offset + int(name[3:]) - 1: count / self.vocabulary.medians[offset + int(name[3:]) - 1]
                for name, count in zip(adata.var_names, counts, strict=True)
                if count > 0 and name.startswith("TOY")
            }
            genes = sorted(value, key=lambda token: (-value[token], token))[: self.room]
            wrapped = [self.vocabulary.cls, *genes, self.vocabulary.eos] if self.vocabulary.has_cls else genes
            rows.append(wrapped if genes else [])
        return rows

    def run(self, tokens: list[int], positions: list[int] | None = None) -> Any:
        """Hidden states and attention of one cell; without positions, every token stands where it is."""
        positions = list(range(len(tokens))) if positions is None else positions
        key = tuple(tokens), tuple(positions)
        if key not in self._seen:
            with torch.no_grad():
                self._seen[key] = self.bert(
                    torch.tensor([tokens]),
                    position_ids=torch.tensor([positions]),
                    output_hidden_states=True,
                    output_attentions=True,
                )
        return self._seen[key]

    def states(self, tokens: list[int], hidden_layer: int = -2, positions: list[int] | None = None) -> np.ndarray:
        """Hidden states, `(length, d)`."""
        return self.run(tokens, positions).hidden_states[hidden_layer][0].double().numpy()

    @property
    def pooling(self) -> str:
        """How cells become vectors unless something else is asked for."""
        return "cls" if self.vocabulary.has_cls else "mean"

    def is_gene(self, token: int) -> bool:
        return not self.vocabulary.is_special[token]

    def genes(self, row: Sequence[int]) -> list[int]:
        """Genes of a cell, by rank."""
        return [token for token in row if self.is_gene(token)]

    def named(self, names: Sequence[str]) -> list[int]:
        """Tokens of genes by their symbols."""
        return [int(np.flatnonzero(self.vocabulary.symbols == name)[0]) for name in names]

    def vector(self, states: Mapping[int, np.ndarray], how: str) -> np.ndarray:
        """One vector of a cell, from the state of each of its tokens."""
        if how == "cls":
            return states[self.vocabulary.cls]
        return np.mean([state for token, state in states.items() if self.is_gene(token)], axis=0)

    def cell(self, tokens: list[int], how: str, hidden_layer: int = -2) -> np.ndarray:
        """One vector of a cell."""
        return self.vector(dict(zip(tokens, self.states(tokens, hidden_layer), strict=True)), how)

    def edited(self, cell: list[int], genes: Sequence[int], kind: str, at: Sequence[int] = ()) -> list[int]:
        """Edit a cell by moving list entries; `at` says how many other genes then stand before each moved gene.

        One that moves to -1 is gone.
        """
        others = [token for token in cell if self.is_gene(token) and token not in genes]
        if kind == "overexpress":
            others = [*genes, *others][: self.room]
        moved = sorted((place, cell.index(gene), gene) for gene, place in zip(genes, at, strict=False) if place >= 0)
        for place, _, gene in reversed(moved):
            others.insert(place, gene)
        return [self.vocabulary.cls, *others, self.vocabulary.eos] if self.vocabulary.has_cls else others

    def effects(
        self,
        rows: Sequence[list[int]],
        names: Sequence[str],
        kind: str = "delete",
        how: str | None = None,
        **arguments: Any,
    ) -> dict[int, SlowEffect]:
        """Effect of deleting or overexpressing genes, by the number of the cell, where that can be done."""
        genes = self.named(names)
        return {
            number: self.effect(row, self.edited(row, genes, kind), genes, how or self.pooling, **arguments)
            for number, row in enumerate(rows)
            if any(token not in genes for token in self.genes(row)) and (kind != "delete" or set(genes) <= set(row))
        }

    def effect(
        self,
        cell: list[int],
        edited: list[int],
        genes: Sequence[int],
        how: str,
        goals: Sequence[np.ndarray] = (),
        *,
        hold: bool = False,
        hidden_layer: int = -2,
    ) -> SlowEffect:
        """Compare a cell with an edited one, token by token."""
        kept = [token for token in cell if token in edited or token in genes]  # what fell off does not take part
        positions = [at if token in genes else kept.index(token) for at, token in enumerate(edited)]
        before = dict(zip(kept, self.states(kept, hidden_layer), strict=True))
        held = dict(zip(edited, self.states(edited, hidden_layer, positions), strict=True))
        after = held if hold else dict(zip(edited, self.states(edited, hidden_layer), strict=True))
        others = [token for token in edited if self.is_gene(token) and token not in genes]
        own = before if how == "cls" else {token: (held if token in genes else before)[token] for token in edited}
        path = [self.vector(states, "cls" if how == "cls" else "mean") for states in (before, own, held, after)]
        shifts = {token: 1 - cosine(before[token], after[token]) for token in others}
        moved = [1 - cosine(path[0], vector) for vector in path[1:]]
        if how == "genes":
            when_held = [1 - cosine(before[token], held[token]) for token in others]
            moved = [0, np.mean(when_held), np.mean([*shifts.values()])]
        toward = [[cosine(vector, goal) - cosine(path[0], goal) for vector in path[1:]] for goal in goals]
        return SlowEffect(
            shift=moved[-1],
            parts=[moved[0], moved[2] - moved[1], moved[1] - moved[0]],
            toward=[change[-1] for change in toward],
            toward_parts=[[own, total - held, held - own] for own, held, total in toward],
            genes={str(self.vocabulary.symbols[token]): value for token, value in shifts.items()},
            vectors=(path[0], path[-1]),
        )


def laid_out(effects: Mapping[int, SlowEffect], n_cells: int, name: str) -> np.ndarray:
    """Values of all cells, `(n_cells, ...)`; NaN where there is no effect."""
    values = {number: getattr(effect, name) for number, effect in effects.items()}
    missing = np.full(np.shape(next(iter(values.values()))), np.nan)
    return np.array([values.get(number, missing) for number in range(n_cells)])


@pytest.fixture(scope="session")
def assert_effects() -> Callable[..., None]:
    """Compare a perturbation, by its number, with the slow effects on cells, toward states and on other genes."""

    def compare(adata: ad.AnnData, number: int, effects: Mapping[int, SlowEffect], key: str) -> None:
        for slot, name in ((key, "shift"), (f"{key}_parts", "parts"), (f"{key}_states", "toward")):
            if slot in adata.obsm:
                expected = laid_out(effects, adata.n_obs, name)
                np.testing.assert_allclose(adata.obsm[slot][:, number], expected, atol=1e-5, err_msg=slot)
        for row, gene in enumerate(adata.var_names):
            values = [effect.genes[gene] for effect in effects.values() if gene in effect.genes]
            mean, sd = (np.mean(values), np.std(values)) if values else (np.nan, np.nan)
            assert adata.varm[f"{key}_n_cells"][row, number] == len(values)
            np.testing.assert_allclose(adata.varm[key][row, number], mean, atol=1e-5)
            np.testing.assert_allclose(adata.varm[f"{key}_sd"][row, number], sd, atol=2e-6)

    return compare


@pytest.fixture(scope="session")
def value_of() -> Callable[..., float]:
    """Look up a number in a table of controls; there is one such row."""

    def find(controls: pd.DataFrame, control: str, statistic: str, measure: str = "shift", column: str = "value"):
        rows = controls[
            (controls["control"] == control) & (controls["statistic"] == statistic) & (controls["measure"] == measure)
        ]
        return rows[column].item()

    return find


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two vectors."""
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@dataclass(frozen=True)
class SlowEffect:
    """What one edit did to one cell."""

    shift: float
    parts: list[float]
    toward: list[float]
    toward_parts: list[list[float]]
    genes: dict[str, float]
    vectors: tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="session", params=["v1", "v2"])
def any_model(request: pytest.FixtureRequest) -> Model:
    """A model without special tokens, and one with them."""
    return request.getfixturevalue("toy_model_v1" if request.param == "v1" else "toy_model")


@pytest.fixture(scope="session")
def slow(any_model) -> SlowModel:
    """The slow reference for `any_model`."""
    return SlowModel(any_model)


@pytest.fixture(scope="session")
def toy_slow(toy_model) -> SlowModel:
    """The slow reference for the model with special tokens."""
    return SlowModel(toy_model)


@pytest.fixture(scope="session")
def slow_v1(toy_model_v1) -> SlowModel:
    """The slow reference for the model without special tokens."""
    return SlowModel(toy_model_v1)


@pytest.fixture
def other_toy_folder(toy_folder: Path, tmp_path: Path) -> Path:
    """The toy model with weights in another order, so that it has learnt something else."""
    folder = shutil.copytree(toy_folder, tmp_path / "other")
    rng = np.random.default_rng(0)
    weights = load_file(folder / "model.safetensors")
    save_file({name: rng.permuted(value) for name, value in weights.items()}, folder / "model.safetensors")
    return folder


@dataclass(frozen=True)
class Screened:
    """Cells after a screen, and its store, if there is one."""

    adata: ad.AnnData
    store: Path | None

    @property
    def table(self) -> pd.DataFrame:
        """What is stored of each gene."""
        return self.adata.varm["gfx_screen"]

    @property
    def controls(self) -> pd.DataFrame:
        """Controls by name and statistic."""
        return self.adata.uns["gfx_screen"]["controls"].set_index(["control", "statistic"])

    def effects(self, measure: str = "shift") -> np.ndarray:
        """Effects by cell and gene; NaN where no gene was deleted."""
        stored = gfx.get.screen_cells(self.adata, self.store, measure=measure).tocoo()
        out = np.full(stored.shape, np.nan)
        out[stored.row, stored.col] = stored.data
        return out


@pytest.fixture(scope="session")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Screened]:
    """Screen a copy of cells: without controls unless they are asked for, and with `stored` effects in cells."""

    def run(adata: ad.AnnData, model: Model, *, stored: bool = False, **arguments: Any) -> Screened:
        store = tmp_path_factory.mktemp("screens") / "store" if stored else None
        chosen = {"controls": None, "store": store} | arguments
        return Screened(gfx.tl.screen_genes(adata, model=model, copy=True, **chosen), store)

    return run

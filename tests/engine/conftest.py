"""Toy models with cells, and a slow reference: transformers as published, one cell at a time, Python lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest
import torch

from gfx._core.encodings import Encodings
from gfx._engine.encoder import layers_needed, load_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import BertModel

    from gfx._core.vocabulary import Vocabulary
    from gfx.models import Model

CPU = torch.device("cpu")


class Reference:
    """The whole published model, eager and in float32; hidden states and attention of one unpadded cell."""

    def __init__(self, model: Model) -> None:
        from transformers import BertForMaskedLM

        self.model = BertForMaskedLM.from_pretrained(model.folder, attn_implementation="eager").eval()
        self._seen: dict[tuple[int, ...], Any] = {}

    def _run(self, tokens: list[int], positions: list[int] | None = None) -> Any:
        key = (*tokens, -1, *(positions or ()))
        if key not in self._seen:
            at = None if positions is None else torch.tensor([positions])
            wanted = {"output_hidden_states": True, "output_attentions": True}
            with torch.no_grad():
                self._seen[key] = self.model(torch.tensor([tokens]), position_ids=at, **wanted)
        return self._seen[key]

    def states(self, tokens: list[int], layer: int, positions: list[int] | None = None) -> np.ndarray:
        """Hidden states of one cell, `(length, d)`; its tokens stand at other positions if these are given."""
        return self._run(tokens, positions).hidden_states[layer][0].double().numpy()

    def attention(self, tokens: list[int]) -> np.ndarray:
        """Attention of one cell, `(n_layers, n_heads, query, key)`."""
        return np.stack([weights[0].double().numpy() for weights in self._run(tokens).attentions])


@dataclass(frozen=True)
class Toy:
    """A random model, its reference, and cells: some long, one without tokens, one of a single gene, one of two."""

    model: Model
    reference: Reference
    ids: np.ndarray
    lengths: np.ndarray

    @property
    def vocabulary(self) -> Vocabulary:
        return self.model.vocabulary

    @property
    def tokens(self) -> Encodings:
        return Encodings.of(self.ids, self.lengths)

    @property
    def poolings(self) -> tuple[str, ...]:
        return ("mean", "cls") if self.vocabulary.has_cls else ("mean",)

    def cells(self) -> list[list[int]]:
        return [row[:length].tolist() for row, length in zip(self.ids, self.lengths, strict=True)]

    def is_gene(self, token: int) -> bool:
        return not self.vocabulary.is_special[token]

    def encoder(self, layer: int = -1, *, dtype: torch.dtype = torch.float32) -> BertModel:
        return load_encoder(
            self.model.weights,
            self.model.config,
            n_layers=layers_needed(layer, self.model.n_layers),
            device=CPU,
            dtype=dtype,
        )


def make_cells(vocabulary: Vocabulary, sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random genes in random order, as many as `sizes` says; the first two genes are in most cells."""
    rng = np.random.default_rng(seed)
    genes = np.flatnonzero(~vocabulary.is_special)
    front, behind = ([vocabulary.cls], [vocabulary.eos]) if vocabulary.has_cls else ([], [])
    rows = []
    for size in sizes:
        chosen = rng.choice(genes[2:], size, replace=False).tolist()
        if size > 2 and rng.random() < 0.7:
            chosen[:2] = genes[:2]
        rng.shuffle(chosen)
        rows.append([*front, *chosen, *behind] if size else [])
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    ids = np.zeros((len(rows), lengths.max()), dtype=np.uint16)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
    return ids, lengths


@pytest.fixture(scope="session", params=["v1", "v2"])
def toy(request: pytest.FixtureRequest) -> Toy:
    """Models without and with special tokens."""
    model = request.getfixturevalue("toy_model_v1" if request.param == "v1" else "toy_model")
    sizes = [20, 62, 0, 7, 1, 33, 2, 15, 48, 20, 5, 11, 3, 27]
    ids, lengths = make_cells(model.vocabulary, sizes)
    return Toy(model, Reference(model), ids, lengths)


class Rows:
    """Tokens of cells in memory, as shards on disk show them: not to be written to."""

    def __init__(self, cells: list[list[int]]) -> None:
        self.cells = [np.array(cell, dtype=np.uint16) for cell in cells]
        for cell in self.cells:
            cell.setflags(write=False)
        self.lengths = np.array([len(cell) for cell in cells], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, cell: int) -> np.ndarray:
        return self.cells[cell]


class MakeRows(Protocol):
    """How `make_rows` is called."""

    def __call__(self, vocabulary: Vocabulary, n_cells: int, n_genes: int = 60, seed: int = 0) -> Rows: ...


@pytest.fixture(scope="session")
def make_rows() -> MakeRows:
    """Make random cells of 2 to `n_genes` genes."""

    def make(vocabulary: Vocabulary, n_cells: int, n_genes: int = 60, seed: int = 0) -> Rows:
        rng = np.random.default_rng(seed)
        genes = np.flatnonzero(~vocabulary.is_special)
        front, behind = ([vocabulary.cls], [vocabulary.eos]) if vocabulary.has_cls else ([], [])
        sizes = rng.integers(2, n_genes + 1, n_cells)
        return Rows([[*front, *rng.choice(genes, size, replace=False), *behind] for size in sizes])

    return make


@pytest.fixture(params=["v1", "v2"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    """Without and with special tokens."""
    return request.getfixturevalue("toy_vocabulary_v1" if request.param == "v1" else "toy_vocabulary")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

"""What rank alone predicts of hidden genes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from gfx._engine.examples import MaskedCells
from gfx.models.pretraining import _rank_baseline
from gfx.models.pretraining._rank_baseline import _frequency_by_rank, rank_baseline

if TYPE_CHECKING:
    from gfx._core.vocabulary import Vocabulary


class Rows:
    """Tokens of cells in memory."""

    def __init__(self, cells: list[list[int]]) -> None:
        self.cells = [np.array(cell, dtype=np.uint16) for cell in cells]
        self.lengths = np.array([len(cell) for cell in cells], dtype=np.int32)

    def __getitem__(self, cell: int) -> np.ndarray:
        return self.cells[cell]


@pytest.fixture(params=["v1", "v2"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return request.getfixturevalue("toy_vocabulary_v1" if request.param == "v1" else "toy_vocabulary")


def rows_of(vocabulary: Vocabulary, genes: list[list[int]]) -> Rows:
    front, behind = ([vocabulary.cls], [vocabulary.eos]) if vocabulary.has_cls else ([], [])
    first = np.flatnonzero(~vocabulary.is_special)[0]
    return Rows([[*front, *(first + np.array(cell)), *behind] for cell in genes])


def hidden(rows: Rows, vocabulary: Vocabulary, cells: np.ndarray) -> MaskedCells:
    return MaskedCells(rows, cells, vocabulary, seed=0, hide_all=True)


def test_identical_cells_are_predicted_by_rank(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rank_baseline, "N_BANDS", 1000)
    rows = rows_of(vocabulary, [list(range(20))] * 30)
    found = rank_baseline(rows, np.arange(20), hidden(rows, vocabulary, np.arange(20, 30)))
    assert found == {"top_1": 1, "top_10": 1, "top_1_unseen": 1, "top_10_unseen": 1, "n": found["n"]}
    assert found["n"] == sum((hidden(rows, vocabulary, np.arange(20, 30))[at]["labels"] >= 0).sum() for at in range(10))


def test_shuffled_cells_are_not_predicted_by_rank(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    rows = rows_of(vocabulary, [rng.permutation(200)[:60].tolist() for _ in range(300)])
    found = rank_baseline(rows, np.arange(200), hidden(rows, vocabulary, np.arange(200, 300)))
    assert found["top_1"] < 0.03
    assert found["top_10"] < 0.1


def test_it_is_the_most_frequent_genes_of_a_rank_band(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted with dictionaries, gene by gene; ties are left to chance, so both ends of them are bounds."""
    monkeypatch.setattr(_rank_baseline, "N_BANDS", 8)
    rng = np.random.default_rng(0)
    liking = np.linspace(4, 0, 200)
    rows = rows_of(
        vocabulary, [np.argsort(-(liking + rng.normal(size=200)))[: rng.integers(20, 60)].tolist() for _ in range(200)]
    )
    learnt, held_out = np.arange(150), hidden(rows, vocabulary, np.arange(150, 200))
    found = rank_baseline(rows, learnt, held_out)
    _, band = _frequency_by_rank(rows, learnt, vocabulary, int(held_out.lengths.max()))
    assert len(set(band)) > 3
    assert sorted(band) == band.tolist()
    counts: dict[int, Counter] = {}
    for cell in learnt:
        for position, token in enumerate(rows[cell].tolist()):
            if not vocabulary.is_special[token]:
                counts.setdefault(band[position], Counter())[token] += 1
    hits = {name: [0, 0] for name in ("top_1", "top_10", "top_1_unseen", "top_10_unseen")}
    for cell in range(50):
        shown = held_out[cell]
        seen = set(shown["input_ids"].tolist())
        for position in np.flatnonzero(shown["labels"] >= 0):
            truth = shown["labels"][position]
            for suffix, left_out in (("", set()), ("_unseen", seen)):
                here = {token: n for token, n in counts[band[position]].items() if token not in left_out}
                above = sum(n > here.get(truth, 0) for n in here.values())
                level = sum(n == here.get(truth, 0) for token, n in here.items() if token != truth)
                for name, most in (("top_1", 1), ("top_10", 10)):
                    hits[name + suffix][0] += above + level < most and truth in here
                    hits[name + suffix][1] += above < most
    for name, (least, most) in hits.items():
        assert least / found["n"] <= found[name] <= most / found["n"]
    assert hits["top_10"][1] - hits["top_10"][0] < 0.2 * found["n"], "ties are few"
    assert found["top_1"] < found["top_10"] < found["top_10_unseen"]


def test_special_tokens_are_not_predicted(vocabulary: Vocabulary) -> None:
    rows = rows_of(vocabulary, [[1, 2, 3]] * 10)
    counts, _ = _frequency_by_rank(rows, np.arange(10), vocabulary, 5)
    assert not counts[:, vocabulary.is_special].any()
    assert counts.sum() == 30

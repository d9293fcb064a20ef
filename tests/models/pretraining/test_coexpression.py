"""Which genes share cells, against a dense reference; and models that start from it."""

from __future__ import annotations

import numpy as np
import pytest

from gfx._core.vocabulary import SPECIALS, Vocabulary
from gfx.models.pretraining import _coexpression
from gfx.models.pretraining._coexpression import find_coexpression

N_TYPES, GENES_OF_A_TYPE, N_CELLS = 6, 10, 300


def vocabulary_of(n_genes: int, *, with_cls: bool = True) -> Vocabulary:
    specials = list(SPECIALS if with_cls else SPECIALS[:2])
    return Vocabulary(
        name="structured",
        ids=np.array([*specials, *(f"ENSG{at:011d}" for at in range(n_genes))], dtype=object),
        medians=np.concatenate([np.full(len(specials), np.nan), np.random.default_rng(1).lognormal(1, 0.5, n_genes)]),
        symbols=np.full(len(specials) + n_genes, "", dtype=object),
    )


@pytest.fixture(scope="module", params=["v1", "v2"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return vocabulary_of(N_TYPES * GENES_OF_A_TYPE, with_cls=request.param == "v2")


def cells_of(vocabulary: Vocabulary) -> list[np.ndarray]:
    """Cells of six types: most genes of their own, some of all others; which are there differs."""
    rng = np.random.default_rng(0)
    front, behind = ([vocabulary.cls], [vocabulary.eos]) if vocabulary.has_cls else ([], [])
    genes = np.flatnonzero(~vocabulary.is_special)
    kind_of_gene = np.arange(len(genes)) // GENES_OF_A_TYPE
    rows = []
    for cell in range(N_CELLS):
        own = kind_of_gene == cell % N_TYPES
        score = rng.normal(size=len(genes)) + 2 * own
        found = np.flatnonzero(score > rng.uniform(0.8, 1.4))
        ordered = found[np.argsort(-score[found], kind="stable")]
        rows.append(np.array([*front, *genes[ordered], *behind], dtype=np.uint16))
    return rows


@pytest.fixture(scope="module")
def cells(vocabulary: Vocabulary) -> list[np.ndarray]:
    return cells_of(vocabulary)


def profile_of(row: np.ndarray, vocabulary: Vocabulary) -> tuple[list[int], np.ndarray]:
    """Genes of a cell and their approximate log counts, by the docstring."""
    genes = [token for token in row.tolist() if not vocabulary.is_special[token]]
    times = (len(genes) + 1) / np.arange(1, len(genes) + 1)
    return genes, np.log(1 + vocabulary.medians[genes] * times / 3)


def reference(cells: list[np.ndarray], vocabulary: Vocabulary, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense, by the docstring: weighted profiles less their mean, scaled principal directions, the genes' weights."""
    profiles = np.zeros((len(cells), len(vocabulary)))
    for cell, row in enumerate(cells):
        genes, values = profile_of(row, vocabulary)
        profiles[cell, genes] = values
    profiles /= np.linalg.norm(profiles, axis=1, keepdims=True)
    frequency = (profiles > 0).mean(axis=0)
    weights = np.where(frequency > 0, np.maximum(frequency, 1e-9) ** -0.25, 0)
    centred = profiles * weights - (profiles * weights).mean(axis=0)
    _, deviations, components = np.linalg.svd(centred, full_matrices=False)
    return centred, components[:size].T / (deviations[:size] / deviations[0]) ** 0.25, weights


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def test_vectors_are_directions_of_dense_principal_components(vocabulary: Vocabulary, cells: list[np.ndarray]) -> None:
    size = N_TYPES - 1  # as many as types tell apart; what follows is noise of nearly equal sizes
    found = find_coexpression(cells, np.arange(N_CELLS), vocabulary, size + 1, seed=0)
    _, directions, _ = reference(cells, vocabulary, size)
    genes = ~vocabulary.is_special
    expected = directions[genes] / np.linalg.norm(directions[genes], axis=1, keepdims=True)
    signs = np.sign((found.vectors[genes, :size] * expected).sum(axis=0))
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(found.vectors[genes, :size] * signs, expected, atol=0.02)
    np.testing.assert_allclose(found.vectors[:, size], 0)  # left for how much a gene weighs
    np.testing.assert_allclose(found.vectors[~genes], 0)


def test_a_cell_vector_is_a_weighted_mean_close_to_the_projection(
    vocabulary: Vocabulary, cells: list[np.ndarray]
) -> None:
    found = find_coexpression(cells, np.arange(N_CELLS), vocabulary, N_TYPES, seed=0)
    centred, directions, weights = reference(cells, vocabulary, N_TYPES - 1)
    sums = []
    for row in cells:
        genes, values = profile_of(row, vocabulary)
        ranks = np.arange(1, len(genes) + 1)
        share = np.exp(found.log_share[genes]) / ranks**found.rank_slope
        sums.append((share[:, None] * found.vectors[genes]).sum(axis=0) / share.sum())
        adds = values * weights[genes] * np.linalg.norm(directions[genes], axis=1)
        assert np.corrcoef(np.log(adds), np.log(share))[0, 1] > 0.95
    vectors = np.stack([found.cell_vector(row) for row in cells])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, sums - np.mean(sums, axis=0), atol=1e-5)
    projected = centred @ directions
    signs = np.sign((vectors[:, :-1] * projected).sum(axis=0))
    assert cosine(vectors[:, :-1] * signs, projected).mean() > 0.95


def test_cell_vectors_do_not_depend_on_depth(vocabulary: Vocabulary, cells: list[np.ndarray]) -> None:
    """A cell of which every second gene is left, and ranked anew, has the vector that these have at their old ranks."""
    found = find_coexpression(cells, np.arange(N_CELLS), vocabulary, 16, seed=0)
    genes = cells[0][~vocabulary.is_special[cells[0]]][1::2]
    weights = np.exp(found.log_share[genes]) * np.arange(2, 2 * len(genes) + 1, 2) ** -found.rank_slope
    expected = weights @ found.vectors[genes] / weights.sum() - found.centre
    np.testing.assert_allclose(found.cell_vector(genes), expected, atol=1e-5)


def test_vectors_have_length_one_and_genes_of_a_type_are_alike(vocabulary: Vocabulary, cells: list[np.ndarray]) -> None:
    found = find_coexpression(cells, np.arange(N_CELLS), vocabulary, 16, seed=0)
    vectors = found.vectors[~vocabulary.is_special]
    assert vectors.shape == (N_TYPES * GENES_OF_A_TYPE, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alike = vectors @ vectors.T
    kinds = np.arange(len(vectors)) // GENES_OF_A_TYPE
    same = (kinds[:, None] == kinds) & ~np.eye(len(vectors), dtype=bool)
    assert alike[same].mean() > alike[kinds[:, None] != kinds].mean() + 0.3


def test_cell_vectors_group_cells_that_the_components_have_not_seen(
    vocabulary: Vocabulary, cells: list[np.ndarray]
) -> None:
    """Cells of a type lie together, also those that the components have not seen."""
    learnt = np.arange(0, N_CELLS, 2)
    found = find_coexpression(cells, learnt, vocabulary, 8, seed=0)
    only = find_coexpression([cells[at] for at in learnt], np.arange(len(learnt)), vocabulary, 8, seed=0)
    np.testing.assert_allclose(found.vectors, only.vectors, atol=1e-5)  # the others are not looked at
    half = np.arange(N_CELLS // 2)
    found = find_coexpression(cells, half, vocabulary, 8, seed=0)
    vectors = np.stack([found.cell_vector(row) for row in cells])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = (vectors[N_CELLS // 2 :] @ vectors[half].T).argmax(axis=1)
    assert (nearest % N_TYPES == np.arange(N_CELLS // 2, N_CELLS) % N_TYPES).mean() > 0.9


def test_fewer_cells_than_components(vocabulary: Vocabulary, cells: list[np.ndarray]) -> None:
    """What there is no direction for, stays zero."""
    found = find_coexpression(cells, np.arange(5), vocabulary, 16, seed=0)
    assert found.vectors.shape == (len(vocabulary), 16)
    assert found.cell_vector(cells[0]).shape == (16,)
    assert not found.vectors[:, 5:].any()
    assert np.isfinite(found.vectors).all()
    seen = np.unique(np.concatenate(cells[:5]))
    seen = seen[~vocabulary.is_special[seen]]
    np.testing.assert_allclose(np.linalg.norm(found.vectors[seen], axis=1), 1, atol=1e-5)
    unseen = np.setdiff1d(np.arange(len(vocabulary)), seen)
    assert not found.vectors[unseen].any()


def test_the_rarest_genes_get_no_vector() -> None:
    vocabulary = vocabulary_of(8)
    cells = [np.array([2, *np.roll(np.arange(4, 9), cell), 3], dtype=np.uint16) for cell in range(4000)]
    cells[7] = np.array([2, 4, 9, 5, 3], dtype=np.uint16)  # token 9 in one cell of 4,000, 10 in two
    cells[11] = cells[12] = np.array([2, 4, 10, 5, 3], dtype=np.uint16)
    found = find_coexpression(cells, np.arange(4000), vocabulary, 4, seed=0)
    assert not found.vectors[9].any()
    assert found.log_share[9] == found.log_share.min()
    assert np.linalg.norm(found.vectors[10]) == pytest.approx(1, abs=1e-5)


def test_components_are_computed_from_at_most_so_many_cells(
    vocabulary: Vocabulary, cells: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_coexpression, "MOST_CELLS", 100)
    drawn, profile_matrix = [], _coexpression.profile_matrix

    def watched(tokens: list[np.ndarray], some_cells: np.ndarray, vocabulary: Vocabulary) -> object:
        drawn.append(some_cells.tolist())
        return profile_matrix(tokens, some_cells, vocabulary)

    monkeypatch.setattr(_coexpression, "profile_matrix", watched)
    first, again, _ = (find_coexpression(cells, np.arange(N_CELLS), vocabulary, 4, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.vectors, again.vectors)
    assert [len(set(some_cells)) for some_cells in drawn] == [100] * 3
    assert drawn[0] == drawn[1] != drawn[2]


def test_cls_starts_at_the_cell_vector() -> None:
    """Behind the first block as a weighted sum of its genes, less what all cells share; near it where it is read."""
    import torch

    from gfx._engine.pretraining import make_model, start_at_cell_vector

    vocabulary = vocabulary_of(N_TYPES * GENES_OF_A_TYPE)
    cells = cells_of(vocabulary)
    found = find_coexpression(cells, np.arange(N_CELLS), vocabulary, 64, seed=0)
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 64,
    }
    model = make_model(
        vocabulary, config, gene_vectors=found.vectors, gene_frequency=np.ones(len(vocabulary)), seed=0
    ).train()

    def cls_of(layer: int) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            states = [
                model.bert(torch.from_numpy(row.astype(np.int64))[None], output_hidden_states=True).hidden_states
                for row in cells
            ]
        return np.concatenate([state[layer][:, 0].numpy() for state in states])

    vectors = np.stack([found.cell_vector(row) for row in cells])
    assert cosine(cls_of(-2), vectors).mean() < 0.3
    model.train()
    start_at_cell_vector(model, found.log_share, found.rank_slope, cells[:100], vocabulary)
    assert model.training
    assert cosine(cls_of(1), vectors).mean() > 0.9
    assert cosine(cls_of(-2), vectors).mean() > 0.85

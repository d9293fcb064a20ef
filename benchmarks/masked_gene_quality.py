"""How well a model names masked genes: `python benchmarks/masked_gene_quality.py --corpus TRAIN --data FOLDER`.

TRAIN is the folder of h5ad files that the model was trained on, FOLDER one that it was not trained on; or, instead of
`--data`, `--held-out FILE` (the model's `pretraining.json`, or npz: for every file of the corpus, by its stem, the rows
that training did not see). Files hold raw counts and `var["ensembl_id"]`.

15 % of a cell's genes are masked, all of them, always the same. Beside the model: the frequency of each gene in that
band of ranks, in all cells of the corpus, and in cells of the same type (`obs["cell_type"]`) in the same file. Each as
it is, and `unseen`: without the genes that the cell still shows, which cannot be the masked one; a harder baseline, for
it knows most of what the cell holds. Prints JSON: loss in nats, shares of masked genes named first and among the first
ten.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import torch
from embedding_quality import Corpus, read_corpus, read_held_out, tokens
from transformers import BertForMaskedLM

import gfx

if TYPE_CHECKING:
    from collections.abc import Iterator

MASKED_SHARE = 0.15
N_BANDS = 64
MAX_CELLS = 400
#: Of each type, for its frequencies.
MIN_CELLS = 10
BATCH = 16

MODEL, RANK, CORPUS, CELL_TYPE = (
    "model",
    "frequency in the band of ranks",
    "frequency in the corpus",
    "frequency in the type",
)


class Tally:
    """Sums up how one predictor does, as it is and without the genes that the cell shows."""

    def __init__(self) -> None:
        self.n = 0
        self.sums = {
            name: 0.0 for suffix in ("", "_unseen") for name in (f"loss{suffix}", f"top_1{suffix}", f"top_10{suffix}")
        }

    def add(self, p: np.ndarray, row: np.ndarray, target: np.ndarray, shown: np.ndarray) -> None:
        """Count one cell.

        Parameters
        ----------
        p
            Probability of every token, `(n_rows, n_tokens)`; none is 0.
        row
            Which row speaks of each masked gene, `(n_masked,)`.
        target
            The masked genes.
        shown
            The genes of the cell that are not masked.
        """
        own = p[row, target]
        before, possible = places(p[row] if len(p) > 1 else p, own), 1.0
        for suffix in ("", "_unseen"):
            if suffix:
                before = before - places(p[row][:, shown] if len(p) > 1 else p[:, shown], own, itself=False)
                possible = 1.0 - p[:, shown].sum(axis=1, dtype=np.float64)[row]
            self.sums[f"loss{suffix}"] += float(-np.log(own / possible).sum())
            self.sums[f"top_1{suffix}"] += float((before < 1).sum())
            self.sums[f"top_10{suffix}"] += float((before < 10).sum())
        self.n += len(target)

    def report(self) -> dict[str, float]:
        return {name: round(value / self.n, 4) for name, value in self.sums.items()} | {"n": self.n}


def places(p: np.ndarray, own: np.ndarray, *, itself: bool = True) -> np.ndarray:
    """How many tokens come before each masked gene; ties, but for the gene itself, count half."""
    if len(p) == 1:
        ordered = np.sort(p[0])
        below, up_to = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
        above, equal = p.shape[1] - up_to, up_to - below
    else:
        above, equal = (p > own[:, None]).sum(axis=1), (p == own[:, None]).sum(axis=1)
    return above + (equal - itself) / 2


def masked_cells(ids: np.ndarray, lengths: np.ndarray, special: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of each cell and which positions are masked: always the same, at least one."""
    for cell, length in enumerate(lengths):
        row = ids[cell, :length].astype(np.int64)
        genes = np.flatnonzero(~special[row])
        rng = np.random.default_rng((0, cell))
        yield row, np.sort(rng.choice(genes, max(1, round(MASKED_SHARE * len(genes))), replace=False))


@torch.inference_mode()
def probabilities(
    network: BertForMaskedLM, cells: list[tuple[np.ndarray, np.ndarray]], vocabulary: object
) -> Iterator[np.ndarray]:
    """What the model says of each cell's masked genes, `(n_masked, n_tokens)`; special tokens are never an answer."""
    special = torch.from_numpy(vocabulary.is_special)
    for start in range(0, len(cells), BATCH):
        some = cells[start : start + BATCH]
        ids = torch.full((len(some), max(len(row) for row, _ in some)), vocabulary.pad)
        for i, (row, masked) in enumerate(some):
            ids[i, : len(row)] = torch.from_numpy(row)
            ids[i, masked] = vocabulary.mask
        hidden = network.bert(ids, attention_mask=(ids != vocabulary.pad).long()).last_hidden_state
        for i, (_, masked) in enumerate(some):
            logits = network.cls(hidden[i, masked]).float()
            logits[:, special] = -30.0  # not minus infinity: no probability is to be 0
            yield logits.softmax(dim=-1).numpy()


class Frequencies:
    """How often the corpus has each gene: by band of ranks, over all, in cells of one type."""

    def __init__(self, corpus: Corpus, vocabulary: object) -> None:
        self.special = vocabulary.is_special
        self.n_tokens = len(vocabulary)
        width = corpus.ids.shape[1]
        edges = np.unique(np.geomspace(1, width + 1, N_BANDS).astype(int)) - 1
        self.band = (np.searchsorted(edges, np.arange(width) - vocabulary.first_gene, side="right") - 1).clip(0)
        self.overall = self.smoothed(self.count(corpus.ids), 1.0 / vocabulary.n_genes)
        bands = [self.count(corpus.ids[:, self.band == band]) for band in range(self.band.max() + 1)]
        self.by_band = np.stack([self.smoothed(count, self.overall) for count in bands])

    def count(self, ids: np.ndarray) -> np.ndarray:
        return np.bincount(ids.ravel(), minlength=self.n_tokens)

    def smoothed(self, count: np.ndarray, prior: np.ndarray | float) -> np.ndarray:
        """Probabilities, as if a hundred more genes had been seen that follow the prior: none is 0."""
        p = np.where(self.special, 1e-12, count + 100 * prior)
        return p / p.sum()

    def of_cells(self, ids: np.ndarray) -> np.ndarray:
        """Probabilities of genes in some cells."""
        return self.smoothed(self.count(ids), self.overall)


def evaluate(  # noqa: PLR0917
    ids: np.ndarray,
    lengths: np.ndarray,
    of_type: list[np.ndarray | None],
    network: BertForMaskedLM,
    vocabulary: object,
    frequencies: Frequencies,
) -> dict[str, dict[str, float]]:
    """Judge all predictors on the same masked genes.

    Parameters
    ----------
    of_type
        For each cell, probabilities of genes in other cells of its type, or `None` where there are too few. Such
        cells are left out for this predictor.
    """
    order = np.argsort(lengths, kind="stable")
    cells = list(masked_cells(ids[order], lengths[order], vocabulary.is_special))
    tallies = {name: Tally() for name in (MODEL, RANK, CORPUS, CELL_TYPE)}
    for cell, (row, masked), p in zip(order, cells, probabilities(network, cells, vocabulary), strict=True):
        target = row[masked]
        shown = np.setdiff1d(row[~vocabulary.is_special[row]], target)
        first = np.zeros(len(target), dtype=np.int64)
        tallies[MODEL].add(p, np.arange(len(target)), target, shown)
        tallies[RANK].add(frequencies.by_band, frequencies.band[masked], target, shown)
        tallies[CORPUS].add(frequencies.overall[None], first, target, shown)
        if of_type[cell] is not None:
            tallies[CELL_TYPE].add(of_type[cell][None], first, target, shown)
    return {name: tally.report() for name, tally in tallies.items() if tally.n}


def type_frequencies(
    labels: np.ndarray, others: np.ndarray, other_labels: np.ndarray, frequencies: Frequencies
) -> list[np.ndarray | None]:
    """For each cell, the frequencies of genes in other cells with its label."""
    known = {
        name: frequencies.of_cells(others[other_labels == name])
        for name in np.unique(labels[labels != ""])
        if (other_labels == name).sum() >= MIN_CELLS
    }
    return [known.get(label) for label in labels]


def labels_of(adata: ad.AnnData) -> np.ndarray:
    """Cell types, empty where there are none."""
    return np.asarray(
        adata.obs["cell_type"].astype(str) if "cell_type" in adata.obs else [""] * adata.n_obs, dtype=object
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--held-out", type=Path)
    where.add_argument("--data", type=Path)
    parser.add_argument("--cells", type=int, default=MAX_CELLS, help="cells of a file at most, drawn at random")
    parser.add_argument("--model", help="a published name or a folder; the embedded model if left out")
    given = parser.parse_args()
    model = gfx.models.load(given.model or "mini")
    network = BertForMaskedLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    report: dict[str, object] = {
        "benchmark": "masked genes",
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "cells": "held out" if given.held_out else "of other data sets",
        "frequency_in_the_type_from": "cells learnt from, same file" if given.held_out else "other cells, same file",
        "sets": {},
    }
    with gfx.settings.override(verbosity=1):
        corpus, sets = read_corpus(given.corpus, model, read_held_out(given.held_out))
        frequencies = Frequencies(corpus, model.vocabulary)
        if given.data:
            sets = {path.stem: ad.read_h5ad(path) for path in sorted(given.data.glob("*.h5ad"))}
        for stem, adata in sets.items():
            ids, lengths = tokens(adata, model)
            labels = labels_of(adata)
            usable = np.flatnonzero(lengths > model.vocabulary.n_specials + 1)  # one gene alone has no context
            n = min(given.cells, len(usable) if given.held_out else len(usable) // 2)
            drawn = rng.permutation(usable)[:n]
            if given.held_out:
                same = corpus.source == stem
                others, other_labels = corpus.ids[same], corpus.cell_type[same]
            else:
                rest = np.setdiff1d(np.arange(len(ids)), drawn)
                others, other_labels = ids[rest], labels[rest]
            of_type = type_frequencies(labels[drawn], others, other_labels, frequencies)
            found = evaluate(ids[drawn], lengths[drawn], of_type, network, model.vocabulary, frequencies)
            report["sets"][stem] = {"cells": n, **found}
            print(json.dumps({stem: report["sets"][stem]}), file=sys.stderr, flush=True)
    report["all"] = over_sets(list(report["sets"].values()))
    print(json.dumps(report, indent=1))


def over_sets(sets: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean over the masked genes of all sets; of those with cell types, where the predictor needs them."""
    out = {}
    for name in (MODEL, RANK, CORPUS, CELL_TYPE):
        rows = [row[name] for row in sets if name in row]
        n = sum(row["n"] for row in rows)
        if n:
            mean = {key: round(sum(row[key] * row["n"] for row in rows) / n, 4) for key in rows[0]}
            out[name] = mean | {"n": n}
    return out


if __name__ == "__main__":
    main()

"""Pretrain a model on cells."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from gfx import _log
from gfx._adata import open_counts, row_blocks, to_counts
from gfx._core.ranking import rank_encode
from gfx.models._build_vocabulary import build_vocabulary
from gfx.models._vocabulary_file import write_vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData

    from gfx._core.vocabulary import Vocabulary

REPORT_FILE = "pretraining.json"
PLAN_FILE = "plan.json"


def _each_source(sources: Sequence[str | Path | AnnData]) -> Iterator[tuple[str, AnnData]]:
    import anndata as ad

    if isinstance(sources, str | Path) or hasattr(sources, "obs_names"):
        sources = [sources]
    if not sources:
        msg = "`sources` is empty: give at least one file or AnnData to learn from."
        raise ValueError(msg)
    for at, source in enumerate(sources):
        if isinstance(source, str | Path):
            yield Path(source).name, ad.read_zarr(source) if str(source).endswith(".zarr") else ad.read_h5ad(source)
        else:
            yield f"source {at}", source


def _encode_sources(
    sources: Sequence[str | Path | AnnData], vocabulary: Vocabulary, max_length: int, gene_ids: str | None
) -> tuple[np.ndarray, np.ndarray]:
    ids, lengths = [], []
    shortest = vocabulary.n_specials + 2  # a cell of one gene has no context to learn from
    for source, adata in _each_source(sources):
        matrix = open_counts(adata, gene_ids=gene_ids)
        tokens = vocabulary.resolve(matrix.names)
        if not (tokens >= 0).any():
            msg = (
                f"{source}: no gene of the vocabulary {vocabulary.name!r}; genes look like {matrix.names[:3].tolist()}."
            )
            raise ValueError(msg)
        for _, block in row_blocks(matrix.x):
            encoded, n = rank_encode(
                to_counts(block, "raw", f"{source}: {matrix.where}"), tokens, vocabulary, max_length
            )
            ids.append(encoded[n >= shortest])
            lengths.append(n[n >= shortest])
    if not any(map(len, ids)):
        msg = f"No cell has more than one gene of the vocabulary {vocabulary.name!r}: there is nothing to learn from."
        raise ValueError(msg)
    out = np.zeros((sum(map(len, ids)), max(part.shape[1] for part in ids)), dtype=ids[0].dtype)
    start = 0
    for part in ids:
        out[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return out, np.concatenate(lengths)


def _coexpression_vectors(ids: np.ndarray, vocabulary: Vocabulary, size: int, seed: int) -> np.ndarray:
    """Gene vectors from which genes share cells: a truncated SVD of cells by genes, weighted by rank."""
    from sklearn.utils.extmath import randomized_svd

    cell, place = np.nonzero(~vocabulary.is_special[ids])
    n_genes = (~vocabulary.is_special[ids]).sum(axis=1)
    # High ranks say most about a cell: 1 at the top, towards 0 at the end.
    weight = 1.0 - (place - vocabulary.first_gene) / np.maximum(n_genes[cell], 1)
    matrix = sparse.csr_array((weight.astype(np.float32), (cell, ids[cell, place])), shape=(len(ids), len(vocabulary)))
    frequency = np.asarray((matrix > 0).mean(axis=0)).ravel()
    matrix = matrix @ sparse.diags_array((1.0 / np.sqrt(np.maximum(frequency, 1e-4))).astype(np.float32))
    _, strength, genes = randomized_svd(matrix, n_components=size, n_iter=3, random_state=seed)
    vectors = genes.T * np.sqrt(strength)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (0.5 * vectors / np.maximum(norm, 1e-12)).astype(np.float32)


def _keep_to_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Note what a folder is trained on and how; refuse to go on there with something else."""
    file = folder / PLAN_FILE
    plan = json.loads(json.dumps(plan, default=str))  # as it is read back: lists for tuples, text for paths
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plan, indent=1))
        return
    before = json.loads(file.read_text())
    changed = sorted(key for key in plan if plan[key] != before.get(key))
    if changed:
        msg = (
            f"{folder} holds a run with another {', '.join(changed)}, which cannot go on with these. "
            "Give another folder, or delete that one."
        )
        raise ValueError(msg)


def pretrain(
    sources: Sequence[str | Path | AnnData],
    folder: str | Path,
    *,
    vocabulary: Vocabulary | None = None,
    gene_ids: str | None = None,
    config: Mapping[str, Any] | None = None,
    curriculum: Sequence[tuple[int, float]] = ((256, 3), (1024, 1)),
    start_from: Literal["random", "coexpression"] = "random",
    held_out: float = 0.05,
    training: Mapping[str, Any] | None = None,
    rng: int = 0,
) -> Path:
    """Pretrain a Geneformer of your own by predicting masked genes.

    15 % of the genes of a cell are chosen; of these 80 % are masked, 10 % replaced by another gene, 10 % left. The
    embedding of `<cls>` alone has to predict the chosen genes too, so that it summarises the cell. A run that was
    stopped goes on from its last checkpoint when called again with the same folder.

    Cost: with the default size and curriculum, an hour for 27,000 cells on two CPU cores.

    Parameters
    ----------
    sources
        Paths of `.h5ad` or `.zarr` files, or AnnData objects, with raw counts in `X`.
    folder
        Where checkpoints and the final model go.
    vocabulary
        From :func:`gfx.models.build_vocabulary`; `None` builds it from the sources.
    gene_ids
        Column of `var` with Ensembl ids; `None` for `var_names`.
    config
        Fields of :class:`transformers.BertConfig` that replace ours: 4 blocks (`num_hidden_layers`) of width 128
        (`hidden_size`) with 4 heads (`num_attention_heads`), 1,024 tokens (`max_position_embeddings`).
    curriculum
        Stages of training: the longest cell, in tokens, and the passes over all cells. Longer cells are thinned at
        random to that length. Short cells first teach more per minute.
    start_from
        Where gene embeddings start: random, or at a singular value decomposition of which genes share cells.
    held_out
        Share of cells kept for evaluation, drawn at random.
    training
        Arguments of :class:`transformers.TrainingArguments` that replace ours in every stage, such as
        ``{"learning_rate": 5e-4}``.
    rng
        Seed of the split, the start and the masking.

    Returns
    -------
    The folder of the finished model, which :func:`gfx.models.load` reads: weights, configuration, vocabulary and
    `pretraining.json` with the masked-gene accuracy on held-out cells beside that of the rank baseline.

    Raises
    ------
    ValueError
        A source has no recognised gene or no raw counts (the message names it), `held_out` leaves no cell, or the
        folder holds a run on other cells or with other settings.

    Examples
    --------
    >>> import gfx, tempfile
    >>> with gfx.settings.override(verbosity=0), tempfile.TemporaryDirectory() as runs:
    ...     folder = gfx.models.pretrain(
    ...         [gfx.datasets.toy()], runs, gene_ids="ensembl_id", curriculum=[(64, 1)],
    ...         config={"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
    ...     )
    ...     model = gfx.models.load(folder)
    >>> model.n_blocks
    1
    """
    from gfx._engine import training as engine

    folder, config = Path(folder), dict(config or {})
    if vocabulary is None:
        vocabulary = build_vocabulary(sources, name=folder.name, gene_ids=gene_ids)
    ids, lengths = _encode_sources(sources, vocabulary, config.get("max_position_embeddings", 1024), gene_ids)
    order = np.random.default_rng(rng).permutation(len(ids))
    n_held_out = round(held_out * len(ids))
    if not 0 < n_held_out < len(ids):
        msg = f"`held_out={held_out}` keeps {n_held_out} of {len(ids)} cells for evaluation; both parts need cells."
        raise ValueError(msg)
    _keep_to_plan(
        folder,
        {
            "vocabulary": vocabulary.sha256,
            "cells": hashlib.sha256(ids.tobytes()).hexdigest(),
            "config": config,
            "curriculum": curriculum,
            "start_from": start_from,
            "held_out": held_out,
            "training": training or {},
            "seed": rng,
        },
    )
    held, learnt = order[:n_held_out], order[n_held_out:]
    train_cells, held_cells = engine.Cells(ids[learnt], lengths[learnt]), engine.Cells(ids[held], lengths[held])
    _log.info(
        f"pretraining on {len(learnt):,} cells, {vocabulary.n_genes:,} genes, "
        f"{lengths[learnt].mean():.0f} tokens a cell; {len(held):,} cells held out"
    )
    vectors = None
    if start_from == "coexpression":
        vectors = _coexpression_vectors(train_cells.ids, vocabulary, config.get("hidden_size", 128), rng)
    frequency = np.bincount(train_cells.ids.ravel(), minlength=len(vocabulary)) / len(train_cells)
    model = engine.make_model(vocabulary, config, gene_vectors=vectors, gene_frequency=frequency, seed=rng)
    history = []
    for stage, (longest, epochs) in enumerate(curriculum):
        history += engine.train(
            model,
            train_cells,
            held_cells,
            vocabulary,
            folder / "stages" / str(stage),
            longest=longest,
            epochs=epochs,
            arguments=training or {},
            seed=rng + stage,
        )
    report = {
        "cells": len(learnt),
        "held_out": len(held),
        "curriculum": [list(stage) for stage in curriculum],
        "start_from": start_from,
        "seed": rng,
        "masked_gene": engine.masked_accuracy(model, held_cells, vocabulary),
        "rank_baseline": engine.rank_baseline(train_cells, held_cells, vocabulary),
        "history": history,
    }
    engine.save(model, folder)
    write_vocabulary(vocabulary, folder)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1))
    _log.info(
        f"masked genes of held-out cells: top-1 {report['masked_gene']['top_1']:.1%} "
        f"(by rank alone {report['rank_baseline']['top_1']:.1%}); model in {folder}"
    )
    return folder

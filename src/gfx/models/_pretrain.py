"""Pretrain a model on cells, or go on with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx import _log
from gfx.models._build_vocabulary import build_vocabulary
from gfx.models._coexpression import find_coexpression
from gfx.models._configurations import CONFIGURATIONS
from gfx.models._load import Model, load
from gfx.models._masked_baselines import rank_baseline
from gfx.models._shards import FEWEST_GENES, encode_sources
from gfx.models._sources import find_sources
from gfx.models._vocabulary_file import write_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.masked_model import MaskedGeneModel
    from gfx.models._coexpression import Coexpression
    from gfx.models._shards import TokenShards

REPORT_FILE = "pretraining.json"
PLAN_FILE = "plan.json"

#: Gene embeddings that start well learn slower than all else, so that the rest adapts to them first.
GENE_RATE_WHEN_STARTED = 0.3

#: Cells to average over where `<cls>` starts as an average.
CELLS_FOR_THE_AVERAGE = 2000


def pretrain(
    sources: str | Path | AnnData | Sequence[str | Path | AnnData],
    folder: str | Path,
    *,
    vocabulary: Vocabulary | None = None,
    gene_ids: str | None = None,
    config: str | Mapping[str, Any] | None = None,
    start_from: str | Path | Model = "random",
    curriculum: Sequence[tuple[int | None, float]] = ((None, 3),),
    cell_weight: float = 0.0,
    held_out: float = 0.05,
    patience: int | None = None,
    training: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    rng: int = 0,
) -> Path:
    """Pretrain a Geneformer by predicting masked genes :cite:p:`Theodoris2023`, from nothing or from a published one.

    15 % of the genes of a cell are chosen; of these 80 % are masked, 10 % replaced by another gene, 10 % left; special
    tokens are never chosen. Which ones, follows from the seed, the epoch and the cell. A run that was stopped goes on
    from its last checkpoint when called again with the same folder, with the losses that it would have had.

    Cells are written as tokens into `folder` once, one file a source, and read from there in place: the corpus need
    not fit in memory. Started by ``torchrun`` or ``accelerate launch``, all processes train one model; they share
    `folder`. Each stage writes its log as lines of JSON, `stages/0/log.jsonl`; for TensorBoard, give
    ``training={"report_to": "tensorboard"}``.

    Cost: on two CPU cores about 50 cells a second of 256 tokens with the default size.

    Parameters
    ----------
    sources
        Paths of `.h5ad` or `.zarr` files, or AnnData objects, with raw counts in `X`.
    folder
        Where tokens, checkpoints and the final model go.
    vocabulary
        From :func:`gfx.models.build_vocabulary`; `None` builds it from the sources, or takes that of the model to start
        from.
    gene_ids
        Column of `var` with gene names; `None` for `var_names`.
    config
        The size of a published model by its name, such as ``"V2-104M"``, or of ``"mini"``, which `None` means: 4
        blocks of width 128 with 4 heads, 1,024 tokens. A mapping of fields of :class:`transformers.BertConfig`
        replaces fields of ``"mini"``.
    start_from
        ``"random"``; or ``"coexpression"``: gene embeddings start at the principal components of which genes share
        cells, and `<cls>` as their average over the cell, which small models on few cells are better for; or a
        model to go on with, by name, folder or as :class:`Model`: it brings its vocabulary and its configuration.
    curriculum
        Stages of training: the longest cell, in tokens, and the passes over all cells. `None` is all that the model
        reads. Longer cells are thinned at random to that length. Short cells first teach more per minute.
    cell_weight
        Weight of a second objective: `<cls>` of the block before the last is drawn to the cell's place among the
        principal components of all cells, for in masked-gene prediction nothing asks it to summarise the cell. 0, as
        in the papers, leaves it out.
    held_out
        Share of cells kept for evaluation, drawn at random.
    patience
        End a stage after that many evaluations without a lower loss on held-out cells, and take the best model; `None`
        trains to the end.
    training
        Arguments of :class:`transformers.TrainingArguments` that replace ours in every stage, such as
        ``{"learning_rate": 5e-4, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 4, "bf16": True}``; or
        such a mapping for each stage. Ours are AdamW, 1e-3 falling linearly after a warm-up of 3 % of the steps,
        batches of 32 cells a device, weight decay 1e-3, gradients clipped at 1.
    rng
        Seed of the split, the start, the order of cells and the masking.

    Returns
    -------
    The folder of the finished model, which :func:`gfx.models.load` reads: weights, configuration, vocabulary, and
    `pretraining.json` with the masked-gene accuracy on held-out cells beside that of the rank baseline, the log, and
    which cells were held out.

    Raises
    ------
    ValueError
        Some sources have no recognised gene or no raw counts, or cannot be read: the message names all of them, and
        what was made of the others is kept for the next call. `held_out` leaves no cell; settings contradict each
        other; or the folder holds a run on other cells or with other settings.
    FileNotFoundError
        A source does not exist.

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
    from gfx._engine import masked_model, masking
    from gfx._engine import training as engine

    folder = Path(folder)
    origin = None if start_from in ("random", "coexpression") else load(start_from)
    vocabulary, config = _what_to_train(vocabulary, config, origin, cell_weight)
    _check_curriculum(curriculum, vocabulary)
    arguments = _each_stage(training, len(curriculum))
    settings, *_ = (engine.training_arguments(folder, given) for given in arguments)  # those of any stage are checked
    model = None if origin is None else masked_model.read_model(origin.folder)  # or fail before a corpus is read
    found = find_sources(sources, gene_ids)
    with settings.main_process_first(local=False):
        if vocabulary is None:
            vocabulary = build_vocabulary(sources, name=folder.name, gene_ids=gene_ids)
        rows = encode_sources(found, vocabulary, config["max_position_embeddings"], folder / "tokens")
        learnt, held = _split(len(rows), held_out, rng)
        _keep_to_plan(
            folder,
            {
                "vocabulary": vocabulary.sha256,
                "cells": rows.content_sha256,
                "config": config,
                "start_from": start_from if origin is None else origin.weights_sha256,
                "curriculum": curriculum,
                "cell_weight": cell_weight,
                "held_out": held_out,
                "patience": patience,
                "training": arguments,
                "seed": rng,
            },
        )
    if settings.process_index == 0:
        _log.info(
            f"pretraining on {len(learnt):,} cells, {vocabulary.n_genes:,} genes, "
            f"{rows.lengths[learnt].mean():.0f} tokens a cell; {len(held):,} cells held out"
        )
    coexpression = None
    if start_from == "coexpression" or cell_weight > 0:
        coexpression = find_coexpression(rows, learnt, vocabulary, config["hidden_size"], rng)
    if model is None:
        start = coexpression if start_from == "coexpression" else None
        model = _make_model(vocabulary, config, rows, learnt, coexpression=start, seed=rng)
    model.cell_weight = cell_weight
    held_cells = masking.MaskedCells(rows, held, vocabulary, seed=rng, hide_all=True)
    history = []
    for stage, (longest, epochs) in enumerate(curriculum):
        history += engine.train(
            model,
            masking.MaskedCells(
                rows,
                learnt,
                vocabulary,
                seed=rng + stage,
                longest=longest,
                place=coexpression.place if cell_weight > 0 else None,
            ),
            held_cells,
            vocabulary,
            folder / "stages" / str(stage),
            epochs=epochs,
            arguments=arguments[stage],
            patience=patience,
            gene_rate=GENE_RATE_WHEN_STARTED if start_from == "coexpression" else 1.0,
            seed=rng + stage,
        )
    if settings.process_index == 0:
        report = {
            "cells": len(learnt),
            "curriculum": [list(stage) for stage in curriculum],
            "start_from": start_from if origin is None else origin.name,
            "cell_weight": cell_weight,
            "seed": rng,
            "masked_gene": engine.masked_accuracy(model, held_cells),
            "rank_baseline": rank_baseline(rows, learnt, held_cells),
            "held_out": _by_source(rows, held),
            "history": history,
        }
        masked_model.save_model(model, folder)
        write_vocabulary(vocabulary, folder)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=1))
        _log.info(
            f"masked genes of held-out cells: top-1 {report['masked_gene']['top_1']:.1%} "
            f"(by rank alone {report['rank_baseline']['top_1']:.1%}); model in {folder}"
        )
    with settings.main_process_first(local=False):
        return folder


def _what_to_train(
    vocabulary: Vocabulary | None, config: str | Mapping[str, Any] | None, origin: Model | None, cell_weight: float
) -> tuple[Vocabulary | None, dict[str, Any]]:
    """Settle vocabulary and configuration; the vocabulary may be left to the sources."""
    if origin is not None:
        if config is not None:
            msg = f"{origin!r} brings its configuration. Leave `config` out to go on with it."
            raise ValueError(msg)
        if vocabulary is not None and vocabulary.sha256 != origin.vocabulary.sha256:
            msg = (
                f"{origin!r} brings its vocabulary; {vocabulary!r} is another. Leave `vocabulary` out to go on with it."
            )
            raise ValueError(msg)
        vocabulary, fields = origin.vocabulary, dict(origin.config)
    elif isinstance(config, str):
        if config not in CONFIGURATIONS:
            msg = f"`config` is one of {', '.join(CONFIGURATIONS)}, or a mapping of fields; found {config!r}."
            raise ValueError(msg)
        fields = dict(CONFIGURATIONS[config])
    else:
        fields = dict(CONFIGURATIONS["mini"])
        if config is not None and "hidden_size" in config:
            fields["intermediate_size"] = 4 * config["hidden_size"]
        fields |= dict(config or {})
    if cell_weight < 0:
        msg = f"`cell_weight={cell_weight}` is a weight; give 0 or more."
        raise ValueError(msg)
    if cell_weight > 0 and vocabulary is not None and not vocabulary.has_cls:
        msg = f"`cell_weight` needs `<cls>`, which {vocabulary!r} lacks. Leave it out."
        raise ValueError(msg)
    if cell_weight > 0 and fields["num_hidden_layers"] < 2:
        msg = (
            "`cell_weight` draws on `<cls>` of the block before the last; a model of one block has none. Leave it out."
        )
        raise ValueError(msg)
    return vocabulary, fields


def _check_curriculum(curriculum: Sequence[tuple[int | None, float]], vocabulary: Vocabulary | None) -> None:
    """Find before hours of training what would fail in a later stage."""
    if not curriculum:
        msg = "`curriculum` is empty: give at least one stage, such as `[(None, 3)]`."
        raise ValueError(msg)
    fewest = FEWEST_GENES + (2 if vocabulary is None else vocabulary.n_specials)
    for longest, passes in curriculum:
        if longest is not None and longest < fewest:
            msg = f"`curriculum` has cells of {longest} tokens; {fewest} are {FEWEST_GENES} genes with special tokens."
            raise ValueError(msg)
        if passes <= 0:
            msg = f"`curriculum` has a stage of {passes} passes over all cells; give more than 0."
            raise ValueError(msg)


def _each_stage(
    training: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, n_stages: int
) -> list[Mapping[str, Any]]:
    """Settle the arguments of each stage of training."""
    if training is None or hasattr(training, "keys"):
        return [training or {}] * n_stages
    if len(training) != n_stages:
        msg = f"`training` has arguments for {len(training)} stages, `curriculum` has {n_stages}."
        raise ValueError(msg)
    return list(training)


def _split(n_cells: int, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the cells to learn from and those to hold out, each in the order of the sources."""
    order = np.random.default_rng(seed).permutation(n_cells)
    n_held_out = round(held_out * n_cells)
    if not 0 < n_held_out < n_cells:
        msg = f"`held_out={held_out}` keeps {n_held_out} of {n_cells} cells for evaluation; both parts need cells."
        raise ValueError(msg)
    return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])


def _make_model(
    vocabulary: Vocabulary,
    config: Mapping[str, Any],
    rows: TokenShards,
    learnt: np.ndarray,
    *,
    coexpression: Coexpression | None,
    seed: int,
) -> MaskedGeneModel:
    """Make an untrained model, with the start that co-expression gives if that is wanted."""
    from gfx._engine import masked_model

    frequency = np.zeros(len(vocabulary))
    for cell in learnt:
        frequency[rows[cell]] += 1 / len(learnt)
    model = masked_model.make_model(
        vocabulary,
        config,
        gene_vectors=None if coexpression is None else coexpression.vectors,
        gene_frequency=frequency,
        seed=seed,
    )
    if coexpression is not None and vocabulary.has_cls:
        some = np.random.default_rng(seed).permutation(learnt)[:CELLS_FOR_THE_AVERAGE]
        masked_model.start_as_average(model, [rows[cell] for cell in some], vocabulary)
    return model


def _by_source(rows: TokenShards, cells: np.ndarray) -> dict[str, list[int]]:
    """List cells by their number in each source, not counting those left out for having fewer than two genes."""
    first = np.cumsum([0, *rows.n_cells])
    return {
        f"{at}: {name}": (cells[(cells >= first[at]) & (cells < first[at + 1])] - first[at]).tolist()
        for at, name in enumerate(rows.names)
    }


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

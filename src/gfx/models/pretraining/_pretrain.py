"""Pretrain a model on cells, from random weights or from a trained model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx import _log
from gfx._core.arguments import check_seed
from gfx.models._load import Model, load
from gfx.models._plan import keep_to_plan
from gfx.models._registry import CONFIGURATIONS
from gfx.models._vocabulary_file import VOCABULARY_FILE, read_vocabulary, write_vocabulary
from gfx.models.pretraining._coexpression import find_coexpression
from gfx.models.pretraining._rank_baseline import rank_baseline
from gfx.models.pretraining._shards import FEWEST_GENES, encode_sources
from gfx.models.pretraining._sources import find_sources
from gfx.models.pretraining._vocabulary import build_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.pretraining import MaskedGeneModel
    from gfx.models.pretraining._coexpression import Coexpression
    from gfx.models.pretraining._shards import TokenShards
    from gfx.models.pretraining._sources import Source

#: Factor of the learning rate of gene embeddings that start from co-expression, so that the rest adapts to them first.
#: At 0.1, masked genes are hardly learnt.
GENE_RATE_WHEN_STARTED = 0.3

#: What a new model starts from.
STARTS = ("random", "coexpression")

#: Default learning rate when training starts from a trained model: that for random weights would undo its training.
RATE_TO_GO_ON = 5e-5

#: Maximum number of held-out cells that are scored; more take time and hardly change the result.
MOST_SCORED = 2_000

#: Cells for the average that `<cls>` starts as, and cells to count genes in, for the initial bias of the output.
CELLS_FOR_THE_AVERAGE, CELLS_FOR_THE_FREQUENCY = 2_000, 50_000


def pretrain(
    sources: str | Path | AnnData | Sequence[str | Path | AnnData],
    folder: str | Path,
    *,
    vocabulary: Vocabulary | None = None,
    layer: str | None = None,
    use_raw: bool = False,
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
    """Pretrain a Geneformer by predicting masked genes :cite:p:`Theodoris2023`, from random weights or a trained model.

    In each cell, 15 % of the genes are selected. Of these, 80 % are masked, 10 % are replaced by another gene, and 10 %
    are left unchanged; special tokens are never selected. The selection is determined by the seed, the epoch and the
    cell. If an interrupted call is repeated with the same folder, training continues from the last checkpoint, with the
    same losses as without the interruption.

    The tokens of the cells are written into `folder` once, in one file per source, and are memory-mapped, so the
    training cells need not fit into memory. If the script is started with ``torchrun`` or ``accelerate launch``, all
    processes train one model and share `folder`. Each stage of the curriculum writes a log as lines of JSON, such as
    `stages/0/log.jsonl`; for TensorBoard, pass ``training={"report_to": "tensorboard"}``.

    Cost: one pass over the sources, then the passes of `curriculum`. On 100,000 cells, training a model of the default
    size takes some hours on a CPU; larger models need GPUs.

    Parameters
    ----------
    sources
        Paths of `.h5ad` or `.zarr` files, or AnnData objects, with raw counts.
    folder
        Folder into which tokens, checkpoints and the final model are written.
    vocabulary
        Vocabulary from :func:`gfx.models.build_vocabulary`. `None` builds a vocabulary from the sources, or uses that
        of the trained model in `start_from`.
    layer
        Layer of every source that holds the raw counts. `None` uses `X`.
    use_raw
        Whether to use the counts and the genes of `raw`, as in files of CELLxGENE whose `X` is normalized.
    gene_ids
        Column of `var` with gene names. `None` uses `var_names`.
    config
        Name of a model whose size is used, such as ``"V2-104M"``. `None` uses the size of ``"mini"``: 4 layers of width
        128 with 4 heads, and 2,048 tokens. A mapping of fields of :class:`transformers.BertConfig` changes these fields
        relative to ``"mini"``.
    start_from
        ``"random"``: random weights. ``"coexpression"``: gene embeddings are initialised with principal components of
        co-detection (which genes are detected in the same cells) and trained with 0.3 times the learning rate, and
        `<cls>` is initialised with the weighted mean of the gene embeddings of the cell; this helps small models on few
        cells. A trained model, as name, folder or :class:`Model`: its training is continued, with its vocabulary and
        its configuration.
    curriculum
        Stages of training, each with the maximum number of tokens per cell (`None`: as many as the model reads) and the
        number of passes over all cells. Cells with more tokens are subsampled to random genes. Training is faster if
        the first stages use few tokens per cell.
    cell_weight
        Weight of an additional cosine loss between the hidden state of `<cls>` in the last but one layer and the
        principal components of the cell. It is useful because the prediction of masked genes does not require `<cls>`
        to summarise the cell. For subsampled cells, the components are computed from the remaining genes. With 0, as in
        the papers, this loss is not used.
    held_out
        Fraction of cells that are held out for evaluation, drawn at random; at most 2,000 of these cells are evaluated.
        In held-out cells, all selected genes are masked, because the model could copy a gene that is left unchanged.
    patience
        A stage ends after this number of evaluations without a lower loss on held-out cells, and the best model is
        kept; `None` trains each stage to its end. A stage is evaluated ten times, or every 500 steps if that is more
        often.
    training
        Arguments of :class:`transformers.TrainingArguments` that replace the defaults of gfx in every stage, such as
        ``{"learning_rate": 5e-4, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 4, "bf16": True}``; or
        such a mapping for each stage. The defaults are AdamW, a learning rate of 1e-3 (5e-5 when starting from a
        trained model) that decreases linearly after a warm-up of 3 % of the steps, batches of 32 cells per device,
        weight decay 1e-3, and gradients clipped at 1. When an interrupted call is continued, only arguments for workers
        and logs may differ.
    rng
        Seed for the choice of held-out cells, the initial weights, the order of cells and the masking.

    Returns
    -------
    The folder of the finished model, which :func:`gfx.models.load` reads: weights, configuration, vocabulary, and
    `pretraining.json` with the accuracy for masked genes of held-out cells, compared with that of the rank baseline,
    the log, and the list of held-out cells.

    Raises
    ------
    ValueError
        Some sources have no recognised gene or no raw counts, or cannot be read: the message names all of these
        sources, and the tokens of the others are kept for the next call. Or `held_out` leaves no cells, settings
        contradict each other, or the folder holds a run on other cells or with other settings.
    FileNotFoundError
        A source does not exist.
    ImportError
        accelerate, which training needs, is not installed.

    Examples
    --------
    >>> import gfx, tempfile
    >>> config = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    >>> with gfx.settings.override(verbosity=0), tempfile.TemporaryDirectory() as runs:
    ...     folder = gfx.models.pretrain(
    ...         [gfx.datasets.toy()],
    ...         runs,
    ...         gene_ids="ensembl_id",
    ...         curriculum=[(64, 1)],
    ...         config=config,
    ...     )
    ...     model = gfx.models.load(folder)
    >>> model.n_layers
    1
    """
    from gfx._engine import pretraining as engine
    from gfx._engine.examples import MaskedCells
    from gfx._engine.trainer import HARMLESS, cells_per_step

    folder = Path(folder)
    rng = check_seed(rng)
    origin = _origin(start_from)
    vocabulary, config = _what_to_train(vocabulary, config, origin, cell_weight)
    if origin is None:
        engine.check_configuration(config)
    _check_lengths(config["max_position_embeddings"], curriculum, vocabulary)
    arguments = _each_stage(training, len(curriculum))
    if origin is not None:
        arguments = [{"learning_rate": RATE_TO_GO_ON, **given} for given in arguments]
    # Those of every stage are checked before anything is read or written.
    settings, *_ = every_stage = [
        engine.stage_arguments(folder, 1, epochs=1, arguments=given, patience=patience, seed=rng) for given in arguments
    ]
    is_first = settings.process_index == 0
    model = (
        None if origin is None else engine.read_model(origin.weights, origin.config)
    )  # or fail before a corpus is read
    place = {"layer": layer, "use_raw": use_raw, "gene_ids": gene_ids}
    corpus = find_sources(sources, **place)
    with settings.main_process_first(local=False):
        if vocabulary is None:
            vocabulary = _vocabulary_of(corpus, folder, place, is_first=is_first)
        shards = encode_sources(corpus, vocabulary, config["max_position_embeddings"], folder / "tokens")
        training_cells, held_out_cells = _split(len(shards), held_out, rng)
        plan = {
            "vocabulary": vocabulary.sha256,
            "cells": shards.content_sha256,
            "config": config,
            "start_from": start_from if origin is None else origin.weights_sha256,
            "curriculum": curriculum,
            "cell_weight": cell_weight,
            "held_out": held_out,
            "patience": patience,
            "training": [{k: v for k, v in given.items() if k not in HARMLESS} for given in arguments],
            "cells per step": [cells_per_step(stage) for stage in every_stage],
            "rng": rng,
        }
        keep_to_plan(folder, plan, unfinished="stages")
    if is_first:
        _log.info(
            f"pretraining on {len(training_cells):,} cells, {vocabulary.n_genes:,} genes, "
            f"{shards.lengths[training_cells].mean():.0f} tokens a cell; {len(held_out_cells):,} cells held out"
        )
    starts_from_coexpression, coexpression = start_from == "coexpression", None
    if starts_from_coexpression or cell_weight > 0:
        coexpression = find_coexpression(shards, training_cells, vocabulary, config["hidden_size"], rng)
    if model is None:
        start = coexpression if starts_from_coexpression else None
        model = _make_model(vocabulary, config, shards, training_cells, coexpression=start, seed=rng)
    model.cell_weight = cell_weight
    cell_vector = coexpression.cell_vector if cell_weight > 0 else None
    scored = np.sort(np.random.default_rng(rng).permutation(held_out_cells)[:MOST_SCORED])
    scored = scored[np.argsort(shards.lengths[scored], kind="stable")]  # batches of one length need little padding
    evaluation = MaskedCells(shards, scored, vocabulary, seed=rng, hide_all=True)
    history = []
    for stage, (longest, epochs) in enumerate(curriculum):
        history += engine.train(
            model,
            MaskedCells(shards, training_cells, vocabulary, seed=rng + stage, longest=longest, cell_vector=cell_vector),
            evaluation,
            vocabulary,
            folder / "stages" / str(stage),
            epochs=epochs,
            arguments=arguments[stage],
            patience=patience,
            gene_rate=GENE_RATE_WHEN_STARTED if starts_from_coexpression else 1.0,
            seed=rng + stage,
        )
    with settings.main_process_first(local=False):  # whoever returns finds the model there
        if is_first:
            engine.save_model(model, folder)
            write_vocabulary(vocabulary, folder)
    if is_first:
        report = {
            "cells": len(training_cells),
            "curriculum": [list(stage) for stage in curriculum],
            "start_from": start_from if origin is None else origin.name,
            "cell_weight": cell_weight,
            "rng": rng,
            "masked_gene": engine.masked_accuracy(model.to(settings.device), evaluation),
            "rank_baseline": rank_baseline(shards, training_cells, evaluation),
            "held_out": _by_source(shards, held_out_cells),
            "history": history,
        }
        (folder / "pretraining.json").write_text(json.dumps(report, indent=1))
        accuracy, by_rank = (report[name]["top_10_unseen"] for name in ("masked_gene", "rank_baseline"))
        _log.info(
            "masked genes of held-out cells, among the first 10 that the cell does not show: "
            f"{accuracy:.1%} (by rank alone {by_rank:.1%}); model in {folder}"
        )
    return folder


def _origin(start_from: str | Path | Model) -> Model | None:
    """Find the model to go on with; `None` for a new one."""
    if isinstance(start_from, str) and start_from in STARTS:
        return None
    try:
        return load(start_from)
    except ValueError as error:
        msg = f"`start_from` is {' or '.join(map(repr, STARTS))}, or a model. {error}"
        raise ValueError(msg) from error


def _vocabulary_of(corpus: Sequence[Source], folder: Path, place: Mapping[str, Any], *, is_first: bool) -> Vocabulary:
    """Build the vocabulary in the first process; the others, and later calls, read it."""
    of_sources = hashlib.sha256("".join(source.fingerprint for source in corpus).encode()).hexdigest()[:12]
    kept = folder / "vocabulary" / of_sources
    if is_first and not (kept / VOCABULARY_FILE).is_file():
        vocabulary = build_vocabulary([source.place for source in corpus], name=folder.name, **place)
        kept.mkdir(parents=True, exist_ok=True)
        write_vocabulary(vocabulary, kept)
    return read_vocabulary(kept / VOCABULARY_FILE)


def _what_to_train(
    vocabulary: Vocabulary | None, config: str | Mapping[str, Any] | None, origin: Model | None, cell_weight: float
) -> tuple[Vocabulary | None, dict[str, Any]]:
    """Choose vocabulary and configuration; a vocabulary of `None` is to be built from the sources."""
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
        msg = "`cell_weight` uses `<cls>` of the last but one layer; a model of one layer has none. Leave it out."
        raise ValueError(msg)
    return vocabulary, fields


def _check_lengths(
    input_size: int, curriculum: Sequence[tuple[int | None, float]], vocabulary: Vocabulary | None
) -> None:
    """Find before hours of training what would fail in a later stage."""
    if not curriculum:
        msg = "`curriculum` is empty: give at least one stage, such as `[(None, 3)]`."
        raise ValueError(msg)
    fewest = FEWEST_GENES + (2 if vocabulary is None else vocabulary.n_specials)
    too_short = f"{fewest} are {FEWEST_GENES} genes with special tokens."
    if input_size < fewest:
        msg = f"`config` reads {input_size} tokens; {too_short}"
        raise ValueError(msg)
    for longest, epochs in curriculum:
        if longest is not None and longest < fewest:
            msg = f"`curriculum` has cells of {longest} tokens; {too_short}"
            raise ValueError(msg)
        if epochs <= 0:
            msg = f"`curriculum` has a stage of {epochs} passes over all cells; give more than 0."
            raise ValueError(msg)


def _each_stage(
    training: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, n_stages: int
) -> list[Mapping[str, Any]]:
    """Return the arguments of each stage of training."""
    if training is None or hasattr(training, "keys"):
        return [training or {}] * n_stages
    if len(training) != n_stages:
        msg = f"`training` has arguments for {len(training)} stages, `curriculum` has {n_stages}."
        raise ValueError(msg)
    return list(training)


def _split(n_cells: int, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the training cells and the held-out cells, each in the order of the sources."""
    order = np.random.default_rng(seed).permutation(n_cells)
    n_held_out = round(held_out * n_cells)
    if not 0 < n_held_out < n_cells:
        msg = f"`held_out={held_out}` keeps {n_held_out} of {n_cells} cells for evaluation; both parts need cells."
        raise ValueError(msg)
    return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])


def _make_model(
    vocabulary: Vocabulary,
    config: Mapping[str, Any],
    shards: TokenShards,
    training_cells: np.ndarray,
    *,
    coexpression: Coexpression | None,
    seed: int,
) -> MaskedGeneModel:
    """Make an untrained model; with `coexpression`, its gene embeddings and `<cls>` start from there."""
    from gfx._engine.pretraining import make_model, start_at_cell_vector

    shuffled = np.random.default_rng(seed).permutation(training_cells)
    counted = shuffled[:CELLS_FOR_THE_FREQUENCY]
    frequency = np.zeros(len(vocabulary))
    for cell in counted:
        frequency[shards[cell]] += 1 / len(counted)
    vectors = None if coexpression is None else coexpression.vectors
    model = make_model(vocabulary, config, gene_vectors=vectors, gene_frequency=frequency, seed=seed)
    if coexpression is not None and vocabulary.has_cls:
        averaged = [shards[cell] for cell in shuffled[:CELLS_FOR_THE_AVERAGE]]
        start_at_cell_vector(model, coexpression.log_share, coexpression.rank_slope, averaged, vocabulary)
    return model


def _by_source(shards: TokenShards, cells: np.ndarray) -> dict[str, list[int]]:
    """List cells by their number in each source, not counting those left out for having fewer than two genes."""
    first = np.cumsum([0, *shards.n_cells])
    return {
        f"{number}: {name}": (cells[(cells >= first[number]) & (cells < first[number + 1])] - first[number]).tolist()
        for number, name in enumerate(shards.names)
    }

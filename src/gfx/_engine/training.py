"""Masked-gene pretraining: one stage, from its last checkpoint, to its end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BertConfig

from gfx._engine import float32_attention
from gfx._engine.device import has_fast_bfloat16
from gfx._engine.examples import NOTHING, Padded
from gfx._engine.masked_model import MaskedGeneModel
from gfx._engine.surroundings import quiet_surroundings
from gfx._engine.trainer import COMMON, KEEP_BEST, OrderedTrainer, check_names, last_checkpoint, training_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import EvalPrediction, TrainingArguments

    from gfx._core.vocabulary import Vocabulary
    from gfx._engine.examples import MaskedCells

#: As in the 2023 paper, but for the batch, the warm-up (10,000 steps there) and what is about logs and checkpoints.
DEFAULTS = COMMON | {
    "learning_rate": 1e-3,
    "warmup_steps": 0.03,  # below 1: of all steps
    "per_device_train_batch_size": 32,
    "eval_strategy": "steps",
    # The others wait while the first process reads the corpus, which may take longer than torch's half hour.
    "ddp_timeout": 86_400,
}

#: Steps between evaluations, and between checkpoints, at most; a short stage has ten of them.
EVALUATE_EVERY = 500


def stage_arguments(
    folder: Path, n_cells: int, *, epochs: float, arguments: Mapping[str, Any], patience: int | None, seed: int
) -> TrainingArguments:
    """Make arguments for one stage of training."""
    given = DEFAULTS | {"num_train_epochs": epochs, "seed": seed} | dict(arguments)
    if patience is not None:
        given |= KEEP_BEST

    def plan(steps: float) -> dict[str, int]:
        every = max(1, min(EVALUATE_EVERY, int(steps / 10)))
        every = given.get("eval_steps", given.get("save_steps", every))  # the best model is one that was saved
        return {"eval_steps": every, "save_steps": every}

    return training_arguments(folder, n_cells, given, plan)


def check_configuration(fields: Mapping[str, Any]) -> None:
    """Refuse what makes no model, before anything is read or written."""
    check_names("config", fields, set(BertConfig().to_dict()) - {"vocab_size", "pad_token_id"}, "BertConfig")
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if width % heads:
        msg = f"`config`: {heads} heads (`num_attention_heads`) do not divide a width of {width} (`hidden_size`)."
        raise ValueError(msg)


@quiet_surroundings()
def train(
    model: MaskedGeneModel,
    cells: MaskedCells,
    held_out: MaskedCells,
    vocabulary: Vocabulary,
    folder: Path,
    *,
    epochs: float,
    arguments: Mapping[str, Any],
    patience: int | None,
    gene_rate: float,
    seed: int,
) -> list[dict[str, float]]:
    """Train one stage, or go on from its last checkpoint in `folder`; returns the log.

    A finished stage is read back and not trained again. Under `torchrun` or `accelerate launch` every process calls
    this, each takes its share of every batch, and the first one writes. With `patience` training ends after that many
    evaluations without a lower loss, and the best model is taken. `gene_rate` is below 1 where gene embeddings start
    well.
    """
    folder = folder.resolve()  # checkpoints name each other by path
    finished = folder / "finished"
    history = finished / "history.json"  # written last
    if history.is_file():
        model.load_state_dict(MaskedGeneModel.from_pretrained(finished).state_dict())
        return json.loads(history.read_text())
    settings = stage_arguments(folder, len(cells), epochs=epochs, arguments=arguments, patience=patience, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, state = last_checkpoint(folder, patience)
    if state is not None:
        model.load_state_dict(MaskedGeneModel.from_pretrained(state.best_model_checkpoint).state_dict())
    else:
        if settings.bf16 and settings.device.type == "cpu" and not has_fast_bfloat16(settings.device):
            model.set_attn_implementation(float32_attention.NAME)
        trainer = OrderedTrainer(
            settings,
            cells,
            held_out,
            vocabulary,
            patience=patience,
            gene_rate=gene_rate,
            prints_log=True,
            model=model,
            preprocess_logits_for_metrics=_rank_of_the_truth,
            compute_metrics=_accuracy,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.trained_model()  # as it came: the next stage may want another precision
        model.set_attn_implementation("sdpa")
        state = trainer.state
    if settings.process_index == 0:
        model.save_pretrained(finished)
        history.write_text(json.dumps(state.log_history))
    return state.log_history


@torch.inference_mode()
def masked_accuracy(model: MaskedGeneModel, held_out: MaskedCells, *, batch_size: int = 32) -> dict[str, float]:
    """Predict the masked genes of cells: mean loss (nats), top-1 and top-10 accuracy, number of predictions.

    ``top_1_unseen`` and ``top_10_unseen`` leave out the genes that the cell still shows, which cannot be masked: to
    compare with a baseline that leaves them out, too.
    """
    model.eval()
    collate = Padded(held_out.vocabulary)
    order = np.argsort(held_out.lengths, kind="stable")
    loss, ranks = 0.0, {"": [], "_unseen": []}
    for start in range(0, len(order), batch_size):
        batch = collate([held_out[cell] for cell in order[start : start + batch_size]])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        is_masked = batch["labels"] != NOTHING
        output = model(**batch)
        shown = batch["input_ids"][torch.nonzero(is_masked)[:, 0]]
        for suffix, logits in (("", output.logits), ("_unseen", output.logits.scatter(1, shown, -torch.inf))):
            ranks[suffix].append(_rank_of_the_truth(logits, batch["labels"])[is_masked].cpu())
        loss += float(output.loss) * int(is_masked.sum())
    ranks = {suffix: torch.cat(parts) for suffix, parts in ranks.items()}
    n = len(ranks[""])
    shares = {f"top_{k}{suffix}": float((rank < k).float().mean()) for suffix, rank in ranks.items() for k in (1, 10)}
    return {"loss": loss / n, **shares, "n": n}


def _rank_of_the_truth(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count the genes that are scored above the masked one, `(b, l)`; -100 where none is masked."""
    is_masked = labels != NOTHING
    truth = logits.gather(1, labels[is_masked][:, None])
    ranks = torch.full_like(labels, NOTHING)
    ranks[is_masked] = (logits > truth).sum(dim=1)
    return ranks


def _accuracy(evaluation: EvalPrediction) -> dict[str, float]:
    ranks = evaluation.predictions[evaluation.label_ids != NOTHING]
    return {"top_1": float((ranks < 1).mean()), "top_10": float((ranks < 10).mean()), "predictions": len(ranks)}

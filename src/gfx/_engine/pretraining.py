"""Masked-gene pretraining: the model, what it starts from, and one stage, from its last checkpoint, to its end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from transformers import BertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from gfx import _log
from gfx._core.checkpoint import FIELDS, check_fields, read_json
from gfx._engine import float32_attention
from gfx._engine.device import has_fast_bfloat16
from gfx._engine.encoder import bert_config, load_weights
from gfx._engine.examples import NOTHING, Padded
from gfx._engine.surroundings import quiet_surroundings
from gfx._engine.trainer import (
    COMMON,
    KEEP_BEST,
    OrderedTrainer,
    best_checkpoint,
    check_names,
    last_checkpoint,
    load_checkpoint,
    training_arguments,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import BertConfig, EvalPrediction, TrainingArguments

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

#: Where `<cls>` starts as a weighted sum, what a weight e times as large adds to an embedding of length 1. Small, for
#: the layer norm takes it from the rest.
SHARE_STEP = 0.1

#: Logarithm of the weight of `<mask>` and `<eos>` against that of a gene: next to nothing.
SHARE_OF_SPECIALS = -5.0


class MaskedGeneModel(BertForMaskedLM):
    """A BERT masked-LM that scores the vocabulary only where a gene is to be predicted.

    Where the batch brings a `cell_vector` for each cell, the loss also has the cosine distance between it and `<cls>`
    of the last but one layer, which embeddings are read from: masked-gene prediction does not require `<cls>` to
    summarise the cell.
    """

    #: The loss is a mean over one batch, which the Trainer averages over accumulated batches and devices.
    accepts_loss_kwargs = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        #: Weight of the cosine distance between `<cls>` and the cell vector.
        self.cell_weight = 0.0
        if config.tie_word_embeddings:  # else the Trainer warns that a checkpoint lacks what is in it once
            self._keys_to_ignore_on_save = ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cell_vector: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Mean cross-entropy over the chosen genes; logits of those genes only."""
        states = self.bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_hidden_states=cell_vector is not None,
        )
        hidden = states.last_hidden_state
        if labels is None:
            return MaskedLMOutput(logits=self.cls(hidden))
        chosen = labels != NOTHING
        logits = self.cls(hidden[chosen]).float()
        loss = functional.cross_entropy(logits, labels[chosen])
        if self.training and cell_vector is not None:
            apart = 1 - functional.cosine_similarity(states.hidden_states[-2][:, 0].float(), cell_vector)
            loss = loss + self.cell_weight * apart.mean()
        return MaskedLMOutput(loss=loss, logits=logits)


@quiet_surroundings()
def make_model(
    vocabulary: Vocabulary,
    config: Mapping[str, Any],
    *,
    gene_vectors: np.ndarray | None,
    gene_frequency: np.ndarray,
    seed: int,
) -> MaskedGeneModel:
    """Make an untrained model of the given fields of :class:`transformers.BertConfig`.

    Gene embeddings start at `gene_vectors`, `(n_tokens, hidden_size)`, if these are given. The output bias starts at
    the logarithm of the share of cells that detect each token, `(n_tokens,)`, so that it need not be learnt.
    """
    torch.manual_seed(seed)
    model = MaskedGeneModel(bert_config(config, vocab_size=len(vocabulary), pad_token_id=vocabulary.pad))
    with torch.no_grad():
        if gene_vectors is not None:
            words = model.bert.embeddings.word_embeddings.weight
            genes = torch.from_numpy(np.flatnonzero(~vocabulary.is_special))
            words[genes] = torch.from_numpy(gene_vectors).to(words.dtype)[genes]
        model.cls.predictions.bias.copy_(torch.from_numpy(np.log(np.maximum(gene_frequency, 1e-6))))
    return model


@torch.no_grad()
def start_at_cell_vector(
    model: MaskedGeneModel,
    log_share: np.ndarray,
    rank_slope: float,
    rows: Sequence[np.ndarray],
    vocabulary: Vocabulary,
) -> None:
    """Let `<cls>` start as a weighted sum of the cell's gene vectors, less that of the mean cell of `rows`.

    The last dimension of the embeddings holds how much a gene counts at its rank, `log_share` of its token less
    `rank_slope` times the logarithm of its rank: the keys of the first layer read that dimension, the values copy all
    others. So embeddings of cells are useful from the first step on, and training refines them instead of finding them
    first. Ranks count by a power: cells thinned to fewer genes, and ranked anew, have the same sums but for chance.
    """
    embeddings, attention = model.bert.embeddings, model.bert.encoder.layer[0].attention
    words, positions = embeddings.word_embeddings.weight, embeddings.position_embeddings.weight
    size = model.config.hidden_size
    head = size // model.config.num_attention_heads
    # Noise of random positions and token types would drown what genes of a cell have in common.
    positions.mul_(0.25)
    embeddings.token_type_embeddings.weight.zero_()
    shares = torch.from_numpy(log_share).to(words.dtype)
    is_gene = torch.from_numpy(~vocabulary.is_special)
    ranks = (torch.arange(len(positions)) - vocabulary.first_gene + 1).clamp(min=1)
    of_rank = -rank_slope * ranks.log()
    cells = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    mean = torch.cat([(shares[cell] + of_rank[: len(cell)])[is_gene[cell]] for cell in cells]).mean()
    words[:, -1] = SHARE_STEP * torch.where(is_gene, shares, SHARE_OF_SPECIALS)
    positions[:, -1] = SHARE_STEP * (of_rank - mean)
    words[vocabulary.cls] = positions[0] = 0

    first_of_heads = slice(None, None, head)
    attention.self.query.weight.mul_(0.1)
    attention.self.query.bias[first_of_heads] = head**0.5  # which attention divides by
    attention.self.key.weight[first_of_heads] = 0
    attention.self.key.weight[first_of_heads, -1] = to_share = 1 / (SHARE_STEP * size**0.5)
    copied = torch.eye(size)
    copied[-1, -1] = 0
    attention.self.value.weight.copy_(copied)
    was_training = model.training
    model.eval()
    centre = torch.zeros(size)
    for cell in cells:
        tokens = embeddings(cell[None])[0]
        centre += (tokens[:, -1] * to_share).softmax(dim=0) @ tokens @ copied / len(cells)
    model.train(was_training)
    words[vocabulary.cls] = -centre / centre.norm()
    # What the layer norm makes of `<cls>` has the length of the square root of its size.
    attention.output.dense.weight.copy_(torch.eye(size) * size**0.5 / centre.norm())


@quiet_surroundings()
def read_model(weights: Path, config: Mapping[str, Any]) -> MaskedGeneModel:
    """Read a checkpoint with its masked-gene head, in float32; one without a head cannot be trained further."""
    model = MaskedGeneModel(bert_config(config))
    load_weights(model, weights, "a masked-gene model (a classifier has none: go on from a pretrained checkpoint)")
    return model


@quiet_surroundings()
def save_model(model: MaskedGeneModel, folder: Path) -> None:
    """Write the model as the plain BERT masked-LM that it is, for any program to read."""
    plain = BertForMaskedLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)


# --- one stage ------------------------------------------------------------------------------------------------------


def stage_arguments(
    folder: Path, n_cells: int, *, epochs: float, arguments: Mapping[str, Any], patience: int | None, seed: int
) -> TrainingArguments:
    """Make arguments for one stage of training."""
    given: dict[str, Any] = DEFAULTS | {"num_train_epochs": epochs} | dict(arguments)
    if patience is not None:
        given |= KEEP_BEST

    def plan(steps: float) -> dict[str, int]:
        every = max(1, min(EVALUATE_EVERY, int(steps / 10)))
        every = given.get("eval_steps", given.get("save_steps", every))  # the best model is one that was saved
        return {"eval_steps": every, "save_steps": every}

    return training_arguments(folder, n_cells, given, plan, seed)


def check_configuration(fields: Mapping[str, Any]) -> None:
    """Refuse what makes no model, before anything is read or written."""
    check_names("config", fields, FIELDS - {"vocab_size", "pad_token_id"}, "BertConfig")
    try:
        check_fields(fields)
    except ValueError as error:
        msg = f"`config`: {error}"
        raise ValueError(msg) from None


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
        load_weights(model, finished / SAFE_WEIGHTS_NAME, "the model that is trained here")
        return read_json(history, list)
    settings = stage_arguments(folder, len(cells), epochs=epochs, arguments=arguments, patience=patience, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, state = last_checkpoint(folder, patience)
    if state is not None:
        load_checkpoint(model, best_checkpoint(folder, state))
    else:
        if settings.bf16 and settings.device.type == "cpu" and not has_fast_bfloat16(settings.device):
            model.set_attn_implementation(float32_attention.NAME)
        trainer = _MaskedGeneTrainer(
            settings,
            cells,
            held_out,
            vocabulary,
            patience=patience,
            gene_rate=gene_rate,
            model=model,
            compute_metrics=_accuracy,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.trained_model()  # as it came: the next stage may want another precision
        model.set_attn_implementation("sdpa")
        state = trainer.state
    if settings.process_index == 0:
        model.save_pretrained(finished)
        history.write_text(json.dumps(state.log_history))
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if losses:  # none where evaluations were turned off
            _log.info(
                f"trained on {len(cells):,} cells for {state.epoch:.3g} epochs: loss of held-out cells "
                f"{losses[0]:.2f} at the first of {len(losses)} evaluations, {losses[-1]:.2f} at the last"
            )
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
    loss, found = 0.0, list[torch.Tensor]()
    for start in range(0, len(order), batch_size):
        batch = collate([held_out[cell] for cell in order[start : start + batch_size]])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        is_masked = batch["labels"] != NOTHING
        output = model(**batch)
        found.append(_ranks_of_the_truth(output.logits, batch["input_ids"], batch["labels"])[is_masked].cpu())
        loss += float(output.loss) * int(is_masked.sum())
    ranks = torch.cat(found).numpy()
    return {"loss": loss / len(ranks), **_shares(ranks), "n": len(ranks)}


class _MaskedGeneTrainer(OrderedTrainer):
    """A Trainer that keeps of each evaluation what :func:`masked_accuracy` does: ranks, and not scores of all genes."""

    def prediction_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Rank the masked genes of one batch."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if logits is None:  # the user wants losses alone
            return loss, logits, labels
        return loss, _ranks_of_the_truth(logits, inputs["input_ids"].to(logits.device), labels), labels


def _ranks_of_the_truth(logits: torch.Tensor, shown: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count the genes scored above the masked one, all and without those that the cell shows, `(b, l, 2)`.

    -100 where none is masked.
    """
    is_masked = labels != NOTHING
    truth = logits.gather(1, labels[is_masked][:, None])
    unseen = logits.scatter(1, shown[torch.nonzero(is_masked)[:, 0]], -torch.inf)
    ranks = torch.full_like(labels, NOTHING)[..., None].repeat(1, 1, 2)
    ranks[is_masked] = torch.stack([(scores > truth).sum(dim=1) for scores in (logits, unseen)], dim=1)
    return ranks


def _shares(ranks: np.ndarray) -> dict[str, float]:
    """Share of the masked genes that are among the first 1 and 10, of `(n, 2)` ranks."""
    return {
        f"top_{k}{suffix}": float((ranks[:, column] < k).mean())
        for column, suffix in enumerate(("", "_unseen"))
        for k in (1, 10)
    }


def _accuracy(evaluation: EvalPrediction) -> dict[str, float]:
    ranks = evaluation.predictions[evaluation.label_ids != NOTHING]
    return _shares(ranks) | {"predictions": len(ranks)}

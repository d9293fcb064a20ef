"""Masked-gene pretraining of a BERT encoder on transformers' Trainer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import BertConfig, BertForMaskedLM, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import MaskedLMOutput
from transformers.trainer import TRAINER_STATE_NAME

from gfx import _log

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gfx._core.vocabulary import Vocabulary

#: Share of genes chosen in a cell, and what becomes of the chosen ones (the rest stay as they are).
MASKED_SHARE, MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.15, 0.8, 0.1

_IGNORE = -100


class Cells(Dataset):
    """Encoded cells, one row of tokens each."""

    def __init__(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self.ids, self.lengths = ids, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, cell: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.ids[cell, : self.lengths[cell]]}


class MaskGenes:
    """Collate cells and choose genes to predict: 80 % become `<mask>`, 10 % another gene, 10 % stay.

    A cell longer than `longest` is thinned to that many tokens drawn at random, in their order: it then looks like
    the same cell sequenced less deeply, whereas cutting its end off would hide the same genes every time.
    """

    def __init__(self, vocabulary: Vocabulary, seed: int, longest: int | None = None) -> None:
        self.vocabulary = vocabulary
        self.genes = np.flatnonzero(~vocabulary.is_special)
        self.rng = np.random.default_rng(seed)
        self.longest = longest

    def _thin(self, row: np.ndarray) -> np.ndarray:
        if self.longest is None or len(row) <= self.longest:
            return row
        special = self.vocabulary.is_special[row]
        genes = self.rng.choice(np.flatnonzero(~special), self.longest - int(special.sum()), replace=False)
        special[genes] = True
        return row[special]

    def __call__(self, cells: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        rows = [self._thin(cell["input_ids"]) for cell in cells]
        ids = np.full((len(rows), max(map(len, rows))), self.vocabulary.pad, dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        masked, labels = mask_genes(ids, self.vocabulary, self.genes, self.rng)
        return {
            "input_ids": torch.from_numpy(masked),
            "attention_mask": torch.from_numpy((ids != self.vocabulary.pad).astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }


def mask_genes(
    ids: np.ndarray, vocabulary: Vocabulary, genes: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Choose genes to predict; special tokens are never chosen, every cell keeps at least one chosen gene.

    Returns
    -------
    Masked tokens and labels, int64 like `ids`; labels are -100 where nothing is predicted.
    """
    is_gene = ~vocabulary.is_special[ids]
    draw = rng.random(ids.shape)
    draw[~is_gene] = 1.0
    lowest = draw.min(axis=1, keepdims=True)
    chosen = is_gene & (draw <= np.maximum(MASKED_SHARE, lowest))
    labels = np.where(chosen, ids, _IGNORE)
    fate = rng.random(ids.shape)
    masked = ids.copy()
    masked[chosen & (fate < MASK_TOKEN_SHARE)] = vocabulary.mask
    replaced = chosen & (fate >= MASK_TOKEN_SHARE) & (fate < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE)
    masked[replaced] = rng.choice(genes, size=int(replaced.sum()))
    return masked, labels


class MaskedGeneModel(BertForMaskedLM):
    """A BERT masked-LM that scores the vocabulary only where a gene is to be predicted.

    With `cell_weight` above zero, `<cls>` alone has to predict the chosen genes too, which makes it a summary of
    the cell: in masked-gene prediction nothing else asks that of it.
    """

    #: The loss is a mean over one batch, which the Trainer averages over accumulated batches and devices.
    accepts_loss_kwargs = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cell_weight = float(getattr(config, "cell_weight", 0.0))

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        """Mean cross-entropy over the chosen genes; logits of those genes only."""
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        if labels is None:
            return MaskedLMOutput(logits=self.cls(hidden))
        chosen = labels != _IGNORE
        target = labels[chosen]
        logits = self.cls(hidden[chosen]).float()
        loss = functional.cross_entropy(logits, target)
        if self.training and self.cell_weight > 0:
            cell = torch.nonzero(chosen)[:, 0]
            scores = functional.log_softmax(self.cls(hidden[:, 0]).float(), dim=-1)
            loss = loss - self.cell_weight * scores[cell, target].mean()
        return MaskedLMOutput(loss=loss, logits=logits)


def make_model(
    vocabulary: Vocabulary,
    config: Mapping[str, Any],
    *,
    gene_vectors: np.ndarray | None,
    gene_frequency: np.ndarray,
    seed: int,
) -> MaskedGeneModel:
    """Make an untrained model; the output bias starts at the genes' log frequency, so that it need not be learnt.

    Parameters
    ----------
    config
        Fields of :class:`transformers.BertConfig` that replace the defaults for a small model.
    gene_vectors
        Where the gene embeddings start, `(n_tokens, hidden_size)`, or `None` for random.
    gene_frequency
        Share of cells that detect each token, `(n_tokens,)`.
    """
    set_seed(seed)
    hidden_size = config.get("hidden_size", 128)
    fields = {
        "vocab_size": len(vocabulary),
        "hidden_size": hidden_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 4 * hidden_size,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.02,
        "attention_probs_dropout_prob": 0.0,  # any other value keeps torch from its fused attention
        "max_position_embeddings": 1024,
        "pad_token_id": vocabulary.pad,
        "cell_weight": 1.0 if vocabulary.has_cls else 0.0,
    }
    model = MaskedGeneModel(BertConfig(**(fields | dict(config))))
    with torch.no_grad():
        if gene_vectors is not None:
            words = model.bert.embeddings.word_embeddings.weight
            genes = torch.from_numpy(np.flatnonzero(~vocabulary.is_special))
            words[genes] = torch.from_numpy(gene_vectors).to(words.dtype)[genes]
        model.cls.predictions.bias.copy_(torch.from_numpy(np.log(np.maximum(gene_frequency, 1e-6))))
    return model


def train(
    model: MaskedGeneModel,
    train_cells: Cells,
    held_out: Cells,
    vocabulary: Vocabulary,
    folder: Path,
    *,
    longest: int,
    epochs: float,
    arguments: Mapping[str, Any],
    seed: int,
) -> list[dict[str, float]]:
    """Train one stage, or go on from its last checkpoint in `folder`; returns the log.

    A finished stage is read back and not trained again.
    """
    finished = folder / "finished"
    history = finished / "history.json"  # written last
    if history.is_file():
        model.load_state_dict(MaskedGeneModel.from_pretrained(finished).state_dict())
        return json.loads(history.read_text())
    given = {
        "learning_rate": 1e-3,
        "weight_decay": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 200,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32,
        "num_train_epochs": epochs,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_steps": 500,
        "save_total_limit": 2,
        "logging_steps": 50,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": not _log.shows_progress(),
    } | dict(arguments)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            prediction_loss_only=True,
            **given,
        ),
        data_collator=MaskGenes(vocabulary, seed, longest),
        train_dataset=train_cells,
        eval_dataset=held_out,
    )
    if not _log.shows_progress():
        trainer.remove_callback(PrinterCallback)  # without bars the Trainer prints every log entry
    folder.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    model.save_pretrained(finished)
    history.write_text(json.dumps(trainer.state.log_history))
    return trainer.state.log_history


def save(model: MaskedGeneModel, folder: Path) -> None:
    """Write the model as the plain BERT masked-LM that it is, for any program to read."""
    plain = BertForMaskedLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)


def _last_checkpoint(folder: Path) -> str | None:
    """Find the last whole checkpoint: a run that was stopped while it wrote one leaves a part of it."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]  # the file written last
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


@torch.inference_mode()
def masked_accuracy(
    model: MaskedGeneModel, cells: Cells, vocabulary: Vocabulary, *, batch_size: int = 32, seed: int = 0
) -> dict[str, float]:
    """Predict genes of held-out cells: mean loss (nats), top-1 and top-10 accuracy, number of predictions.

    Every chosen gene is masked. In training a tenth of them stays to be seen, and copying these alone would look like
    10 % of success.
    """
    model.eval()
    collate = MaskGenes(vocabulary, seed)
    order = np.argsort(cells.lengths, kind="stable")
    loss = top_1 = top_10 = total = 0.0
    for start in range(0, len(order), batch_size):
        batch = collate([cells[i] for i in order[start : start + batch_size]])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        chosen = batch["labels"] != _IGNORE
        output = model(**batch | {"input_ids": batch["input_ids"].masked_fill(chosen, vocabulary.mask)})
        target = batch["labels"][chosen]
        best = output.logits.topk(10, dim=-1).indices == target[:, None]
        loss += float(output.loss) * len(target)
        top_1 += float(best[:, 0].sum())
        top_10 += float(best.any(dim=1).sum())
        total += len(target)
    return {"loss": loss / total, "top_1": top_1 / total, "top_10": top_10 / total, "n": int(total)}


def rank_baseline(
    train_cells: Cells, cells: Cells, vocabulary: Vocabulary, *, n_bins: int = 64, seed: int = 0
) -> dict[str, float]:
    """Predict masked genes from their rank alone: the genes most frequent in that band of ranks in other cells.

    ``top_1_unseen`` and ``top_10_unseen`` also leave out the genes that the cell shows, which cannot be masked: a
    harder baseline, for it knows most of what the cell holds.
    """
    genes = np.flatnonzero(~vocabulary.is_special)
    width = max(train_cells.ids.shape[1], int(cells.lengths.max()))
    edges = np.unique(np.geomspace(1, width + 1, n_bins).astype(int)) - 1
    band = (np.searchsorted(edges, np.arange(width) - vocabulary.first_gene, side="right") - 1).clip(0)
    counts = np.zeros((band.max() + 1, len(vocabulary)), dtype=np.int64)
    for column in range(train_cells.ids.shape[1]):
        counts[band[column]] += np.bincount(train_cells.ids[:, column], minlength=len(vocabulary))
    counts[:, vocabulary.is_special] = 0
    rng = np.random.default_rng(seed)
    n_best = min(10, len(vocabulary) - 1)
    hits = {"top_1": 0, "top_10": 0, "top_1_unseen": 0, "top_10_unseen": 0}
    total = 0
    for cell in range(len(cells)):
        ids = cells.ids[cell : cell + 1, : cells.lengths[cell]].astype(np.int64)
        _, labels = mask_genes(ids, vocabulary, genes, rng)
        at = np.flatnonzero(labels[0] != _IGNORE)
        scores = counts[band[at]]
        for suffix in ("", "_unseen"):
            best = np.argpartition(-scores, n_best, axis=1)[:, :n_best]
            best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1), 1)
            found = best == labels[0, at][:, None]
            hits[f"top_1{suffix}"] += int(found[:, 0].sum())
            hits[f"top_10{suffix}"] += int(found.any(axis=1).sum())
            scores[:, np.delete(ids[0], at)] = -1
        total += len(at)
    return {name: n / total for name, n in hits.items()} | {"n": total}

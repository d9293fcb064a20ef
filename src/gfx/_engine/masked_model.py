"""The model that is pretrained: a BERT masked-LM that scores only what it is asked, and what it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from gfx._engine.examples import NOTHING
from gfx._engine.surroundings import quiet_surroundings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gfx._core.vocabulary import Vocabulary


#: Where `<cls>` starts as a weighted sum, what a weight e times as large adds to an embedding of length 1. Small, for
#: the layer norm takes it from the rest.
SHARE_STEP = 0.1

#: Logarithm of the weight of `<mask>` and `<eos>` against that of a gene: next to nothing.
SHARE_OF_SPECIALS = -5.0


class MaskedGeneModel(BertForMaskedLM):
    """A BERT masked-LM that scores the vocabulary only where a gene is to be predicted.

    Where the batch brings the `place` of each cell among all cells, `<cls>` of the block before the last, which
    embeddings are read from, is drawn towards it: in masked-gene prediction nothing asks `<cls>` to be a summary.
    """

    #: The loss is a mean over one batch, which the Trainer averages over accumulated batches and devices.
    accepts_loss_kwargs = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        #: Weight of the distance of `<cls>` from the cell's place.
        self.cell_weight = 0.0
        if config.tie_word_embeddings:  # else the Trainer warns that a checkpoint lacks what is in it once
            self._keys_to_ignore_on_save = ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]

    def forward(self, input_ids, attention_mask=None, labels=None, position_ids=None, place=None, **kwargs):
        """Mean cross-entropy over the chosen genes; logits of those genes only."""
        states = self.bert(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, output_hidden_states=place is not None
        )
        hidden = states.last_hidden_state
        if labels is None:
            return MaskedLMOutput(logits=self.cls(hidden))
        chosen = labels != NOTHING
        logits = self.cls(hidden[chosen]).float()
        loss = functional.cross_entropy(logits, labels[chosen])
        if self.training and place is not None:
            apart = 1 - functional.cosine_similarity(states.hidden_states[-2][:, 0].float(), place)
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
    model = MaskedGeneModel(BertConfig(vocab_size=len(vocabulary), pad_token_id=vocabulary.pad, **config))
    with torch.no_grad():
        if gene_vectors is not None:
            words = model.bert.embeddings.word_embeddings.weight
            genes = torch.from_numpy(np.flatnonzero(~vocabulary.is_special))
            words[genes] = torch.from_numpy(gene_vectors).to(words.dtype)[genes]
        model.cls.predictions.bias.copy_(torch.from_numpy(np.log(np.maximum(gene_frequency, 1e-6))))
    return model


@torch.no_grad()
def start_at_place(
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
def read_model(folder: Path) -> MaskedGeneModel:
    """Read a checkpoint with its masked-gene head, in float32; one without a head cannot be trained further."""
    model, report = MaskedGeneModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, weights_only=True
    )
    if report["missing_keys"]:
        msg = (
            f"{folder} lacks {sorted(report['missing_keys'])[:3]}: it is no masked-gene model, such as a classifier. "
            "Go on from a pretrained checkpoint."
        )
        raise ValueError(msg)
    return model


@quiet_surroundings()
def save_model(model: MaskedGeneModel, folder: Path) -> None:
    """Write the model as the plain BERT masked-LM that it is, for any program to read."""
    plain = BertForMaskedLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)

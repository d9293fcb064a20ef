"""Sizes of models by name, as fields of `transformers.BertConfig`."""

from __future__ import annotations

from typing import Any


def _size(blocks: int, width: int, inner: int, *, tokens: int, dropout: float, head: int = 64) -> dict[str, Any]:
    return {
        "num_hidden_layers": blocks,
        "hidden_size": width,
        "num_attention_heads": width // head,
        "intermediate_size": inner,
        "max_position_embeddings": tokens,
        "hidden_act": "relu",
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


#: The published sizes, and that of the embedded model. It has no dropout: what is masked differs in every epoch, and
#: drawing random numbers costs a CPU a tenth of its time.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mini": _size(4, 128, 512, tokens=2048, dropout=0.0, head=32),
    "V1-10M": _size(6, 256, 512, tokens=2048, dropout=0.02),
    "gf-12L-30M": _size(12, 512, 1024, tokens=2048, dropout=0.02),
    "gf-12L-95M": _size(12, 512, 1024, tokens=4096, dropout=0.02),
    "gf-20L-95M": _size(20, 896, 1792, tokens=4096, dropout=0.02),
    "V2-104M": _size(12, 768, 3072, tokens=4096, dropout=0.1),
    "V2-316M": _size(18, 1152, 4608, tokens=4096, dropout=0.1),
}

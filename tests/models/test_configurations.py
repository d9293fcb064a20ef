"""The sizes that are known by name are those of the published models."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from gfx.models import load
from gfx.models._registry import CONFIGURATIONS, published


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_name_gives_a_model_of_the_published_size(name: str) -> None:
    """Every parameter of the card, counted without memory for any."""
    registry = published()
    card = registry.models[name]
    n_tokens = len(load("mini").vocabulary) if card.embedded else registry.vocabularies[card.vocabulary].n_tokens
    config = BertConfig(vocab_size=n_tokens, **CONFIGURATIONS[name])
    with torch.device("meta"):
        model = BertForMaskedLM(config)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == card.parameters
    assert config.num_hidden_layers == card.n_layers
    assert config.hidden_size == card.hidden_size
    assert config.max_position_embeddings == card.input_size


def test_every_published_size_has_a_name() -> None:
    """Models tuned further, such as V2-104M_CLcancer, have the size of what they were tuned from."""
    assert {name.partition("_")[0] for name in published().models} == set(CONFIGURATIONS)


def test_mini_is_of_the_size_of_the_embedded_model() -> None:
    embedded = load("mini").config
    for field in ("num_attention_heads", "intermediate_size", "hidden_act"):
        assert CONFIGURATIONS["mini"][field] == embedded[field]


#: Heads, width of the feed-forward part, dropout, of the published `config.json`.
PUBLISHED = {
    "V1-10M": (4, 512, 0.02),
    "gf-12L-30M": (8, 1024, 0.02),
    "gf-12L-95M": (8, 1024, 0.02),
    "gf-20L-95M": (14, 1792, 0.02),
    "V2-104M": (12, 3072, 0.1),
    "V2-316M": (18, 4608, 0.1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_heads_width_and_dropout_are_the_published_ones(name: str) -> None:
    found = CONFIGURATIONS[name]
    heads, inner, dropout = PUBLISHED[name]
    assert found["num_attention_heads"] == heads
    assert found["intermediate_size"] == inner
    assert found["hidden_dropout_prob"] == found["attention_probs_dropout_prob"] == dropout
    assert found["hidden_act"] == "relu"

"""A model that is nothing but a vocabulary: tokenizing needs no weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gfx.models import Model

if TYPE_CHECKING:
    from collections.abc import Callable

    from gfx._core.vocabulary import Vocabulary


class Weightless(Model):
    """Model without a weights file."""

    weights_sha256 = "none"


@pytest.fixture(scope="session")
def as_model() -> Callable[..., Model]:
    """Wrap a vocabulary in a model of a stated input size."""

    def wrap(vocabulary: Vocabulary, max_length: int = 64, name: str = "test") -> Model:
        config = {
            "max_position_embeddings": max_length,
            "num_hidden_layers": 1,
            "hidden_size": 2,
            "num_attention_heads": 1,
        }
        return Weightless(name=name, folder=Path("none"), weights=Path("none"), config=config, vocabulary=vocabulary)

    return wrap

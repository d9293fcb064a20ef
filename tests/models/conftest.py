"""Models in the shape of the published repository, on the local server."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save

from gfx.models._registry import FileEntry, ModelCard, Registry, Store, published

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Hub

REVISION = "1234567890abcdef1234567890abcdef12345678"
#: The byte-identical copies at hand carry the older name.
RENAMED = {"gc104M": "gc95M"}


def checkpoint(n_tokens: int, *, max_length: int = 64, size: int = 8) -> dict[str, bytes]:
    """Make a random checkpoint of one block in the published layout: config and safetensors."""
    rng = np.random.default_rng(n_tokens)
    shapes = {
        "bert.embeddings.word_embeddings.weight": (n_tokens, size),
        "bert.embeddings.position_embeddings.weight": (max_length, size),
        "bert.embeddings.token_type_embeddings.weight": (2, size),
    }
    dense = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    for name in (*dense, "intermediate.dense", "output.dense"):
        shapes |= {f"bert.encoder.layer.0.{name}.weight": (size, size), f"bert.encoder.layer.0.{name}.bias": (size,)}
    for name in ("embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"):
        shapes |= {f"bert.{name}.LayerNorm.{part}": (size,) for part in ("weight", "bias")}
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": n_tokens,
        "hidden_size": size,
        "intermediate_size": size,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": max_length,
        "pad_token_id": 0,
    }
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save({key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}),
    }


@pytest.fixture
def make_checkpoint(tmp_path: Path):
    """Write a random checkpoint into a folder: ``make_checkpoint("name", n_tokens)``."""

    def make(name: str, n_tokens: int, **settings: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in checkpoint(n_tokens, **settings).items():
            (folder / file).write_bytes(content)
        return folder

    return make


@pytest.fixture
def store(hub: Hub, tmp_path: Path) -> Store:
    """Empty cache, and a registry of one small model without dictionaries that the hub serves: ``"small"``."""
    files = []
    for name, content in checkpoint(30).items():
        entry = FileEntry(f"Small/{name}", REVISION, len(content), hashlib.sha256(content).hexdigest())
        hub.files[f"Small/Models/resolve/{REVISION}/{entry.path}"] = content
        files.append(entry)
    card = ModelCard(
        name="small",
        description="Random weights.",
        licence="BSD-3-Clause",
        parameters=1000,
        n_layers=1,
        hidden_size=8,
        input_size=64,
        vocabulary="none",
        specials=("<pad>", "<mask>"),
        files=tuple(files),
        size=sum(file.size for file in files),
        also_known_as=("Tiny-2026",),
    )
    registry = Registry(repository="Small/Models", models={"small": card}, vocabularies={})
    return Store(registry=registry, folder=tmp_path / "cache", endpoint=hub.url, attempts=1)


@pytest.fixture
def published_store(hub: Hub, tmp_path: Path, shared: Path) -> Store:
    """Empty cache, and the real registry, its dictionaries served by the hub as they are published.

    Adds `V1-small` and `V2-small`: random weights with tables of the published sizes.
    """
    registry = published()
    base = f"{registry.repository}/resolve"
    models = dict(registry.models)
    for vocabulary, like in (("V1", "V1-10M"), ("V2", "V2-104M")):
        card = registry.vocabularies[vocabulary]
        for file in card.files:
            name = file.name
            for new, old in RENAMED.items():
                name = name.replace(new, old)
            hub.files[f"{base}/{file.revision}/{file.path}"] = (shared / "data" / "official" / name).read_bytes()
        files = []
        for name, content in checkpoint(card.n_tokens).items():
            entry = FileEntry(f"{vocabulary}-small/{name}", REVISION, len(content), hashlib.sha256(content).hexdigest())
            hub.files[f"{base}/{REVISION}/{entry.path}"] = content
            files.append(entry)
        models[f"{vocabulary}-small"] = replace(
            models[like], name=f"{vocabulary}-small", files=(*files, *card.files), also_known_as=()
        )
    return Store(registry=replace(registry, models=models), folder=tmp_path / "cache", endpoint=hub.url)

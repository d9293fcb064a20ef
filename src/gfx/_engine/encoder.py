"""The encoder alone: no masked-LM head, no layer above the one whose states are wanted."""

from __future__ import annotations

import errno
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import BertConfig, BertModel

from gfx._engine.device import ran_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: How torch says that a file is broken or no pickle of tensors: it walks through whatever bytes are there.
_UNREADABLE = (UnpicklingError, RuntimeError, LookupError, EOFError, ValueError, OSError)


def layers_needed(hidden_layer: int, n_layers: int) -> int:
    """Count the network layers to run, for states that are numbered as a list of the embedding and of each layer is."""
    wanted = hidden_layer if hidden_layer >= 0 else n_layers + 1 + hidden_layer
    if not 0 <= wanted <= n_layers:
        msg = (
            f"`hidden_layer={hidden_layer}` is outside this model of {n_layers} layers: "
            f"0 is the embedding, 1 to {n_layers} are the layers, -1 is the last layer, -2 the one before."
        )
        raise ValueError(msg)
    return wanted


def load_encoder(
    weights: Path,
    config: Mapping[str, Any],
    *,
    n_layers: int,
    device: torch.device,
    dtype: torch.dtype,
) -> BertModel:
    """Read the first `n_layers` layers of a checkpoint; pickled weights only as plain tensors."""
    settings = BertConfig(**{**config, "num_hidden_layers": n_layers})
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):  # no time spent on random weights that are replaced at once
        encoder = BertModel(settings, add_pooling_layer=False)
    expected = encoder.state_dict()
    state = read_tensors(weights, set(expected))
    missing = sorted(set(expected) - set(state))
    if missing:
        n = len(missing)
        msg = f"{weights.name} lacks {n} tensors of a BERT encoder with {n_layers} layers, such as {missing[0]!r}."
        raise ValueError(msg)
    wrong = [name for name, tensor in expected.items() if state[name].shape != tensor.shape]
    if wrong:
        msg = (
            f"{weights.name}: {wrong[0]!r} has shape {tuple(state[wrong[0]].shape)}, config.json promises "
            f"{tuple(expected[wrong[0]].shape)}."
        )
        raise ValueError(msg)
    encoder.load_state_dict({name: state[name].to(device, dtype) for name in expected}, assign=True)
    positions = torch.arange(settings.max_position_embeddings, device=device)[None]
    encoder.embeddings.position_ids = positions
    encoder.embeddings.token_type_ids = torch.zeros_like(positions)
    return encoder.eval().requires_grad_(requires_grad=False)


def random_encoder(
    config: Mapping[str, Any], *, n_layers: int, seed: int, device: torch.device, dtype: torch.dtype
) -> BertModel:
    """Make the same network with random weights, drawn as those of a network before its training."""
    settings = BertConfig(**{**config, "num_hidden_layers": n_layers})
    settings._attn_implementation = "sdpa"
    # The user's random numbers stay as they were: `torch.manual_seed` would seed those of all devices.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        encoder = BertModel(settings, add_pooling_layer=False)
    return encoder.to(device, dtype).eval().requires_grad_(requires_grad=False)


def read_tensors(weights: Path, wanted: set[str]) -> dict[str, torch.Tensor]:
    """Read the encoder's tensors, as far as they are there; of safetensors nothing else is read from disk."""
    if weights.suffix == ".safetensors":
        try:
            with safe_open(weights, framework="pt") as stored:
                names = {name.removeprefix("bert."): name for name in stored.keys()}  # noqa: SIM118 - it is no mapping
                return {name: stored.get_tensor(names[name]) for name in wanted & set(names)}
        except SafetensorError as error:
            msg = f"{weights} is not a readable safetensors file ({error}). Copy or fetch it again."
            raise ValueError(msg) from error
    try:
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if not _blames_the_content(error):
            raise
        msg = (
            f"{weights} was refused: it holds more than tensors, or is broken. Pickles can run any program when "
            "they are read; do not open this one with anything else, and ask for `model.safetensors`."
        )
        raise ValueError(msg) from None
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}


def _blames_the_content(error: Exception) -> bool:
    """Tell a broken file from a lack of memory, and from one that cannot be opened (a cut zip is invalid, too)."""
    if isinstance(error, OSError):
        return error.errno == errno.EINVAL
    return not (isinstance(error, RuntimeError) and ran_out_of_memory(error))

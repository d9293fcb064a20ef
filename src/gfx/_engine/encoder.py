"""The encoder alone: no masked-LM head, no layer above the one whose states are wanted."""

from __future__ import annotations

import errno
import struct
import zlib
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from transformers import BertConfig, BertModel

from gfx._core.arguments import check_whole
from gfx._core.checkpoint import NUMBERS, check_shapes, encoder_shapes, plain_names
from gfx._core.pickles import check_nesting

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

#: Precisions of weights.
_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

#: Trained weights are far below; states of those above are infinite.
LARGEST_WEIGHT = 1_000_000

#: Pickles at the beginning of a file that torch wrote before it wrote zips: signs of the format, content, and keys.
_OLD_PICKLES = 5

#: How torch says that a file is broken or no pickle of tensors: it walks through whatever bytes are there.
_UNREADABLE = (
    *(UnpicklingError, RuntimeError, LookupError, EOFError, ValueError, OSError),
    *(AttributeError, TypeError, AssertionError, ArithmeticError, MemoryError, struct.error, BadZipFile, zlib.error),
)


def layers_needed(hidden_layer: int, n_layers: int) -> int:
    """Count the network layers to run, for states that are numbered as a list of the embedding and of each layer is."""
    hidden_layer = check_whole(hidden_layer, "hidden_layer")
    wanted = hidden_layer if hidden_layer >= 0 else n_layers + 1 + hidden_layer
    if not 0 <= wanted <= n_layers:
        msg = (
            f"`hidden_layer={hidden_layer}` is outside this model of {n_layers} layers: "
            f"0 is the embedding, 1 to {n_layers} are the layers, -1 is the last layer, -2 the one before."
        )
        raise ValueError(msg)
    return wanted


def load_weights(model: nn.Module, weights: Path, what: str) -> None:
    """Put the weights of a file into a model, all of them; those that are tied need not be there."""
    parameters = {name.removeprefix("bert."): parameter for name, parameter in model.named_parameters()}
    state = read_tensors(weights, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, what)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def bert_config(config: Mapping[str, Any], **changes: Any) -> BertConfig:
    """Make the configuration of a network that reads genes in both directions, with torch's own attention."""
    # It takes no whole number where it expects a fraction.
    numbers = {name: float(config[name]) for name in NUMBERS if config.get(name) is not None}
    settings = BertConfig(**{**config, **numbers, **changes, "is_decoder": False})
    settings._attn_implementation = "sdpa"
    return settings


def load_encoder(
    weights: Path,
    config: Mapping[str, Any],
    *,
    n_layers: int,
    device: torch.device,
    dtype: torch.dtype,
) -> BertModel:
    """Read the first `n_layers` layers of a checkpoint; pickled weights only as plain tensors."""
    expected = encoder_shapes(config, n_layers)
    state = read_tensors(weights, expected, f"a BERT encoder with {n_layers} layers")
    settings = bert_config(config, num_hidden_layers=n_layers)
    with torch.device("meta"):  # no time spent on random weights that are replaced at once
        encoder = BertModel(settings, add_pooling_layer=False)
    encoder.load_state_dict({name: state[name].to(device, dtype) for name in expected}, assign=True)
    positions = torch.arange(settings.max_position_embeddings, device=device)[None]
    encoder.embeddings.position_ids = positions
    encoder.embeddings.token_type_ids = torch.zeros_like(positions)
    return encoder.eval().requires_grad_(requires_grad=False)


def random_encoder(
    config: Mapping[str, Any], *, n_layers: int, seed: int, device: torch.device, dtype: torch.dtype
) -> BertModel:
    """Make the same network with random weights, drawn as those of a network before its training."""
    settings = bert_config(config, num_hidden_layers=n_layers)
    # The user's random numbers stay as they were: `torch.manual_seed` would seed those of all devices.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        encoder = BertModel(settings, add_pooling_layer=False)
    return encoder.to(device, dtype).eval().requires_grad_(requires_grad=False)


def read_tensors(weights: Path, expected: Mapping[str, tuple[int, ...]], what: str) -> dict[str, torch.Tensor]:
    """Read the weights of `what`, by their names without `bert.`, each one of its shape and checked.

    Of safetensors nothing else is read from disk; pickles are read as plain tensors only.
    """
    if weights.suffix == ".safetensors":
        try:
            with safe_open(weights, framework="pt") as stored:
                names = plain_names(stored.keys())
                tensors = {name: stored.get_tensor(names[name]) for name in names if name in expected}
        except (SafetensorError, ValueError) as error:
            msg = f"{weights} is not a readable safetensors file ({error}). Copy or fetch it again."
            raise ValueError(msg) from error
    else:
        pickled = read_pickle(weights, _ASK_FOR_SAFETENSORS)
        if not isinstance(pickled, dict) or not all(isinstance(name, str) for name in pickled):
            msg = f"{weights} holds a {type(pickled).__name__}, not weights by their names. {_ASK_FOR_SAFETENSORS}"
            raise ValueError(msg)
        try:
            names = plain_names(pickled)
        except ValueError as error:
            msg = f"{weights} cannot be read: {error}."
            raise ValueError(msg) from None
        tensors = {name: pickled[names[name]] for name in names if name in expected}
    for name, tensor in tensors.items():
        _check_kind(weights, name, tensor)
    # Before a look at values, of which a small file may claim as many as it likes.
    check_shapes(weights, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, what)
    for name, tensor in tensors.items():
        if tensor.numel() and not _largest(tensor) <= LARGEST_WEIGHT:
            msg = (
                f"{weights}: {name!r} has NaN or infinite values, or some beyond {LARGEST_WEIGHT:,}, which spoil all "
                "states. Fetch it again, or ask its author."
            )
            raise ValueError(msg)
    return tensors


_ASK_FOR_SAFETENSORS = "Fetch it again, or ask its author for `model.safetensors`."


def _check_kind(file: Path, name: str, tensor: object) -> None:
    """Refuse what is no ordinary tensor of numbers with a fraction: states would be constant, or no numbers."""
    if not isinstance(tensor, torch.Tensor):
        msg = f"{file}: {name!r} is a {type(tensor).__name__}, not a tensor. {_ASK_FOR_SAFETENSORS}"
    elif tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        kind = "without values" if tensor.is_meta else f"of layout {tensor.layout}, type {tensor.dtype}"
        kind = "of tensors" if tensor.is_nested else kind
        msg = f"{file}: {name!r} is a tensor {kind}; an ordinary one is needed. {_ASK_FOR_SAFETENSORS}"
    elif tensor.dtype not in _PRECISIONS:
        msg = f"{file}: {name!r} is of type {tensor.dtype}; weights are float32, float16, bfloat16 or float64."
    else:
        return
    raise ValueError(msg)


def _largest(tensor: torch.Tensor) -> float:
    """Find the largest absolute value; NaN if there is one. As a Python number: in half precision a million is inf."""
    return torch.stack(torch.aminmax(tensor.detach())).abs().max().item()


def read_pickle(file: Path, advice: str, **how: Any) -> object:
    """Read a pickle of torch as tensors and plain values, and as nothing else; `advice` ends the message."""
    try:
        _check_pickle(file)
        return torch.load(file, map_location="cpu", weights_only=True, **how)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # as which torch reports a zip that was cut
            raise
        msg = (
            f"{file} was refused: it holds more than tensors, asks for more memory than there is, or is broken. "
            f"Pickles can run any program when they are read; do not open this one with anything else. {advice}"
        )
        raise ValueError(msg) from None


def _check_pickle(file: Path) -> None:
    """Look through the pickles in a file of torch, a zip or an older one, before torch follows them."""
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\3\4":  # as torch tells them apart
            stream.seek(0)
            for _ in range(_OLD_PICKLES):
                check_nesting(stream)
            return
    with ZipFile(file) as packed:
        for entry in packed.infolist():  # of several of one name, or in capitals, torch may take any
            if entry.filename.lower().endswith("data.pkl"):
                with packed.open(entry) as stream:
                    check_nesting(stream)

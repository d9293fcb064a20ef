from __future__ import annotations

import io
import pickle
from pathlib import Path
from pickletools import genops
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gfx._engine.encoder import layers_needed, load_encoder, random_encoder

CPU = torch.device("cpu")
TOKENS = torch.tensor([[2, 9, 8, 7, 3]])


def load(toy, weights=None, n_layers=3, dtype=torch.float32, **kwargs):
    return load_encoder(
        weights or toy.model.weights, toy.model.config, n_layers=n_layers, device=CPU, dtype=dtype, **kwargs
    )


@pytest.mark.parametrize(("layer", "blocks"), [(-1, 6), (-2, 5), (-7, 0), (0, 0), (1, 1), (6, 6)])
def test_blocks_needed(layer, blocks):
    assert layers_needed(layer, 6) == blocks


@pytest.mark.parametrize("layer", [7, -8])
def test_layer_outside_the_model(layer):
    with pytest.raises(ValueError, match=rf"`hidden_layer={layer}` is outside this model of 6 layers"):
        layers_needed(layer, 6)


@pytest.mark.parametrize("n_layers", [0, 1, 2, 3])
def test_states_of_every_layer(toy, n_layers):
    encoder = load(toy, n_layers=n_layers)
    assert len(encoder.encoder.layer) == n_layers
    assert not any("pooler" in name or "cls" in name for name, _ in encoder.named_parameters())
    found = encoder(input_ids=TOKENS).last_hidden_state[0]
    np.testing.assert_allclose(found, toy.reference.states(TOKENS[0].tolist(), n_layers), atol=1e-6)


def test_encoder_is_frozen_and_without_dropout(toy):
    encoder = load(toy)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    first, second = (encoder(input_ids=TOKENS).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(toy, dtype):
    encoder = load(toy, dtype=dtype)
    assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
    found = encoder(input_ids=TOKENS).last_hidden_state[0].float()
    expected = toy.reference.states(TOKENS[0].tolist(), -1)
    np.testing.assert_allclose(found, expected, atol={torch.float32: 1e-6, torch.float16: 0.01}.get(dtype, 0.1))


def test_weights_stored_in_half_precision_run_in_single(toy, tmp_path):
    half = {name: tensor.half() for name, tensor in load_file(toy.model.weights).items()}
    save_file(half, tmp_path / "model.safetensors")
    encoder = load(toy, tmp_path / "model.safetensors")
    assert encoder.dtype == torch.float32
    found = encoder(input_ids=TOKENS).last_hidden_state[0]
    np.testing.assert_allclose(found, toy.reference.states(TOKENS[0].tolist(), -1), atol=0.02)


def test_heads_and_prefix_do_not_matter(toy, tmp_path):
    """The same weights as a bare encoder, and with a classifier's head beside them."""
    stored = load_file(toy.model.weights)
    assert any(name.startswith("cls.") for name in stored)
    bare = {name.removeprefix("bert."): tensor for name, tensor in stored.items() if name.startswith("bert.")}
    headed = stored | {"classifier.weight": torch.ones(3, 16), "bert.pooler.dense.bias": torch.ones(16)}
    expected = load(toy)(input_ids=TOKENS).last_hidden_state
    for name, tensors in {"bare": bare, "headed": headed}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert torch.equal(load(toy, tmp_path / f"{name}.safetensors")(input_ids=TOKENS).last_hidden_state, expected)


def test_old_weights_file(toy, tmp_path):
    torch.save(load_file(toy.model.weights), tmp_path / "pytorch_model.bin")
    found = load(toy, tmp_path / "pytorch_model.bin")(input_ids=TOKENS).last_hidden_state
    assert torch.equal(found, load(toy)(input_ids=TOKENS).last_hidden_state)


class Intruder:
    """Writes a file when it is unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_weights_file_that_runs_a_program_is_refused(toy, tmp_path, save):
    weights, traces = tmp_path / "pytorch_model.bin", tmp_path / "traces"
    save(load_file(toy.model.weights) | {"extra": Intruder(traces)}, weights)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was refused: it holds more than tensors"):
        load(toy, weights)
    assert not traces.exists()
    pickle.loads(pickle.dumps(Intruder(traces)))  # noqa: TID251 - the intruder works where nobody watches
    assert traces.exists()


def stored(path, **kwargs):
    torch.save({"weight": torch.ones(1000)}, path, **kwargs)
    return path.read_bytes()


@pytest.mark.parametrize(
    "broken",
    [
        lambda path: b"",
        lambda path: b"hello",
        lambda path: stored(path)[:1000],
        lambda path: stored(path)[:-30],
        lambda path: stored(path, _use_new_zipfile_serialization=False)[:200],
        lambda path: stored(path, _use_new_zipfile_serialization=False)[:-30],
    ],
    ids=["empty", "text", "zip, its start", "zip without its end", "old, its start", "old without its end"],
)
def test_a_broken_old_weights_file(toy, tmp_path, broken):
    weights = tmp_path / "pytorch_model.bin"
    weights.write_bytes(broken(weights))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was refused: .* or is broken"):
        load(toy, weights)


#: A tuple of tuples as key: 200,000 deep, which crashes a reader, or doubled 60 times, which it never finishes.
NESTED = {"deep": b"\x85" * 200_000, "doubling": b"q\x00h\x00\x86" * 60}


@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_a_weights_file_with_nested_keys_is_refused_in_no_time(toy, tmp_path, nested, is_zip):
    weights = tmp_path / "pytorch_model.bin"
    hostile = b"\x80\x02})" + nested + b"K\x01s."
    whole = stored(weights, _use_new_zipfile_serialization=is_zip)
    if is_zip:
        with ZipFile(weights) as packed:
            parts = {name: packed.read(name) for name in packed.namelist()}
        with ZipFile(weights, "w") as packed:
            for name, part in parts.items():
                packed.writestr(name, hostile if name.endswith("data.pkl") else part)
    else:
        signs = io.BytesIO(whole)
        for _ in range(3):
            list(genops(signs))
        weights.write_bytes(whole[: signs.tell()] + hostile + whole[signs.tell() :])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was refused: .* or is broken"):
        load(toy, weights)


def test_a_missing_file_and_too_little_memory_are_named(toy, tmp_path, monkeypatch):
    """Torch says the same where a file claims more than there is as where other programs took it."""
    with pytest.raises(FileNotFoundError, match="absent"):
        load(toy, tmp_path / "absent.bin")

    def full(*_args, **_kwargs):
        msg = "DefaultCPUAllocator: can't allocate memory"
        raise RuntimeError(msg)

    torch.save({}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(ValueError, match="asks for more memory than there is"):
        load(toy, tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("content", [lambda whole: b"hello", lambda whole: whole[:100], lambda whole: whole[:-9]])
def test_a_broken_safetensors_file(toy, tmp_path, content):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(content(toy.model.weights.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load(toy, weights)


def test_missing_tensor(toy, tmp_path):
    stored = load_file(toy.model.weights)
    del stored["bert.encoder.layer.1.output.dense.bias"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors of a BERT encoder with 3 layers, such as 'encoder\.layer\.1"
    ):
        load(toy, tmp_path / "model.safetensors")
    load(toy, tmp_path / "model.safetensors", n_layers=1)  # what is not run is not needed


def test_wrong_shape(toy, tmp_path):
    stored = load_file(toy.model.weights)
    stored["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(17)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has shape \(17,\), \(16,\) in a BERT encoder with 3 layers as `config"):
        load(toy, tmp_path / "model.safetensors")


def test_global_state_is_left_alone(toy):
    before = torch.random.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    load(toy)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before[1:]


# --- random weights ------------------------------------------------------------------------------------------------


def draw(toy, seed=0, *, n_layers=3, device=CPU, dtype=torch.float32):
    return random_encoder(toy.model.config, n_layers=n_layers, seed=seed, device=device, dtype=dtype)


@pytest.mark.parametrize("n_layers", [0, 2, 3])
def test_random_weights_have_the_shape_of_the_model(toy, n_layers):
    ours, theirs = draw(toy, n_layers=n_layers), load(toy, n_layers=n_layers)
    assert type(ours) is type(theirs)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert ours(input_ids=TOKENS).last_hidden_state.shape == (1, 5, 16)


def test_random_weights_are_random_and_as_wide_as_the_model_says(toy):
    ours, theirs = draw(toy, 5), load(toy)
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.2.attention.self.query.weight"):
        weights = ours.state_dict()[name]
        assert weights.std().item() == pytest.approx(toy.model.config["initializer_range"], rel=0.15)
        assert not torch.isclose(weights, theirs.state_dict()[name]).all()


def test_a_seed_makes_the_weights(toy):
    one, same, other = (draw(toy, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embeddings.word_embeddings.weight"], other["embeddings.word_embeddings.weight"])
    half = draw(toy, 1, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(one[name].to(half[name].dtype), half[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_random_weights_lie_where_they_are_asked_for(toy, device, dtype):
    encoder = draw(toy, device=torch.device(device), dtype=dtype)
    assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
    assert {tensor.device.type for tensor in [*encoder.parameters(), *encoder.buffers()]} == {device}


def test_random_weights_do_not_depend_on_where_tensors_go_by_default(toy):
    """On the default device of a user other random numbers are drawn, or none at all."""
    with torch.device("meta"):
        encoder = draw(toy, 1)
    expected = draw(toy, 1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())


def test_random_weights_leave_the_users_random_numbers_alone(toy, monkeypatch):
    seeded = []
    for device in (torch.cuda, torch.mps, torch.xpu):  # what is not there is seeded in advance
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(device, name, lambda *_args, **_kwargs: seeded.append(1), raising=False)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), torch.get_default_dtype()
    draw(toy)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert torch.get_default_dtype() == before[2]
    assert not seeded
    torch.manual_seed(0)
    assert seeded  # it would have been noticed

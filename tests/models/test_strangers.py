"""Folders of models from strangers: what is read of them, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gfx

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import ToyCells

WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture
def folder(toy_folder: Path, tmp_path: Path) -> Path:
    """Copy of the toy model that a test may damage."""
    return Path(shutil.copytree(toy_folder, tmp_path / "stranger"))


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weight(folder: Path, name: str, tensor: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file, {"format": "pt"})


def embedding(folder: Path, toy_cells: ToyCells) -> tuple[np.ndarray, dict[str, Any]]:
    adata = toy_cells(6)
    gfx.tl.embed(adata, model=folder)
    return adata.obsm["X_gfx"], adata.uns["X_gfx"]["params"]


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_no_fractions_are_refused_by_name(
    folder: Path, toy_cells: ToyCells, kind: torch.dtype, file: str
) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[WORDS] = weights[WORDS].mul(100).to(kind)
    (folder / "model.safetensors").unlink()
    (save_file if file == "model.safetensors" else torch.save)(weights, folder / file)
    adata = toy_cells(6)
    with pytest.raises(ValueError, match=rf"{file}: 'embeddings\.word_embeddings\.weight' is of type {kind}; weights"):
        gfx.tl.embed(adata, model=folder)
    assert not adata.obsm


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_weight_without_a_value_in_the_row_of_a_gene_that_no_cell_has_is_refused_by_name(
    folder: Path, toy_cells: ToyCells, value: float, precision: torch.dtype, file: str
) -> None:
    weights = {name: tensor.to(precision) for name, tensor in load_file(folder / "model.safetensors").items()}
    weights[WORDS][-1, 3] = torch.tensor(value).to(precision)  # infinite in half precision
    (folder / "model.safetensors").unlink()
    (save_file if file == "model.safetensors" else torch.save)(weights, folder / file)
    adata = toy_cells(6)
    adata = adata[:, adata.var["ensembl_id"] != "ENSG00000000200"].copy()
    with pytest.raises(ValueError, match=rf"{file}: 'embeddings\.word_embeddings\.weight' has NaN or infinite"):
        gfx.tl.embed(adata, model=folder)


def test_states_that_the_precision_cannot_hold_are_not_cells_without_genes(folder: Path, toy_cells: ToyCells) -> None:
    words = load_file(folder / "model.safetensors")[WORDS]
    change_weight(folder, WORDS, words / words.abs().max() * 900_000)  # float16 ends at 65,504
    adata = toy_cells(6)
    with (
        gfx.settings.override(dtype="float16"),
        pytest.raises(ValueError, match=r"6 of 6 cells are beyond what float16 can hold.*dtype = \"float32\""),
    ):
        gfx.tl.embed(adata, model=folder)
    assert not adata.obsm
    with gfx.settings.override(dtype="float32"):
        gfx.tl.embed(adata, model=folder)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def with_words(change: Callable[[torch.Tensor], object]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights | {WORDS: change(weights[WORDS])}


#: What a pickle of weights holds instead, and what is said of it.
PICKLES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "list": (lambda weights: [*weights.values()], "holds a list, not weights by their names"),
    "tensor": (lambda weights: weights[WORDS].repeat(9, 9), "holds a Tensor, not weights by their names"),
    "text": (lambda _: "weights" * 10_000, "holds a str, not weights by their names"),
    "numbered": (lambda weights: dict(enumerate(weights.values())), "holds a dict, not weights by their names"),
    "nested": (lambda weights: {"state_dict": weights}, "lacks 37 tensors of a BERT encoder"),
    "sparse": (with_words(torch.Tensor.to_sparse), "is a tensor of layout torch.sparse_coo"),
    "meta": (with_words(lambda words: words.to("meta")), "is a tensor without values"),
    "tensor of tensors": (
        with_words(lambda words: torch.nested.nested_tensor([words[0], words[0, :3]])),
        "(is a tensor of tensors|was refused)",  # the older format cannot hold them
    ),
    "one value again and again": (
        with_words(lambda words: words[:1, :1].expand(10**7, 10**7)),
        r"has shape \(10000000, 10000000\), \(204, 16\) in a BERT encoder",
    ),
    "numbers": (with_words(torch.Tensor.tolist), "is a list, not a tensor"),
    "complex": (with_words(lambda words: words.to(torch.complex64)), "is of type torch.complex64"),
    "another shape": (with_words(lambda words: words[:-1]), r"has shape \(203, 16\), \(204, 16\) in a BERT encoder"),
    "two names": (lambda weights: weights | {WORDS.removeprefix("bert."): weights[WORDS]}, "has two weights"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_a_pickle_that_holds_no_weights_is_one_error_that_names_it(
    folder: Path, toy_cells: ToyCells, kind: str, old: bool
) -> None:
    make, text = PICKLES[kind]
    file = folder / "pytorch_model.bin"
    torch.save(make(whole(folder)), file, _use_new_zipfile_serialization=not old)
    (folder / "model.safetensors").unlink()
    if old:
        os.truncate(file, max(file.stat().st_size, 50_000))  # room enough for the weights
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin.* {text}"):
        gfx.tl.embed(toy_cells(6), model=folder)


class Memory:
    """Asks for memory where a pickle is read."""

    def __reduce__(self) -> tuple[object, tuple[int, int]]:
        return torch.Tensor, (10**8, 10**8)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_a_pickle_that_asks_for_more_memory_than_there_is_is_refused(
    folder: Path, toy_cells: ToyCells, old: bool
) -> None:
    file = folder / "pytorch_model.bin"
    torch.save(whole(folder) | {"more": Memory()}, file, _use_new_zipfile_serialization=not old)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was refused: .*more memory than there is"):
        gfx.tl.embed(toy_cells(6), model=folder)


@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL"])
def test_no_pickle_hides_in_a_zip(folder: Path, toy_cells: ToyCells, name: str) -> None:
    """One with a key that is read for ever; torch takes the first of that name, in capitals or not."""
    doubling = b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."
    torch.save(whole(folder), folder / "whole")
    (folder / "model.safetensors").unlink()
    with ZipFile(folder / "whole") as packed, ZipFile(folder / "pytorch_model.bin", "w") as hostile:
        for entry in packed.namelist():
            if entry.endswith("data.pkl"):
                hostile.writestr(entry.replace("data.pkl", name), doubling)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # two of one name
                hostile.writestr(entry, packed.read(entry))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was refused: it holds more than tensors"):
        gfx.tl.embed(toy_cells(6), model=folder)


# --- the configuration ----------------------------------------------------------------------------------------------


def test_what_decides_nothing_is_not_read(folder: Path, toy_cells: ToyCells) -> None:
    """Nothing that would make transformers load code, kernels or quantized weights, or attend to the left only."""
    expected, params = embedding(folder, toy_cells)
    strange = {
        "is_decoder": True,
        "add_cross_attention": True,
        "attn_implementation": "stranger/kernel",
        "_attn_implementation": "stranger/kernel",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "auto_map": {"AutoModel": "stranger/repository--model.Model"},
        "kernels": {"attention": "stranger/kernel"},
        "trust_remote_code": True,
        "_name_or_path": "stranger/repository",
        "chunk_size_feed_forward": -1,
        "torchscript": True,
    }
    configure(folder, **strange)
    found, params_of_strange = embedding(folder, toy_cells)
    np.testing.assert_array_equal(found, expected)
    assert params_of_strange == params
    assert not {*strange} & {*gfx.models.load(folder).config}


@pytest.mark.parametrize("field", [{"hidden_act": "gelu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 0.1}])
def test_fields_that_change_embeddings_change_what_is_recorded(
    folder: Path, toy_cells: ToyCells, field: dict[str, object]
) -> None:
    vectors, params = embedding(folder, toy_cells)
    configure(folder, **field)
    others, other_params = embedding(folder, toy_cells)
    assert np.abs(vectors - others).max() > 1e-3
    assert params["weights_sha256"] == other_params["weights_sha256"]
    assert params["config_sha256"] != other_params["config_sha256"]


def test_a_store_of_another_configuration_is_refused(folder: Path, toy_cells: ToyCells, tmp_path: Path) -> None:
    gfx.tl.embed(toy_cells(6), model=folder, store=tmp_path / "store")
    configure(folder, hidden_act="gelu")
    with pytest.raises(ValueError, match="holds a run with another config_sha256, which"):
        gfx.tl.embed(toy_cells(6), model=folder, store=tmp_path / "store")


BAD_FIELDS = {
    "num_hidden_layers": [10**12, 0, -1, 2.5, "3", True, [3]],
    "hidden_size": [0, 10**12, 2.0, 7],
    "num_attention_heads": [0, 3, 0.5],
    "intermediate_size": [0, 10**12, "wide"],
    "vocab_size": [0, 2**40],
    "max_position_embeddings": [0, 2**40],
    "type_vocab_size": [0, 10**12],
    "pad_token_id": [-1, 0.5],
    "layer_norm_eps": [0, "small", True],
    "hidden_dropout_prob": [-1, 2, "half"],
    "initializer_range": [-1, float("inf"), float("nan")],
    "hidden_act": ["relu6000", 3, ["relu"], {"os": "system"}],
    "tie_word_embeddings": ["yes", 1],
    "position_embedding_type": ["relative_key"],
    "architectures": ["BertModel", [3]],
    "id2label": [[], "a", {"0": "a", "2": "b"}, {}, {"0": ["a"]}, {"0": "a", "1": "a"}],
    "classifier_head": [
        *([], {}, {"of": "cells"}, {"of": "genes", "pooling": "cls", "tasks": [["t", ["a"]]]}),
        *(
            {"of": "cells", "pooling": "cls", "tasks": tasks}
            for tasks in (
                [],
                [["t", []]],
                [["t"]],
                {"t": "ab"},
                [["t", [1]]],
                3,
                [["t", ["a", "a"]]],
                [["t", ["a"]]] * 2,
            )
        ),
        {"of": "genes", "pooling": "gene", "tasks": [["t", ["a"]], ["u", ["b"]]]},
    ],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_FIELDS.items() for value in values], ids=str
)
def test_a_field_that_makes_no_network_is_refused_by_name(folder: Path, name: str, value: object) -> None:
    configure(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"config\.json describes no Geneformer: .*`{name}`") as caught:
        gfx.models.load(folder)
    assert len(str(caught.value)) < 600


def test_whole_numbers_are_read_where_fractions_are_meant(folder: Path, toy_cells: ToyCells) -> None:
    configure(folder, layer_norm_eps=1, initializer_range=1, hidden_dropout_prob=0)
    assert np.isfinite(embedding(folder, toy_cells)[0]).all()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not readable"),
        (b"\xff\xfe", "is not readable"),
        (b"[" * 100_000, "is not readable"),
        (b'["bert"]', "holds a list, not a dict"),
        (b"null", "holds a NoneType, not a dict"),
        (b" " * (1 << 25), "bytes, far more than such a file needs"),
    ],
    ids=["empty", "no text", "nested", "list", "null", "large"],
)
def test_a_configuration_that_is_none_is_one_error(folder: Path, content: bytes, text: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json {text}|config\.json has .*{text}"):
        gfx.models.load(folder)


@pytest.mark.parametrize("name", ["encoder.layer.2.output.dense.weight", "embeddings.LayerNorm.bias"])
def test_a_weight_that_is_missing_or_of_another_shape_is_named_when_the_model_is_loaded(
    folder: Path, name: str
) -> None:
    change_weight(folder, f"bert.{name}", torch.zeros(5, 5))
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(5, 5\), \("):
        gfx.models.load(folder)
    file = folder / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if not key.endswith(name)}, file)
    with pytest.raises(ValueError, match=rf"lacks 1 tensors of a BERT encoder, such as '{name}'"):
        gfx.models.load(folder)


def test_one_weight_under_two_names_is_refused(folder: Path) -> None:
    change_weight(folder, WORDS.removeprefix("bert."), torch.zeros(204, 16))
    with pytest.raises(ValueError, match=r"two weights 'embeddings\.word_embeddings\.weight': 'bert\..* and 'embed"):
        gfx.models.load(folder)


def test_weights_under_their_old_names_are_the_same_model(folder: Path, toy_cells: ToyCells) -> None:
    before, _ = embedding(folder, toy_cells)
    file = folder / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = load_file(file)
    for now, then in old.items():
        weights = {name.replace(now, then): tensor for name, tensor in weights.items()}
    assert not set(old) & {".".join(name.split(".")[-2:]) for name in weights}
    save_file(weights, file)
    np.testing.assert_array_equal(embedding(folder, toy_cells)[0], before)


def test_a_pickle_without_room_for_the_weights_is_refused_before_it_is_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    configure(folder, num_hidden_layers=1000, hidden_size=1 << 14, intermediate_size=1 << 16)
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin has [\d,]+ bytes, `config\.json` promises [\d,]+ weights"
    ):
        gfx.models.load(folder)


def test_training_that_goes_on_from_a_folder_takes_our_attention(
    folder: Path, toy_cells: ToyCells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that the folder says besides is passed over: nothing is asked of a hub, no kernel is looked for."""
    from transformers import PreTrainedModel

    strange = {"attn_implementation": "stranger/kernel", "_attn_implementation": "stranger/kernel", "is_decoder": True}
    configure(folder, **strange, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "stranger/repository"}')
    seen = set()
    original = PreTrainedModel.__init__

    def watched(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        seen.add((config._attn_implementation, config.is_decoder, hasattr(config, "quantization_config")))

    monkeypatch.setattr(PreTrainedModel, "__init__", watched)
    with gfx.settings.override(verbosity=0):
        trained = gfx.models.pretrain(
            [toy_cells(40)],
            tmp_path / "run",
            gene_ids="ensembl_id",
            start_from=folder,
            curriculum=[(64, 1)],
            training={"max_steps": 1, "use_cpu": True},
        )
    assert seen == {("sdpa", False, False)}
    written = json.loads((trained / "config.json").read_text())
    assert not {"attn_implementation", "quantization_config"} & set(written)

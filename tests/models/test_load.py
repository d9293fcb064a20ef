from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gfx
from gfx._core.manifest import file_sha256
from gfx._core.vocabulary import Vocabulary
from gfx.models._load import _announce_embedded
from gfx.models._registry import Store, published
from gfx.models._vocabulary_file import write_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable

    from gfx.models import Model


@pytest.fixture
def own_folder(toy_folder: Path, tmp_path: Path) -> Path:
    """Copy of the toy model that a test may change."""
    return Path(shutil.copytree(toy_folder, tmp_path / "own"))


def load_from(store: Store, name: str | Path | None, vocabulary: str | Vocabulary | None) -> Model:
    """Load with the cache and the registry of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gfx.models._load.default_store", lambda: store)
        return gfx.models.load(name, vocabulary=vocabulary)


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def vocabulary_of(ids: list[str]) -> Vocabulary:
    medians = [np.nan if name.startswith("<") else 1.0 for name in ids]
    return Vocabulary("made", np.array(ids, dtype=object), np.array(medians), np.array([""] * len(ids), dtype=object))


def test_a_folder_gives_its_model(toy_folder: Path, toy_vocabulary: Vocabulary) -> None:
    for name in (toy_folder, str(toy_folder)):
        model = gfx.models.load(name)
        assert model.name == toy_folder.name
        assert model.weights == toy_folder / "model.safetensors"
        assert (model.max_length, model.n_layers, model.hidden_size, model.n_heads) == (64, 3, 16, 2)
        assert model.vocabulary.sha256 == toy_vocabulary.sha256
        assert model.provenance() == {
            "model": toy_folder.name,
            "weights_sha256": file_sha256(toy_folder / "model.safetensors"),
            "config_sha256": model.config_sha256,
            "vocabulary": "toy",
            "vocabulary_sha256": toy_vocabulary.sha256,
        }
        assert "3 layers of width 16" in repr(model)
        assert "64 tokens" in repr(model)


def test_a_loaded_model_is_returned_as_it_is(toy_model: Model) -> None:
    assert gfx.models.load(toy_model) is toy_model
    with pytest.raises(ValueError, match="has its vocabulary"):
        gfx.models.load(toy_model, vocabulary="V1")


def test_a_loaded_model_travels_to_other_processes(toy_model: Model) -> None:
    assert pickle.loads(pickle.dumps(toy_model)).provenance() == toy_model.provenance()  # noqa: TID251


@pytest.mark.parametrize(("name", "max_length"), [("V1-small", 2048), ("V2-small", 4096)])
def test_a_published_model_is_fetched_with_its_dictionaries(published_store: Store, name: str, max_length: int) -> None:
    model = load_from(published_store, name.upper(), None)
    family = name[:2]
    assert model.name == name
    assert model.folder == published_store.folder / name
    assert model.vocabulary.name == family
    assert model.vocabulary.has_cls == (family == "V2")
    assert model.vocabulary.resolve(["GATA4"])[0] == model.vocabulary.token_of["ENSG00000136574"]
    assert published_store.registry.models[name].input_size == max_length
    offline = load_from(replace(published_store, offline=True), name, None)
    assert offline.provenance() == model.provenance()


@pytest.mark.parametrize(("family", "other"), [("V1", "V2"), ("V2", "V1")])
def test_another_familys_dictionary_is_refused(
    published_store: Store, make_checkpoint: Callable[..., Path], family: str, other: str
) -> None:
    n_tokens = published_store.registry.vocabularies[family].n_tokens
    folder = make_checkpoint("mine", n_tokens)
    assert load_from(published_store, folder, family.lower()).vocabulary.name == family
    with pytest.raises(ValueError, match=rf"table has {n_tokens:,} tokens, as {family} has; .*as {other} has"):
        load_from(published_store, folder, other)
    with pytest.raises(ValueError, match=rf"'{family}-small'.*as {other} has"):
        load_from(published_store, f"{family}-small", other)


def test_published_dictionaries_beside_a_folder(
    published_store: Store, make_checkpoint: Callable[..., Path], shared: Path
) -> None:
    folder = make_checkpoint("cloned", 20_275)
    for path in (shared / "data" / "official").glob("*_gc95M.pkl"):
        shutil.copy(path, folder)
    model = load_from(replace(published_store, offline=True), folder, None)
    assert (model.name, model.vocabulary.name) == ("cloned", "V2")
    shutil.copy(shared / "data" / "official" / "token_dictionary_gc30M.pkl", folder)
    with pytest.raises(ValueError, match=r"several token_dictionary.*gc30M.*gc95M"):
        load_from(published_store, folder, None)


def test_a_folder_of_dictionaries_as_vocabulary(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    dictionaries = tmp_path / "dictionaries"
    dictionaries.mkdir()
    (dictionaries / "token_dictionary.pkl").write_bytes(pickle.dumps({"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2}))
    (dictionaries / "gene_median_dictionary.pkl").write_bytes(pickle.dumps({"ENSG00000000003": 2.5, "else": 1.0}))
    folder = make_checkpoint("mine", 3)
    vocabulary = gfx.models.load(folder, vocabulary=str(dictionaries)).vocabulary
    assert (vocabulary.name, vocabulary.n_genes, vocabulary.medians[2]) == ("dictionaries", 1, 2.5)


def test_a_folder_without_vocabulary_says_what_to_give_and_does_not_guess(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"holds no vocabulary.*vocabulary=\"V1\".*25,426 tokens, as V1 has"):
        gfx.models.load(make_checkpoint("mine", 25_426))


def test_what_is_no_vocabulary_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint("mine", 3)
    for nothing in ("V3", tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"`vocabulary` is 'V1' or 'V2'.*found"):
            gfx.models.load(folder, vocabulary=nothing)


def test_a_larger_vocabulary_than_the_table_is_refused(toy_folder: Path, toy_vocabulary: Vocabulary) -> None:
    larger = vocabulary_of([*toy_vocabulary.ids, "ENSG00000777777"])
    smaller = vocabulary_of(list(toy_vocabulary.ids[:-1]))
    for vocabulary in (larger, smaller):
        with pytest.raises(ValueError, match=rf"table has 204 tokens; the vocabulary has {len(vocabulary)} tokens"):
            gfx.models.load(toy_folder, vocabulary=vocabulary)


def test_another_vocabulary_of_the_same_size_is_refused(
    toy_folder: Path, own_folder: Path, toy_vocabulary: Vocabulary
) -> None:
    ids = list(toy_vocabulary.ids)
    swapped = replace(toy_vocabulary, name="swapped", ids=np.array([*ids[:-2], ids[-1], ids[-2]], dtype=object))
    rescaled = replace(toy_vocabulary, name="rescaled", medians=toy_vocabulary.medians * 2)
    for vocabulary in (swapped, rescaled):
        with pytest.raises(ValueError, match=rf"{vocabulary.name!r} is not the one beside the model .*, 'toy': genes"):
            gfx.models.load(toy_folder, vocabulary=vocabulary)
    renamed = replace(toy_vocabulary, name="renamed")
    assert gfx.models.load(toy_folder, vocabulary=renamed).vocabulary is renamed
    (own_folder / "vocabulary.tsv.gz").unlink()  # nothing to compare with
    assert gfx.models.load(own_folder, vocabulary=swapped).vocabulary is swapped


def test_a_named_model_takes_its_own_vocabulary_only(published_store: Store) -> None:
    own = load_from(published_store, "V2-small", None).vocabulary
    assert load_from(published_store, "V2-small", "V2").vocabulary.sha256 == own.sha256
    ids = list(own.ids)
    other = replace(own, name="other", ids=np.array([*ids[:-2], ids[-1], ids[-2]], dtype=object))
    with pytest.raises(ValueError, match="'other' is not the one beside the model 'V2-small', 'V2'"):
        load_from(published_store, "V2-small", other)


def test_missing_special_tokens_are_refused(published_store: Store) -> None:
    genes = [f"ENSG{n:011d}" for n in range(20_273)]
    without_cls = vocabulary_of(["<pad>", "<mask>", *genes])
    with pytest.raises(ValueError, match=r"'V2-small' needs <cls>, <eos>, which the vocabulary 'made' lacks"):
        load_from(published_store, "V2-small", without_cls)


def test_another_padding_token_is_refused(toy_folder: Path, toy_vocabulary: Vocabulary) -> None:
    moved = vocabulary_of(["<mask>", "<pad>", *toy_vocabulary.ids[2:]])
    with pytest.raises(ValueError, match=r"pads with token 1.*with 0"):
        gfx.models.load(toy_folder, vocabulary=moved)


@pytest.mark.parametrize("style", ["v1style", "v2style"])
def test_models_of_the_official_software_load(golden: Path, style: str) -> None:
    specials = ["<pad>", "<mask>", "<cls>", "<eos>"][: 4 if style == "v2style" else 2]
    vocabulary = vocabulary_of(specials + [f"ENSG{n:011d}" for n in range(64 - len(specials))])
    model = gfx.models.load(golden / style, vocabulary=vocabulary)
    assert (model.name, model.n_layers, model.max_length) == (style, 3, 32)


def test_pickled_weights_are_accepted_and_left_to_torch(own_folder: Path) -> None:
    (own_folder / "model.safetensors").rename(own_folder / "pytorch_model.bin")
    assert gfx.models.load(own_folder).weights.name == "pytorch_model.bin"
    configure(own_folder, vocab_size=300)
    with pytest.raises(ValueError, match="table has 300 tokens"):
        gfx.models.load(own_folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"vocab_size": 300}, r"word_embeddings.weight' has shape \(204, 16\), \(300, 16\) in a BERT encoder"),
        ({"hidden_size": 32}, r"word_embeddings.weight' has shape \(204, 16\), \(204, 32\) in a BERT encoder"),
        (
            {"max_position_embeddings": 128},
            r"position_embeddings.weight' has shape \(64, 16\), \(128, 16\) in a BERT encoder",
        ),
        ({"num_hidden_layers": 4}, r"holds layers \[0, 1, 2\].*asks for 4"),
        ({"model_type": "gpt2"}, "describes a 'gpt2' model"),
        ({"num_attention_heads": None}, "does not say num_attention_heads"),
    ],
)
def test_a_configuration_of_another_model_is_refused(own_folder: Path, changes: dict[str, object], text: str) -> None:
    configure(own_folder, **changes)
    with pytest.raises(ValueError, match=text):
        gfx.models.load(own_folder)


def test_weights_without_a_word_table_are_refused(own_folder: Path) -> None:
    weights = load_file(own_folder / "model.safetensors")
    del weights["bert.embeddings.word_embeddings.weight"]
    save_file(weights, own_folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors of a BERT encoder, such as 'embeddings.word_embeddings.weight'"
    ):
        gfx.models.load(own_folder)


def test_an_encoder_saved_without_its_head_loads(own_folder: Path) -> None:
    weights = load_file(own_folder / "model.safetensors")
    encoder = {key.removeprefix("bert."): value for key, value in weights.items() if key.startswith("bert.")}
    save_file(encoder, own_folder / "model.safetensors")
    assert gfx.models.load(own_folder).n_layers == 3


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:67c4\n", "git lfs pull"),
        ("model.safetensors", b"\xff" * 100, "not a readable safetensors file"),
        ("config.json", b"{", r"config\.json is not readable"),
    ],
)
def test_damaged_files_are_named(own_folder: Path, file: str, content: bytes, text: str) -> None:
    (own_folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=text):
        gfx.models.load(own_folder)


def test_missing_parts_are_named_with_what_is_there(own_folder: Path) -> None:
    (own_folder / "model.safetensors").rename(own_folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"neither `model\.safetensors` nor.*'weights\.safetensors'"):
        gfx.models.load(own_folder)
    (own_folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no `config\.json`"):
        gfx.models.load(own_folder)


def test_unknown_models_are_answered_with_close_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"Did you mean.*'V2-104M'.*no folder of that name"):
        gfx.models.load("V2-104")
    with pytest.raises(ValueError, match=r"'V2' is a vocabulary.*V2-104M"):
        gfx.models.load("V2")
    for path in (tmp_path / "absent", str(tmp_path / "absent"), "./absent"):
        with pytest.raises(ValueError, match="is not a folder"):
            gfx.models.load(path)


def test_settings_name_the_default_model(own_folder: Path, toy_folder: Path) -> None:
    with gfx.settings.override(model=str(own_folder)):
        assert gfx.models.load().name == "own"
        assert gfx.models.load(toy_folder).name == toy_folder.name


def test_the_embedded_model_is_the_default_and_is_announced_once(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gfx.models._registry.EMBEDDED_FOLDER", toy_folder)
    card = replace(published().models["V1-10M"], name="mini", files=(), embedded=True)
    store = Store(registry=replace(published(), models={"mini": card}), folder=tmp_path / "cache")
    _announce_embedded.cache_clear()
    with gfx.settings.override(model=None, verbosity=0):
        load_from(store, None, None)
    assert capsys.readouterr().out == ""  # not seen, and so still to be said
    with gfx.settings.override(model=None):
        model = load_from(store, None, None)
        said = capsys.readouterr().out
        load_from(store, toy_folder, None)
        load_from(store, None, None)
    assert (model.name, model.folder) == ("mini", toy_folder)
    assert "using the embedded 'mini'" in said
    assert "V2-104M" in said
    assert capsys.readouterr().out == ""


def test_loading_needs_no_torch(own_folder: Path, toy_vocabulary: Vocabulary) -> None:
    write_vocabulary(toy_vocabulary, own_folder)
    program = (
        "import sys, gfx\n"
        f"gfx.models.load({str(own_folder)!r}).provenance(), gfx.models.available()\n"
        "print(sorted({'torch', 'transformers', 'scanpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr

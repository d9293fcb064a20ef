from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pandas as pd
import pytest

import gfx
from gfx.models import _registry
from gfx.models._registry import Store, published

if TYPE_CHECKING:
    from pathlib import Path

PUBLISHED = [
    "V1-10M",
    "V2-104M",
    "V2-104M_CLcancer",
    "V2-316M",
    "gf-12L-30M",
    "gf-12L-95M",
    "gf-12L-95M_CLcancer",
    "gf-20L-95M",
    "V1-10M_cardiomyopathies",
]


def test_every_file_is_pinned() -> None:
    registry = published()
    assert set(PUBLISHED) <= set(registry.models)
    cards = [card for card in (*registry.models.values(), *registry.vocabularies.values()) if card.files]
    for file in {file for card in cards for file in card.files}:
        assert re.fullmatch("[0-9a-f]{40}", file.revision)
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.size > 0


def test_addresses_lead_to_a_revision_of_the_repository(tmp_path: Path) -> None:
    store = Store(published(), tmp_path)
    for file in store.files_of(store.registry.models["V1-10M"]):
        assert re.match(r"https://huggingface\.co/ctheodoris/Geneformer/resolve/[0-9a-f]{40}/\w", file.url)
        assert file.url.endswith(f"/{file.name}")


def test_pins_agree_with_the_published_history(shared: Path) -> None:
    history = pd.read_csv(shared / "facts" / "lfs_history.tsv", sep="\t").set_index("path")
    registry = published()
    files = {file for card in (*registry.models.values(), *registry.vocabularies.values()) for file in card.files}
    large = [file for file in files if file.name != "config.json"]
    assert len(large) == 17
    for file in large:
        known = history.loc[[file.path]]
        known = known[known["last_commit"] == file.revision]
        assert known[["size", "lfs_sha256"]].to_numpy().tolist() == [[file.size, file.sha256]]


def test_small_files_agree_with_the_facts(shared: Path) -> None:
    facts = (shared / "facts" / "checkpoints.md").read_text()
    for card in published().models.values():
        for file in card.files:
            assert re.search(rf"\| {file.size} \| {file.sha256} \|", facts), file


def test_parameters_follow_from_the_size_of_the_weights() -> None:
    """float32 weights: 4 bytes each, and a header."""
    for name in PUBLISHED:
        card = gfx.models.info(name)
        weights = next(file for file in card.files if file.name in ("model.safetensors", "pytorch_model.bin"))
        assert 0 < weights.size - 4 * card.parameters < 110_000


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("V2-104M", "V2-104M"),
        ("v2-104m_clcancer", "V2-104M_CLcancer"),
        ("Geneformer-V1-10M", "V1-10M"),
        ("gf-6L-30M-i2048", "V1-10M"),
        ("GF-12L-95M-I4096", "gf-12L-95M"),
        ("v1", "V1"),
    ],
)
def test_names_are_found_in_any_case_and_by_older_names(asked: str, name: str) -> None:
    assert gfx.models.info(asked).name == name


def test_no_two_models_share_a_name() -> None:
    registry = published()
    names = [name for card in registry.models.values() for name in (card.name, *card.also_known_as)]
    names += list(registry.vocabularies)
    assert len({name.casefold() for name in names}) == len(names)


def test_unknown_names_are_answered_with_what_comes_close() -> None:
    with pytest.raises(ValueError, match=r"'V2-140M'.*Did you mean.*'V2-104M'.*Models: .*V2-316M"):
        gfx.models.info("V2-140M")


def test_cards_show_the_figures_of_a_model() -> None:
    text = repr(gfx.models.info("V2-316M"))
    for part in ("V2-316M", "316,354,867", "4,096", "<cls>", "Apache-2.0", "1,273.0 MB"):
        assert part in text
    assert "20,275" in repr(gfx.models.info("V2"))


def test_available_lists_every_published_model() -> None:
    table = gfx.models.available()
    assert set(PUBLISHED) <= set(table.index)
    assert table.loc["V1-10M", "specials"] == "<pad> <mask>"
    assert table.loc["gf-20L-95M", "input_size"] == 4096
    assert table["cached"].dtype == bool


def test_the_embedded_model_is_listed_with_its_own_figures(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "EMBEDDED_FOLDER", toy_folder)
    card = published.__wrapped__().get(toy_folder.name)
    width, blocks, inner, length, tokens = 16, 3, 32, 64, 204
    block = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    embeddings = (tokens + length + 2) * width + 2 * width
    head = width**2 + width + 2 * width + tokens
    assert card.parameters == embeddings + blocks * block + head
    assert (card.n_layers, card.hidden_size, card.input_size) == (blocks, width, length)
    assert card.embedded
    assert card.size == sum(path.stat().st_size for path in toy_folder.iterdir())
    assert "available" in dir(gfx.models)


def test_the_embedded_model_is_always_there() -> None:
    if not (_registry.EMBEDDED_FOLDER / "config.json").is_file():
        pytest.skip("no embedded model in this checkout")
    table = gfx.models.available()
    assert table.loc["mini", "cached"]
    assert table.loc["mini", "megabytes"] <= 8
    model = gfx.models.load("mini")
    card = gfx.models.info("mini")
    assert tuple(s for s in model.vocabulary.token_of if s.startswith("<")) == card.specials
    assert gfx.models.fetch("mini") == model.folder


def test_unknown_attributes_are_answered_with_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"it offers.*available"):
        gfx.models.availabel  # noqa: B018


def test_training_is_reached_from_the_package() -> None:
    assert gfx.models.pretrain.__module__ == "gfx.models.pretraining._pretrain"
    assert gfx.models.build_vocabulary.__module__ == "gfx.models.pretraining._vocabulary"

"""The cache that the tools of Hugging Face keep is read before anything is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import gfx
from gfx.models._hugging_face import endpoint, hub_cache

if TYPE_CHECKING:
    from conftest import Hub

    from gfx.models._registry import Store


class HubCache:
    """Folder in the layout of `huggingface_hub`: contents by hash, and links to them by revision and path."""

    def __init__(self, folder: Path, repository: str) -> None:
        self.folder = folder
        self.repository = folder / f"models--{repository.replace('/', '--')}"

    def add(self, blob: str, content: bytes, snapshot: str) -> Path:
        """Add a file, `snapshot` being its revision and path."""
        path, link = self.repository / "blobs" / blob, self.repository / "snapshots" / snapshot
        path.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        link.symlink_to(os.path.relpath(path, link.parent))
        return path


@pytest.fixture
def cache(store: Store, tmp_path: Path) -> HubCache:
    return HubCache(tmp_path / "huggingface" / "hub", store.registry.repository)


@pytest.fixture
def linked(store: Store, cache: HubCache) -> Store:
    """Use the store with that cache; what is in neither is downloaded from the server."""
    return replace(store, hub_cache=cache.folder)


def content_of(store: Store, hub: Hub, name: str) -> tuple[str, str, bytes]:
    """Path in the repository, hash and content of a file of the small model."""
    (file,) = (file for file in store.registry.models["small"].files if file.name == name)
    (content,) = (content for path, content in hub.files.items() if path.endswith(f"/{name}"))
    return file.path, file.sha256, content


def fill(store: Store, hub: Hub, cache: HubCache) -> Path:
    """Put both files into the cache as another revision had them; only weights are named by their SHA-256."""
    path, sha256, content = content_of(store, hub, "model.safetensors")
    weights = cache.add(sha256, content, f"of-2024/older-name/{path}")
    path, _, content = content_of(store, hub, "config.json")
    cache.add("0" * 40, content, f"of-2024/{path}")
    return weights


def test_files_of_the_cache_are_linked_and_nothing_is_downloaded(
    linked: Store, hub: Hub, cache: HubCache, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = fill(linked, hub, cache)
    folder = replace(linked, offline=True).fetch("small")
    assert not hub.asked
    assert (folder / "model.safetensors").resolve() == weights.resolve()
    assert (folder / "config.json").read_bytes() == content_of(linked, hub, "config.json")[2]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert linked.holds(linked.registry.models["small"])
    said = " ".join(capsys.readouterr().out.split())
    assert said == f"Linking 2 files of small ({linked.registry.models['small'].size / 1e6:.1f} MB) into {folder}, " + (
        f"from {cache.repository / 'blobs'}."
    )
    linked.fetch("small")
    assert capsys.readouterr().out == "", "it is there now"


def test_a_file_with_another_hash_is_not_used(linked: Store, hub: Hub, cache: HubCache) -> None:
    """Whatever its name says."""
    path, sha256, content = content_of(linked, hub, "model.safetensors")
    other = content[:-1] + bytes([content[-1] ^ 1])
    blob = cache.add(sha256, other, f"of-2024/{path}")
    folder = linked.fetch("small")
    assert not (folder / "model.safetensors").is_symlink()
    assert (folder / "model.safetensors").read_bytes() == content
    assert blob.read_bytes() == other
    assert len(hub.asked) == 2


def test_what_the_cache_lacks_is_downloaded(
    linked: Store, hub: Hub, cache: HubCache, capsys: pytest.CaptureFixture[str]
) -> None:
    path, sha256, content = content_of(linked, hub, "model.safetensors")
    cache.add(sha256, content, f"of-2024/{path}")
    folder = linked.fetch("small")
    assert [asked.rpartition("/")[2] for asked in hub.asked] == ["config.json"]
    assert (folder / "model.safetensors").is_symlink()
    linking, _, downloading = " ".join(capsys.readouterr().out.split()).partition("Downloading")
    assert linking.startswith("Linking model.safetensors of small")
    assert downloading.startswith(" config.json of small")
    assert downloading.endswith(f"from {hub.url.removeprefix('http://')}.")


def test_what_is_deleted_from_the_cache_or_changed_there_is_downloaded(
    linked: Store, hub: Hub, cache: HubCache
) -> None:
    weights = fill(linked, hub, cache)
    path = linked.fetch("small") / "model.safetensors"
    content = path.read_bytes()
    for change in (lambda: weights.write_bytes(b"?" + content[1:]), weights.unlink):
        change()
        linked.fetch("small")
        assert not path.is_symlink()
        assert path.read_bytes() == content
        path.unlink()
        weights.write_bytes(content)
        linked.fetch("small")
        assert path.is_symlink()


def test_a_cache_of_others_that_cannot_be_read_is_passed_over(linked: Store, hub: Hub, cache: HubCache) -> None:
    fill(linked, hub, cache).chmod(0)
    if os.access(cache.repository / "blobs" / content_of(linked, hub, "model.safetensors")[1], os.R_OK):
        pytest.skip("this user may read everything")
    linked.fetch("small")
    assert [asked.rpartition("/")[2] for asked in hub.asked] == ["model.safetensors"]


def test_where_links_cannot_be_made_files_are_copied(
    linked: Store, hub: Hub, cache: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = fill(linked, hub, cache)

    def refuse(*_: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    path = linked.fetch("small") / "model.safetensors"
    assert not path.is_symlink()
    assert path.read_bytes() == weights.read_bytes()
    assert not hub.asked


def test_a_model_is_loaded_from_the_cache(
    published_store: Store, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the dictionaries as they are published."""
    store = replace(published_store, hub_cache=tmp_path / "hub", offline=True)
    cache = HubCache(store.hub_cache, store.registry.repository)
    for file in store.registry.models["V2-small"].files:
        (content,) = (content for path, content in hub.files.items() if path.endswith(f"/{file.path}"))
        cache.add(file.sha256, content, f"{file.revision}/{file.path}")
    monkeypatch.setattr("gfx.models._load.default_store", lambda: store)
    model = gfx.models.load("V2-small")
    assert model.vocabulary.name == "V2"
    assert model.weights.is_symlink()
    assert not hub.asked


WHERE_IT_IS = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE); print(constants.ENDPOINT)"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"XDG_CACHE_HOME": "/xdg"},
        {"XDG_CACHE_HOME": "/xdg", "HUGGINGFACE_HUB_CACHE": "/former"},
        {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "~/of huggingface"},
        {"HF_HOME": "/elsewhere", "HF_HUB_CACHE": "$HOME/hub", "HF_ENDPOINT": "https://mirror.example/"},
    ],
)
def test_cache_and_address_are_those_of_huggingface_hub(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", WHERE_IT_IS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(hub_cache()), endpoint()]


def test_the_default_store_reads_it(
    published_store: Store, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = HubCache(tmp_path / "hub", published_store.registry.repository)
    for file in published_store.registry.vocabularies["V1"].files:
        (content,) = (content for path, content in hub.files.items() if path.endswith(f"/{file.path}"))
        cache.add(file.sha256, content, f"{file.revision}/{file.path}")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache.folder))
    with gfx.settings.override(cache_dir=tmp_path / "own", offline=True):
        folder = gfx.models.fetch("V1")
    assert {path.resolve().parent for path in folder.iterdir()} == {cache.repository / "blobs"}

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

import gfx
from gfx._core.manifest import file_sha256
from gfx._core.scratch import scratch_folder
from gfx.models._registry import Store, default_store, published

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Hub

    from gfx._downloads import RemoteFile


pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of answers that pooch gave up


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_of(store: Store) -> list[RemoteFile]:
    return store.files_of(store.registry.models["small"])


def path_of(store: Store, file: str) -> str:
    """Path of a file of the small model on the server."""
    (url,) = (entry.url for entry in files_of(store) if entry.name == file)
    return urlsplit(url).path[1:]


def test_fetched_once_then_used_from_the_cache(store: Store, hub: Hub) -> None:
    folder = store.fetch("small")
    assert folder == store.folder / "small"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    for path in folder.iterdir():
        assert path.read_bytes() == hub.files[path_of(store, path.name)]
        assert path.stat().st_mode & 0o777 == 0o644
    before = contents(store.folder)
    assert store.fetch("TINY-2026") == folder
    assert set(hub.asked.values()) == {1}
    assert contents(store.folder) == before


def test_a_file_put_there_by_hand_is_used_and_only_the_rest_is_fetched(store: Store, hub: Hub) -> None:
    (store.folder / "small").mkdir(parents=True)
    (store.folder / "small" / "model.safetensors").write_bytes(hub.files[path_of(store, "model.safetensors")])
    store.fetch("small")
    assert dict(hub.asked) == {path_of(store, "config.json"): 1}


def test_a_damaged_file_in_the_cache_is_replaced(store: Store, hub: Hub) -> None:
    path = store.fetch("small") / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # same size, one bit
    store.fetch("small")
    assert path.read_bytes() == whole
    assert hub.asked[path_of(store, "model.safetensors")] == 2


def test_a_broken_transfer_is_started_again(store: Store, hub: Hub) -> None:
    hub.broken[path_of(store, "model.safetensors")] = 1
    folder = replace(store, attempts=2).fetch("small")
    assert hub.asked[path_of(store, "model.safetensors")] == 2
    assert (folder / "model.safetensors").read_bytes() == hub.files[path_of(store, "model.safetensors")]
    assert len(list(folder.iterdir())) == 2


def test_a_transfer_that_stays_broken_leaves_nothing_and_the_next_call_goes_on(store: Store, hub: Hub) -> None:
    path = path_of(store, "model.safetensors")
    hub.broken[path] = 1
    with pytest.raises(RuntimeError, match=r"(?s)Could not fetch model\.safetensors.*by hand") as caught:
        store.fetch("small")
    assert_shown_alone(caught.value)
    assert list(contents(store.folder)) == ["small/config.json"]
    store.fetch("small")
    assert hub.asked == {path_of(store, "config.json"): 1, path: 2}


def test_other_bytes_than_published_are_refused_and_not_kept(store: Store, hub: Hub) -> None:
    path = path_of(store, "model.safetensors")
    hub.files[path] = hub.files[path][:-1] + b"?"
    with pytest.raises(
        RuntimeError, match=r"(?s)model\.safetensors is not the published file: its sha256 differs"
    ) as caught:
        store.fetch("small")
    assert_shown_alone(caught.value)
    assert list(contents(store.folder)) == ["small/config.json"]
    assert not store.holds(store.registry.models["small"])


def test_a_missing_file_is_named_with_address_size_and_hash(store: Store, hub: Hub) -> None:
    content = hub.files.pop(path_of(store, "config.json"))
    with pytest.raises(RuntimeError) as caught:
        store.fetch("small")
    for part in ("404", "config.json", f"{len(content)} bytes", sha256(content), str(store.folder), hub.url):
        assert part in str(caught.value)
    assert contents(store.folder) == {}
    assert_shown_alone(caught.value)


def test_a_server_that_does_not_answer_is_one_error_without_a_chain(store: Store) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        nowhere = replace(store, endpoint=address)
        with pytest.raises(RuntimeError, match=r"^Could not fetch config\.json: .*Connection refused") as caught:
            nowhere.fetch("small")
    for entry in files_of(nowhere):
        assert entry.url in str(caught.value), "all that is missing, for whoever cannot connect"
    assert_shown_alone(caught.value)


def assert_shown_alone(error: RuntimeError) -> None:
    shown = "".join(traceback.format_exception(error))
    assert shown.count("Traceback") == 1
    assert shown.endswith(f"RuntimeError: {error}\n")


def test_a_cache_that_cannot_be_written_names_the_setting(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder can be made below this")
    with pytest.raises(RuntimeError, match=r"Could not write to the cache.*cache_dir.*GFX_CACHE_DIR"):
        replace(store, folder=tmp_path / "file" / "cache").fetch("small")


def test_offline_names_every_missing_file(store: Store, hub: Hub) -> None:
    (store.folder / "small").mkdir(parents=True)
    (store.folder / "small" / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="gfx is offline") as caught:
        replace(store, offline=True).fetch("small")
    assert not hub.asked
    for entry in files_of(store):
        for part in (
            entry.url,
            str(store.folder / "small" / entry.name),
            entry.sha256,
            f"{entry.size:,} bytes",
        ):
            assert part in str(caught.value)
    assert "config.json (the file there now, 2 bytes, is another one)" in str(caught.value)


def test_offline_uses_what_is_there(store: Store, hub: Hub) -> None:
    folder = store.fetch("small")
    hub.asked.clear()
    assert replace(store, offline=True).fetch("small") == folder
    assert not hub.asked


FETCH = """
import pickle, sys
store = pickle.loads(sys.stdin.buffer.read())
print(store.fetch("small"))
"""


def test_two_processes_fetch_at_once(store: Store, hub: Hub) -> None:
    hub.together[path_of(store, "model.safetensors")] = threading.Barrier(2)  # neither is served before both ask
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FETCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in processes:
        process.stdin.write(pickle.dumps(store))
        process.stdin.close()
    for process in processes:
        with process.stdout, process.stderr:
            said = process.stderr.read().decode()
            process.stdout.read()
        assert process.wait(timeout=60) == 0, said
    assert hub.asked[path_of(store, "model.safetensors")] == 2
    assert {name: sha256(content) for name, (content, _) in contents(store.folder / "small").items()} == {
        entry.name: entry.sha256 for entry in store.registry.models["small"].files
    }


def test_what_a_killed_download_left_is_deleted_by_the_next_call(store: Store, hub: Hub) -> None:
    """Killed half-way through a file; another process that still fetches keeps its part."""
    path = path_of(store, "model.safetensors")
    hub.together[path] = threading.Barrier(2)  # the server waits for a second process, which comes last
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen([sys.executable, "-c", FETCH], **how)
    killed.stdin.write(pickle.dumps(store))
    killed.stdin.close()
    while not hub.asked[path]:
        time.sleep(0.01)
    folder = store.folder / "small"
    (part,) = (entry for entry in folder.glob("tmp-*") if entry.is_dir())
    with pytest.raises(RuntimeError, match="gfx is offline"):
        replace(store, offline=True).fetch("small")
    assert part.is_dir(), "its process is still there"
    killed.kill()
    killed.wait()
    assert part.is_dir()
    store.fetch("small")
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_cached_lists_what_is_there(store: Store) -> None:
    assert store.cached().empty
    assert not store.available().loc["small", "cached"]
    folder = store.fetch("small")
    assert store.available().loc["small", "cached"]
    row = store.cached().loc["small"]
    assert row["complete"]
    assert row["folder"] == str(folder)
    (folder / "model.safetensors").unlink()
    assert not store.cached().loc["small", "complete"]


def test_a_hash_is_taken_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"another"):
        path.write_bytes(content)
        assert file_sha256(path) == sha256(content)


def test_the_real_dictionaries_pass_their_published_hashes(published_store: Store, hub: Hub) -> None:
    for name in ("V1", "V2"):
        folder = published_store.fetch(name)
        card = published_store.registry.vocabularies[name]
        assert {path.name for path in folder.iterdir()} == {file.name for file in card.files}
    assert set(hub.asked.values()) == {1}
    assert published_store.cached().index.tolist() == ["V1", "V2"]


def test_settings_choose_cache_and_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    with gfx.settings.override(cache_dir=tmp_path, offline=True):
        store = default_store()
        assert (store.folder, store.offline) == (tmp_path, True)
        assert store.registry is published()
        with pytest.raises(
            RuntimeError, match=r"(?s)huggingface\.co.*Geneformer-V1-10M/model\.safetensors.*41,183,536"
        ):
            gfx.models.fetch("V1-10M")
        assert gfx.models.cached().empty
    assert list(tmp_path.iterdir()) == []


HOMELESS = """
import sys, warnings
from pathlib import Path
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gfx
    from gfx.models._registry import default_store
    from gfx._core import ranking, scales
    folder = default_store().folder
    adata = gfx.datasets.toy(3)
    gfx.pp.tokenize(adata, model="mini")
(text,) = {str(each.message) for each in caught if "no folder of the user" in str(each.message)}
import numba
print(folder, numba.config.CACHE_DIR, adata.obs["gfx_tokens_n"].min() > 0)
"""


def test_without_a_folder_to_write_to_caches_are_temporary_and_one_warning_says_so(tmp_path: Path) -> None:
    """As on the nodes of a cluster and in containers, with a package that nobody may write to."""
    code = (
        "import os\n"
        "may = os.access\n"
        f"os.access = lambda path, mode: str(path).startswith({str(tmp_path)!r}) and may(path, mode)\n{HOMELESS}"
    )
    places = {"HOME": "/proc/none", "TMPDIR": str(tmp_path), "XDG_CACHE_HOME": ""}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_CACHE", "GFX_"))}
    for _ in range(2):  # the second call finds what the first left
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | places, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        models, compiled, works = done.stdout.splitlines()[-1].split()
        assert (models, compiled, works) == (
            f"{tmp_path}/gfx-{os.getuid()}/downloads",
            f"{tmp_path}/gfx-{os.getuid()}/numba",
            "True",
        )
    assert (tmp_path / f"gfx-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / f"gfx-{os.getuid()}" / "numba").rglob("*.nbi"))


def test_a_temporary_folder_that_others_can_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code lies there, which is run."""
    planted = tmp_path / f"gfx-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match="There is no folder of the user's to write to"):
        folder = scratch_folder.__wrapped__()
    assert folder != planted
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_mirror_of_hugging_face_is_asked_instead(
    published_store: Store, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    with gfx.settings.override(cache_dir=tmp_path / "elsewhere"):
        folder = gfx.models.fetch("V2")
    assert folder == tmp_path / "elsewhere" / "V2"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        file.name for file in published_store.registry.vocabularies["V2"].files
    )
    assert all(path.startswith("ctheodoris/Geneformer/resolve/") for path in hub.asked)


def test_without_a_setting_the_systems_cache_is_used() -> None:
    import pooch

    with gfx.settings.override(cache_dir=None):
        assert default_store().folder == pooch.os_cache("gfx")

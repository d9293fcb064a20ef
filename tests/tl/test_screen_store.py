"""What the store of a screen refuses, goes on with, survives, and runs again."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import warnings
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr

import gfx
from gfx._run_store import RunStore, RunStoreError
from gfx.tl.screen import _run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import anndata as ad
    from tests.conftest import ToyCells

    Slots = dict[str, Any]
    ReadSlots = Callable[[ad.AnnData], Slots]

# The toy cells' states are drawn at random, and most of the time they are not separable.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out cells of")

N_CELLS = 12


def files(store: Path) -> dict[str, bytes]:
    """Content of every file of a store."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def times(store: Path) -> dict[Path, int]:
    """When each file and folder of a store was written."""
    return {path: path.stat().st_mtime_ns for path in store.rglob("*")}


@pytest.fixture(scope="module")
def arguments(toy_folder: Path) -> dict[str, Any]:
    """6 of 12 cells, two in a block, with a goal and a random-weights model."""
    states = {"groupby": "condition", "start": "sick", "goal": "healthy"}
    return {"model": toy_folder, "controls": "random_weights", **states}


@pytest.fixture
def adata(toy_cells: ToyCells) -> ad.AnnData:
    return toy_cells(N_CELLS)


@pytest.fixture(scope="module")
def whole(
    toy_cells: ToyCells, arguments: dict[str, Any], slots: ReadSlots, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Slots]:
    """A store that was finished at once, and what came out."""
    store, adata = tmp_path_factory.mktemp("whole") / "store", toy_cells(N_CELLS)
    gfx.tl.screen_genes(adata, store=store, **arguments)
    return store, slots(adata)


@pytest.fixture
def store(whole: tuple[Path, Slots], tmp_path: Path) -> Path:
    """A copy of that store."""
    return shutil.copytree(whole[0], tmp_path / "store")


@pytest.fixture
def assert_goes_on(
    toy_cells: ToyCells, arguments: dict[str, Any], whole: tuple[Path, Slots], slots: ReadSlots
) -> Callable[[Path], None]:
    """Screen with a store, to the same result and the same store to the last bit."""

    def go_on(store: Path) -> None:
        adata = toy_cells(N_CELLS)
        gfx.tl.screen_genes(adata, store=store, **arguments)
        assert slots(adata) == whole[1]
        assert files(store) == files(whole[0])

    return go_on


# --- what is read, and how often ------------------------------------------------------------------------------------


def test_a_finished_screen_is_read_block_by_block_each_once(
    store: Path, assert_goes_on: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written."""
    reads: Counter[tuple[str, int]] = Counter()
    read = RunStore.read

    def counted(self: RunStore, job: str, number: int) -> Any:
        reads[job, number] += 1
        return read(self, job, number)

    monkeypatch.setattr(RunStore, "read", counted)
    before = times(store)
    assert_goes_on(store)
    assert times(store) == before
    of_cells = [(job, number) for job in ("model", "random_weights") for number in range(3)]
    expected = [*of_cells, ("states_model", 0), ("states_random_weights", 0), ("genes", 0)]
    assert reads == dict.fromkeys(expected, 1)


def test_what_is_missing_is_run_and_what_is_there_is_read_once(
    store: Path, assert_goes_on: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(store / "model" / "1")
    shutil.rmtree(store / "random_weights")
    reads: Counter[tuple[str, int]] = Counter()
    read = RunStore.read
    monkeypatch.setattr(RunStore, "read", lambda self, *block: reads.update([block]) or read(self, *block))
    assert_goes_on(store)
    blocks = [("model", 0), ("model", 2), ("states_model", 0), ("states_random_weights", 0), ("genes", 0)]
    assert reads == dict.fromkeys(blocks, 1)


def test_effects_in_cells_can_be_summed_up_otherwise(
    adata: ad.AnnData, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Groups and baselines are no part of what a store holds."""
    chosen = {"model": arguments["model"], "store": tmp_path / "store"}
    gfx.tl.screen_genes(adata, controls=None, **chosen)
    before = times(tmp_path / "store")
    gfx.tl.screen_genes(adata, groupby="condition", controls="baselines", **chosen)
    assert "gfx_screen_groups" in adata.varm
    assert "detection" in adata.varm["gfx_screen"]
    assert times(tmp_path / "store") == before


# --- what is refused ------------------------------------------------------------------------------------------------


def edit_manifest(store: Path, **changed: object) -> None:
    path = store / "zarr.json"
    group = json.loads(path.read_text())
    group["attributes"]["gfx"] |= changed
    path.write_text(json.dumps(group))


def assert_refused(adata: ad.AnnData, store: Path, slots: ReadSlots, *names: str, **arguments: Any) -> None:
    """What differs is named, and nothing is changed."""
    before, stored = slots(adata), files(store)
    with pytest.raises(RunStoreError) as caught:
        gfx.tl.screen_genes(adata, store=store, **arguments)
    message = str(caught.value)
    assert str(store) in message
    assert f"another {', '.join(sorted(names))}, which" in message
    assert slots(adata) == before
    assert files(store) == stored


def test_a_store_of_another_format_is_refused(
    adata: ad.AnnData, arguments: dict[str, Any], store: Path, slots: ReadSlots
) -> None:
    edit_manifest(store, format=1)
    assert_refused(adata, store, slots, "format", **arguments)


@pytest.mark.parametrize(
    "versions",
    [{"gfx_version": "0.0.1"}, {"torch_version": "1.13"}, {"gfx_version": "0.0.1", "torch_version": "1.13"}],
    ids=lambda versions: "+".join(versions),  # noqa: PLW0108 - pytest wants a plain function
)
def test_a_store_of_other_versions_goes_on_with_a_warning_that_names_them(
    *,
    adata: ad.AnnData,
    arguments: dict[str, Any],
    whole: tuple[Path, Slots],
    store: Path,
    slots: ReadSlots,
    versions: dict[str, str],
) -> None:
    """The warning points at the call. Blocks that are there are kept, missing ones are run."""
    began = json.loads((store / "zarr.json").read_text())["attributes"]["gfx"]
    edit_manifest(store, **versions)
    shutil.rmtree(store / "model" / "1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gfx.tl.screen_genes(adata, store=store, **arguments)
    (warning,) = [each for each in caught if "that began with" in str(each.message)]
    for name, version in versions.items():
        assert f"{name.removesuffix('_version')} {version} (now {began[name]})" in str(warning.message)
    assert warning.filename == __file__
    assert slots(adata) == whole[1]


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"rng": 1}, ["rng"]),
        ({"hidden_layer": -1}, ["hidden_layer"]),
        ({"pooling": "mean"}, ["pooling"]),
        ({"positions": "keep"}, ["positions"]),
        ({"controls": None}, ["controls", "n_probes"]),
        ({"genes": [f"TOY{n}" for n in range(1, 200)]}, ["genes"]),
        ({"genes": ["TOY90", "TOY48"]}, ["genes", "screened_cells"]),
        ({"mask_obs": np.arange(N_CELLS) < 9}, ["screened_cells"]),
        ({"start": "healthy", "goal": "sick"}, ["goal", "screened_cells", "start"]),
        ({"start": None, "goal": None}, ["goal", "groupby", "screened_cells", "start", "states"]),
        ({"method": gfx.tl.FirstOrder(n_probes=2)}, ["cells_per_block", "method", "n_probes"]),
    ],
    ids=lambda value: "+".join(value),  # noqa: PLW0108 - pytest wants a plain function
)
def test_a_store_of_other_parameters_is_refused(
    *,
    adata: ad.AnnData,
    arguments: dict[str, Any],
    store: Path,
    slots: ReadSlots,
    changed: dict[str, Any],
    names: list[str],
) -> None:
    assert_refused(adata, store, slots, *names, **(arguments | changed))


@pytest.mark.parametrize("changed", [{"dtype": "bfloat16"}, {"batch_tokens": 1000}])
@pytest.mark.filterwarnings("ignore:.*bfloat16")
def test_a_store_of_other_settings_is_refused(
    adata: ad.AnnData, arguments: dict[str, Any], store: Path, slots: ReadSlots, changed: dict[str, Any]
) -> None:
    """Those that change the last digits."""
    with gfx.settings.override(**changed):
        assert_refused(adata, store, slots, *changed, **arguments)


def test_a_store_of_other_cells_is_refused(
    adata: ad.AnnData, toy_cells: ToyCells, arguments: dict[str, Any], store: Path, slots: ReadSlots
) -> None:
    others = ["cells", "screened_cells", "states", "tokens"]
    assert_refused(adata[:9].copy(), store, slots, *others, **arguments)
    assert_refused(adata[::-1].copy(), store, slots, *others, **arguments)
    assert_refused(toy_cells(N_CELLS, seed=1), store, slots, "screened_cells", "tokens", **arguments)
    renamed = adata.copy()
    renamed.obs_names = [f"other{number}" for number in range(N_CELLS)]
    assert_refused(renamed, store, slots, "cells", **arguments)


def test_a_store_of_another_goal_is_refused(
    adata: ad.AnnData, arguments: dict[str, Any], store: Path, slots: ReadSlots
) -> None:
    """The cells that are screened are the same, those of the goal are not."""
    fewer = adata.copy()
    fewer.obs.loc[fewer.obs_names[1], "condition"] = np.nan
    assert_refused(fewer, store, slots, "states", **arguments)
    counts = adata.X.toarray()
    counts[1] = counts[3]
    adata.X = type(adata.X)(counts)
    assert_refused(adata, store, slots, "tokens", **arguments)


def test_a_store_of_another_model_is_refused(
    *,
    adata: ad.AnnData,
    toy_folder_v1: Path,
    toy_folder: Path,
    arguments: dict[str, Any],
    store: Path,
    slots: ReadSlots,
    tmp_path: Path,
) -> None:
    names = ["config_sha256", "genes", "model", "pooling", "screened_cells", "tokens"]
    names += ["vocabulary", "vocabulary_sha256", "weights_sha256"]
    assert_refused(adata, store, slots, *names, **(arguments | {"model": toy_folder_v1}))
    retrained = shutil.copytree(toy_folder, tmp_path / "other" / toy_folder.name)
    weights = bytearray((retrained / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (retrained / "model.safetensors").write_bytes(weights)
    assert_refused(adata, store, slots, "weights_sha256", **(arguments | {"model": retrained}))


def a_file(path: Path) -> None:
    path.write_text("notes")


def an_empty_folder(path: Path) -> None:
    path.mkdir()


def a_folder_of_something_else(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("notes")


def a_zarr_group(path: Path) -> None:
    zarr.create_group(path).attrs["encoding-type"] = "anndata"


def a_zarr_array(path: Path) -> None:
    zarr.create_array(path, data=np.arange(3))


def a_group_with_our_name(path: Path) -> None:
    zarr.create_group(path).attrs["gfx"] = "mine"


def a_broken_group(path: Path) -> None:
    zarr.create_group(path)
    (path / "zarr.json").write_text("{")


OTHERS = [a_file, an_empty_folder, a_folder_of_something_else, a_zarr_group, a_zarr_array, a_group_with_our_name]


@pytest.mark.parametrize("make", [*OTHERS, a_broken_group])
def test_what_is_no_store_is_left_alone(
    adata: ad.AnnData, arguments: dict[str, Any], slots: ReadSlots, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "theirs"
    make(path)
    before, stored = slots(adata), files(tmp_path)
    with pytest.raises(RunStoreError, match=r"theirs is no store of gfx\. Give `store` a path where nothing is"):
        gfx.tl.screen_genes(adata, store=path, **arguments)
    assert slots(adata) == before
    assert files(tmp_path) == stored
    assert path.exists()


# --- what is damaged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block", ["model/1", "random_weights/2", "states_model/0", "states_random_weights/0", "genes/0"]
)
def test_a_damaged_block_is_run_again_and_no_other(
    store: Path, assert_goes_on: Callable[[Path], None], block: str
) -> None:
    """Whatever job it belongs to; `test_run.py` damages blocks in more ways."""
    before = {path: time for path, time in times(store).items() if path.is_file() and store / block not in path.parents}
    for chunk in [path for path in (store / block).glob("*/c/**/*") if path.is_file()]:
        os.truncate(chunk, chunk.stat().st_size // 2)
    assert_goes_on(store)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_damaged_block_of_estimates_is_run_again(
    toy_cells: ToyCells, toy_folder: Path, slots: ReadSlots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random directions are drawn for each cell by itself; exact checks and candidates are blocks as well."""
    monkeypatch.setitem(_run.CELLS_PER_BLOCK, False, 16)
    monkeypatch.setattr(_run, "CHECKED_PER_BLOCK", 1)
    store = tmp_path / "store"
    chosen = {"model": toy_folder, "method": gfx.tl.FirstOrder(n_probes=2), "controls": None, "store": store}
    first, second = toy_cells(30), toy_cells(30)
    gfx.tl.screen_genes(first, **chosen)
    before = files(store)
    assert {path.name for path in (store / "model").iterdir()} == {"0", "1"}
    for block in ("model/0", "checked/2", "candidates/0"):
        (store / block / "shift/c/0").unlink()
    gfx.tl.screen_genes(second, **chosen)
    assert slots(second) == slots(first)
    assert files(store) == before


def test_what_a_killed_beginning_left_is_no_store(
    whole: tuple[Path, Slots], assert_goes_on: Callable[[Path], None], tmp_path: Path
) -> None:
    part = shutil.copytree(whole[0], tmp_path / "store.part")
    (part / "zarr.json").write_text("{")
    assert_goes_on(tmp_path / "store")
    assert not part.exists()


# --- a full disk ----------------------------------------------------------------------------------------------------

PAGE = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk that holds so many files, each smaller than a page; call again for a larger one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = False

    def disk(n_files: int) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={n_files * PAGE}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a disk that is full can be made by root alone")
        mounted = True
        return path

    yield disk
    if mounted:
        subprocess.run(["umount", path], check=True)


def finished_blocks(store: Path) -> set[Path]:
    return {path for job in store.iterdir() if job.is_dir() for path in job.iterdir() if path.name.isdecimal()}


@pytest.mark.parametrize(("n_files", "n_layers"), [(4, 0), (14, 3), (40, 5), (70, 8)])
def test_a_full_disk_loses_nothing(
    *,
    adata: ad.AnnData,
    arguments: dict[str, Any],
    whole: tuple[Path, Slots],
    slots: ReadSlots,
    small_disk: Callable[[int], Path],
    assert_goes_on: Callable[[Path], None],
    n_files: int,
    n_layers: int,
) -> None:
    """The screen stops, the cells are as they were, whole blocks are kept; with more room it goes on."""
    disk = small_disk(n_files)
    before = slots(adata)
    with pytest.raises(
        OSError, match=f"{disk / 'store'}: No space left on device.* finished before are kept"
    ) as caught:
        gfx.tl.screen_genes(adata, store=disk / "store", **arguments)
    assert caught.value.errno == errno.ENOSPC
    assert slots(adata) == before
    kept = finished_blocks(disk / "store")
    assert len(kept) == n_layers
    assert files(disk / "store").items() <= files(whole[0]).items()  # and no part of any other block
    written = {path: path.stat().st_mtime_ns for block in kept for path in block.rglob("*")}

    small_disk(2 * len(files(whole[0])))  # room is made
    assert_goes_on(disk / "store")
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_disk_too_small_to_begin(
    *,
    adata: ad.AnnData,
    arguments: dict[str, Any],
    whole: tuple[Path, Slots],
    slots: ReadSlots,
    small_disk: Callable[[int], Path],
    assert_goes_on: Callable[[Path], None],
) -> None:
    disk = small_disk(1)
    (disk / "full").write_bytes(bytes(PAGE))
    before = slots(adata)
    with pytest.raises(OSError, match=f"{disk / 'store'}: No space left on device") as caught:
        gfx.tl.screen_genes(adata, store=disk / "store", **arguments)
    assert caught.value.errno == errno.ENOSPC
    assert slots(adata) == before
    assert [path.name for path in disk.iterdir()] == ["full"]
    small_disk(2 * len(files(whole[0])))  # room is made
    assert_goes_on(disk / "store")


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Make writes fail, as those to a full disk do."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_loses_nothing(
    *,
    adata: ad.AnnData,
    arguments: dict[str, Any],
    store: Path,
    slots: ReadSlots,
    assert_goes_on: Callable[[Path], None],
) -> None:
    """The same where nobody may make a disk: files of the missing block are too large to be written."""
    shutil.rmtree(store / "model" / "2")
    before, stored = slots(adata), files(store)
    with files_no_larger_than(100), pytest.raises(OSError, match=f"{store}: File too large") as caught:
        gfx.tl.screen_genes(adata, store=store, **arguments)
    assert caught.value.errno == errno.EFBIG
    assert slots(adata) == before
    assert files(store) == stored
    assert_goes_on(store)


def test_a_folder_that_cannot_be_written_to(
    adata: ad.AnnData, arguments: dict[str, Any], slots: ReadSlots, tmp_path: Path
) -> None:
    """A file stands where a folder should."""
    (tmp_path / "file").write_text("notes")
    before = slots(adata)
    with pytest.raises(OSError, match="file"):
        gfx.tl.screen_genes(adata, store=tmp_path / "file" / "store", **arguments)
    assert slots(adata) == before

"""What a store of a screen refuses, survives, and does again."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from gfx.tl._screen_store import ScreenStoreError

import gfx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import anndata as ad
    from tests.conftest import ToyCells

    Slots = dict[str, Any]
    ReadSlots = Callable[[ad.AnnData], Slots]

# The toy cells' states are drawn at random, and most of the time nothing tells them apart.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out cells of")

#: Block, shift of the model: one chunk of a store.
CHUNK = "model/shift/c/{}/0"


def files(store: Path) -> dict[str, bytes]:
    """Content of every file of a store."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def arguments(toy_folder: Path) -> dict[str, Any]:
    """20 of 40 cells, two in a block, with a goal."""
    return {"model": toy_folder, "groupby": "condition", "start": "sick", "goal": "healthy", "layers": True}


@pytest.fixture
def adata(toy_cells: ToyCells) -> ad.AnnData:
    return toy_cells(40)


@pytest.fixture(scope="module")
def whole(
    toy_cells: ToyCells, arguments: dict[str, Any], slots: ReadSlots, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Slots]:
    """A store that was finished at once, and what came out."""
    store, adata = tmp_path_factory.mktemp("whole") / "store", toy_cells(40)
    with pytest.warns(UserWarning, match="Held-out cells of"):
        gfx.tl.screen_genes(adata, store=store, **arguments)
    return store, slots(adata)


@pytest.fixture
def store(whole: tuple[Path, Slots], tmp_path: Path) -> Path:
    """A copy of that store."""
    return shutil.copytree(whole[0], tmp_path / "store")


# --- what is refused -----------------------------------------------------------------------------------------------


def edited(store: Path, **changed: object) -> None:
    """Write something else about a store into it."""
    path = store / "zarr.json"
    noted = json.loads(path.read_text())
    noted["attributes"]["gfx_screen"] |= changed
    path.write_text(json.dumps(noted))


@pytest.mark.parametrize("changed", [{"format": 2}, {"gfx_version": "0.0.1"}, {"torch_version": "1.0"}])
def test_a_store_of_another_version_is_refused(
    adata: ad.AnnData, arguments: dict[str, Any], store: Path, slots: ReadSlots, changed: dict[str, Any]
) -> None:
    edited(store, **changed)
    assert_refused(adata, store, slots, *changed, **arguments)


def assert_refused(adata: ad.AnnData, store: Path, slots: ReadSlots, *names: str, **arguments: Any) -> None:
    """What differs is named, and nothing is changed."""
    before, there = slots(adata), files(store)
    with pytest.raises(ScreenStoreError) as caught:
        gfx.tl.screen_genes(adata, store=store, **arguments)
    said = str(caught.value)
    assert str(store) in said
    assert f"another {', '.join(sorted(names))};" in said
    assert slots(adata) == before
    assert files(store) == there


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"rng": 1}, ["rng"]),
        ({"hidden_layer": -1}, ["hidden_layer"]),
        ({"pooling": "mean"}, ["pooling"]),
        ({"operator": "delete"}, ["operator"]),
        ({"dtype": "bfloat16"}, ["dtype"]),
        ({"null": None}, ["n_probes", "null"]),
        ({"n_probes": 2}, ["n_probes"]),
        ({"genes": [f"TOY{at}" for at in range(1, 200)]}, ["genes"]),
        ({"genes": ["TOY90", "TOY48"]}, ["cells", "genes"]),
        ({"mask_obs": np.arange(40) < 30}, ["cells"]),
        ({"start": "healthy", "goal": "sick"}, ["cells", "goal", "start", "states"]),
        ({"start": None, "goal": None}, ["cells", "goal", "groupby", "start", "states"]),
        ({"method": "first_order", "n_probes": 2}, ["cells_per_block", "method", "n_probes"]),
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


def test_effects_in_cells_can_be_summed_up_otherwise(
    adata: ad.AnnData, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Groups are no part of what a store holds."""
    arguments = {"model": arguments["model"], "null": None, "store": tmp_path / "store"}
    gfx.tl.screen_genes(adata, **arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    gfx.tl.screen_genes(adata, groupby="condition", **arguments)
    assert "gfx_screen_groups" in adata.varm
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


def test_a_store_of_other_cells_is_refused(
    adata: ad.AnnData, toy_cells: ToyCells, arguments: dict[str, Any], store: Path, slots: ReadSlots
) -> None:
    assert_refused(adata[:30].copy(), store, slots, "cells", "states", **arguments)
    assert_refused(adata[::-1].copy(), store, slots, "cells", "states", **arguments)
    assert_refused(toy_cells(40, seed=1), store, slots, "cells", "states", **arguments)
    renamed = adata.copy()
    renamed.obs_names = [f"other{at}" for at in range(40)]
    assert_refused(renamed, store, slots, "cells", **arguments)


def test_a_store_of_another_goal_is_refused(
    adata: ad.AnnData, arguments: dict[str, Any], store: Path, slots: ReadSlots
) -> None:
    """The cells that are screened are the same, those that they should become are not."""
    fewer = adata.copy()
    fewer.obs.loc[fewer.obs_names[1], "condition"] = np.nan
    assert_refused(fewer, store, slots, "states", **arguments)
    counts = adata.X.toarray()
    counts[1] = counts[3]
    adata.X = type(adata.X)(counts)
    assert_refused(adata, store, slots, "states", **arguments)


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
    names = ["cells", "genes", "model", "pooling", "states", "vocabulary", "vocabulary_sha256", "weights_sha256"]
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
    zarr.create_group(path).attrs["gfx_screen"] = "mine"


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
    before, there = slots(adata), files(tmp_path)
    with pytest.raises(ScreenStoreError, match=r"theirs is (no store|a zarr store, but not one) of a screen"):
        gfx.tl.screen_genes(adata, store=path, **arguments)
    assert slots(adata) == before
    assert files(tmp_path) == there
    assert path.exists()


# --- what is torn --------------------------------------------------------------------------------------------------


def cut(path: Path, *, to: float) -> None:
    os.truncate(path, int(path.stat().st_size * to))


def flipped(path: Path, *, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int((len(content) - 1) * at)] ^= 1
    path.write_bytes(content)


def gone(path: Path) -> None:
    path.unlink()


def zeros(path: Path) -> None:
    """What some file systems leave after a power failure."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    **{f"cut to {to}": partial(cut, to=to) for to in (0, 0.001, 0.1, 0.5, 0.9, 0.999)},
    **{f"flipped at {at}": partial(flipped, at=at) for at in (0, 0.01, 0.5, 0.99, 1)},
    "gone": gone,
    "zeros": zeros,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_torn_block_is_done_again(
    *,
    adata: ad.AnnData,
    arguments: dict[str, Any],
    whole: tuple[Path, Slots],
    store: Path,
    slots: ReadSlots,
    damage: Callable[[Path], None],
) -> None:
    """The last one, and not the others."""
    damage(store / CHUNK.format(2))
    others = [store / CHUNK.format(at) for at in (0, 1)]
    before = [path.stat().st_mtime_ns for path in others]
    gfx.tl.screen_genes(adata, store=store, **arguments)
    assert slots(adata) == whole[1]
    assert files(store) == files(whole[0])
    assert [path.stat().st_mtime_ns for path in others] == before


@pytest.mark.parametrize("measure", ["model/shift", "model/toward", "random_weights/shift", "random_weights/toward"])
def test_a_block_that_lacks_anything_is_done_again(
    *,
    adata: ad.AnnData,
    arguments: dict[str, Any],
    whole: tuple[Path, Slots],
    store: Path,
    slots: ReadSlots,
    measure: str,
) -> None:
    shutil.rmtree(store / measure / "c" / "1")
    gfx.tl.screen_genes(adata, store=store, **arguments)
    assert slots(adata) == whole[1]
    assert files(store) == files(whole[0])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["model", "random_weights"])
def test_a_goal_that_is_torn_is_told(
    *,
    adata: ad.AnnData,
    arguments: dict[str, Any],
    store: Path,
    slots: ReadSlots,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    """Blocks that are done and others would move towards different cells."""
    damage(store / "goals" / name / "c" / "0" / "0")
    before, there = slots(adata), files(store)
    with pytest.raises(ScreenStoreError, match="is damaged: what cells should move towards cannot be read"):
        gfx.tl.screen_genes(adata, store=store, **arguments)
    assert slots(adata) == before
    assert files(store) == there


def test_estimates_are_done_again(toy_cells: ToyCells, toy_folder: Path, slots: ReadSlots, tmp_path: Path) -> None:
    """By derivatives, which draw random directions: those of each cell are its own."""
    arguments = {"model": toy_folder, "method": "first_order", "n_probes": 2, "store": tmp_path / "store"}
    first, second = toy_cells(150), toy_cells(150)
    gfx.tl.screen_genes(first, **arguments)
    there = files(tmp_path)
    assert len([name for name in there if name.startswith("store/model/shift/c")]) == 2
    gone(tmp_path / "store" / CHUNK.format(0))
    gfx.tl.screen_genes(second, **arguments)
    assert slots(second) == slots(first)
    assert files(tmp_path) == there


def test_what_a_beginning_left_is_no_store(
    adata: ad.AnnData, arguments: dict[str, Any], whole: tuple[Path, Slots], slots: ReadSlots, tmp_path: Path
) -> None:
    """Killed before the store was there: it is made anew, whatever lies about."""
    part = shutil.copytree(whole[0], tmp_path / "store.part")
    (part / "zarr.json").write_text("{")
    gfx.tl.screen_genes(adata, store=tmp_path / "store", **arguments)
    assert slots(adata) == whole[1]
    assert files(tmp_path / "store") == files(whole[0])
    assert not part.exists()


# --- a full disk ---------------------------------------------------------------------------------------------------

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


def n_at_begin(store: Path) -> int:
    """How many files a store has before anything is measured."""
    return len([name for name in files(store) if not name.startswith(("model/", "random_weights/"))]) + 6


@pytest.mark.parametrize("n_chunks", [1, 5, 11])
def test_a_full_disk_loses_nothing(
    *,
    adata: ad.AnnData,
    arguments: dict[str, Any],
    whole: tuple[Path, Slots],
    slots: ReadSlots,
    small_disk: Callable[[int], Path],
    n_chunks: int,
) -> None:
    """12 chunks there should be. The screen stops, the cells are as they were; with more room it goes on."""
    disk = small_disk(n_at_begin(whole[0]) + n_chunks)
    before = slots(adata)
    n_blocks = n_chunks // 4
    with pytest.raises(OSError, match=f"{disk / 'store'}: No space left on device. .* {n_blocks} block") as caught:
        gfx.tl.screen_genes(adata, store=disk / "store", **arguments)
    assert caught.value.errno == errno.ENOSPC
    assert slots(adata) == before
    kept = files(disk / "store")
    assert len(kept) == n_at_begin(whole[0]) + n_chunks
    written = {disk / "store" / name: (disk / "store" / name).stat().st_mtime_ns for name in kept if "/c/" in name}

    small_disk(2 * len(files(whole[0])))  # room is made
    gfx.tl.screen_genes(adata, store=disk / "store", **arguments)
    assert slots(adata) == whole[1]
    assert files(disk / "store") == files(whole[0])
    done = [path for path in written if path.parent.name in map(str, range(n_blocks))]
    assert all(path.stat().st_mtime_ns == written[path] for path in done)


def test_a_disk_too_small_to_begin(
    adata: ad.AnnData,
    arguments: dict[str, Any],
    whole: tuple[Path, Slots],
    slots: ReadSlots,
    small_disk: Callable[[int], Path],
) -> None:
    disk = small_disk(n_at_begin(whole[0]) // 2)
    before = slots(adata)
    with pytest.raises(OSError, match=f"{disk / 'store'}: No space left on device") as caught:
        gfx.tl.screen_genes(adata, store=disk / "store", **arguments)
    assert caught.value.errno == errno.ENOSPC
    assert slots(adata) == before
    assert not (disk / "store").exists()
    small_disk(2 * len(files(whole[0])))  # room is made
    gfx.tl.screen_genes(adata, store=disk / "store", **arguments)
    assert slots(adata) == whole[1]
    assert files(disk / "store") == files(whole[0])


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
    adata: ad.AnnData, arguments: dict[str, Any], whole: tuple[Path, Slots], slots: ReadSlots, tmp_path: Path
) -> None:
    """The same where nobody may make a disk: one chunk is too large to be written."""
    store, before = tmp_path / "store", slots(adata)
    chunks = {name: len(content) for name, content in files(whole[0]).items() if "/c/" in name}
    largest = max(chunks.values())
    with files_no_larger_than(largest - 1), pytest.raises(OSError, match=f"{store}: File too large") as caught:
        gfx.tl.screen_genes(adata, store=store, **arguments)
    assert caught.value.errno == errno.EFBIG
    assert slots(adata) == before
    gfx.tl.screen_genes(adata, store=store, **arguments)
    assert slots(adata) == whole[1]
    assert files(store) == files(whole[0])


def test_a_folder_that_cannot_be_written_to(
    adata: ad.AnnData, arguments: dict[str, Any], slots: ReadSlots, tmp_path: Path
) -> None:
    """A file stands where a folder should."""
    (tmp_path / "file").write_text("notes")
    before = slots(adata)
    with pytest.raises(OSError, match="file"):
        gfx.tl.screen_genes(adata, store=tmp_path / "file" / "store", **arguments)
    assert slots(adata) == before

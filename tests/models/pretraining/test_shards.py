"""Tokens on disk: what is in the shards, when they are written, and what is left when that goes wrong."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx
from gfx._adata import match_genes
from gfx._core.ranking import rank_cells
from gfx._core.vocabulary import SPECIALS, Vocabulary
from gfx.models._vocabulary_file import write_vocabulary
from gfx.models.pretraining._shards import TokenShards, encode_sources
from gfx.models.pretraining._sources import Source, find_sources

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import RealCells, ToyCells

LONGEST = 48


def in_memory(adata: ad.AnnData, vocabulary: Vocabulary, max_length: int = LONGEST) -> list[np.ndarray]:
    """Encode the whole matrix at once and leave out cells of fewer than two genes."""
    encoded, lengths, *_ = rank_cells(
        sparse.csr_array(adata.X), match_genes(adata.var_names, vocabulary).tokens, vocabulary, max_length
    )
    fewest = 2 + 2 * vocabulary.has_cls
    return [row[:n] for row, n in zip(encoded, lengths, strict=True) if n >= fewest]


def assert_same_cells(shards: TokenShards, expected: list[np.ndarray]) -> None:
    assert len(shards) == len(expected)
    assert shards.lengths.dtype == np.int32
    assert shards.lengths.tolist() == [len(cell) for cell in expected]
    for at, cell in enumerate(expected):
        np.testing.assert_array_equal(shards[at], cell)


def files_in(folder: Path) -> dict[str, int]:
    """Names, and the inode that a file written anew would not keep."""
    return {file.name: file.stat().st_ino for file in folder.iterdir()}


@pytest.fixture
def three(toy_cells: ToyCells, tmp_path: Path) -> list[Path]:
    """Files a.h5ad, b.h5ad and c.h5ad of 20 cells each."""
    paths = [tmp_path / f"{name}.h5ad" for name in "abc"]
    for seed, path in enumerate(paths):
        toy_cells(20, seed=seed).write_h5ad(path)
    return paths


# --- what is in them ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
@pytest.mark.parametrize("specials", [True, False])
@pytest.mark.parametrize("kind", ["memory", "h5ad", "zarr", "dask"])
def test_cells_are_those_of_the_whole_matrix_in_their_order(
    kind: str,
    specials: bool,
    toy_cells: ToyCells,
    toy_vocabulary: Vocabulary,
    toy_vocabulary_v1: Vocabulary,
    tmp_path: Path,
) -> None:
    vocabulary = toy_vocabulary if specials else toy_vocabulary_v1
    first, second = toy_cells(50), toy_cells(30, seed=1)
    place = first
    if kind == "dask":
        place = ad.AnnData(da.from_array(first.X.toarray(), chunks=(7, -1)), var=first.var)
    elif kind != "memory":
        place = tmp_path / f"first.{kind}"
        getattr(first, f"write_{kind}")(place)
    shards = encode_sources(find_sources([place, second], None), vocabulary, LONGEST, tmp_path / "shards")
    expected = in_memory(first, vocabulary) + in_memory(second, vocabulary)
    assert max(map(len, expected)) == LONGEST, "some cells are cut off"
    assert_same_cells(shards, expected)
    assert shards.names == ["source 0" if kind in {"memory", "dask"} else place.name, "source 1"]
    assert shards.n_cells.tolist() == [50, 30]


def test_real_cells_are_those_of_the_whole_matrix(real_cells: RealCells, shared: Path, tmp_path: Path) -> None:
    name, vocabulary = "train/darmanis2015_adult_brain_100", gfx.models.load("mini").vocabulary
    sources = find_sources(shared / "data" / "cells" / f"{name}.h5ad", None)
    shards = encode_sources(sources, vocabulary, 1024, tmp_path)
    assert_same_cells(shards, in_memory(real_cells(name), vocabulary, 1024))


def test_numpy_reads_the_tokens(toy_cells: ToyCells, toy_vocabulary: Vocabulary, tmp_path: Path) -> None:
    adata = toy_cells()
    shards = encode_sources(find_sources(adata, None), toy_vocabulary, LONGEST, tmp_path)
    tokens = np.load(shards.paths[0])
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, np.concatenate(in_memory(adata, toy_vocabulary)))


def test_more_shards_than_may_be_open(
    three: list[Path], toy_vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gfx.models.pretraining._shards.MOST_OPEN", 1)
    shards = encode_sources(find_sources(three, None), toy_vocabulary, LONGEST, tmp_path / "shards")
    expected = [cell for path in three for cell in in_memory(ad.read_h5ad(path), toy_vocabulary)]
    first_cells = [shards[at] for at in (0, 20, 40)]  # views outlive what is closed
    for at in np.random.default_rng(0).permutation(60):
        np.testing.assert_array_equal(shards[at], expected[at])
    for cell, at in zip(first_cells, (0, 20, 40), strict=True):
        np.testing.assert_array_equal(cell, expected[at])


def test_cells_are_views_that_nobody_writes_to(toy_cells: ToyCells, toy_vocabulary: Vocabulary, tmp_path: Path) -> None:
    shards = encode_sources(find_sources(toy_cells(), None), toy_vocabulary, LONGEST, tmp_path)
    cell = shards[np.int64(3)]
    assert cell.dtype == np.uint16
    assert not cell.flags.owndata
    assert not cell.flags.writeable
    np.testing.assert_array_equal(shards[-1], shards[len(shards) - 1])
    with pytest.raises(IndexError):
        shards[len(shards)]


def test_cells_of_fewer_than_two_genes_are_left_out_and_counted(
    toy_cells: ToyCells, toy_vocabulary: Vocabulary, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adata = toy_cells(10, n_unknown=1)
    x = adata.X.toarray()
    x[2] = 0
    x[5, :-1] = 0
    x[5, -1] = 7  # detected, but unknown
    x[7] = 0
    x[7, 3] = 2  # one gene
    x[8] = 0
    x[8, [3, 4]] = 1  # two
    adata.X = sparse.csr_matrix(x)
    with caplog.at_level(logging.INFO, logger="gfx"):
        shards = encode_sources(find_sources(adata, None), toy_vocabulary, LONGEST, tmp_path)
    assert caplog.messages == ["source 0: 7 cells written as tokens; 3 with fewer than 2 genes left out"]
    assert shards.n_cells.tolist() == [7]
    assert shards.lengths[-2] == 4
    assert_same_cells(shards, in_memory(adata, toy_vocabulary))


def test_a_large_vocabulary_needs_wider_tokens(tmp_path: Path) -> None:
    n = 70_000
    names = [f"ENSG{number:011d}" for number in range(n)]
    vocabulary = Vocabulary(
        name="large",
        ids=np.array([*SPECIALS, *names], dtype=object),
        medians=np.concatenate([np.full(len(SPECIALS), np.nan), np.ones(n)]),
        symbols=np.full(n + len(SPECIALS), "", dtype=object),
    )
    x = sparse.random_array((20, n), density=0.001, random_state=0, format="csr", dtype=np.float32)
    x.data[:] = np.arange(1, len(x.data) + 1)
    adata = ad.AnnData(x, var=pd.DataFrame(index=names))
    shards = encode_sources(find_sources(adata, None), vocabulary, 4096, tmp_path)
    assert shards[0].dtype == np.uint32
    assert max(shards[at].max() for at in range(len(shards))) > np.iinfo(np.uint16).max
    assert_same_cells(shards, in_memory(adata, vocabulary, 4096))


def test_a_source_without_cells_is_an_empty_shard(
    toy_cells: ToyCells, toy_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    adata = toy_cells(10)
    adata[:0].copy().write_h5ad(tmp_path / "empty.h5ad")
    sources = find_sources([tmp_path / "empty.h5ad", adata, tmp_path / "empty.h5ad"], None)
    for _ in range(2):
        shards = encode_sources(sources, toy_vocabulary, LONGEST, tmp_path / "shards")
        assert_same_cells(shards, in_memory(adata, toy_vocabulary))
        assert shards.n_cells.tolist() == [0, 10, 0]


def test_sources_without_a_usable_cell_are_refused(
    toy_cells: ToyCells, toy_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    adata = toy_cells(5)
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
    for cells in (adata, adata[:0].copy()):
        with pytest.raises(ValueError, match="No cell has more than one gene of the vocabulary 'toy'"):
            encode_sources(find_sources(cells, None), toy_vocabulary, LONGEST, tmp_path)


# --- when they are written ------------------------------------------------------------------------------------------


def test_finished_shards_are_not_written_again(three: list[Path], toy_vocabulary: Vocabulary, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    before = encode_sources(find_sources(three, None), toy_vocabulary, LONGEST, folder)
    written = files_in(folder)
    for path in three:  # the same size and time, but nobody can read it any more
        seen = path.stat()
        path.write_bytes(bytes(seen.st_size))
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    after = encode_sources(find_sources(three, None), toy_vocabulary, LONGEST, folder)
    assert files_in(folder) == written
    assert_same_cells(after, [before[at] for at in range(len(before))])


def test_other_settings_of_the_encoding_make_other_shards(
    three: list[Path], toy_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    folder, sources = tmp_path / "shards", find_sources(three[0], None)
    renamed = Vocabulary(
        name="renamed",
        ids=toy_vocabulary.ids,
        medians=toy_vocabulary.medians,
        symbols=np.roll(toy_vocabulary.symbols, 1),  # the same tokens, found under other names
        aliases=toy_vocabulary.aliases,
    )
    assert renamed.sha256 == toy_vocabulary.sha256
    calls = [
        lambda: encode_sources(sources, toy_vocabulary, LONGEST, folder),
        lambda: encode_sources(sources, toy_vocabulary, LONGEST - 1, folder),
        lambda: encode_sources(sources, renamed, LONGEST, folder),
        lambda: encode_sources(find_sources(three[0], "ensembl_id"), toy_vocabulary, LONGEST, folder),
    ]
    paths = [call().paths[0] for call in calls]
    assert len(set(paths)) == len(calls)
    assert [call().paths[0] for call in calls] == paths
    os.utime(three[0], ns=(0, 0))
    assert encode_sources(find_sources(three[0], None), toy_vocabulary, LONGEST, folder).paths[0] not in paths


def test_the_content_hash_depends_on_cells_and_not_on_files(
    toy_cells: ToyCells, toy_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    adata = toy_cells(30)
    adata.write_h5ad(tmp_path / "here.h5ad")
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "here.h5ad", tmp_path / "there" / "other name.h5ad")
    os.utime(tmp_path / "there" / "other name.h5ad", ns=(0, 0))
    blocks = ad.AnnData(da.from_array(adata.X.toarray(), chunks=(7, -1)), var=adata.var)

    def content(number: int, *places: Path | ad.AnnData) -> str:
        folder = tmp_path / str(number)
        return encode_sources(find_sources(places, None), toy_vocabulary, LONGEST, folder).content_sha256

    here = content(0, tmp_path / "here.h5ad")
    assert content(1, tmp_path / "there" / "other name.h5ad") == here
    assert content(2, blocks) == here, "blocks of another size"
    assert content(3, adata[::-1].copy()) != here
    assert content(4, adata[:-1].copy()) != here
    first, second = adata[:10].copy(), adata[10:].copy()
    assert content(5, first, second) != content(6, second, first)


# --- when it goes wrong ---------------------------------------------------------------------------------------------


def negative_counts(path: Path) -> None:
    adata = ad.read_h5ad(path)
    adata.X.data[-1] = -1
    adata.write_h5ad(path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def mouse_ids(path: Path) -> None:
    adata = ad.read_h5ad(path)
    adata.var_names = [f"ENSMUSG{n:011d}" for n in range(adata.n_vars)]
    adata.write_h5ad(path)


def symbols_nobody_knows(path: Path) -> None:
    adata = ad.read_h5ad(path)
    adata.var_names = [f"PROBE_{n}_AT" for n in range(adata.n_vars)]
    adata.write_h5ad(path)


def column_is_missing(path: Path) -> None:
    adata = ad.read_h5ad(path)
    del adata.var["ensembl_id"]
    adata.write_h5ad(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (negative_counts, "negative values"),
        (truncated, "cannot be read to its end"),
        (mouse_ids, "mouse genes"),
        (symbols_nobody_knows, "Only 0 of 205 genes"),
        (column_is_missing, "ensembl_id"),
    ],
)
def test_a_bad_source_is_named_and_the_others_are_kept(
    spoil: Callable[[Path], None], said: str, three: list[Path], toy_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    folder, good = tmp_path / "shards", three[1].read_bytes()
    gene_ids = "ensembl_id" if spoil is column_is_missing else None
    spoil(three[1])
    with pytest.raises(ValueError, match=rf"1 of 3 sources cannot be used(?s:.*)- b\.h5ad: .*{said}") as error:
        encode_sources(find_sources(three, gene_ids), toy_vocabulary, LONGEST, folder)
    assert not re.search(r"[ac]\.h5ad", str(error.value))
    assert str(folder) in str(error.value)
    written = files_in(folder)
    assert sorted(name[0] for name in written) == ["a", "c"], "and nothing half-written"
    # Without the bad file the call finishes and writes nothing; with a sound one it writes that alone.
    assert len(encode_sources(find_sources(three[::2], gene_ids), toy_vocabulary, LONGEST, folder)) == 40
    assert files_in(folder) == written
    three[1].write_bytes(good)
    shards = encode_sources(find_sources(three, gene_ids), toy_vocabulary, LONGEST, folder)
    assert_same_cells(shards, [cell for path in three for cell in in_memory(ad.read_h5ad(path), toy_vocabulary)])
    now = files_in(folder)
    assert sorted(name[0] for name in now) == ["a", "b", "c"]
    assert written.items() < now.items()


def shorter(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def empty(_: bytes) -> bytes:
    return b""


def overwritten(whole: bytes) -> bytes:
    return whole[:-400] + bytes(400)


def arrays_of(whole: bytes) -> list[np.ndarray]:
    file = io.BytesIO(whole)
    return [np.load(file) for _ in range(3)]


def file_of(*arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    for array in arrays:
        np.save(file, array)
    return file.getvalue()


def cells_that_end_nowhere(whole: bytes) -> bytes:
    tokens, lengths, account = arrays_of(whole)
    lengths[5] = 1 << 30
    return file_of(tokens, lengths, account)


def a_cell_of_no_token(whole: bytes) -> bytes:
    tokens, lengths, account = arrays_of(whole)
    lengths[[5, 6]] = 0, lengths[5] + lengths[6]
    return file_of(tokens, lengths, account)


def tokens_alone(whole: bytes) -> bytes:
    return file_of(arrays_of(whole)[0])


def another_table(_: bytes) -> bytes:
    return file_of(np.ones((3, 2)), np.ones(3), np.array("[]"))


def objects(whole: bytes) -> bytes:
    return file_of(np.array([{}], dtype=object), *arrays_of(whole)[1:])


@pytest.mark.parametrize(
    "damage",
    [shorter, empty, overwritten, cells_that_end_nowhere, a_cell_of_no_token, tokens_alone, another_table, objects],
)
def test_a_damaged_shard_is_named_and_made_anew(
    damage: Callable[[bytes], bytes],
    three: list[Path],
    toy_vocabulary: Vocabulary,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sources = find_sources(three, None)
    paths = encode_sources(sources, toy_vocabulary, LONGEST, tmp_path / "shards").paths
    whole = [path.read_bytes() for path in paths]
    paths[1].unlink()  # what is mapped is not written to
    paths[1].write_bytes(damage(whole[1]))
    with pytest.raises(ValueError, match=rf"{paths[1].name} is not a whole shard of tokens .*: it has to be deleted"):
        TokenShards(paths)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="gfx"):
        encode_sources(sources, toy_vocabulary, LONGEST, tmp_path / "shards")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert f"{paths[1].name} is not a whole shard of tokens" in said[0]
    assert said[1] == "b.h5ad: 20 cells written as tokens"
    assert [path.read_bytes() for path in paths] == whole


CHILD = """
import os, signal, sys
import anndata as ad, dask, dask.array as da
from pathlib import Path
from gfx.models.pretraining._shards import encode_sources
from gfx.models.pretraining._sources import Source
from gfx.models._vocabulary_file import read_vocabulary

folder, path = Path(sys.argv[1]), Path(sys.argv[2])
adata = ad.read_h5ad(path)

def second_half():
    (part,) = (folder / "shards").glob("*.part")
    os.kill(os.getpid(), signal.SIGKILL)

half = adata.X[:10].toarray()
later = da.from_delayed(dask.delayed(second_half)(), half.shape, half.dtype)
lazy = ad.AnnData(da.concatenate([da.from_array(half, chunks=-1), later]), var=adata.var)
source = Source(path.name, lazy, None)
source.__dict__["fingerprint"] = Source(path.name, path, None).fingerprint  # to write the shard of the file
encode_sources([source], read_vocabulary(folder / "vocabulary.tsv.gz"), int(sys.argv[3]), folder / "shards")
"""


def test_a_killed_process_leaves_no_shard(three: list[Path], toy_vocabulary: Vocabulary, tmp_path: Path) -> None:
    write_vocabulary(toy_vocabulary, tmp_path)
    arguments = [sys.executable, "-c", CHILD, str(tmp_path), str(three[0]), str(LONGEST)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert [Path(name).suffix for name in files_in(tmp_path / "shards")] == [".part"]
    sources = find_sources(three[0], None)
    shards = encode_sources(sources, toy_vocabulary, LONGEST, tmp_path / "shards")
    assert_same_cells(shards, in_memory(ad.read_h5ad(three[0]), toy_vocabulary))
    assert list(files_in(tmp_path / "shards")) == [shards.paths[0].name], "what was left over is gone"


def test_a_full_disk_is_not_blamed_on_the_source(
    three: list[Path], toy_vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has room for the header, and none for tokens."""

    class Full(io.FileIO):
        def write(self, content: bytes) -> int:
            if self.tell():
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    opened = Path.open

    def open_on_a_full_disk(path: Path, mode: str = "r", **how: str) -> io.IOBase:
        return Full(path, mode) if mode == "wb" else opened(path, mode, **how)

    monkeypatch.setattr(Path, "open", open_on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device") as error:
        encode_sources(find_sources(three[0], None), toy_vocabulary, LONGEST, tmp_path / "shards")
    monkeypatch.undo()
    assert "a.h5ad" not in str(error.value)
    assert not files_in(tmp_path / "shards")


# --- several processes ----------------------------------------------------------------------------------------------


def test_another_process_may_be_faster(toy_cells: ToyCells, toy_vocabulary: Vocabulary, tmp_path: Path) -> None:
    adata = toy_cells(20)
    expected = in_memory(adata, toy_vocabulary)
    source = Source("cells", adata, None)

    class Overtaken(Source):
        def open(self):
            encode_sources([source], toy_vocabulary, LONGEST, tmp_path)
            assert not list(tmp_path.glob("*.part")), "the file that is being written was taken away"
            return super().open()

    slow = Overtaken("cells", adata, None)
    slow.__dict__["fingerprint"] = source.fingerprint
    assert_same_cells(encode_sources([slow], toy_vocabulary, LONGEST, tmp_path), expected)
    assert len(files_in(tmp_path)) == 1


def test_encoding_the_same_sources_at_the_same_time_does_no_harm(
    three: list[Path], toy_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    work = (find_sources(three, None), toy_vocabulary, LONGEST, tmp_path / "shards")
    with ThreadPoolExecutor(2) as pool:  # they meet in the folder alone, as processes do
        made = [waiting.result() for waiting in [pool.submit(encode_sources, *work) for _ in range(2)]]
    expected = [cell for path in three for cell in in_memory(ad.read_h5ad(path), toy_vocabulary)]
    for shards in made:
        assert_same_cells(shards, expected)
    assert sorted(name[0] for name in files_in(tmp_path / "shards")) == ["a", "b", "c"]


def test_worker_processes_receive_paths_and_not_tokens(
    three: list[Path], toy_vocabulary: Vocabulary, tmp_path: Path
) -> None:
    shards = encode_sources(find_sources(three, None), toy_vocabulary, LONGEST, tmp_path / "shards")
    sent = pickle.dumps(shards)
    assert len(sent) < 2000
    assert_same_cells(pickle.loads(sent), [shards[at] for at in range(len(shards))])  # noqa: TID251 - our own

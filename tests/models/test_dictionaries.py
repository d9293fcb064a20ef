from __future__ import annotations

import gzip
import os
import pickle
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from gfx.models._vocabulary_file import (
    read_dictionary,
    read_published_vocabulary,
    read_vocabulary,
    write_vocabulary,
)

if TYPE_CHECKING:
    from pathlib import Path

    from gfx._core.vocabulary import Vocabulary

FAMILIES = {"V1": ("gc30M", "gc30M"), "V2": ("gc95M", "gc104M")}  # names of the pickles, and of the same as text


def pickled(folder: Path, content: object, protocol: int = 4) -> Path:
    path = folder / "dictionary.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def published(shared: Path, family: str) -> Vocabulary:
    folder, corpus = shared / "data" / "official", FAMILIES[family][0]
    return read_published_vocabulary(
        family,
        folder / f"token_dictionary_{corpus}.pkl",
        folder / f"gene_median_dictionary_{corpus}.pkl",
        symbols=folder / f"gene_name_id_dict_{corpus}.pkl",
        mapping=folder / f"ensembl_mapping_dict_{corpus}.pkl",
    )


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_and_numpy_numbers_come_back_as_plain_values(tmp_path: Path, protocol: int) -> None:
    content = {
        "text": "ENSG00000000003",
        "int": 7,
        "float": 0.1,
        "int16": np.int16(-12345),
        "uint8": np.uint8(200),
        "float64": np.float64(0.1),
        "float32": np.float32(0.25),
    }
    read = read_dictionary(pickled(tmp_path, content, protocol))
    assert read == content
    assert {type(value) for value in read.values()} == {str, int, float}


def test_big_endian_numbers_keep_their_value(tmp_path: Path) -> None:
    # numpy writes scalars in native order; a pickle from elsewhere says ">" in the state of its dtype
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(pickle.dumps({"gene": np.int16(0x0102)}, protocol=4).replace(b"\x8c\x01<", b"\x8c\x01>"))
    assert read_dictionary(path) == {"gene": 0x0201}


class Runs:
    """Leaves a mark where a pickle was run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_runs_a_program_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    path = pickled(tmp_path, {"ENSG00000000003": Runs(mark)})
    with pytest.raises(ValueError, match=rf"{os.system.__module__}\.system"):
        read_dictionary(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"a": np.array([1.0])}, "_reconstruct"),
        ({"a": pd.Timestamp("2020-01-01")}, "pandas"),
        ({"a": np.datetime64("2020-01-01")}, "M8"),
        ({"a": complex(1)}, "complex"),
        ({"a": {1, 2}}, "set"),
        ({"a": [1]}, "list"),
        ({"a": None}, "NoneType"),
        ({"a": True}, "bool"),
        ({"a": b"raw"}, "bytes"),
        ({1: 2}, "int"),
        (["a"], "list"),
        ("a", "str"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path: Path, content: object, name: str) -> None:
    with pytest.raises(ValueError, match=f"was refused.*{name}"):
        read_dictionary(pickled(tmp_path, content))


@pytest.mark.parametrize("code", ["O8", "V8", "S4", "U4", "f8,i4", "c16"])
def test_numpy_types_that_are_no_numbers_are_refused(tmp_path: Path, code: str) -> None:
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(f"cnumpy\ndtype\n(S'{code}'\nI00\nI01\ntR0}}S'gene'\nI1\ns.".encode())
    with pytest.raises(ValueError, match=rf"numpy\.dtype\('{code}'\)"):
        read_dictionary(path)


def test_broken_pickles_are_named(tmp_path: Path) -> None:
    path = tmp_path / "dictionary.pkl"
    whole = pickle.dumps({f"gene {n}": n for n in range(100)})
    for content in (b"", whole[: len(whole) // 2], b"no pickle at all", b"\x80\x04."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"dictionary\.pkl is not a readable pickle"):
            read_dictionary(path)


def text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


HOSTILE = {
    "deeply nested tuple as key": b"\x80\x04})" + b"\x85" * 200_000 + b"K\x01s.",
    "doubling tuple as key": b"\x80\x04})" + b"q\x00h\x00\x86" * 100 + b"K\x01s.",
    "deeply nested dictionary": b"\x80\x04}" + (text("a") + b"}") * 200_000 + b"s" * 200_000 + b".",
    "dictionary in itself": b"\x80\x04}q\x00" + text("a") + b"h\x00s.",
    "length of 2**33": b"\x80\x04}\x8d" + (1 << 33).to_bytes(8, "little") + b"a.",
    "length of 2**62": b"\x80\x04}\x8d" + (1 << 62).to_bytes(8, "little") + b"a.",
    "bytes of 2**40": b"\x80\x04}\x8e" + (1 << 40).to_bytes(8, "little") + b"a.",
    "number of 2**31 bytes": b"\x80\x04}" + text("a") + b"\x8b" + ((1 << 31) - 1).to_bytes(4, "little") + b"a" + b"s.",
    "memo index of 2**31": b"\x80\x04}" + text("a") + b"r" + (1 << 31).to_bytes(4, "little") + b"j\xff\xff\xff\x7fs.",
    "large number": b"\x80\x04}" + text("a") + b"\x8a\xff" + b"\x7f" * 255 + b"s.",
    "attribute of a dictionary": b"\x80\x04}}" + text("a") + text("b") + b"sb.",
    "call of a number": b"\x80\x04K\x01)R.",
    "persistent id": b"\x80\x04" + text("a") + b"Q.",
    "extension": b"\x80\x04\x82\x01.",
    "buffer": b"\x80\x05\x97.",
    "long tuple, to be given again and again": b"\x80\x04(" + b"N" * 100_000 + b"tq\x00" + b"h\x00" * 1000 + b".",
    "mark that is not there": b"\x80\x04}u.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_dictionary_is_one_error_in_little_time_and_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"dictionary\.pkl (was refused|is not a readable pickle)") as caught:
            read_dictionary(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000
    assert peak < 1_000_000 + 30 * len(content)


def test_a_dictionary_of_more_instructions_than_any_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gfx._core.pickles.MOST_INSTRUCTIONS", 1000)
    assert len(read_dictionary(pickled(tmp_path, {f"gene {n}": n for n in range(300)}))) == 300
    with pytest.raises(ValueError, match="asks for more than 1,000 instructions"):
        read_dictionary(pickled(tmp_path, {f"gene {n}": n for n in range(350)}))


def test_a_dictionary_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "dictionary.pkl"
    with path.open("wb") as file:
        file.truncate(1 << 33)  # takes no place on the disk
    with pytest.raises(ValueError, match=r"dictionary\.pkl was refused: it has more than 67,108,864 bytes"):
        read_dictionary(path)


def test_medians_that_are_none_name_their_file(tmp_path: Path) -> None:
    tokens, medians = tmp_path / "tokens.pkl", tmp_path / "medians.pkl"
    tokens.write_bytes(pickle.dumps({"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2}))
    medians.write_bytes(pickle.dumps({"ENSG00000000003": -2.0}))
    with pytest.raises(ValueError, match=r"tokens\.pkl and .*medians\.pkl make no vocabulary: .*no positive median"):
        read_published_vocabulary("own", tokens, medians)


# --- our table -------------------------------------------------------------------------------------------------------

SOUND = "#made\ntoken\tid\tsymbol\tmedian\taliases\n0\t<pad>\t\t\t\n1\t<mask>\t\t\t\n2\tENSG00000000003\tA\t1.5\tB|C\n"


def test_a_table_is_read_as_it_was_written(tmp_path: Path, toy_vocabulary: Vocabulary) -> None:
    odd = replace(
        toy_vocabulary,
        symbols=np.where(toy_vocabulary.symbols == "TOY3", 'a "quoted"\ttab', toy_vocabulary.symbols),
        n_cells=np.arange(len(toy_vocabulary)),
        gene_types=np.array(["NA"] * len(toy_vocabulary), dtype=object),
    )
    read = read_vocabulary(write_vocabulary(odd, tmp_path))
    for column in ("ids", "medians", "symbols", "n_cells", "gene_types"):
        np.testing.assert_array_equal(getattr(read, column), getattr(odd, column))
    assert (read.name, read.aliases, read.sha256) == (odd.name, odd.aliases, odd.sha256)
    assert read.n_cells.dtype == np.int64


BROKEN_TABLES = {
    "empty": b"",
    "no gzip": SOUND.encode(),
    "cut": gzip.compress(SOUND.encode())[:-12],
    "without its end": gzip.compress(SOUND.encode())[:-4],
    "flipped": bytes(b ^ (n == 40) for n, b in enumerate(gzip.compress(SOUND.encode()))),
    "no text": gzip.compress(b"\xff" * 100),
    "no name": gzip.compress(SOUND[1:].encode()),
    "no columns": gzip.compress(b"#made\n"),
    "other columns": gzip.compress(SOUND.replace("median", "mean").encode()),
    "more columns": gzip.compress(SOUND.replace("aliases", "aliases\tn_cells\tweight").encode()),
    "a row too short": gzip.compress(SOUND.replace("A\t1.5", "1.5").encode()),
    "tokens in disorder": gzip.compress(SOUND.replace("1\t<mask>", "3\t<mask>").encode()),
    "median of text": gzip.compress(SOUND.replace("1.5", "much").encode()),
    "median of 0": gzip.compress(SOUND.replace("1.5", "0").encode()),
    "large field": gzip.compress(SOUND.replace("B|C", "B" * 1_000_000).encode()),
    "bomb": gzip.compress(b"\t" * (1 << 28)),
}


@pytest.mark.parametrize("content", BROKEN_TABLES.values(), ids=BROKEN_TABLES)
def test_a_table_that_is_none_is_one_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vocabulary.tsv.gz"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"vocabulary\.tsv\.gz is no vocabulary that gfx wrote .*Copy or fetch"
    ) as caught:
        read_vocabulary(path)
    assert len(str(caught.value)) < 1000


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dictionary.pkl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:67c4\nsize 425590\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_dictionary(path)


def test_wrong_kinds_of_value_are_refused(tmp_path: Path) -> None:
    tokens, medians = tmp_path / "tokens.pkl", tmp_path / "medians.pkl"
    medians.write_bytes(pickle.dumps({"ENSG00000000003": "2.0"}))
    for numbering, text in (
        ({"<pad>": 0, "<mask>": 1.5}, "maps str to int"),
        ({"<pad>": 0, "<mask>": 2}, "does not number"),
        ({"<pad>": 0, "<mask>": 0}, "does not number"),
        ({"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2}, "maps str to int or float"),
    ):
        tokens.write_bytes(pickle.dumps(numbering))
        with pytest.raises(ValueError, match=text):
            read_published_vocabulary("own", tokens, medians)


def test_published_vocabularies_agree_with_their_text(shared: Path, published: Vocabulary, family: str) -> None:
    exact = {"median": lambda text: float(text or "nan")}  # pandas before 3 is off by a last bit
    file = shared / "data" / "official" / f"vocab_{FAMILIES[family][1]}.csv.gz"
    text = pd.read_csv(file, keep_default_na=False, converters=exact)
    assert published.ids.tolist() == text["ensembl_id"].tolist()
    np.testing.assert_array_equal(published.medians, text["median"].to_numpy())
    without_symbol = (text["symbol"] == "") | (text["symbol"] == text["ensembl_id"])
    assert published.symbols.tolist() == text["symbol"].mask(without_symbol, "").tolist()
    assert published.has_cls == (family == "V2")
    assert set(map(type, published.ids)) == {str}


def test_every_published_name_leads_to_its_gene(shared: Path, published: Vocabulary, family: str) -> None:
    token_of = dict(zip(published.ids, range(len(published)), strict=True))
    for dictionary, keys, n_known in (
        ("ensembl_mapping_dict", "key", {"V1": 25_424, "V2": 91_753}),
        ("gene_name_id_dict", "symbol", {"V1": 21_245, "V2": 20_271}),
    ):
        corpus = FAMILIES[family][1]
        table = pd.read_csv(shared / "data" / "official" / f"{dictionary}_{corpus}.csv.gz", keep_default_na=False)
        expected = [token_of.get(gene, -1) for gene in table["ensembl_id"]]
        found = published.resolve(table[keys])
        np.testing.assert_array_equal(found, expected)
        assert (found >= 0).sum() == n_known[family]


def test_dictionaries_of_two_families_do_not_mix(shared: Path) -> None:
    folder = shared / "data" / "official"
    with pytest.raises(ValueError, match=r"have no median.*different families"):
        read_published_vocabulary(
            "mixed", folder / "token_dictionary_gc30M.pkl", folder / "gene_median_dictionary_gc95M.pkl"
        )

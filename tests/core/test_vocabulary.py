"""Looking genes up, and what is no vocabulary."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gfx._core.vocabulary import CLS, EOS, MASK, PAD, Vocabulary, plain_id


def small(**changes: object) -> Vocabulary:
    fields = {
        "name": "small",
        "ids": np.array([PAD, MASK, CLS, EOS, "ENSG00000000001", "ENSG00000000002"], dtype=object),
        "medians": np.array([np.nan] * 4 + [1.5, 2.5]),
        "symbols": np.array([""] * 4 + ["ONE", "TWO"], dtype=object),
        "aliases": {"UNO": "ENSG00000000001", "ENSG00000000009": "ENSG00000000002", "LOST": "ENSG00000000077"},
    }
    return Vocabulary(**(fields | changes))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("ENSG00000136574.12", "ENSG00000136574"),
        (" ensg00000136574.3 ", "ENSG00000136574"),
        ("ENSMUSG00000021944.5", "ENSMUSG00000021944"),
        ("ENSG00000182378.10_PAR_Y", "ENSG00000182378.10_PAR_Y"),
        ("RP11-34P13.7", "RP11-34P13.7"),
        ("nkx2-5", "NKX2-5"),
    ],
)
def test_plain_id(name, plain):
    assert plain_id(name) == plain


def test_resolves_every_kind_of_name():
    names = ["ENSG00000000001", "ENSG00000000001.7", "ensg00000000002", "ONE", "two", "uno", "ENSG00000000009"]
    assert small().resolve(names).tolist() == [4, 4, 5, 4, 5, 4, 5]
    assert small().resolve(names).dtype == np.int32


def test_unknown_names_and_special_tokens_are_no_genes():
    assert small().resolve(["ENSG00000000077", "LOST", "", PAD, "<CLS>", CLS, "x"]).tolist() == [-1] * 7
    assert small().resolve([]).tolist() == []


def test_published_mapping_wins_over_symbols():
    moved = small(aliases={"ONE": "ENSG00000000002"})
    assert moved.resolve(["ONE"]).tolist() == [5]


def test_knows_its_special_tokens():
    vocab = small()
    assert (vocab.pad, vocab.mask, vocab.cls, vocab.eos, vocab.n_genes, len(vocab)) == (0, 1, 2, 3, 2, 6)
    without = small(
        ids=np.delete(vocab.ids, [2, 3]),
        medians=np.delete(vocab.medians, [2, 3]),
        symbols=np.delete(vocab.symbols, [2, 3]),
    )
    assert (without.has_cls, without.cls, without.eos, without.n_genes) == (False, None, None, 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"medians": np.ones(3)}, "6 ids, 3 medians, 6 symbols; one of each per token"),
        ({"n_cells": np.ones(3)}, "6 ids, 6 medians, 6 symbols, 3 n_cells"),
        ({"ids": np.array([PAD, MASK, CLS, EOS, "A", "A"], dtype=object)}, "names a gene twice"),
        ({"ids": np.array([PAD, MASK, CLS, "E", "A", "B"], dtype=object)}, "lacks special tokens"),
        ({"ids": np.array(["P", MASK, CLS, EOS, "A", "B"], dtype=object)}, "lacks special tokens"),
        ({"medians": np.array([np.nan] * 4 + [1.0, 0.0])}, "1 genes have no positive median, such as"),
        ({"medians": np.array([np.nan] * 4 + [1.0, np.nan])}, "no positive median"),
    ],
)
def test_refuses_what_is_no_vocabulary(changes, text):
    with pytest.raises(ValueError, match=text):
        small(**changes)


def test_symbols_that_genes_share():
    vocab = small(symbols=np.array([""] * 4 + ["ONE", "ONE"], dtype=object))
    assert (vocab.n_with_symbol["ONE"], vocab.n_with_symbol["TWO"]) == (2, 0)
    assert (small().n_with_symbol["ONE"], small().n_with_symbol["TWO"]) == (1, 1)


def test_fingerprint_follows_tokens_and_medians_only():
    vocab = small()
    assert dataclasses.replace(vocab, name="other", aliases={}).sha256 == vocab.sha256
    assert small(medians=np.array([np.nan] * 4 + [1.5, 2.50001])).sha256 != vocab.sha256
    assert small(ids=np.array([PAD, MASK, CLS, EOS, "ENSG00000000001", "X"], dtype=object)).sha256 != vocab.sha256


def test_published_vocabularies(official_v1, official_v2):
    # Token and median of some genes, as the dictionaries have them.
    checks = {
        "ENSG00000136574": ((7261, 5.2215), (7196, 3.2114)),
        "ENSG00000089225": ((1831, 4.7541), (1821, 1.9592)),
        "ENSG00000148400": ((9045, 2.3229), (8964, 1.7932)),
    }
    for name, expected in checks.items():
        for vocab, (token, median) in zip((official_v1, official_v2), expected, strict=True):
            assert vocab.resolve([name, f"{name}.3", name.lower()]).tolist() == [token] * 3
            assert vocab.medians[token] == pytest.approx(median, abs=5e-5)
    symbols = ["GATA4", "TBX5", "NOTCH1"]
    assert official_v1.resolve(symbols).tolist() == [7261, 1831, 9045]
    assert official_v2.resolve(symbols).tolist() == [7196, 1821, 8964]
    assert (official_v1.n_genes, official_v2.n_genes) == (25_424, 20_271)
    assert official_v1.resolve(["MALAT1"]) == official_v2.resolve(["MALAT1"]) == -1

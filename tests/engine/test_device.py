from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import torch

from gfx import settings
from gfx._core.attention import AttentionSums
from gfx._core.edits import Edits
from gfx._engine.attention import sum_attention
from gfx._engine.device import (
    batch_tokens,
    choose_device,
    choose_dtype,
    halving,
    has_fast_bfloat16,
    sum_dtype,
    workers,
)
from gfx._engine.perturb import run_edits
from gfx._engine.pooling import embed_cells, mean_genes, sum_genes, sums_of_genes


def embed_genes(*cells, n_groups, **chosen):
    """Mean hidden state of each gene, and numbers of cells."""
    slots = n_groups * len(cells[-1])
    means, counts = mean_genes(*sums_of_genes([sum_genes(*cells, n_groups=n_groups, **chosen)], slots), n_groups)
    return means[:-1], counts[:-1]


def attention_of(encoder, ids, lengths, vocabulary):
    """Mean attention over all cells."""
    result = sum_attention(encoder, ids, lengths, vocabulary, unit=np.zeros(len(ids), dtype=np.int64), n_units=1)
    return AttentionSums.of([result], 1, len(vocabulary)).means(np.array([0]))


CPU = torch.device("cpu")

#: Of a network that is wide enough for bfloat16 to be faster.
WIDTH = 256


def test_choose_device():
    assert choose_device("cpu") == CPU
    with settings.override(device="cpu"):
        assert choose_device(None) == CPU
    assert choose_device(None).type in {"cpu", "cuda", "mps"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="This torch sees no cuda device"):
        choose_device("cuda:0")
    with settings.override(device="cuda"), pytest.raises(ValueError, match="no cuda device"):
        choose_device(None)


@pytest.mark.parametrize("n", [1, 2])
def test_a_device_of_a_number_that_is_not_there(monkeypatch, n):
    """As on a machine with so many."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    assert choose_device(f"cuda:{n - 1}") == torch.device("cuda", n - 1)
    with pytest.raises(ValueError, match=rf"sees {n} cuda device\(s\), numbered from 0, and no 'cuda:7'"):
        choose_device("cuda:7")


def test_choose_dtype():
    assert choose_dtype("float16", CPU, WIDTH) == torch.float16
    assert choose_dtype(None, CPU, WIDTH) == (torch.bfloat16 if has_fast_bfloat16(CPU) else torch.float32)
    assert choose_dtype(None, torch.device("mps"), WIDTH) == torch.float32
    with pytest.raises(ValueError, match=r"`dtype` is one of \['float32', 'bfloat16', 'float16'\], found 'int8'"):
        choose_dtype("int8", CPU, WIDTH)


def cpu_with(monkeypatch, **capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


def test_bfloat16_by_name_warns_on_a_cpu_without_instructions_for_it(monkeypatch):
    cpu_with(monkeypatch, amx_bf16=False, avx512_bf16=False)
    with pytest.warns(UserWarning, match=r'5 to 9 times slower .*Set `gfx\.settings\.dtype = "float32"`') as caught:
        assert choose_dtype("bfloat16", CPU, WIDTH) == torch.bfloat16
    assert [warning.filename for warning in caught] == [__file__], "told at the line that asked for it"


def test_bfloat16_by_name_warns_once_for_each_line(monkeypatch):
    cpu_with(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            choose_dtype("bfloat16", CPU, WIDTH)
        choose_dtype("bfloat16", CPU, WIDTH)
    assert len(caught) == 2


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16"])
def test_bfloat16_is_no_warning_where_the_cpu_has_instructions_for_it(monkeypatch, capability):
    cpu_with(monkeypatch, **{capability: True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_dtype("bfloat16", CPU, WIDTH) == torch.bfloat16


@pytest.mark.parametrize(("width", "expected"), [(128, torch.float32), (WIDTH, torch.bfloat16)])
def test_width_decides_on_a_cpu_with_matrix_units(monkeypatch, width, expected):
    cpu_with(monkeypatch, amx_bf16=True)
    assert choose_dtype(None, CPU, width) == expected
    assert choose_dtype("bfloat16", CPU, width) == torch.bfloat16, "as it was asked for"


def test_width_does_not_matter_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert choose_dtype(None, torch.device("cuda"), 16) == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_only_bfloat16_by_name_warns(monkeypatch, dtype):
    cpu_with(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_dtype(dtype, CPU, WIDTH)
        choose_dtype("bfloat16", torch.device("mps"), WIDTH)


def test_sums_are_double_where_there_is_double():
    assert sum_dtype(CPU) == torch.float64
    assert sum_dtype(torch.device("mps")) == torch.float32


def test_batch_tokens_follow_the_setting():
    assert batch_tokens(CPU) > 1000
    with settings.override(batch_tokens=77):
        assert batch_tokens(CPU) == 77
    with pytest.raises(ValueError, match="above 0"):
        settings.batch_tokens = 0


# --- out of memory --------------------------------------------------------------------------------------------------


def allocate_too_much() -> None:
    """Ask the CPU for a petabyte: the error that users see there."""
    torch.empty(10**15, dtype=torch.uint8)


def raise_out_of_memory() -> None:
    """What CUDA raises."""
    msg = "CUDA out of memory. Tried to allocate 20.00 GiB."
    raise torch.OutOfMemoryError(msg)


FAILURES = [allocate_too_much, raise_out_of_memory]


def at_most(n_cells, encoder, fail=raise_out_of_memory):
    """Let the encoder fail for more cells at a time than `n_cells`; returns the sizes it was given."""
    sizes = []

    def check(_module, inputs):
        sizes.append(len(inputs[0]))
        if sizes[-1] > n_cells:
            fail()

    encoder.encoder.layer[0].intermediate.dense.register_forward_pre_hook(check)  # once a pass, however it is run
    return sizes


def everything(toy, encoder):
    """All that the engine computes, as arrays."""
    cells = toy.ids, toy.lengths, toy.vocabulary
    genes = np.flatnonzero(~toy.vocabulary.is_special)
    group = np.arange(len(toy.ids)) % 3
    sets = [genes[:1], genes[1:2], genes[:2]]
    cell, which = np.nonzero([[set(one) <= set(row) and len(row) > 4 for one in sets] for row in toy.cells()])
    goals = np.eye(2, 16)
    deleted = run_edits(
        encoder,
        *cells,
        Edits("delete", sets, cell, which),
        how="mean",
        positions="close",
        split=True,
        goals=goals,
        gene_groups=which,
        keep_vectors=True,
    )
    attention = attention_of(encoder, *cells)
    return [
        embed_cells(encoder, *cells, how="mean"),
        *embed_genes(encoder, *cells, group=group, n_groups=3),
        *deleted.values(),
        *attention.values(),
    ]


@pytest.mark.parametrize("fail", FAILURES)
def test_what_does_not_fit_is_halved_and_nothing_changes(toy, fail):
    expected = everything(toy, toy.encoder())
    encoder = toy.encoder()
    sizes = at_most(2, encoder, fail)
    found = everything(toy, encoder)
    assert max(sizes) > 2  # it did fail
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("fail", FAILURES)
def test_a_cell_that_does_not_fit_by_itself(toy, fail):
    encoder = toy.encoder()
    at_most(0, encoder, fail)
    with pytest.raises(RuntimeError, match="A single cell does not fit in memory") as caught:
        embed_cells(encoder, toy.ids, toy.lengths, toy.vocabulary, how="mean")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_other_errors_pass_and_are_not_tried_again(toy):
    encoder = toy.encoder()
    calls = []

    def check(_module, inputs):
        calls.append(inputs)
        msg = "expected scalar type Float"
        raise RuntimeError(msg)

    encoder.encoder.layer[0].intermediate.dense.register_forward_pre_hook(check)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        embed_cells(encoder, toy.ids, toy.lengths, toy.vocabulary, how="mean")
    assert len(calls) == 1


def test_halving_keeps_the_order_and_tells_once(capsys):
    done = []

    def run(batch):
        if len(batch) > 2:
            raise_out_of_memory()
        done.extend(batch.tolist())
        return batch.sum()

    with settings.override(verbosity=2):
        pairs = list(halving([np.arange(7), np.arange(7, 12)], run))
    assert done == list(range(12))
    assert all(batch.sum() == total for batch, total in pairs)
    assert capsys.readouterr().out == "out of memory with 7 cells at a time: halving\n"


def test_halving_keeps_the_order_among_workers(threads):
    threads(2)

    def run(batch):
        if len(batch) > 2:
            raise_out_of_memory()
        return batch.sum()

    with workers(2) as mapped:
        pairs = list(halving([np.arange(7), np.arange(7, 9), np.arange(9, 14)], run, mapped))
    assert np.concatenate([batch for batch, _ in pairs]).tolist() == list(range(14))
    assert all(batch.sum() == total for batch, total in pairs)


@pytest.mark.parametrize(("n", "each"), [(1, 4), (2, 2), (3, 1), (4, 1)])
def test_workers_share_the_threads_and_give_them_back(threads, n, each):
    threads(4)

    def square(x):
        return x * x, torch.get_num_threads()

    with workers(n) as mapped:
        found = list(mapped(square, list(range(20))))
        assert torch.get_num_threads() == each, "where results are taken, too"
    assert found == [(x * x, each) for x in range(20)]
    assert torch.get_num_threads() == 4


def test_workers_begin_few_batches_before_results_are_taken(threads):
    """Results of many batches would not fit in memory together."""
    threads(2)
    begun = []
    with workers(2) as mapped:
        results = mapped(begun.append, range(100))
        for n_taken, _ in enumerate(results):
            assert len(begun) <= n_taken + 4
    assert sorted(begun) == list(range(100))


def test_a_failing_worker_stops_the_others_and_gives_the_threads_back(threads):
    threads(2)
    begun = []

    def fail(x):
        begun.append(x)
        if x > 0:
            time.sleep(0.01)  # batches that take no time might all be done before the first one is heard of
        msg = f"batch {x}"
        raise ValueError(msg)

    with pytest.raises(ValueError, match="batch 0"), workers(2) as mapped:
        list(mapped(fail, list(range(200))))
    assert len(begun) < 200
    assert torch.get_num_threads() == 2

"""Where a model runs, in which precision, and what happens when memory runs out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gfx import _log
from gfx._core.arguments import check_choice
from gfx._core.batching import ahead, batches_by_length
from gfx._settings import DTYPES as PRECISIONS
from gfx._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy as np

T = TypeVar("T")
U = TypeVar("U")

DTYPES = {name: getattr(torch, name) for name in PRECISIONS}

#: Padded tokens in one forward pass: what keeps a device busy without filling its memory.
_BATCH_TOKENS = {"cpu": 16_384, "mps": 32_768, "cuda": 131_072}

#: Tokens in a pass that a CPU still runs out of its cache; more are slower, and take more memory.
_CACHED_TOKENS = 4_096

#: Width of a network from which on bfloat16 is faster on a CPU with matrix units: measured at 128 and 256.
_WIDE = 256

#: Cells of different lengths are padded to share a pass of a CPU until it has so many tokens.
_MIXED_TOKENS = 1_024


def choose_devices() -> list[torch.device]:
    """Take the devices of the settings, else CUDA, MPS or the CPU, whichever is there first."""
    named = settings.device
    if named is None:
        named = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return [_available(name) for name in ([named] if isinstance(named, str) else named)]


def choose_device(device: str | None = None) -> torch.device:
    """Take the named device, else the first of :func:`choose_devices`."""
    return choose_devices()[0] if device is None else _available(device)


def _available(name: str) -> torch.device:
    kind = name.partition(":")[0]
    try:
        device = torch.device(name)
        n_there = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
        n_there |= {"cpu": 1, "mps": int(torch.backends.mps.is_available())}
        if kind not in n_there:
            torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        msg = f"This torch cannot use {name!r}. Set `gfx.settings.device = None` to run on what is there. ({error})"
        raise ValueError(msg) from error
    n = n_there.get(kind)
    if n is not None and (device.index or 0) >= n:
        seen = f"{n} {kind} device(s), numbered from 0, and no {name!r}" if n else f"no {kind} device"
        msg = f"This torch sees {seen}. Set `gfx.settings.device = None` to run on what is there."
        raise ValueError(msg)
    return device


def has_fast_bfloat16(device: torch.device, *, own_attention: bool = False) -> bool:
    """Whether bfloat16 is reliably fast, with fused attention: on CUDA, and on CPUs with matrix units (AMX).

    With attention of our own (:func:`gfx._engine.blocks.attend`), also on CPUs with AVX-512 instructions for it, on
    which torch's fused attention takes between half and eight times as long as in float32, from one run to the next.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        find: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # older torch cannot tell
        return bool(find().get("amx_bf16") or (own_attention and find().get("avx512_bf16")))
    return False


def choose_dtype(dtype: str | None, device: torch.device, width: int) -> torch.dtype:
    """Take the named precision, with a warning where a CPU has no instructions for it; `None` is the faster one.

    `width` is that of the network's vectors. A CPU prepares bfloat16 products anew for cells of every length, which
    took longer than narrow products save.
    """
    if dtype is None:
        is_narrow = device.type == "cpu" and width < _WIDE
        return torch.bfloat16 if has_fast_bfloat16(device) and not is_narrow else torch.float32
    check_choice(dtype, "dtype", DTYPES)
    if dtype == "bfloat16" and device.type == "cpu" and not has_fast_bfloat16(device, own_attention=True):
        _log.warn(
            "This CPU has no instructions for bfloat16, which was measured to be 5 to 9 times slower than float32 on "
            'such a CPU. Set `gfx.settings.dtype = "float32"`.'
        )
    return DTYPES[dtype]


def batch_tokens(device: torch.device) -> int:
    """Say how many padded tokens one forward pass takes."""
    return settings.batch_tokens or _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cpu"])


def sum_dtype(device: torch.device) -> torch.dtype:
    """Precision of running sums: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def passes(lengths: np.ndarray, device: torch.device) -> list[np.ndarray]:
    """Share cells out to passes of the network, longest first: the numbers of the cells of each.

    Passes of a CPU are small, and hold cells of one length, which need no mask, unless these are short.
    """
    limit = batch_tokens(device)
    if device.type != "cpu":
        return batches_by_length(lengths, limit)
    n_passes = max(1, limit // _CACHED_TOKENS)  # whatever the number of threads
    mixed = min(limit, _MIXED_TOKENS)
    most = min(limit, _CACHED_TOKENS, max(mixed, -(-int(lengths.sum()) // n_passes)))
    return batches_by_length(lengths, most, mixed_tokens=mixed)


def n_workers(device: torch.device) -> int:
    """Count the workers that run :func:`passes` at a time: on a CPU as many as there are threads, within a batch."""
    if device.type != "cpu":
        return 1
    return min(torch.get_num_threads(), max(1, batch_tokens(device) // _CACHED_TOKENS))


@contextmanager
def workers(n: int) -> Iterator[Callable[[Callable[[T], U], Iterable[T]], Iterator[U]]]:
    """Share the CPU's threads out to `n` workers; gives what maps batches over them, results in order.

    Threads that share each operation of one small batch wait for each other at each, and longer where another program
    takes turns with one of them. With a batch each they do not. All workers, and the thread that takes their results,
    have equally many threads: sums round as these are many, and any worker may take any batch.
    Batches are begun as results are taken, so that few of these are in memory.
    """
    if n == 1:
        yield map
        return
    n_threads = torch.get_num_threads()
    torch.set_num_threads(n_threads // n)
    try:
        with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(n_threads // n,)) as pool:

            def mapped(function: Callable[[T], U], batches: Iterable[T]) -> Iterator[U]:
                submitted = ((batch, pool.submit(function, batch)) for batch in batches)
                return (result for _, result in ahead(submitted, 2 * n))

            yield mapped
    finally:
        torch.set_num_threads(n_threads)


#: How allocators say it that do not raise torch.OutOfMemoryError: CPU on Linux, CPU on Windows, MPS.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "MPS backend out of memory")


def ran_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def halving(
    batches: list[np.ndarray], run: Callable[[np.ndarray], T], mapped: Callable[..., Iterator[Any]] = map
) -> Iterator[tuple[np.ndarray, T]]:
    """Run every batch; one that does not fit in memory is cut in two and run again.

    All that `run` does for a batch must be undone by its failing: it adds to nothing, and writes only what a repetition
    overwrites. `mapped` maps it over batches, as :func:`workers` do.
    """
    is_known = False

    def attempt(batch: np.ndarray) -> T | RuntimeError:
        try:
            return run(batch)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            return error.with_traceback(None)  # which would keep what the attempt has made

    def finish(batch: np.ndarray, result: T | RuntimeError) -> Iterator[tuple[np.ndarray, T]]:
        nonlocal is_known
        if not isinstance(result, RuntimeError):
            yield batch, result
            return
        if len(batch) == 1:
            msg = (
                "A single cell does not fit in memory. Use a smaller model, fewer genes per cell (a model with a "
                "shorter input), or another device."
            )
            raise RuntimeError(msg) from result
        if not is_known:
            _log.info(f"out of memory with {len(batch)} cells at a time: halving")
        is_known = True
        half = len(batch) // 2
        for part in (batch[:half], batch[half:]):
            yield from finish(part, attempt(part))

    for batch, result in zip(batches, mapped(attempt, batches), strict=True):
        yield from finish(batch, result)

"""Where a model runs, in which precision, and what happens when memory runs out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from gfx import _log
from gfx._settings import DTYPES as PRECISIONS
from gfx._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

T = TypeVar("T")
U = TypeVar("U")

DTYPES = {name: getattr(torch, name) for name in PRECISIONS}

#: Padded tokens in one forward pass: what keeps a device busy without filling its memory.
_BATCH_TOKENS = {"cpu": 16_384, "mps": 32_768, "cuda": 131_072}


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
    device = torch.device(name)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(device.type, True)
    if not there:
        msg = f"This torch sees no {device.type} device. Set `gfx.settings.device = None` to run on what is there."
        raise ValueError(msg)
    return device


def has_fast_bfloat16(device: torch.device, *, own_attention: bool = False) -> bool:
    """Whether bfloat16 is reliably faster than float32: on CUDA, and on CPUs with matrix units (AMX).

    With attention of our own (:func:`gfx._engine.blocks.attend`), also on CPUs with AVX-512 instructions for it, on
    which torch's fused attention takes between half and eight times as long as in float32, from one run to the next.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        find = getattr(torch.cpu, "get_capabilities", dict)  # older torch cannot tell
        return bool(find().get("amx_bf16") or (own_attention and find().get("avx512_bf16")))
    return False


def choose_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Take the named precision, with a warning where a CPU has no instructions for it; `None` is the fastest one."""
    if dtype is None:
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        msg = f"`dtype` is one of {list(DTYPES)}, found {dtype!r}."
        raise ValueError(msg)
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


@contextmanager
def workers(n: int) -> Iterator[Callable[[Callable[[T], U], list[T]], Iterator[U]]]:
    """Share the CPU's threads out to `n` workers; gives what maps batches over them, results in order.

    Threads that share each operation of one small batch wait for each other at each. With a batch each they do not.
    """
    if n == 1:
        yield map
        return
    n_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(n_threads // n,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(n_threads)  # each of them set it for threads to come, too


#: How allocators say it that do not raise torch.OutOfMemoryError: CPU on Linux, CPU on Windows, MPS.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "MPS backend out of memory")


def ran_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def halving(batches: list[np.ndarray], run: Callable[[np.ndarray], T]) -> Iterator[tuple[np.ndarray, T]]:
    """Run every batch; one that does not fit in memory is cut in two and run again.

    All that `run` does for a batch must be undone by its failing: it adds to nothing, and writes only what a repetition
    overwrites.
    """
    waiting, is_known = list(reversed(batches)), False
    while waiting:
        batch = waiting.pop()
        try:
            result = run(batch)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            if len(batch) == 1:
                msg = (
                    "A single cell does not fit in memory. Use a smaller model, fewer genes per cell (a model with a "
                    "shorter input), or another device."
                )
                raise RuntimeError(msg) from error
            if not is_known:
                _log.info(f"out of memory with {len(batch)} cells at a time: halving")
            is_known = True
            half = len(batch) // 2
            waiting += [batch[half:], batch[:half]]
            continue
        yield batch, result

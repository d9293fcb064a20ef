"""What training leaves alone: the user's random numbers, and a screen where nothing is to be shown."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from gfx import _log
from gfx._engine.device import choose_device

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def quiet_surroundings() -> Iterator[None]:
    """Give random numbers and the device back as they were, and let transformers say and draw no more than we do."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(max(level, _log.logger.getEffectiveLevel()))
    if bars:  # they are about files that are read and written in no time
        transformers_logging.disable_progress_bar()
    # One process trains on one device; to name it keeps torch from touching, and warning of, all others.
    current = torch.cuda.current_device() if torch.cuda.is_available() else None
    devices = [] if current is None else [current]
    if current is not None and (chosen := choose_device(None)).type == "cuda":
        devices = sorted({current, chosen.index or 0})  # the first one is the Trainer's where none is named
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if current is not None:  # the Trainer makes the first one current
            torch.cuda.set_device(current)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()

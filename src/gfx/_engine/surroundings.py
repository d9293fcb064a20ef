"""What training leaves alone: the user's random numbers on every device, the current device, and an empty screen."""

from __future__ import annotations

import logging
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from gfx import _log

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Warns of the file system where two checkpoints are less than a second apart, as they are in a short training.
_OF_CHECKPOINTS = logging.getLogger("transformers.trainer_utils")


@contextmanager
def quiet_surroundings() -> Iterator[None]:
    """Give random numbers and the device back as they were, and let transformers say and draw no more than we do."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    level_of_checkpoints = _OF_CHECKPOINTS.level
    _OF_CHECKPOINTS.setLevel(logging.ERROR)
    transformers_logging.set_verbosity(max(level, _log.logger.getEffectiveLevel()))
    if bars:  # they are about files that are read and written in no time
        transformers_logging.disable_progress_bar()
    # The Trainer seeds every GPU that it sees, whichever of them trains; to name them keeps torch from a warning.
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    current = torch.cuda.current_device() if gpus else None
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)
        if current is not None:  # the Trainer makes the first one current
            torch.cuda.set_device(current)
        transformers_logging.set_verbosity(level)
        _OF_CHECKPOINTS.setLevel(level_of_checkpoints)
        if bars:
            transformers_logging.enable_progress_bar()

"""The "gfx" logger: our messages only, never the root logger's business."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

LEVELS = {0: logging.ERROR, 1: logging.WARNING, 2: logging.INFO, 3: logging.INFO - 5, 4: logging.DEBUG}

_PACKAGE = Path(__file__).parent

logger = logging.getLogger("gfx")


class _StdoutHandler(logging.StreamHandler):
    """Write where `print` writes now, so that notebooks and captured output show the messages in place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stdout


def set_verbosity(level: int) -> None:
    """Show messages up to `level`: 0 errors, 1 warnings, 2 info, 3 hints, 4 debug."""
    logger.setLevel(LEVELS[level])
    if not logger.handlers:
        handler = _StdoutHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


#: Say what was done.
info = logger.info


def warn(message: str) -> None:
    """Warn at the line outside gfx that led here, so that Python shows the warning once for each such line."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def shows_progress() -> bool:
    """Whether a progress bar is wanted: whenever info messages are."""
    return logger.isEnabledFor(logging.INFO)

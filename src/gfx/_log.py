"""The "gfx" logger and progress bars: our messages only, never the root logger's business."""

from __future__ import annotations

import logging
import sys
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

if TYPE_CHECKING:
    from tqdm import tqdm

LEVELS = {0: logging.ERROR, 1: logging.WARNING, 2: logging.INFO, 3: logging.INFO - 5, 4: logging.DEBUG}

_PACKAGE = Path(__file__).parent

#: Letters in a line of a message: what a page and a notebook show without scrolling.
_WIDTH = 88

logger = logging.getLogger("gfx")


class _StdoutHandler(logging.StreamHandler):
    """Write where `print` writes now, so that notebooks and captured output show the messages in place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stdout


class _Lines(logging.Formatter):
    """Break messages into lines of the width of a page."""

    def format(self, record: logging.LogRecord) -> str:
        how = {"width": _WIDTH, "break_long_words": False, "break_on_hyphens": False}
        return "\n".join(textwrap.fill(line, **how) for line in super().format(record).split("\n"))


def set_verbosity(level: int) -> None:
    """Show messages up to `level`: 0 errors, 1 warnings, 2 info; 3 and 4, hints and details in scanpy, add none."""
    logger.setLevel(LEVELS[level])
    if not logger.handlers:
        handler = _StdoutHandler()
        handler.setFormatter(_Lines("%(message)s"))
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


# --- progress bars --------------------------------------------------------------------------------------------------


def shows_progress() -> bool:
    """Whether a progress bar is wanted: whenever info messages are."""
    return logger.isEnabledFor(logging.INFO)


def progress(total: int, description: str, unit: str, *, is_hidden: bool = False) -> tqdm:
    """Make a progress bar, which appears if a call takes longer than a second and goes when it ends."""
    from tqdm import tqdm

    look = {"desc": description, "unit": unit, "leave": False, "delay": 1}
    if file := _CellOutput.of_notebook():
        look |= {"file": file, "position": 0}
    return tqdm(total=total, disable=is_hidden or not shows_progress(), **look)


class _CellOutput:
    """What a progress bar writes to in a notebook: one output of the cell, which is empty when the bar has ended.

    A stored notebook would keep all states of a bar on stderr, and the first state of a widget. While a bar is shown,
    no other is, so that a call has one bar.
    """

    encoding = "utf-8"
    _writer: ClassVar[_CellOutput | None] = None
    _place: ClassVar[tuple[int, str]] = 0, ""  # number of the cell, and the name of its output

    def __init__(self, shell: Any) -> None:
        self._shell = shell

    @classmethod
    def of_notebook(cls) -> _CellOutput | None:
        """Find the notebook that runs this process, if there is one."""
        ipython = sys.modules.get("IPython")
        shell = None if ipython is None else ipython.get_ipython()
        return cls(shell) if hasattr(shell, "kernel") else None

    def write(self, text: str) -> None:
        """Show a state of the bar; an empty one ends it."""
        here, line = _CellOutput, text.strip()
        cell, name = here._place
        is_new = cell != self._shell.execution_count
        if not (is_new or here._writer in {None, self}) or (is_new and not line):
            return
        if is_new:
            here._place = _, name = self._shell.execution_count, uuid4().hex
        here._writer = self if line else None
        state = {"text/plain": line} if line else {"text/plain": "", "text/html": ""}
        self._shell.display_pub.publish(state, transient={"display_id": name}, update=not is_new)

    def flush(self) -> None:
        """Do nothing: each state is shown at once."""

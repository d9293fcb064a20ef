"""Screens cells in processes that a test may kill; what takes seconds is done once, before they are forked.

Each line of input is a JSON of `cells`, the path of an h5ad file, `arguments`, `kill_at`, the number of finished blocks
to wait for, and `kill_after`, the seconds to wait then before it is killed. The answer says how it ended: 0, or minus
the signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import anndata as ad
import torch
import zarr  # noqa: F401 - loaded here, so that children need not

import gfx


def screen(cells: str, arguments: dict[str, object]) -> int:
    """Screen in a child, and return its process."""
    child = os.fork()
    if child:
        return child
    try:
        gfx.tl.screen_genes(ad.read_h5ad(cells), **arguments)
    except BaseException:  # noqa: BLE001 - nothing may go on in the child
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def n_finished(store: Path) -> int:
    """Count the blocks of the model and of random weights that are there."""
    return len(
        [block for job in ("model", "random_weights") for block in store.glob(f"{job}/*") if block.name.isdecimal()]
    )


def main(cells: str, model: str) -> None:
    torch.set_num_threads(1)
    # Compiles and loads all that is needed; no store, whose threads would not be in the children.
    gfx.tl.screen_genes(ad.read_h5ad(cells), model=model, genes=["TOY90"], controls=None)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        child = screen(asked["cells"], asked["arguments"])
        while n_finished(Path(asked["arguments"]["store"])) < asked["kill_at"]:
            time.sleep(0.001)
        time.sleep(asked["kill_after"])
        os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

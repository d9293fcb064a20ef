"""Use damaged files one after the other, in a process with little memory and time; a line of JSON says how each ended.

Run by `test_damaged_files.py`: ``python damaged_files_child.py FOLDER SEED NUMBER``. The folder holds whole files.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

import gfx

#: Bytes of memory beyond those of a process that has embedded cells, and seconds, for each file.
MEMORY, SECONDS = 1 << 30, 20

HOSTILE_VALUES = (
    0,
    -1,
    1,
    2.5,
    10**12,
    2**62,
    1e308,
    None,
    True,
    "",
    "x" * 1000,
    [],
    [[]] * 3,
    {},
    {"a": [1]},
    "../..",
)


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flip, overwrite, insert, repeat or swap something."""
    size = len(content)
    start, stop = sorted(rng.integers(0, size + 1, 2).tolist())
    noise = rng.bytes(int(rng.integers(1, 40)))
    match rng.integers(8):
        case 0:
            return content[:start]
        case 1:
            return content[stop:]
        case 2:
            return content[:start] + content[stop:]
        case 3:
            return content[:start] + noise + content[start:]
        case 4:
            fill = (b"\0", b"\xff", b"[", b"\x7f")[rng.integers(4)]
            stop = min(stop, start + 64)
            return content[:start] + fill * (stop - start) + content[stop:]
        case 5:
            return content[:stop] + content[start:]
        case 6:
            return content[: min(start, 8)] + noise + content[min(start, 8) + len(noise) :]
    flipped = bytearray(content)
    for place in rng.integers(0, min(size, int(rng.choice([16, 200, size]))), int(rng.integers(1, 6))):
        flipped[place] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


def damage_json(content: bytes, rng: np.random.Generator) -> bytes:
    """Put a hostile value, or nothing, in the place of one that is somewhere in it."""
    whole = json.loads(content)
    places: list[tuple[Any, Any]] = []
    waiting = [whole]
    while waiting:
        holder = waiting.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder))
        places += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    holder, key = places[rng.integers(len(places))]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = HOSTILE_VALUES[rng.integers(len(HOSTILE_VALUES))]
    return json.dumps(whole).encode()


def use(adata: ad.AnnData, kind: str, folder: Path) -> None:
    """Embed cells with a model, go on with a store, or predict with a classifier."""
    if kind == "store":
        gfx.tl.embed(adata, model=folder.parent / "model", store=folder)
    elif kind == "of_genes":
        gfx.tl.predict_genes(adata, folder)
    elif kind == "of_cells":
        gfx.tl.predict_cells(adata, folder)
    else:
        gfx.tl.embed(adata, model=folder)


def outcome(adata: ad.AnnData, kind: str, folder: Path, file: Path) -> str:
    """Say what is wrong with how it ended; nothing if it is as it should be."""
    try:
        use(adata, kind, folder)
    except ValueError as error:
        text = str(error)
        if adata.obsm or adata.varm:
            return "the object was changed"
        # A vocabulary of another size is named by the name within it.
        named = any(name in text for name in (file.name, str(folder), repr(folder.name)))
        return "" if named and len(text) < 3000 else f"unclear: {text[:1000]}"
    except BaseException:  # noqa: BLE001 - what else comes is what is looked for
        return traceback.format_exc()[-1500:]
    if kind == "of_genes":  # genes that no cell has are without a value
        result = adata.varm["gfx_predicted_genes"][adata.var["gfx_predicted_genes_n_cells"] > 0]
    else:
        result = adata.obsm["gfx_predicted_cells" if kind == "of_cells" else "X_gfx"]
    return "" if np.isfinite(result).all() else "results without a value"


def main(root: Path, seed: int, number: int) -> None:
    cells = ad.read_h5ad(root / "cells.h5ad")
    warnings.simplefilter("ignore")
    gfx.settings.verbosity = 0
    kinds = ("model", "pickled", "dictionaries", "of_genes", "of_cells", "store")
    for kind in kinds[:-1]:
        use(cells.copy(), kind, root / kind)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rng = np.random.default_rng(seed)
    originals = [(kind, path) for kind in kinds for path in sorted((root / kind).rglob("*")) if path.is_file()]
    for case in range(number):
        kind, original = originals[rng.integers(len(originals))]
        folder = root / "damaged"
        shutil.copytree(root / kind, folder)
        file = folder / original.relative_to(root / kind)
        content = file.read_bytes()
        is_json = file.suffix == ".json" and rng.random() < 0.7
        file.write_bytes(damage_json(content, rng) if is_json else damage(content, rng))
        print(json.dumps({"case": case, "file": f"{kind}/{original.relative_to(root / kind)}"}), flush=True)
        signal.alarm(SECONDS)
        wrong = outcome(cells.copy(), kind, folder, file)
        signal.alarm(0)
        print(json.dumps({"case": case, "wrong": wrong}), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

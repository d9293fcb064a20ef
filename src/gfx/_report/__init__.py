"""One page of all results, which `gfx.get` hands out as :func:`gfx.get.report`.

`_sections` says what there is to tell of each kind of result, `_page` formats tables and figures and fills `page.html`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gfx._adata import pick
from gfx._core.manifest import write_whole
from gfx._docs import shared
from gfx._report._page import render
from gfx._report._sections import checksums, overview, sections
from gfx._results import TABLE, made_by

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData

    from gfx._types import Data

_SUFFIXES = (".html", ".htm")


@shared()
def report(
    adata: Data,
    path: str | Path,
    *,
    key: str | Sequence[str] | None = None,
    names: str | None = None,
    mod: str | None = None,
) -> None:
    """Write all results of an object, with their controls and limitations, as one HTML file.

    The file needs no network and no other file: figures are inside. It says which data and which model were used; then,
    for each result, what the controls say, the strongest effects beside their null distributions and baselines,
    figures, what may be concluded and what may not, and the parameters; at the end checksums, versions and what to
    cite. A warning is given where a control is missing or explains the effect. Results that have no control, such as
    embeddings, are listed as such.

    Nothing is computed anew: use the tables of `gfx.get` for all genes or perturbations, of which the report shows
    the first. The same object gives the same file. Cost: one pass over the counts for their checksum, and a second or
    two for each result.

    Parameters
    ----------
    adata
        Cells with at least one result of `gfx.tl`.
    path
        File to write, which ends in `.html`. An existing file is replaced once the new one is complete.
    key
        The `key_added`, or default name, of the result to report, or several. `None` reports all.
    {names}
    {mod}

    Returns
    -------
    `None`. Writes the file.

    Raises
    ------
    KeyError
        There is no result, none of this name, or no such column in `var`.
    ValueError
        The file does not end in `.html`.
    FileNotFoundError
        There is no such folder.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.ifnb()[::56].copy()
    >>> genes = ["ISG15", "B2M", "FTL"]
    >>> pairs = [("ISG15", "B2M"), ("ISG15", "FTL"), ("B2M", "FTL")]
    >>> gfx.tl.delete_genes(adata, genes + pairs, model="mini", n_random=10)
    >>> gfx.get.report(adata, "report.html")
    """
    path = _checked(path)
    adata = pick(adata, mod)
    keys = _chosen(adata, key)
    told = sections(adata, keys, names)
    write_whole(path, render(told, overview(adata, told), checksums(adata, told)))


def _checked(path: str | Path) -> Path:
    """Refuse what cannot be written before anything is drawn."""
    if not isinstance(path, str | os.PathLike):
        msg = f"`path` is where to write the report, such as 'report.html'; found a {type(path).__name__}."
        raise TypeError(msg)
    path = Path(path).expanduser()
    if path.suffix.lower() not in _SUFFIXES:
        msg = f"A report is an HTML file; found `path={str(path)!r}`. Give a name that ends in '.html'."
        raise ValueError(msg)
    if path.is_dir():
        msg = f"{path} is a folder. Give the name of a file in it, such as '{path / 'report.html'}'."
        raise IsADirectoryError(msg)
    if not path.parent.is_dir():
        msg = f"There is no folder {path.parent}. Make it first, or choose another `path`."
        raise FileNotFoundError(msg)
    return path


def _chosen(adata: AnnData, key: str | Iterable[str] | None) -> list[str]:
    """Names of the results to report: those asked for, or all but tokens, which every result is made of."""
    present = [str(name) for name, entry in adata.uns.items() if made_by(entry) in TABLE]
    present = [name for name in present if made_by(adata.uns[name]) != "pp.tokenize"]
    if not present:
        msg = "There is no result to report. Run one of `gfx.tl` first, such as `gfx.tl.delete_genes(adata, ...)`."
        raise KeyError(msg)
    if key is None:
        return present
    wanted = [key] if isinstance(key, str) else list(dict.fromkeys(key))
    if missing := [name for name in wanted if name not in present]:
        msg = f"Did not find the results {missing}. Present: {sorted(present)}."
        raise KeyError(msg)
    if not wanted:
        msg = f"`key` names no result. Leave it out for all of them: {sorted(present)}."
        raise ValueError(msg)
    return wanted

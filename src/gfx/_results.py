"""What gfx writes into an AnnData: the names of all slots, who owns them, how they are written and found again.

A tool claims its slots before it computes, and writes them when everything is computed::

    slots = claim(adata, "tl.embed", key_added, mod=mod, copy=copy)  # ValueError if something is in the way
    vectors = ...  # of slots.adata
    slots.write("embedded 60 cells", params={"pooling": "mean"}, obsm={"": vectors})
    return slots.returned

`tl._prepare.prepare` claims for tools; they write to `cells.slots`. Parts are suffixes: ``""`` is the key itself,
``"sd"`` is ``f"{key}_sd"``. A part that is `None` is not written; what an earlier call of the same function wrote under
the same key, and this one does not, is dropped. Columns of tasks are claimed once the names of the tasks are known:
``slots.claim(tasks, reads=[("obs", groupby)])``, where `reads` are inputs of the call, which must not be written over.

A reader finds one result of one or several functions, and reads its parts::

    result = find(adata, "tl.attention", key=key, mod=mod)  # KeyError that lists what there is, or names the call
    result.read("varm"), result.read("var", "n_cells"), result.uns["entropy"], result.has("varm", "groups")

A new tool is one row of `TABLE`. No other file spells a slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from gfx._adata import column_of, copied, pick
from gfx._log import info

if TYPE_CHECKING:
    from anndata import AnnData

    from gfx._types import Data

#: Stands for the names of the tasks of a classifier, which are those of columns of the user's.
TASK = "{task}"


@dataclass(frozen=True)
class Row:
    """What a function may write: `parts` by element of the AnnData, and the record in `uns`, under a `default` key.

    `call` are its first arguments, for messages that ask to call it.
    """

    default: str
    parts: Mapping[str, tuple[str, ...]]
    call: str = "adata"


def _perturbation(default: str) -> Row:
    parts = {"obsm": ("", "parts", "states"), "varm": ("", "sd", "n_cells", "null")}
    return Row(default, parts, call="adata, ...")


TABLE: dict[str, Row] = {
    "pp.tokenize": Row("gfx_tokens", {"obsm": ("",), "obs": ("n", "vocabulary")}),
    "tl.embed": Row("X_gfx", {"obsm": ("",)}),
    "tl.embed_genes": Row("gfx_genes", {"varm": ("", "groups", "groups_n_cells"), "var": ("n_cells",)}),
    "tl.delete_genes": _perturbation("gfx_delete"),
    "tl.overexpress_genes": _perturbation("gfx_overexpress"),
    "tl.shift_genes": _perturbation("gfx_shift"),
    "tl.screen_genes": Row("gfx_screen", {"varm": ("", "groups")}),
    "tl.attention": Row(
        "gfx_attention",
        {
            "varm": (
                *("", "sd", "given", "given_sd", "to_deleted", "random", "random_change"),
                *("groups", "groups_sd", "groups_uniform", "groups_n_cells"),
                *("groups_given", "groups_given_sd", "groups_given_uniform"),
            ),
            "var": ("n_cells", "uniform", "given_uniform", "rank", "random_uniform"),
            "varp": ("", "uniform", "n_cells", "coexpression"),
        },
    ),
    "tl.classify_genes": Row(
        "gfx_gene_class", {"varm": ("", "sd", "fold"), "var": ("", "predicted", "n_cells")}, call="adata, labels"
    ),
    "tl.predict_genes": Row(
        "gfx_predicted_genes",
        {"varm": ("", "sd", "groups", "groups_n_cells"), "var": ("", "n_cells", "in_training")},
        call="adata, model",
    ),
    "tl.classify_cells": Row("gfx_cell_class", {"obsm": ("", "fold"), "obs": (TASK,)}, call="adata, groupby"),
    "tl.predict_cells": Row("gfx_predicted_cells", {"obsm": ("",), "obs": (TASK,)}, call="adata, model"),
}

#: Functions whose results the same tables and plots read.
PERTURBATIONS = ("tl.delete_genes", "tl.overexpress_genes", "tl.shift_genes")
CLASSIFICATIONS = ("tl.classify_genes", "tl.classify_cells")

#: A slot: the element of the AnnData that holds it, and its name there.
Slot = tuple[str, str]


# --- names ----------------------------------------------------------------------------------------------------------


def slot_name(key: str, part: str = "") -> str:
    """Name of a part of the result under a key."""
    return f"{key}_{part}" if part else key


def slots_of(function: str, key: str, tasks: Iterable[str] = ()) -> list[Slot]:
    """List all slots that a function may write under a key, its record in `uns` last."""
    parts = [
        (element, part)
        for element, of_element in TABLE[function].parts.items()
        for given in of_element
        for part in (tasks if given == TASK else (given,))
    ]
    return [*((element, slot_name(key, part)) for element, part in parts), ("uns", key)]


#: Names that are written where no other key is given.
RESERVED = frozenset(name for function, row in TABLE.items() for _, name in slots_of(function, row.default))


def key_of(function: str, key_added: str | None) -> str:
    """Return the key to write under: the default one, or the user's, if it does no harm."""
    default = TABLE[function].default
    if key_added is None or key_added == default:
        return default
    if not isinstance(key_added, str):
        msg = f"`key_added` is a name, found {key_added!r} of type {type(key_added).__name__}."
        raise TypeError(msg)
    if "/" in key_added:
        msg = f"`key_added={key_added!r}` has a '/', which files cannot hold in a name. Leave it out."
        raise ValueError(msg)
    if key_added in {"", ".", ".."} or not key_added.isprintable():
        msg = f"`key_added={key_added!r}` is no name that files can hold. Leave it out for the default, {default!r}."
        raise ValueError(msg)
    if key_added in RESERVED:
        msg = f"`key_added={key_added!r}` is where another function writes. Choose a name of your own."
        raise ValueError(msg)
    return key_added


# --- records --------------------------------------------------------------------------------------------------------


def storable(value: object) -> object:
    """Turn a value into what `write_h5ad` accepts, or raise `TypeError`."""
    match value:
        case None | bool() | int() | float() | np.ndarray():
            return value
        case str():
            return str(value)
        case PurePath():
            return value.name  # a whole path would reveal the layout of somebody's disk
        case np.generic():
            return value.item()
        case Mapping():
            return {str(k): storable(v) for k, v in value.items()}
        case list() | tuple():
            return [storable(v) for v in value]
        case _:
            msg = f"Cannot store a {type(value).__name__} in `.uns`."
            raise TypeError(msg)


def record(function: str, /, **params: object) -> dict[str, object]:
    """Note the function, the version of gfx and the parameters that a result came from.

    `None` is left out: it would come back from a file as a missing entry or as text, depending on the format.
    """
    everything = {"gfx_version": version("scgfx"), "function": function} | params
    return {name: storable(value) for name, value in everything.items() if value is not None}


def made_by(entry: object) -> str | None:
    """Return the function of ours that wrote an entry of `uns`; `None` for what others keep there."""
    params = entry.get("params") if isinstance(entry, Mapping) else None
    return params.get("function") if isinstance(params, Mapping) else None


def mask_name(mask_obs: object) -> str | None:
    """Note which cells were used: the name of a column, or that an array was given."""
    return mask_obs if mask_obs is None or isinstance(mask_obs, str) else "array"


# --- one result -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """The slots of one result of a function, such as ``"tl.embed"``: claimed and not yet written, or found.

    `returned` is what a function that writes returns: the copy that it worked on, or `None`.
    """

    adata: AnnData
    function: str
    key: str
    returned: Data | None = None

    def name(self, part: str = "") -> str:
        """Name of a part."""
        return slot_name(self.key, part)

    def _owners(self) -> dict[Slot, tuple[str, str]]:
        """Map every slot that a record lists to the key and the function of its result."""
        own_last = [*self.adata.uns.items(), (self.key, self.adata.uns.get(self.key))]
        return {
            (element, str(name)): (key, made_by(entry))
            for key, entry in own_last
            if made_by(entry)
            for element, names in {**entry.get("slots", {}), "uns": [key]}.items()
            for name in np.atleast_1d(names)  # lists come back from files as arrays
        }

    @property
    def owned(self) -> set[Slot]:
        """Slots that an earlier call of this function wrote under this key, by its record."""
        return {slot for slot, owner in self._owners().items() if owner == (self.key, self.function)}

    def claim(self, tasks: Iterable[str] = (), *, reads: Iterable[tuple[str, object]] = ()) -> Slots:
        """Raise a `ValueError` if a slot that the call may write holds anything else, or is an input of the call.

        `tasks` are the names of tasks, once they are known. `reads` are the inputs, as element and name; names that are
        no text are skipped.
        """
        owners, owned, targets = self._owners(), self.owned, slots_of(self.function, self.key, tasks)
        # The record first: it says best what is there.
        taken = [slot for slot in reversed(targets) if slot[1] in getattr(self.adata, slot[0]) and slot not in owned]
        if taken:
            element, name = taken[0]
            _, writer = owners.get((element, name), (None, None))
            value = getattr(self.adata, element)[name]
            shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
            unknown = f"a {type(value).__name__}{shape} that gfx did not write, or of which it has lost the record"
            self._refuse(taken, f"holds {f'a result of `gfx.{writer}`' if writer else unknown}")
        for element, name in reads:
            if isinstance(name, str) and (element, name) in owned.union(targets):
                self._refuse([(element, name)], "is an input of this call, which would write over it")
        return self

    def _refuse(self, taken: Sequence[Slot], reason: str) -> None:
        """Say what is in the way in the first slot, and how to make room for the call in all of them."""
        slots = [f"adata.{element}[{name!r}]" for element, name in taken]
        msg = f"`{slots[0]}` {reason}. Choose another name with `key_added=`, or run `del {', '.join(slots)}` first."
        raise ValueError(msg)

    def write(
        self,
        done: str,
        *,
        params: Mapping[str, object],
        uns: Mapping[str, object] | None = None,
        hint: str = "",
        **elements: Mapping[str, Any],
    ) -> None:
        """Write a result and its record, drop what an earlier call leaves behind, and log one line.

        `elements` are the values of parts, such as ``varm={"": means, "sd": deviations}``; `None` is not written.
        `params` are recorded with the function and the version, `uns` is whatever else belongs into `uns[key]`. `done`
        says for the log what was done on what, and `hint` what to read or do next.
        """
        row = TABLE[self.function].parts
        values: dict[Slot, Any] = {}
        for element, parts in elements.items():
            unknown = set() if TASK in row[element] else set(parts) - set(row[element])
            if unknown:
                msg = f"The table of slots has no {sorted(unknown)} in {element!r} of {self.function!r}."
                raise KeyError(msg)
            values |= {(element, self.name(part)): value for part, value in parts.items() if value is not None}
        how = record(self.function, **params)
        stale = self.owned - set(values) - {("uns", self.key)}
        names: dict[str, list[str]] = {}
        for (element, name), value in values.items():  # the first of these turns a view into an object of its own
            getattr(self.adata, element)[name] = value
            names.setdefault(element, []).append(name)
        for element, name in stale:
            if name in getattr(self.adata, element):
                del getattr(self.adata, element)[name]
        self.adata.uns[self.key] = {"params": how, "slots": names} | dict(uns or {})
        where = "adata" + ", ".join(f".{element}" for element in (*names, "uns"))
        info(f"{done}: added {self.key!r} ({where})." + f"\n{hint}" * bool(hint))

    # --- reading

    @property
    def uns(self) -> Mapping[str, Any]:
        """The record and all tables."""
        return self.adata.uns[self.key]

    def names(self, entry: str) -> list[str]:
        """Read names that are listed in `uns`, such as those of groups; none where there is no such list."""
        return [str(name) for name in np.atleast_1d(np.asarray(self.uns.get(entry, []), dtype=object))]

    def has(self, element: str, part: str = "") -> bool:
        """Whether there is such a part."""
        return self.name(part) in getattr(self.adata, element)

    def read(self, element: str, part: str = "") -> Any:
        """Read a part, arrays as those of numpy; `KeyError` where it is not there, or no longer."""
        if not self.has(element, part):
            msg = (
                f"Did not find `adata.{element}[{self.name(part)!r}]`, a part of the result {self.key!r} of "
                f"`gfx.{self.function}`: the call did not write it, or it got lost, as `anndata.concat` drops `varm` "
                'unless called with `merge="same"`.'
            )
            raise KeyError(msg)
        holder, name = getattr(self.adata, element), self.name(part)
        if element in {"obs", "var"}:
            return column_of(holder, name, f"adata.{element}")
        is_table_or_sparse = hasattr(holder[name], "columns") or hasattr(holder[name], "tocsr")
        return holder[name] if is_table_or_sparse else np.asarray(holder[name])


def claim(data: Data, function: str, key_added: str | None, *, mod: str | None = None, copy: bool = False) -> Slots:
    """Find the slots that a function writes, and claim them; see :meth:`Slots.claim`."""
    slots = Slots(pick(data, mod), function, key_of(function, key_added)).claim()
    data = copied(data, copy=copy)
    return replace(slots, adata=pick(data, mod), returned=data if copy else None)


def find(data: Data, *functions: str, key: str | None = None, mod: str | None = None) -> Slots:
    """Find the result `key` of one of several functions; `KeyError` where there is none, or more than one.

    Without `key` it is the one under the default name, if there is exactly one such, else the only one there is.
    """
    adata = pick(data, mod)
    present = {name: made_by(entry) for name, entry in adata.uns.items() if made_by(entry) in functions}
    *first, last = (f"`gfx.{function}`" for function in functions)
    names = f"{', '.join(first)} or {last}" if first else last
    if key is None:
        candidates = [name for name, function in present.items() if TABLE[function].default == name] or sorted(present)
        if len(candidates) > 1:
            msg = f"There are several results of {names}; choose one with `key=`: {sorted(present)}."
            raise KeyError(msg)
        key = candidates[0] if candidates else None
    if key in present:
        return Slots(adata, present[key], key)
    problem = f"Did not find {f'a result of {names}' if key is None else repr(key)} in `adata.uns`."
    if writer := made_by(adata.uns.get(key)):
        problem = f"`adata.uns[{key!r}]` was written by `gfx.{writer}`, not by {names}."
    row = TABLE[functions[0]]
    named = "" if key in {None, row.default} else f", key_added={key!r}"
    run = f"`gfx.{functions[0]}({row.call}{named})`" if len(functions) == 1 else "one of them"
    made = {name: made_by(entry) for name, entry in sorted(adata.uns.items())}
    others = [f"{name!r} of `gfx.{made[name]}`" for name in made if made[name] and name not in present]
    besides = f" Other results: {', '.join(others)}." if others else ""
    known = "" if key is None else f" Results of {names}: {sorted(present)}."
    msg = f"{problem}{known} Run {run} first.{besides}"
    raise KeyError(msg)

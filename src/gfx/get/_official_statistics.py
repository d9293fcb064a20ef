"""The statistics of the official software, from finished results."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from gfx._adata import gene_names, pick
from gfx._core import official_statistics as official
from gfx._core.gene_names import name_kind
from gfx._keys import PERTURBATIONS
from gfx.get._perturbation import PerturbationResult, find_perturbation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from mudata import MuData


Method = Literal["goal_state_shift", "vs_null", "mixture", "aggregate", "gene_shifts"]
_METHODS: tuple[str, ...] = get_args(Method)


def official_statistics_df(
    adata: AnnData | MuData,
    method: Method,
    *,
    null_key: str | None = None,
    key: str | None = None,
    mod: str | None = None,
) -> pd.DataFrame:
    """Compute what Geneformer's own software calls the statistics of a perturbation :cite:p:`Theodoris2023`.

    For comparison with what was published: names of columns, formulae and order of rows are those of its
    `InSilicoPerturberStats`. Elsewhere gfx gives shifts, 1 - cosine; here stand cosines, and 1 means that nothing
    moved. Its p-values take cells for independent samples, which those of one donor are not, so that they fall with
    the number of cells; and a gene that differs from all others together may do so by its rank alone. The tables of the
    perturbation itself hold effects against their controls.

    Computed anew at each call from the cells that `adata` has now; the rows of genes in ``"gene_shifts"`` are those of
    all cells that were perturbed.

    Cost: seconds for ten thousand perturbations of a thousand cells. Memory: up to a dozen times the cells ×
    perturbations. ``"gene_shifts"`` has one row for each perturbation and each gene that it met.

    Parameters
    ----------
    adata
        After :func:`gfx.tl.delete_genes`, or another perturbation of genes.
    method
        What the official software calls the mode:

        ``"goal_state_shift"``
            Does a gene move cells towards the goal more than all genes together do? A rank-sum test against the pool
            of all values, or 100,000 of them drawn with a fixed seed. A result of one perturbation only gives its mean
            shifts. Needs states.
        ``"vs_null"``
            Does a perturbation move these cells more than those of `null_key`? A rank-sum test.
        ``"mixture"``
            Which perturbations have an impact, by a mixture of two normals over their average cosines (there
            ``mixture_model``)? The component of the lower cosine is the one with impact.
        ``"aggregate"``
            The cosine of every cell (there ``aggregate_data``).
        ``"gene_shifts"``
            Mean and population sd of the cosine of each remaining gene (there ``aggregate_gene_shifts``).
    null_key
        For ``"vs_null"``: the `key_added` of the same perturbations in cells of no interest.
    key
        The `key_added` of the perturbation; `None`: the only result under a default name.
    mod
        Modality of a MuData.

    Returns
    -------
    The official table without its index and its tokens. `Gene_name` is the perturbation as it was called, genes of a
    set joined by "+" as their `Ensembl_ID` are. Perturbations that no cell has are left out.

    ``"goal_state_shift"``
        `Gene_name`, `Ensembl_ID`, `Shift_to_goal_end`, `Shift_to_alt_end_<state>`, `Goal_end_vs_random_pval`,
        `Alt_end_vs_random_pval_<state>`, `Goal_end_FDR`, `Alt_end_FDR_<state>`, `N_Detections`, `Sig` (1 if
        `Goal_end_FDR` < 0.05); of one perturbation the shifts only.
    ``"vs_null"``
        `Gene_name`, `Ensembl_ID`, `Test_avg_shift`, `Null_avg_shift`, `Test_vs_null_avg_shift`, `Test_vs_null_pval`,
        `Test_vs_null_FDR`, `N_Detections_test`, `N_Detections_null`, `Sig`.
    ``"mixture"``
        `Gene_name`, `Ensembl_ID`, `Test_avg_shift`, `Impact_component`, `Impact_component_percent`, `N_Detections`.
    ``"aggregate"``
        `Cosine_sim`, `Gene`; one row a perturbation and cell.
    ``"gene_shifts"``
        `Gene_name`, `Ensembl_ID`, `Affected`, `Affected_gene_name`, `Affected_Ensembl_ID`, `Cosine_sim_mean`,
        `Cosine_sim_stdev`, `N_Detections`; `Affected` is ``"cell_emb"`` for whole cells, else the Ensembl id.

    Raises
    ------
    ValueError
        No such method; no `null_key`, or one that `method` has no use for; a null without any of the perturbations; no
        states; too few perturbations for a mixture.
    KeyError
        No such result, several under default names, or one that lacks what the method needs.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.toy()
    >>> gfx.tl.delete_genes(adata, ["CD3D", "MS4A1", "CD74"], model="mini", null=None)
    >>> gfx.get.official_statistics_df(adata, "mixture").columns.tolist()
    ['Gene_name', 'Ensembl_ID', 'Test_avg_shift', 'Impact_component', 'Impact_component_percent', 'N_Detections']
    """
    if method not in _METHODS:
        close = difflib.get_close_matches(str(method), _METHODS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        msg = f"`method` is one of {list(_METHODS)}, found {method!r}.{hint}"
        raise ValueError(msg)
    found = pick(adata, mod)
    result = _find(found, key)
    if method == "vs_null":
        return _vs_null(result, found, null_key)
    if null_key is not None:
        msg = f"`null_key={null_key!r}` is for `method='vs_null'`, found {method!r}. Leave `null_key` out."
        raise ValueError(msg)
    match method:
        case "goal_state_shift":
            return _goal_state_shift(result)
        case "mixture":
            return official.mixture(result.genes, result.cosines)
        case "aggregate":
            return official.aggregate(result.genes, result.cosines)
        case _:
            return _gene_shifts(result)


def _goal_state_shift(result: _Result) -> pd.DataFrame:
    shifts = result.state_shifts
    goal = shifts.pop(str(result.params["goal"]))
    del shifts[str(result.params["start"])]
    if goal.shape[1] == 1:
        return official.goal_state_shift_of_one(goal[:, 0], {name: values[:, 0] for name, values in shifts.items()})
    return official.goal_state_shift(result.genes, goal, shifts)


def _vs_null(test: _Result, adata: AnnData, null_key: str | None) -> pd.DataFrame:
    if null_key is None:
        msg = (
            "`method='vs_null'` compares with the same perturbations in cells of no interest; found no `null_key`. "
            f"Run `gfx.{test.function}(adata, ..., key_added='null')` on them, then give `null_key='null'`."
        )
        raise ValueError(msg)
    null = _find(adata, null_key)
    if null.keys.uns == test.keys.uns:
        msg = f"`null_key={null_key!r}` is the result to be compared itself. Give the key of another one."
        raise ValueError(msg)
    column = {gene: at for at, gene in enumerate(null.genes["Ensembl_ID"])}
    at = np.array([column.get(gene, -1) for gene in test.genes["Ensembl_ID"]], dtype=np.int64)
    if (at < 0).all():
        names = null.genes["Gene_name"].tolist()
        msg = (
            f"`null_key={null_key!r}` has none of the perturbations {test.genes['Gene_name'].tolist()[:5]}; it has "
            f"{names[:5]}. Run the same perturbations in both."
        )
        raise ValueError(msg)
    return official.vs_null(test.genes, test.cosines, np.where(at >= 0, null.cosines[:, at], np.nan))


def _gene_shifts(result: _Result) -> pd.DataFrame:
    affected = result.affected
    # Columns of one gene hold the same values: each gene once, as the official software has it.
    ids = affected["Ensembl_ID"].fillna("")
    once = ~(ids.duplicated() & (ids != "")).to_numpy()
    keys = result.keys
    mean, sd, n_cells = (result.per_gene(slot)[once] for slot in (keys.varm, keys.varm_sd, keys.varm_n_cells))
    return official.gene_shifts(
        result.genes,
        result.cosines,
        affected=affected[once],
        affected_cosines=1 - mean.astype(np.float64),
        affected_sd=sd,
        n_affected=n_cells,
    )


# --- where a result is ----------------------------------------------------------------------------------------------


class _Result(PerturbationResult):
    """A finished perturbation, as the official statistics see it."""

    @property
    def params(self) -> Mapping[str, Any]:
        return self.uns["params"]

    @property
    def genes(self) -> pd.DataFrame:
        """What was perturbed: `Gene_name` and `Ensembl_ID`."""
        if "ensembl_ids" not in self.uns:
            msg = f"Did not find 'ensembl_ids' in `adata.uns[{self.keys.uns!r}]`. {self.again}"
            raise KeyError(msg)
        return pd.DataFrame(
            {"Gene_name": _texts(self.uns["perturbations"]), "Ensembl_ID": _texts(self.uns["ensembl_ids"])}
        )

    @property
    def cosines(self) -> np.ndarray:
        """Cosine of each cell with itself before, float64 `(n_obs, n_perturbations)`."""
        return 1 - np.asarray(self._slot("obsm", self.keys.obsm), dtype=np.float64)

    @property
    def state_shifts(self) -> dict[str, np.ndarray]:
        """Change of each cell's cosine to each state, `(n_obs, n_perturbations)`."""
        if "states" not in self.uns:
            msg = (
                f"`adata.uns[{self.keys.uns!r}]` has no states, so no goal to move towards. Run `gfx.{self.function}"
                "(adata, ..., groupby=..., start=..., goal=...)`, or use `method='aggregate'` or `method='mixture'`."
            )
            raise ValueError(msg)
        toward = np.asarray(self._slot("obsm", self.keys.obsm_states))
        return {str(name): toward[:, :, at] for at, name in enumerate(_texts(self.uns["states"]))}

    @property
    def affected(self) -> pd.DataFrame:
        """What may have moved, each gene of the AnnData: `Gene_name` and `Ensembl_ID`, missing where none is known."""
        var = self.adata.var
        columns = [name for name in (self.params.get("gene_ids"), "ensembl_id") if name in var.columns]
        ids = np.full(len(var), np.nan, dtype=object)
        for names in (*(var[name] for name in columns), var.index):
            texts = gene_names(names)
            is_id = np.array([name_kind(text) == "Ensembl" for text in texts], dtype=bool)
            if is_id.any():
                ids[is_id] = [text.partition(".")[0] for text in texts[is_id]]
                break
        return pd.DataFrame({"Gene_name": self.adata.var_names.to_numpy(dtype=object), "Ensembl_ID": ids})

    def per_gene(self, slot: str) -> np.ndarray:
        """Read values of each gene of the AnnData, `(n_vars, n_perturbations)`."""
        return np.asarray(self._slot("varm", slot))

    @property
    def again(self) -> str:
        """What to call where something is missing."""
        key_added = "" if self.keys.uns == PERTURBATIONS[self.function] else f", key_added={self.keys.uns!r}"
        return f"Run `gfx.{self.function}(adata, ...{key_added})` again."

    def _slot(self, where: str, slot: str) -> object:
        slots = getattr(self.adata, where)
        if slot not in slots:
            msg = f"Did not find {slot!r} in `adata.{where}`. {self.again} Present: {sorted(slots)}."
            raise KeyError(msg)
        return slots[slot]


def _texts(values: object) -> np.ndarray:
    """Return names as they were, from a list or an array, before a file and after."""
    return np.array([str(value) for value in np.atleast_1d(np.asarray(values, dtype=object))], dtype=object)


def _find(adata: AnnData, key: str | None) -> _Result:
    found = find_perturbation(adata, key=key, mod=None)
    return _Result(**vars(found))

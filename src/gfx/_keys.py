"""Left until every room reads and writes through `gfx._results`."""

from __future__ import annotations

from dataclasses import dataclass

from gfx._results import PERTURBATIONS as _PERTURBATIONS
from gfx._results import TABLE, key_of


@dataclass(frozen=True)
class TokenKeys:
    """Slots of :func:`gfx.pp.tokenize`."""

    obsm: str
    obs: str
    uns: str


@dataclass(frozen=True)
class PerturbationKeys:
    """Slots of :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` and :func:`gfx.tl.shift_genes`."""

    obsm: str
    obsm_parts: str
    obsm_states: str
    varm: str
    varm_sd: str
    varm_n_cells: str
    varm_null: str
    uns: str


@dataclass(frozen=True)
class ScreenKeys:
    """Slots of :func:`gfx.tl.screen_genes`."""

    varm: str
    varm_groups: str
    layer: str
    layer_toward: str
    uns: str


@dataclass(frozen=True)
class AttentionKeys:
    """Slots of :func:`gfx.tl.attention`."""

    varm: str
    var: str
    var_uniform: str
    uns: str


@dataclass(frozen=True)
class GeneClassKeys:
    """Slots of :func:`gfx.tl.classify_genes`."""

    varm: str
    varm_sd: str
    varm_fold: str
    var: str
    var_predicted: str
    var_n_cells: str
    uns: str


@dataclass(frozen=True)
class PredictedGenesKeys:
    """Slots of :func:`gfx.tl.predict_genes`."""

    varm: str
    varm_sd: str
    varm_groups: str
    varm_groups_n_cells: str
    var: str
    var_n_cells: str
    var_learnt: str
    uns: str


@dataclass(frozen=True)
class PredictedCellsKeys:
    """Slots of :func:`gfx.tl.predict_cells`; the columns of `obs` begin with the name `obs`, see :meth:`of`."""

    obsm: str
    obs: str
    uns: str

    def of(self, task: str) -> str:
        """Column of `obs` with the predicted class of a task, which is called like the column that was learnt."""
        return f"{self.obs}_{task}"


@dataclass(frozen=True)
class CellClassKeys(PredictedCellsKeys):
    """Slots of :func:`gfx.tl.classify_cells`."""

    obsm_fold: str


def token_keys(key: str | None = None) -> TokenKeys:
    """Where tokens live."""
    base = key_of("pp.tokenize", key)
    return TokenKeys(obsm=base, obs=f"{base}_n", uns=base)


#: Where each way to perturb genes writes, unless another name is given.
PERTURBATIONS = {function: TABLE[function].default for function in _PERTURBATIONS}


def perturbation_keys(function: str, key: str | None = None) -> PerturbationKeys:
    """Where the effects of perturbed genes live."""
    base = key_of(function, key)
    return PerturbationKeys(
        obsm=base,
        obsm_parts=f"{base}_parts",
        obsm_states=f"{base}_states",
        varm=base,
        varm_sd=f"{base}_sd",
        varm_n_cells=f"{base}_n_cells",
        varm_null=f"{base}_null",
        uns=base,
    )


def screen_keys(key: str | None = None) -> ScreenKeys:
    """Where the effects of all genes live."""
    base = key_of("tl.screen_genes", key)
    return ScreenKeys(varm=base, varm_groups=f"{base}_groups", layer=base, layer_toward=f"{base}_toward", uns=base)


def attention_keys(key: str | None = None) -> AttentionKeys:
    """Where attention lives."""
    base = key_of("tl.attention", key)
    return AttentionKeys(varm=base, var=f"{base}_n_cells", var_uniform=f"{base}_uniform", uns=base)


def gene_class_keys(key: str | None = None) -> GeneClassKeys:
    """Where classes of genes live that were predicted for genes held out."""
    base = key_of("tl.classify_genes", key)
    return GeneClassKeys(
        varm=base,
        varm_sd=f"{base}_sd",
        varm_fold=f"{base}_fold",
        var=base,
        var_predicted=f"{base}_predicted",
        var_n_cells=f"{base}_n_cells",
        uns=base,
    )


def predicted_genes_keys(key: str | None = None) -> PredictedGenesKeys:
    """Where classes of genes live that a trained model predicts."""
    base = key_of("tl.predict_genes", key)
    return PredictedGenesKeys(
        varm=base,
        varm_sd=f"{base}_sd",
        varm_groups=f"{base}_groups",
        varm_groups_n_cells=f"{base}_groups_n_cells",
        var=base,
        var_n_cells=f"{base}_n_cells",
        var_learnt=f"{base}_learnt",
        uns=base,
    )


def cell_class_keys(key: str | None = None) -> CellClassKeys:
    """Where classes of cells live that were predicted for cells held out."""
    base = key_of("tl.classify_cells", key)
    return CellClassKeys(obsm=base, obsm_fold=f"{base}_fold", obs=base, uns=base)


def predicted_cells_keys(key: str | None = None) -> PredictedCellsKeys:
    """Where classes of cells live that a trained model predicts."""
    base = key_of("tl.predict_cells", key)
    return PredictedCellsKeys(obsm=base, obs=base, uns=base)

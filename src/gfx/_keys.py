"""Every slot name that gfx writes or reads. No other file spells them."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TokenKeys:
    """Slots of :func:`gfx.pp.tokenize`."""

    obsm: str
    obs: str
    uns: str


@dataclass(frozen=True)
class EmbedKeys:
    """Slots of :func:`gfx.tl.embed`."""

    obsm: str
    uns: str


@dataclass(frozen=True)
class EmbedGenesKeys:
    """Slots of :func:`gfx.tl.embed_genes`."""

    varm: str
    varm_groups: str
    varm_groups_n_cells: str
    var: str
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


def _is_default(key: str | None, default: str) -> bool:
    """Whether a result keeps our names; a name of the user's that would do harm is refused."""
    if key is None or key == default:
        return True
    if not isinstance(key, str):
        msg = f"`key_added` is a name, found {key!r} of type {type(key).__name__}."
        raise TypeError(msg)
    if "/" in key:
        msg = f"`key_added={key!r}` has a '/', which files cannot hold in a name. Leave it out."
        raise ValueError(msg)
    if key in {"", ".", ".."} or not key.isprintable():
        msg = f"`key_added={key!r}` is no name that files can hold. Leave it out for the default, {default!r}."
        raise ValueError(msg)
    if key in _DEFAULTS:
        msg = f"`key_added={key!r}` is where another function writes. Choose a name of your own."
        raise ValueError(msg)
    return False


def token_keys(key: str | None = None) -> TokenKeys:
    """Where tokens live."""
    if _is_default(key, "gfx_tokens"):
        return TokenKeys(obsm="gfx_tokens", obs="gfx_n_tokens", uns="gfx_tokens")
    return TokenKeys(obsm=key, obs=f"{key}_n_tokens", uns=key)


def embed_keys(key: str | None = None) -> EmbedKeys:
    """Where cell embeddings live."""
    return EmbedKeys(obsm="X_gfx", uns="gfx") if _is_default(key, "X_gfx") else EmbedKeys(obsm=key, uns=key)


def embed_genes_keys(key: str | None = None) -> EmbedGenesKeys:
    """Where gene embeddings live."""
    is_default = _is_default(key, "gfx")
    base = "gfx" if is_default else key
    return EmbedGenesKeys(
        varm=base,
        varm_groups=f"{base}_groups",
        varm_groups_n_cells=f"{base}_groups_n_cells",
        var=f"{base}_n_cells",
        uns="gfx_genes" if is_default else base,
    )


#: Where each way to perturb genes writes, unless another name is given.
PERTURBATIONS = {
    "tl.delete_genes": "gfx_delete",
    "tl.overexpress_genes": "gfx_overexpress",
    "tl.shift_genes": "gfx_shift",
}


def perturbation_keys(function: str, key: str | None = None) -> PerturbationKeys:
    """Where the effects of perturbed genes live."""
    default = PERTURBATIONS[function]
    base = default if _is_default(key, default) else key
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
    base = "gfx_screen" if _is_default(key, "gfx_screen") else key
    return ScreenKeys(varm=base, varm_groups=f"{base}_groups", layer=base, layer_toward=f"{base}_toward", uns=base)


def attention_keys(key: str | None = None) -> AttentionKeys:
    """Where attention lives."""
    base = "gfx_attention" if _is_default(key, "gfx_attention") else key
    return AttentionKeys(varm=base, var=f"{base}_n_cells", var_uniform=f"{base}_uniform", uns=base)


def gene_class_keys(key: str | None = None) -> GeneClassKeys:
    """Where classes of genes live that were predicted for genes held out."""
    base = "gfx_gene_class" if _is_default(key, "gfx_gene_class") else key
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
    base = "gfx_predicted_genes" if _is_default(key, "gfx_predicted_genes") else key
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
    base = "gfx_cell_class" if _is_default(key, "gfx_cell_class") else key
    return CellClassKeys(obsm=base, obsm_fold=f"{base}_fold", obs=base, uns=base)


def predicted_cells_keys(key: str | None = None) -> PredictedCellsKeys:
    """Where classes of cells live that a trained model predicts."""
    base = "gfx_predicted_cells" if _is_default(key, "gfx_predicted_cells") else key
    return PredictedCellsKeys(obsm=base, obs=base, uns=base)


#: Slots that are written where no other name is given.
_DEFAULTS = frozenset(
    slot
    for keys in (
        token_keys(),
        embed_keys(),
        embed_genes_keys(),
        *map(perturbation_keys, PERTURBATIONS),
        screen_keys(),
        attention_keys(),
        gene_class_keys(),
        predicted_genes_keys(),
        cell_class_keys(),
        predicted_cells_keys(),
    )
    for slot in asdict(keys).values()
)

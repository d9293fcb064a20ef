"""Every slot name that gfx writes or reads. No other file spells them."""

from __future__ import annotations

from dataclasses import dataclass


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
class DeleteKeys:
    """Slots of :func:`gfx.tl.delete_genes`."""

    obsm: str
    obsm_states: str
    varm: str
    varm_n_cells: str
    uns: str


@dataclass(frozen=True)
class AttentionKeys:
    """Slots of :func:`gfx.tl.attention`."""

    varm: str
    var: str
    var_uniform: str
    uns: str


def _base(key: str | None, default: str) -> str:
    """Take the user's name for a result, or ours; a name that a file cannot hold is refused."""
    if key is None:
        return default
    if not key:
        msg = "`key_added=''` is no name; leave it out for the default."
        raise ValueError(msg)
    if "/" in key:
        msg = f"`key_added={key!r}` has a '/', which files cannot hold in a name. Leave it out."
        raise ValueError(msg)
    return key


def token_keys(key: str | None = None) -> TokenKeys:
    """Where tokens live."""
    base = _base(key, "gfx_tokens")
    return TokenKeys(obsm=base, obs="gfx_n_tokens" if key is None else f"{base}_n_tokens", uns=base)


def embed_keys(key: str | None = None) -> EmbedKeys:
    """Where cell embeddings live."""
    return EmbedKeys(obsm=_base(key, "X_gfx"), uns=_base(key, "gfx"))


def embed_genes_keys(key: str | None = None) -> EmbedGenesKeys:
    """Where gene embeddings live."""
    key = _base(key, "gfx")
    return EmbedGenesKeys(
        varm=key,
        varm_groups=f"{key}_groups",
        varm_groups_n_cells=f"{key}_groups_n_cells",
        var=f"{key}_n_cells",
        uns=f"{key}_genes",
    )


def delete_keys(key: str | None = None) -> DeleteKeys:
    """Where the effects of deleted genes live."""
    key = _base(key, "gfx_delete")
    return DeleteKeys(obsm=key, obsm_states=f"{key}_states", varm=key, varm_n_cells=f"{key}_n_cells", uns=key)


def attention_keys(key: str | None = None) -> AttentionKeys:
    """Where attention lives."""
    key = _base(key, "gfx_attention")
    return AttentionKeys(varm=key, var=f"{key}_n_cells", var_uniform=f"{key}_uniform", uns=key)

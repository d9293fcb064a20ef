"""Real cells that are part of the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData


def ifnb() -> AnnData:
    """Read 1,120 blood cells, half of them stimulated with interferon beta :cite:p:`Kang2018`.

    Peripheral blood mononuclear cells of eight patients with lupus, cultured for six hours without or with interferon
    beta and sequenced with 10x 3' version 1 chemistry: a random draw of monocytes, B cells, naive CD4 T cells and NK
    cells in each condition. The embedded model was not trained on this study. It is part of the package; nothing is
    downloaded.

    The counts are public (GEO, GSE96583). Donors are not recorded, so the cells cannot show how results vary between
    patients.

    Returns
    -------
    1,120 cells × 12,420 genes: raw counts in `X` (CSR, float32), symbols as `var_names`, `var["ensembl_id"]`,
    `obs["condition"]` (`control`, `stimulated`), `obs["cell_type"]` (`B`, `CD14 Mono`, `CD4 Naive T`, `NK`) and the
    source in `uns["source"]`.

    Examples
    --------
    >>> import gfx
    >>> adata = gfx.datasets.ifnb()
    >>> adata.obs["condition"].value_counts().to_dict()
    {'control': 560, 'stimulated': 560}
    """
    import anndata as ad

    return ad.read_h5ad(Path(__file__).parent / "kang2018_ifnb.h5ad")

"""Four lines beside scanpy: tokenize, embed, delete genes, read attention. Runs offline in about a minute.

Real cells: 700 blood cells that scanpy carries (`pbmc68k_reduced`). Their raw counts are lost, only log-normalised
values are left; the order of genes within a cell is still that of the counts, which is all that a Geneformer reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # draw into files

import anndata as ad
import matplotlib.pyplot as plt
import scanpy as sc
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

import gfx

LINEAGES = {
    "T cells": ["CD3D", "IL32"],
    "B cells": ["CD79A", "MS4A1"],
    "NK and cytotoxic cells": ["NKG7", "GNLY"],
    "monocytes": ["S100A9", "LYZ"],
}
MEMBERS = {
    "T cells": ["CD4+/CD25 T Reg", "CD4+/CD45RO+ Memory", "CD8+/CD45RA+ Naive Cytotoxic", "CD4+/CD45RA+/CD25- Naive T"],
    "B cells": ["CD19+ B"],
    "NK and cytotoxic cells": ["CD56+ NK", "CD8+ Cytotoxic T"],
    "monocytes": ["CD14+ Monocyte"],
}


def say(title: str) -> None:
    print(f"\n== {title}")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    adata = sc.datasets.pbmc68k_reduced()
    say(f"{adata.n_obs} blood cells, {adata.raw.n_vars} genes, {adata.obs['bulk_labels'].nunique()} cell types")

    say("1. Cells become ranked genes")
    gfx.pp.tokenize(adata, use_raw=True, counts="log1p")

    say("2. Cells become vectors")
    gfx.tl.embed(adata)
    sc.pp.neighbors(adata, use_rep="X_gfx", key_added="gfx_neighbors")
    sc.tl.umap(adata, neighbors_key="gfx_neighbors", key_added="X_umap_gfx")
    for name, basis in (("gfx (embedded model)", "X_gfx"), ("PCA of the same cells", "X_pca")):
        accuracy = cross_val_score(
            KNeighborsClassifier(10), adata.obsm[basis], adata.obs["bulk_labels"].astype(str), cv=3
        ).mean()
        print(f"   nearest neighbours name the cell type of {accuracy:.0%} of held-out cells in {name}")

    say("3. Genes are deleted and compared with rank-matched random gene sets in the same cells")
    markers = [gene for pair in LINEAGES.values() for gene in pair]
    gfx.tl.delete_genes(adata, [*markers, ("CD79A", "MS4A1")])
    controls = gfx.get.controls_df(adata)
    print("   First the controls: what else explains the ranking?")
    print(controls[controls["statistic"] == "spearman"].round(2).to_string(index=False))
    print("   Then the effects, sorted by z-score among random gene sets:")
    columns = ["perturbation", "n_cells", "shift_mean", "position_mean", "context_mean", "random_mean", "z", "p", "fdr"]
    print(gfx.get.deletion_df(adata)[columns].round(5).to_string(index=False))
    together = gfx.get.synergy_df(adata).iloc[0]
    print(
        f"   {together['perturbation']} together shift cells {together['on_vectors_mean']:+.5f} beyond the sum of both "
        f"displacements (z-score {together['on_vectors_z']:+.1f} among random pairs)"
    )
    compare_lineages(adata)
    moved = gfx.get.gene_effects_df(adata, "CD79A", min_cells=20).head(8)
    print(f"   genes that the deletion of CD79A shifts most, beyond random deletions: {', '.join(moved['gene'])}")

    say("4. Attention is read")
    gfx.tl.attention(adata)
    attended = gfx.get.attention_df(adata, min_cells=20).groupby("gene")["ratio"].mean().nlargest(10)
    print(f"   genes attended to most, over all heads: {', '.join(attended.index)}")
    top = gfx.get.attention_ranks_df(adata).query("rank <= 20").groupby("layer")["ratio"].mean()
    for layer, ratio in top.items():
        print(f"   layer {layer} gives the top 20 genes of a cell {ratio:.2f} times what uniform attention would")

    say("Pictures and data")
    with plt.rc_context({"figure.dpi": 120}):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        sc.pl.embedding(
            adata,
            basis="X_umap_gfx",
            color="bulk_labels",
            ax=axes[0],
            show=False,
            title="UMAP of X_gfx",
            legend_loc=None,
        )
        sc.pl.umap(adata, color="bulk_labels", ax=axes[1], show=False, title="UMAP of PCA")
        save(figure, folder / "umap.png")
        save(gfx.pl.rank_trend(adata, show=False)[0].get_figure(), folder / "rank_trend.png")
        save(gfx.pl.deletion(adata, show=False).get_figure(), folder / "deletion.png")
        save(gfx.pl.attention(adata, show=False)[0].get_figure(), folder / "attention.png")
    adata.write_h5ad(folder / "quickstart.h5ad")
    print(f"   wrote {folder / 'quickstart.h5ad'}: everything above is in it")


def compare_lineages(adata: ad.AnnData) -> None:
    """Test whether a marker shifts its own lineage more than other cells that express it."""
    cells = gfx.get.deletion_cells_df(adata).join(adata.obs["bulk_labels"], on="cell")
    wins = 0
    for lineage, pair in LINEAGES.items():
        for gene in pair:
            of_gene = cells[cells["perturbation"] == gene]
            own = of_gene["bulk_labels"].isin(MEMBERS[lineage])
            inside, outside = of_gene.loc[own, "shift"].mean(), of_gene.loc[~own, "shift"].mean()
            wins += inside > outside
            print(f"   {gene:7s} shifts {lineage} by {inside:.5f}, other cells that express it by {outside:.5f}")
    n_markers = sum(map(len, LINEAGES.values()))
    print(f"   {wins} of {n_markers} markers shift their own lineage more; chance gives about {n_markers // 2}.")


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
    print(f"   wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo"))

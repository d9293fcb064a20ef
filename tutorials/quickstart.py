"""From counts to plots in about a minute, offline: `make demo` runs it and writes into demo/.

Real cells: 1,120 blood cells, half of them treated with interferon beta (`gfx.datasets.ifnb`). The small model of the
package, which was not trained on them, embeds the cells, deletes genes from them, and shows what it attends to.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")  # draw into files

import matplotlib.pyplot as plt
import scanpy as sc
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

import gfx

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

#: Genes that interferon switches on, and genes that monocytes express without it.
INTERFERON, MONOCYTE = ["ISG15", "IFITM3", "CXCL10"], ["LYZ", "FTL", "TYROBP"]

#: Monocytes of each condition to delete genes from, and to read attention in; all 600 would take ten times as long.
N_DELETION, N_ATTENTION = 60, 15


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cells = gfx.datasets.ifnb()
    heading("Blood cells with and without interferon")
    explain(
        f"""{cells.n_obs:,} blood cells and {cells.n_vars:,} genes, as raw counts. Half of the cells were treated with
        interferon beta, a signal of infection, which switches on a few hundred genes. The answers are therefore known
        in advance, and the model, `mini`, has never seen these cells."""
    )
    embed(cells, folder)
    monocytes = delete(cells, folder)
    read_attention(monocytes, folder)
    heading("Files")
    cells.write_h5ad(folder / "cells.h5ad")
    monocytes.write_h5ad(folder / "monocytes.h5ad")
    explain(
        f"""{folder / "cells.h5ad"} and {folder / "monocytes.h5ad"} hold all results, next to your counts. The
        notebooks in tutorials/ explain each step; start with tutorials/01_quickstart.ipynb."""
    )


def embed(cells: AnnData, folder: Path) -> None:
    """Embed the cells, and compare the embedding with principal components."""
    heading("1. Each cell becomes a ranked list of genes, and then a vector")
    explain("The model reads the genes of a cell in order, the most characteristic first, and returns an embedding.")
    gfx.pp.tokenize(cells)
    gfx.tl.embed(cells)
    normalized = cells.copy()
    sc.pp.normalize_total(normalized, target_sum=1e4)
    sc.pp.log1p(normalized)
    sc.pp.highly_variable_genes(normalized, n_top_genes=2000)
    sc.pp.pca(normalized)
    cells.obsm["X_pca"] = normalized.obsm["X_pca"]
    explain(
        """Does the embedding separate what it should? The share of cells whose label is that of most of their ten
        nearest neighbours among the other cells (cross-validation), next to plain PCA of the same cells:"""
    )
    bases = {"X_gfx": "embedding", "X_pca": "PCA"}
    labels = {"cell_type": "cell type", "condition": "condition"}
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.6), layout="constrained")
    for row, (basis, name) in zip(axes, bases.items(), strict=True):
        sc.pp.neighbors(cells, use_rep=basis, key_added=name)
        sc.tl.umap(cells, neighbors_key=name, key_added=f"X_umap_{name}")
        for ax, (label, meaning) in zip(row, labels.items(), strict=True):
            accuracy = cross_val_score(KNeighborsClassifier(10), cells.obsm[basis], cells.obs[label], cv=5).mean()
            print(f"   {name:9s} {meaning:9s} {accuracy:.1%}")
            title = f"{name}, {meaning}: {accuracy:.1%}"
            look = {"title": title, "frameon": False, "show": False}
            sc.pl.embedding(cells, basis=f"X_umap_{name}", color=label, ax=ax, **look)
    save(figure, folder / "umap.png", "both embeddings as UMAP; the embedding is in the first row")


def delete(cells: AnnData, folder: Path) -> AnnData:
    """Delete genes from stimulated monocytes, and ask whether they shift toward control."""
    heading("2. Genes are deleted from treated monocytes: do the cells look untreated again?")
    explain(
        f"""Each gene is removed from the list of a cell, and the model reads the cell again ({N_DELETION} monocytes of
        each condition). If the model has learnt what interferon does, deleting genes that interferon switches on
        ({", ".join(INTERFERON)}) shifts treated cells toward untreated ones, and deleting other genes of monocytes
        ({", ".join(MONOCYTE)}) does not."""
    )
    monocytes = draw(cells[cells.obs["cell_type"] == "CD14 Mono"], N_DELETION)
    gfx.tl.delete_genes(monocytes, INTERFERON + MONOCYTE, groupby="condition", start="stimulated", goal="control")
    explain("First the controls. How far does something simpler rank 100 random genes as the model does (Spearman)?")
    controls = gfx.get.controls_df(monocytes)
    for control, name in {
        "random_weights": "the same network with random weights",
        "rank": "the rank of the gene",
        "logfc": "its fold change from treated to untreated",
    }.items():
        value = controls.query(f"control == '{control}' and measure == 'toward' and statistic == 'spearman'")["value"]
        print(f"   {name:41s} {value.item():+.2f}")
    explain(
        """Then the effects. `toward_mean` is the shift toward untreated cells; `toward_z` compares it with the deletion
        of random genes of the same rank. Above 2, few random genes do as much:"""
    )
    effects = gfx.get.deletion_df(monocytes).query("role == 'goal'")
    columns = ["perturbation", "n_cells", "rank_mean", "toward_mean", "toward_z", "toward_p", "toward_fdr"]
    print(textwrap.indent(effects[columns].round(3).to_string(index=False), "   "))
    explain(
        """Random genes of high rank in treated cells are often interferon genes as well, so these z-scores are
        conservative. A deletion in silico shows what the model expects, not what an experiment would find."""
    )
    save(gfx.pl.deletion(monocytes, show=False).get_figure(), folder / "deletion.png", "the effects as a picture")
    save(
        gfx.pl.rank_trend(monocytes, show=False)[0].get_figure(),
        folder / "rank_trend.png",
        "how far any gene shifts a cell, by its rank, in the model and with random weights",
    )
    return monocytes


def read_attention(monocytes: AnnData, folder: Path) -> None:
    """Read which genes the model attends to."""
    heading("3. Which genes does the model attend to?")
    some = draw(monocytes, N_ATTENTION)
    gfx.tl.attention(some)
    ratio = gfx.get.attention_df(some, min_cells=10).groupby("gene")["ratio"].mean().nlargest(8)
    explain(
        f"""In {some.n_obs} monocytes, these genes receive most attention, compared with attention that is spread evenly
        over the genes of a cell: {", ".join(f"{gene} ({value:.1f} times)" for gene, value in ratio.items())}.
        Attention shows what the network reads, not which gene regulates which."""
    )
    save(
        gfx.pl.attention(some, show=False)[0].get_figure(),
        folder / "attention.png",
        "how evenly each head attends, and to which ranks",
    )


def draw(cells: AnnData, n: int) -> AnnData:
    """Draw as many cells of each condition."""
    return cells[cells.obs.groupby("condition", observed=True).sample(n, random_state=0).index].copy()


def heading(title: str) -> None:
    print(f"\n== {title}")


def explain(text: str) -> None:
    print(textwrap.fill(" ".join(text.split()), 100, initial_indent="   ", subsequent_indent="   "))


def save(figure: Figure, path: Path, meaning: str) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"   wrote {path}: {meaning}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo"))

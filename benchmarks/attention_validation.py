"""What heads attend to, beside what needs no attention: `python benchmarks/attention_validation.py DATA`.

DATA is a folder of reference data: `cells/tutorial/kang2018_ifnb_1120.h5ad`, and in `genes` `tf_lambert2018.tsv`,
`paper_gene_labels.csv.gz`, `collectri_human.tsv` and `dorothea_human_ABC.tsv`. Prints JSON. Five questions:

- layers: how broadly do heads attend, early and late, beside random weights?
- sets: do heads attend to transcription factors, or to central genes of the NOTCH1 network, beyond the rank and the
  detection of these genes? Calibration: how many random sets of high ranks does each test call special?
- edges: does attention find targets of transcription factors, beside co-expression and ranks? The head is chosen on
  half of the factors and judged on the other half.
- groups: are the genes whose attention differs most with interferon those of the interferon response, beside fold
  changes?
- deletion: how much does attention change without STAT1, beside random weights?

About 5 minutes on 2 cores with `mini`; `--figures FOLDER` draws.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import gfx

RESPONSE = ["ISG15", "IFI6", "IFIT1", "IFIT2", "IFIT3", "MX1", "OAS1", "LY6E", "ISG20", "IFITM3", "CXCL10", "CCL8"]
RESPONSE += ["TNFSF10", "IFI35", "IRF7", "STAT1"]
KEY = "gfx_attention"
#: Cells that a gene is in at least, and cells behind a pair of genes.
MIN_CELLS = 50
N_RANDOM_SETS, SIZE_OF_SETS = 200, 50
TOP = 20


def read_edges(genes: Path, known: set[str]) -> dict[str, pd.DataFrame]:
    """Read edges between known genes."""
    files = {"collectri": "collectri_human.tsv", "dorothea": "dorothea_human_ABC.tsv"}
    tables = {
        name: pd.read_csv(genes / file, sep="\t").rename(columns={"tf": "source"}) for name, file in files.items()
    }
    return {name: table[table["source"].isin(known) & table["target"].isin(known)] for name, table in tables.items()}


def rounded(table: pd.DataFrame) -> list[dict[str, object]]:
    return json.loads(table.round(4).to_json(orient="records"))


def sets_of_genes(adata: ad.AnnData, sets: dict[str, list[str]]) -> dict[str, object]:
    """Count heads that attend to sets, by each test, and random sets of high ranks that each test calls special."""
    table = gfx.get.attention_heads_df(adata, gene_sets=sets, min_cells=MIN_CELLS, key=KEY)
    report: dict[str, object] = {}
    for name, of_set in table.groupby("gene_set", sort=False):
        report[str(name)] = {
            "genes": int(of_set["n_genes"].iloc[0]),
            "heads": len(of_set),
            "more_or_less_than_other_genes": int((of_set["fdr"] < 0.05).sum()),
            "than_matched_genes": int((of_set["fdr_matched"] < 0.05).sum()),
            "remain_beside_random_weights": int(of_set["remains"].sum()),
            "largest_auc_matched": float(of_set["auc_matched"].max()),
        }
    rng = np.random.default_rng(0)
    often = (adata.var[f"{KEY}_n_cells"] >= MIN_CELLS).to_numpy()
    weight = np.where(often, 1 / (adata.var[f"{KEY}_rank"].fillna(0).to_numpy() + 50), 0)
    drawn = {
        f"random {number}": adata.var_names[
            rng.choice(adata.n_vars, SIZE_OF_SETS, replace=False, p=weight / weight.sum())
        ].tolist()
        for number in range(N_RANDOM_SETS)
    }
    random = gfx.get.attention_heads_df(adata, gene_sets=drawn, min_cells=MIN_CELLS, key=KEY)
    report["random sets of highly ranked genes: p below 0.05"] = {
        name: float((random[name] < 0.05).mean()) for name in ("p", "p_matched")
    }
    return report


def find_edges(adata: ad.AnnData, edges: pd.DataFrame) -> dict[str, object]:
    """Choose a head on half of the sources, and judge it on the others beside what needs no attention."""
    sources = np.random.default_rng(0).permutation(edges["source"].unique())
    chosen_on, judged_on = (edges[edges["source"].isin(half)] for half in np.array_split(sources, 2))
    first = gfx.get.attention_edges_df(adata, chosen_on, min_cells=MIN_CELLS, key=KEY)
    best = first[first["layer"].notna()].iloc[0]
    second = gfx.get.attention_edges_df(adata, judged_on, min_cells=MIN_CELLS, key=KEY)
    is_best = (second["layer"] == best["layer"]) & (second["head"] == best["head"])
    is_best &= second["direction"] == best["direction"]
    return {"judged": rounded(second[is_best.fillna(value=False) | second["layer"].isna()])}


def compare_groups(adata: ad.AnnData) -> dict[str, object]:
    """Count genes of the interferon response among those that differ most in attention, and in expression."""
    table = gfx.get.attention_difference_df(
        adata, group="stimulated", reference="control", min_cells=MIN_CELLS, key=KEY
    )
    nearer = np.where(table["difference"] > 0, table["low"], -table["high"])
    by_attention = table.assign(nearer=nearer).groupby("gene")["nearer"].max().nlargest(TOP).index
    scaled = adata.X.multiply(1e4 / np.asarray(adata.X.sum(axis=1))).log1p().tocsr()
    is_goal = (adata.obs["condition"] == "stimulated").to_numpy()
    means = [np.asarray(scaled[rows].mean(axis=0)).ravel() for rows in (is_goal, ~is_goal)]
    change = pd.Series(np.abs(means[0] - means[1]), index=adata.var_names)
    by_expression = change[change.index.isin(table["gene"])].nlargest(TOP).index
    return {
        f"of the response among the first {TOP} genes": {
            "attention": int(by_attention.isin(RESPONSE).sum()),
            "expression": int(by_expression.isin(RESPONSE).sum()),
        },
        "genes": int(table["gene"].nunique()),
        "first": by_attention.tolist(),
    }


def delete(adata: ad.AnnData, gene: str) -> dict[str, object]:
    """Measure how attention changes without a gene."""
    gfx.tl.attention(adata, deleted=gene, key_added="without")
    table = gfx.get.attention_difference_df(adata, min_cells=MIN_CELLS, key="without")
    relative = (table["difference"] / table["reference"]).abs()
    random = table["random"].abs()  # where attention is uniform, its ratio to uniform attention is 1
    known = (table["low"] > 0) | (table["high"] < 0)
    return {
        "cells": int(adata.uns["without"]["n_cells"]),
        "median change, relative": float(relative.median()),
        "99 % of changes are below": float(relative.quantile(0.99)),
        "median change with random weights, relative": float(random.median()),
        "share of intervals over cells without 0": float(known.mean()),
    }


def draw(adata: ad.AnnData, sets: dict[str, list[str]], folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    how = {"key": KEY, "show": False}
    axes = {
        "attention_sets": gfx.pl.attention_heads(adata, gene_sets=sets, min_cells=MIN_CELLS, **how),
        "attention_bands": gfx.pl.attention_bands(adata, **how),
        "attention_neighbors": gfx.pl.attention_neighbors(
            adata, "STAT1", sort_by="ratio", min_cells=MIN_CELLS, network=True, **how
        ),
        "attention_groups": [
            gfx.pl.attention_difference(adata, group="stimulated", reference="control", min_cells=MIN_CELLS, **how)
        ],
    }
    for name, (first, *_) in axes.items():
        first.get_figure().savefig(folder / f"{name}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--figures", type=Path)
    given = parser.parse_args()
    genes = given.data / "genes"
    adata = ad.read_h5ad(given.data / "cells" / "tutorial" / "kang2018_ifnb_1120.h5ad")
    gfx.pp.tokenize(adata, model="mini")
    often = np.asarray((adata.X > 0).sum(axis=0)).ravel() >= MIN_CELLS
    known = adata.var_names[often & (gfx.models.load("mini").vocabulary.resolve(adata.var_names) >= 0)]
    edges = read_edges(genes, set(known))
    named = pd.unique(pd.concat([table[end] for table in edges.values() for end in ("source", "target")]))
    gfx.tl.attention(adata, model="mini", groupby="condition", genes=list(named), heads="each", key_added=KEY)
    labels = pd.read_csv(genes / "paper_gene_labels.csv.gz")
    sets = {"transcription factors": pd.read_csv(genes / "tf_lambert2018.tsv", sep="\t")["gene_name"].tolist()}
    for name in ("central", "peripheral"):
        sets[f"NOTCH1 network, {name}"] = labels.loc[labels["class"] == f"n1_{name}", "symbol"].tolist()
    sets["interferon response"] = RESPONSE
    report = {
        "benchmark": "attention_validation",
        "cells": adata.n_obs,
        "layers": rounded(gfx.get.attention_layers_df(adata, key=KEY)),
        "sets": sets_of_genes(adata, sets),
        "edges": {name: find_edges(adata, table) for name, table in edges.items()},
        "groups": compare_groups(adata),
        "deletion of STAT1": delete(adata, "STAT1"),
    }
    if given.figures is not None:
        draw(adata, sets, given.figures)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

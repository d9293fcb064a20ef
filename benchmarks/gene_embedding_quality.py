"""What gene embeddings know of complexes and pathways.

`python benchmarks/gene_embedding_quality.py --corpus TRAIN --genes-dir DIR`: TRAIN is the folder of h5ad files that the
model was trained on, DIR holds `msigdb_selected_sets.tsv` (columns set, gene_name, ensembl_id). With `--data FILES`
(h5ad, raw counts, `var["ensembl_id"]`) also contextual gene embeddings, averaged over those cells. Prints JSON, or
tables with `--markdown`:

- neighbours by cosine of well-known genes;
- for families of genes that make one complex or serve one purpose, and for the sets: how often a member is more similar
  to the other members (mean over them) than a gene outside is, which is an AUC, averaged over the members. `matched`:
  genes outside are drawn, five times, among those detected about as often, because genes found in every cell resemble
  each other in many ways. `unmatched`: all genes outside. Against random weights, correlation of log-normalised counts
  over the cells of the corpus, the vectors of its SVD, and how often genes are detected, alone.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
from embedding_quality import N_SEEDS, Corpus, components, random_twin, read_corpus, read_held_out
from sklearn.preprocessing import normalize

import gfx

if TYPE_CHECKING:
    from scipy import sparse

WELL_KNOWN = (
    ("T-cell receptor complex", ("CD3E", "CD3D")),
    ("MHC class II", ("HLA-DRA",)),
    ("ribosome", ("RPL3", "RPS6")),
    ("interferon response", ("IFIT1", "ISG15")),
    ("B cells", ("MS4A1",)),
    ("cytotoxic cells", ("GNLY",)),
    ("matrix", ("COL1A1",)),
    ("cell division", ("MKI67",)),
)
N_NEIGHBOURS = 8

#: Symbols that make a family.
FAMILIES = {
    "T-cell receptor, CD3 and CD8": r"CD3[DEG]|CD247|TR[ABGD]C\d?|TR[ABGD][VJ]\d.*|CD8A|CD8B2?",
    "MHC class II": r"HLA-D[MOPQR][AB]\d?|CD74",
    "MHC class I": r"HLA-[ABCEFG]|B2M",
    "cytosolic ribosome": r"RPL\d+(A|L|AL)?|RPS\d+(A|X|L|Y\d)?|RPSA|RPLP[012]|FAU|UBA52",
    "mitochondrial ribosome": r"MRP[LS]\d+[AB]?",
    "proteasome": r"PSM[ABCD]\d+",
    "NADH dehydrogenase": r"NDUF[ABCSV]\d+|NDUFAB1|MT-ND\d[L]?",
    "cytochrome c oxidase": r"COX[4-8](I\d|[ABC]\d?)L?|MT-CO\d",
    "ATP synthase": r"ATP5[A-Z]+\d?|MT-ATP\d",
    "chaperonin CCT": r"CCT\d[AB]?|TCP1",
    "DNA replication licensing": r"MCM[2-7]",
    "kinetochore and spindle": r"CENP[A-Z]\d?|NDC80|NUF2|SPC2[45]|BUB1B?|KIF(11|14|15|18A|18B|20A|20B|23|2C|4A)",
    "histones": r"H1-\d+|H1F\w+|H2A\w+|H2B\w+|H3C\w+|H3F3[AB]|H3-3[AB]|H4C\w+|HIST[1-4]H\w+",
    "keratins": r"KRT\d+[A-C]?",
    "collagens": r"COL\d+A\d+",
    "interferon-induced": r"IFI\w+|IFIT\w+|IFITM\d+|OAS[123L]+|ISG\d+|MX[12]|IRF[79]|STAT[12]",
    "tubulins": r"TUB[ABG]\w*",
    "heat-shock proteins": r"HSP[ABDEH]\d+\w*|HSP90\w+|DNAJ[AB]\d+",
    "metallothioneins": r"MT[1-4]\w?",
    "S100": r"S100([BGPZ]|A\d+)",
    "spliceosome": r"SNRP\w+\d?|SF3[AB]\d|LSM\d",
    "translation factor eIF3": r"EIF3[A-M]",
    "vacuolar ATPase": r"ATP6V\w+",
    "granzymes and their like": r"GZM[ABHKM]|PRF1|GNLY|NKG7|CTSW|CST7|KLR[BDFK]\d",
    "haemoglobins": r"HB[ABDEGMQZ]\d?",
    "complement C1q": r"C1Q[ABC]",
}
MIN_MEMBERS = 3
#: Sets of genes that every cell needs are neither complex nor pathway.
LEFT_OUT = re.compile("HOUSEKEEPING")
#: A set that shares more than this part of its members with a larger one says the same again.
MAX_SHARED = 0.5
#: Cells that a gene needs: what is known of rarer genes is noise, in the corpus and in a model of it.
MIN_CELLS = 30
#: Bands of detection frequency. Ten are too few: the top one holds genes found in a tenth and in all of the cells.
N_STRATA = 50
#: A band has at least so many genes, however small the corpus: more than any set has at one frequency.
FEWEST_IN_BAND = 150
N_CONTROLS = 200

WORDS, CONTEXT, TWIN = "model, input embeddings", "model, contextual embeddings", "random weights, input embeddings"
CORRELATION, SVD, FREQUENCY = "correlation of log counts", "SVD gene vectors", "detection frequency alone"


# --- genes and sets ------------------------------------------------------------------------------------------------


def family_members(vocabulary: object) -> dict[str, np.ndarray]:
    """Tokens of each family."""
    symbols = pd.Series(vocabulary.symbols.astype(str))
    return {name: np.flatnonzero(symbols.str.fullmatch(pattern)) for name, pattern in FAMILIES.items()}


def listed_sets(table: Path, vocabulary: object) -> dict[str, np.ndarray]:
    """Tokens of each set of the table, larger sets first; sets that repeat a larger one are left out."""
    rows = pd.read_csv(table, sep="\t")
    rows = rows[~rows["set"].str.contains(LEFT_OUT)]
    rows["token"] = vocabulary.resolve(rows["ensembl_id"].astype(str))
    members = {name: np.unique(group) for name, group in rows[rows["token"] >= 0].groupby("set")["token"]}
    kept: dict[str, np.ndarray] = {}
    for name in sorted(members, key=lambda name: (-len(members[name]), name)):
        if all(np.isin(members[name], other).mean() <= MAX_SHARED for other in kept.values()):
            kept[name] = members[name]
    return kept


# --- what is compared ----------------------------------------------------------------------------------------------


def input_embeddings(model: gfx.models.Model) -> np.ndarray:
    """Vectors by which the model reads its tokens, `(n_tokens, hidden_size)`."""
    import torch

    from gfx._engine.encoder import load_encoder

    encoder = load_encoder(model.weights, model.config, n_layers=0, device=torch.device("cpu"), dtype=torch.float32)
    return encoder.embeddings.word_embeddings.weight.numpy()


def contextual_embeddings(files: list[Path], model: gfx.models.Model) -> np.ndarray:
    """Mean of each gene's hidden states over the cells of all files that have it; NaN for genes in too few."""
    total = np.zeros((len(model.vocabulary), model.hidden_size))
    n_cells = np.zeros(len(model.vocabulary), dtype=np.int64)
    for file in files:
        adata = ad.read_h5ad(file)
        gfx.pp.tokenize(adata, model=model, gene_ids="ensembl_id")
        gfx.tl.embed_genes(adata, model=model)
        token = model.vocabulary.resolve(adata.var["ensembl_id"].astype(str))
        found = adata.var["gfx_genes_n_cells"].to_numpy() > 0
        token, first = np.unique(token[found], return_index=True)  # an id that stands twice has one embedding
        counts = adata.var["gfx_genes_n_cells"].to_numpy()[found][first]
        total[token] += adata.varm["gfx_genes"][found][first] * counts[:, None]
        n_cells[token] += counts
    total[n_cells < MIN_CELLS] = np.nan
    return (total / np.maximum(n_cells, 1)[:, None]).astype(np.float32)


def cosines(vectors: np.ndarray, genes: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Cosine of each gene to each column gene, `(n_genes, n_columns)`; both as tokens."""
    unit = normalize(vectors[genes])
    return unit @ normalize(vectors[columns]).T


def correlations(log_counts: sparse.csr_matrix, genes: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Pearson correlation over cells of each gene with each column gene, `(n_genes, n_columns)`."""
    n = log_counts.shape[0]
    by_gene = log_counts[:, genes].T.tocsr()
    mean = np.asarray(by_gene.mean(axis=1)).ravel()
    sd = np.sqrt(np.asarray(by_gene.multiply(by_gene).mean(axis=1)).ravel() - mean**2)
    at = np.searchsorted(genes, columns)
    out = np.empty((len(genes), len(columns)), dtype=np.float32)
    for start in range(0, len(columns), 256):
        some = at[start : start + 256]
        product = by_gene @ by_gene[some].T.toarray() / n
        out[:, start : start + 256] = (product - mean[:, None] * mean[some]) / (sd[:, None] * sd[some])
    return out


# --- retrieval -----------------------------------------------------------------------------------------------------


def strata(frequency: np.ndarray) -> np.ndarray:
    """Number of the band of detection frequency of each gene; bands have equally many genes."""
    rank = np.argsort(np.argsort(frequency, kind="stable"), kind="stable")
    return rank * min(N_STRATA, max(len(frequency) // FEWEST_IN_BAND, 1)) // len(frequency)


def retrieval(similarity: np.ndarray, rows: np.ndarray, stratum: np.ndarray) -> tuple[np.ndarray, float]:
    """AUC of the members of a set, by controls of the same stratum (one value for each seed), and by all other genes.

    Parameters
    ----------
    similarity
        Of every gene to each member, `(n_genes, n_members)`.
    rows
        Which genes the members are, `(n_members,)`.
    stratum
        Of every gene, `(n_genes,)`.
    """
    n = len(rows)
    outside = np.ones(len(similarity), dtype=bool)
    outside[rows] = False
    total = similarity.sum(axis=1)
    unmatched = np.empty(n)
    matched = np.empty((N_SEEDS, n))
    for i, row in enumerate(rows):
        to_others = (total - similarity[:, i]) / (n - 1)
        own = (total[row] - similarity[row, i]) / (n - 1)
        unmatched[i] = share_below(to_others[outside], own)
        pool = np.flatnonzero(outside & (stratum == stratum[row]))
        if not len(pool):
            msg = f"All genes detected as often as member {i} of the set belong to it: use fewer bands than {N_STRATA}."
            raise ValueError(msg)
        for seed in range(N_SEEDS):
            rng = np.random.default_rng((seed, i))
            controls = rng.choice(pool, min(N_CONTROLS, len(pool)))
            matched[seed, i] = share_below(to_others[controls], own)
    return matched.mean(axis=1), float(unmatched.mean())


def share_below(values: np.ndarray, own: float) -> float:
    """Share of values below one's own, ties counted half."""
    return float((values < own).mean() + (values == own).mean() / 2)


def evaluate(
    sets: dict[str, dict[str, np.ndarray]], corpus: Corpus, model: gfx.models.Model, vectors: dict[str, list]
) -> dict[str, object]:
    """AUC of every set by every similarity.

    Parameters
    ----------
    sets
        Kind of set -> name -> tokens.
    vectors
        Name -> one or more draws of gene vectors, `(n_tokens, d)`; NaN for genes without.
    """
    frequency = detection(corpus)
    usable = ~model.vocabulary.is_special & (frequency * len(corpus.lengths) >= MIN_CELLS)
    for draws in vectors.values():
        usable &= np.isfinite(draws[0]).all(axis=1)
    genes = np.flatnonzero(usable)
    stratum = strata(frequency[genes])
    members = {
        (kind, name): np.intersect1d(tokens, genes) for kind, named in sets.items() for name, tokens in named.items()
    }
    members = {which: tokens for which, tokens in members.items() if len(tokens) >= MIN_MEMBERS}
    columns = np.unique(np.concatenate(list(members.values())))

    def similarities(name: str) -> list[np.ndarray]:
        if name == CORRELATION:
            return [correlations(corpus.log_counts, genes, columns)]
        if name == FREQUENCY:
            return [-np.abs(frequency[genes][:, None] - frequency[columns])]
        return [cosines(draw, genes, columns) for draw in vectors[name]]

    found: dict[str, dict[tuple[str, str], tuple[np.ndarray, float]]] = {}
    for name in (*vectors, CORRELATION, FREQUENCY):
        draws = similarities(name)
        found[name] = {}
        for which, tokens in members.items():
            rows, at = np.searchsorted(genes, tokens), np.searchsorted(columns, tokens)
            matched, unmatched = zip(*(retrieval(draw[:, at], rows, stratum) for draw in draws), strict=True)
            found[name][which] = np.concatenate(matched), float(np.mean(unmatched))
    report: dict[str, object] = {"genes": len(genes), "means": {}, "sets": {}}
    for kind in sets:
        own = [which for which in members if which[0] == kind]
        report["means"][kind] = {"sets": len(own)} | {
            name: summary(np.mean([by[w][0] for w in own], axis=0), float(np.mean([by[w][1] for w in own])))
            for name, by in found.items()
        }
        report["sets"][kind] = {
            w[1]: {"members": len(members[w])} | {name: summary(*by[w]) for name, by in found.items()} for w in own
        }
    return report


def summary(matched: np.ndarray, unmatched: float) -> dict[str, float]:
    """Mean and standard deviation over seeds, and the AUC by all genes."""
    return {
        "matched": round(float(matched.mean()), 3),
        "sd": round(float(matched.std()), 4),
        "unmatched": round(unmatched, 3),
    }


def detection(corpus: Corpus) -> np.ndarray:
    """Share of cells that detect each token."""
    return corpus.log_counts.getnnz(axis=0) / corpus.log_counts.shape[0]


# --- neighbours ----------------------------------------------------------------------------------------------------


def neighbours(vectors: np.ndarray, candidates: np.ndarray, vocabulary: object) -> dict[str, list[str] | None]:
    """Symbols nearest to each well-known gene among the candidates; `None` where the gene is not among them."""
    out: dict[str, list[str] | None] = {}
    for _, symbols in WELL_KNOWN:
        for symbol in symbols:
            token = int(vocabulary.resolve([symbol])[0])
            if token not in candidates:
                out[symbol] = None
                continue
            similarity = cosines(vectors, candidates, np.array([token]))[:, 0]
            order = [t for t in candidates[np.argsort(-similarity, kind="stable")] if t != token][:N_NEIGHBOURS]
            out[symbol] = [str(vocabulary.symbols[t] or vocabulary.ids[t]) for t in order]
    return out


def markdown(report: dict[str, object]) -> str:
    """Tables for the model card."""
    found = report["neighbours"]
    lines = ["| | gene | " + " | ".join(found) + " |", "|---" * (len(found) + 2) + "|"]
    for what, symbols in WELL_KNOWN:
        for symbol in symbols:
            cells = [", ".join(lists[symbol] or ["(too rare here)"]) for lists in found.values()]
            lines.append(f"| {what} | {symbol} | " + " | ".join(cells) + " |")
    for kind, means in report["retrieval"]["means"].items():
        lines += ["", f"| {kind} ({means['sets']}) | AUC, matched | unmatched |", "|---|---|---|"]
        rows = ((name, row) for name, row in means.items() if name != "sets")
        lines += [f"| {name} | {r['matched']:.3f} ± {r['sd']:.3f} | {r['unmatched']:.3f} |" for name, r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--genes-dir", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="h5ad files for contextual embeddings")
    parser.add_argument("--held-out", type=Path, help="pretraining.json, or npz: what training did not see")
    parser.add_argument("--model", help="a published name or a folder; the embedded model if left out")
    parser.add_argument("--markdown", action="store_true", help="print tables instead of JSON")
    given = parser.parse_args()
    model = gfx.models.load(given.model or "mini")
    with tempfile.TemporaryDirectory() as folder, gfx.settings.override(verbosity=1):
        corpus, _ = read_corpus(given.corpus, model, read_held_out(given.held_out))
        vectors = {WORDS: [input_embeddings(model)]}
        if given.data:
            vectors[CONTEXT] = [contextual_embeddings(given.data, model)]
        twins = [random_twin(model, Path(folder) / str(seed), seed) for seed in range(N_SEEDS)]
        vectors[TWIN] = [input_embeddings(twin) for twin in twins]
        vectors[SVD] = [components(corpus, model, 0).vectors]
    sets = {
        "families": family_members(model.vocabulary),
        "MSigDB sets": listed_sets(given.genes_dir / "msigdb_selected_sets.tsv", model.vocabulary),
    }
    frequent = detection(corpus) * len(corpus.lengths) >= MIN_CELLS
    report = {
        "benchmark": "gene embedding quality",
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "cells_of_a_gene": f"at least {MIN_CELLS}",
        "neighbours": {
            name: neighbours(
                draws[0],
                np.flatnonzero(frequent & ~model.vocabulary.is_special & np.isfinite(draws[0]).all(axis=1)),
                model.vocabulary,
            )
            for name, draws in vectors.items()
            if name in (WORDS, CONTEXT)
        },
        "retrieval": evaluate(sets, corpus, model, vectors),
    }
    print(markdown(report) if given.markdown else json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

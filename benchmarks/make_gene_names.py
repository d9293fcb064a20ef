"""Make the table of gene names that the package ships: current and former symbols, synonyms, retired ids.

python benchmarks/make_gene_names.py DICTIONARIES CURRENT VOCABULARY...

`DICTIONARIES` is a folder with the published dictionaries as text, `CURRENT` a table of symbols and Ensembl ids
(`gene_name`, `ensembl_id`), and `VOCABULARY` a table with a column of the ids whose names are wanted. A name that two
of them give to different genes is left out.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pandas as pd

TABLE = Path(__file__).resolve().parents[1] / "src" / "gfx" / "_core" / "gene_names.tsv.gz"


def main(dictionaries: Path, current: Path, *vocabularies: Path) -> None:
    """Read all names, and write those of the wanted genes."""
    ids: set[str] = set()
    for path in vocabularies:
        table = pd.read_csv(path, sep=None, engine="python", comment="#", keep_default_na=False)
        ids |= {name for name in table["id" if "id" in table else "ensembl_id"] if name.startswith("ENSG")}
    read = {"keep_default_na": False, "dtype": str}
    sources = [pd.read_csv(current, sep="\t", **read)[["gene_name", "ensembl_id"]]]
    published = ("ensembl_mapping_dict_gc104M", "gene_name_id_dict_gc104M", "gene_name_id_dict_gc30M")
    sources += [pd.read_csv(dictionaries / f"{name}.csv.gz", **read) for name in published]
    gene_of: dict[str, str] = {}
    several = {f"{number}-MAR" for number in (1, 2)}  # MARCHF1 and MTARC1 were MARCH1 and MARC1
    for table in sources:
        for name, gene in table.itertuples(index=False, name=None):
            if gene_of.setdefault(name.upper(), gene) != gene:
                several.add(name.upper())
    former = {f"SEPT{n}": f"SEPTIN{n}" for n in range(1, 15)} | {f"MARCH{n}": f"MARCHF{n}" for n in range(1, 12)}
    # The dates into which spreadsheets turned them, as `gfx._core.gene_names.plain_date` writes all dates.
    former |= {f"{n}-SEP": f"SEPTIN{n}" for n in range(1, 15)} | {f"{n}-MAR": f"MARCHF{n}" for n in range(3, 12)}
    former |= {"15-SEP": "SELENOF", "1-DEC": "DELEC1"}
    for name, symbol in former.items():
        if symbol in gene_of:
            gene_of[name] = gene_of[symbol]
    names: dict[str, list[str]] = {}
    for name, gene in sorted(gene_of.items()):
        if gene in ids and name != gene and name not in several and not set(name) & set("\t\n|"):
            names.setdefault(gene, []).append(name)
    lines = [f"{gene}\t{'|'.join(names[gene])}\n" for gene in sorted(names)]
    TABLE.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""Which kind of name, which species."""

from __future__ import annotations

import pytest

from gfx._core.gene_names import Species, foreign_species, name_kind, name_kinds


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ENSG00000136574", "Ensembl"),
        ("ENSG00000136574.12", "Ensembl"),
        ("ensg00000136574", "Ensembl"),
        ("GATA4", "symbol"),
        ("C1orf112", "symbol"),
        ("HLA-DRB1", "symbol"),
        ("RP11-34P13.7", "symbol"),
        ("2626", "number"),
        ("", "none"),
        ("ENSMUSG00000021944", Species("mouse", is_sure=True)),
        ("ENSRNOG00000010708", Species("rat", is_sure=True)),
        ("ENSGALG00000010708", Species("foreign (ENSGALG...)", is_sure=True)),
        ("Gata4", Species("mouse or rat", is_sure=False)),
        ("mt-Nd1", Species("mouse or rat", is_sure=False)),
        ("Gm1992", Species("mouse or rat", is_sure=False)),
        ("gata4", Species("zebrafish or frog", is_sure=False)),
    ],
)
def test_kinds(name, kind):
    assert name_kind(name) == kind


def test_species_is_that_of_the_majority():
    assert foreign_species(["Gata4", "Tbx5", "NPPA"]).name == "mouse or rat"
    assert foreign_species(["Gata4", "TBX5", "NPPA", ""]) is None
    assert foreign_species(["", "", "ENSMUSG00000021944"]) == ("mouse", True)
    assert foreign_species([]) is None
    assert name_kinds(["GATA4", "TBX5", "2626"]).to_dict() == {"symbol": 2, "number": 1}


def test_real_names(real_cells):
    assert foreign_species(real_cells("eval/pbmc3k_10x").var_names) is None
    mouse = real_cells("other/mouse_heart_1k_v2_10x")
    assert foreign_species(mouse.var_names).name == "mouse or rat"
    assert foreign_species(mouse.var["ensembl_id"]) == ("mouse", True)

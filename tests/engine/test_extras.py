"""What works in a plain installation, and what is said of what it leaves out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gfx._engine.extras import need


def test_what_is_installed_is_not_missed() -> None:
    need("Anything")
    need("Reading numbers", "numpy", "scipy")


def test_missing_packages_are_named_with_the_lines_that_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("optuna", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as raised:
        need("`n_trials=3`", "accelerate", "numpy", "optuna")
    assert str(raised.value) == (
        "`n_trials=3` needs accelerate and optuna: `pip install 'scgfx[train,search]'` or "
        "`conda install -c conda-forge accelerate optuna`."
    )


def test_a_plain_installation_runs_models_and_probes_and_refuses_to_train() -> None:
    code = """
import sys
for name in ("accelerate", "bitsandbytes", "dask", "muon", "optuna", "peft", "psutil"):
    sys.modules[name] = None
import gfx
gfx.settings.verbosity = 0
adata = gfx.datasets.toy()
gfx.tl.embed(adata)
gfx.tl.classify_cells(adata, "cell_type", method="linear_probe", n_repeats=1)
slots = [sorted(adata.obsm), sorted(adata.uns)]
for train in (
    lambda: gfx.tl.classify_cells(adata, "cell_type", method="fine_tune", key_added="trained"),
    lambda: gfx.models.pretrain([adata], "nowhere", gene_ids="ensembl_id", curriculum=[(64, 1)]),
):
    try:
        train()
    except ImportError as error:
        assert str(error).startswith("Training needs accelerate: `pip install 'scgfx[train]'`"), error
    else:
        raise SystemExit("it trained")
assert slots == [sorted(adata.obsm), sorted(adata.uns)]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)

"""Arguments that cannot be meant: an error of ours that names the argument, and nothing written."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pandas as pd
import pytest

import gfx
from gfx.models import FineTuning
from gfx.tl.perturbation import _perturb

delete_genes = partial(gfx.tl.delete_genes, controls=None)
tune = partial(gfx.tl.classify_cells, groupby="cell_type", n_splits=2, n_repeats=1, controls=None)
label = partial(gfx.tl.classify_genes, n_splits=2, n_repeats=1, controls=None, method="linear_probe")

#: What is called, with what, and the error.
WRONG = {
    "layer as text": (gfx.tl.embed, {"hidden_layer": "x"}, TypeError, "`hidden_layer` is a whole number, found 'x'"),
    "half a layer": (gfx.tl.embed, {"hidden_layer": 1.0}, TypeError, "`hidden_layer` is a whole number, found 1.0"),
    "layer True": (gfx.tl.embed_genes, {"hidden_layer": True}, TypeError, "`hidden_layer` is a whole number"),
    "no such layer": (gfx.tl.embed, {"hidden_layer": 10**9}, ValueError, "`hidden_layer=1000000000` is outside"),
    "batch as text": (tune, {"method": FineTuning(batch_size="32")}, TypeError, "`batch_size` is a whole number"),
    "half a batch": (tune, {"method": FineTuning(batch_size=2.5)}, TypeError, "`batch_size` is a whole number"),
    "no batch": (tune, {"method": FineTuning(batch_size=0)}, ValueError, "`batch_size` is 1 or more, found 0"),
    "batch of training": (
        tune,
        {"method": FineTuning(training={"per_device_train_batch_size": "32"})},
        TypeError,
        r"`training\['per_device_train_batch_size'\]` is a whole number, found '32'",
    ),
    "half a frozen layer": (tune, {"method": FineTuning(freeze_layers=0.5)}, TypeError, "`freeze_layers` is a whole"),
    "passes as text": (tune, {"method": FineTuning(n_epochs="2")}, TypeError, "`n_epochs` is a number above 0"),
    "no pass": (tune, {"method": FineTuning(n_epochs=0)}, ValueError, "`n_epochs` is a number above 0, found 0"),
    "no genes": (delete_genes, {"genes": np.array([])}, ValueError, "`genes` is empty"),
    "no genes to screen": (gfx.tl.screen_genes, {"genes": np.array([])}, ValueError, "`genes` is empty"),
    "one gene that is no list": (delete_genes, {"genes": np.array("TOY1")}, TypeError, "`genes` are names of genes"),
    "a number of genes": (delete_genes, {"genes": 5}, TypeError, "`genes` are names of genes, .* found 5 of type int"),
    "no list of genes": (label, {"labels": {"a": None, "b": ["TOY1"]}}, TypeError, "class 'a' is a list of genes"),
    "a number of controls": (gfx.tl.delete_genes, {"genes": "TOY1", "controls": 5}, ValueError, "`controls` is one of"),
    "a number of columns": (tune, {"groupby": 5}, TypeError, "`groupby` names columns of `obs`, found 5 of type int"),
    "training cells as text": (tune, {"learning_curve": ["8"]}, TypeError, "`learning_curve` is a whole number"),
    "empty name": (gfx.tl.embed, {"key_added": ""}, ValueError, "`key_added=''` is no name"),
    "slash": (gfx.tl.embed, {"key_added": "a/b"}, ValueError, "`key_added='a/b'` has a '/'"),
    "list of columns": (
        gfx.tl.embed_genes,
        {"groupby": ["cell_type"]},
        TypeError,
        r"A column of `adata.obs` is named by text, found \['cell_type'\] of type list",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_argument_that_cannot_be_meant_is_named(wrong, cells, toy_model, slots):
    function, arguments, error, text = WRONG[wrong]
    before = slots(cells)
    with pytest.raises(error, match=text):
        function(cells, model=toy_model, **arguments)
    assert slots(cells) == before


@pytest.mark.parametrize("device", ["xpu", "npu:3", "mlu"])
def test_a_device_that_this_torch_cannot_use_is_named(cells, toy_model, slots, device):
    before = slots(cells)
    message = f"This torch cannot use '{device}'. Set `gfx.settings.device = None`"
    with gfx.settings.override(device=device), pytest.raises(ValueError, match=message):
        gfx.tl.embed(cells, model=toy_model)
    assert slots(cells) == before


def test_no_genes_for_a_vocabulary(toy_cells):
    with pytest.raises(ValueError, match="`genes` is empty"):
        gfx.models.build_vocabulary(toy_cells(5), gene_ids="ensembl_id", genes=np.array([]))
    with pytest.raises(TypeError, match="`min_cells` is a whole number, found '3'"):
        gfx.models.build_vocabulary(toy_cells(5), gene_ids="ensembl_id", min_cells="3")


def test_a_continuous_label_gives_a_short_error(cells, toy_model):
    cells.obs["score"] = np.random.default_rng(0).normal(size=cells.n_obs)
    with pytest.raises(ValueError, match=r"and 14 more\. Leave them out.* Cut numbers into classes first") as error:
        tune(cells, groupby="score", model=toy_model)
    assert len(str(error.value)) < 600
    with pytest.raises(KeyError, match=r"and 14 more\.") as error:
        delete_genes(cells, "TOY1", model=toy_model, groupby="score", start="high", goal="low")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("start", "goal"), [("0", "1"), (0, 1), (0.0, 1.0), ("0.0", "1.0"), (np.float32(0), np.int8(1))]
)
def test_states_of_a_column_of_floats_are_asked_for_as_numbers_or_text(cells, toy_model, start, goal):
    cells.obs["cluster"] = (np.arange(cells.n_obs) % 2).astype(float)
    arguments = {"model": toy_model, "groupby": "cluster", "start": start, "goal": goal, "key_added": "x"}
    with pytest.warns(UserWarning, match="separable|tested"):
        delete_genes(cells, "TOY90", **arguments)
    params = cells.uns["x"]["params"]
    assert (params["start"], params["goal"]) == ("0.0", "1.0")


@pytest.mark.parametrize("dtype", [float, int])
def test_groups_of_numbers_are_read_as_numbers_or_text(cells, toy_model, dtype):
    cells.obs["cluster"] = (np.arange(cells.n_obs) % 2).astype(dtype)
    gfx.tl.attention(cells, model=toy_model, groupby="cluster", controls=None)
    gfx.tl.screen_genes(cells, genes=["TOY90"], model=toy_model, groupby="cluster", controls=None)
    first, second = (str(dtype(n)) for n in (0, 1))
    for group, reference in ((0, 1), ("0", "1"), (0.0, 1.0), ("0.0", "1.0"), (first, second)):
        pd.testing.assert_frame_equal(gfx.get.screen_df(cells, group), gfx.get.screen_df(cells, first))
        for table in (gfx.get.attention_df, gfx.get.attention_heads_df):
            pd.testing.assert_frame_equal(table(cells, group=group), table(cells, group=first))
        difference = [
            gfx.get.attention_difference_df(cells, group=one, reference=other, min_cells=1)
            for one, other in ((group, reference), (first, second))
        ]
        pd.testing.assert_frame_equal(*difference)
        with pytest.raises(ValueError, match="are two different groups"):
            gfx.get.attention_difference_df(cells, group=group, reference=first)
    for unknown in (2, "0.5", "00", "a"):
        with pytest.raises(ValueError, match=r"has the groups \["):
            gfx.get.attention_df(cells, group=unknown)
        with pytest.raises(KeyError, match="Did not find the group"):
            gfx.get.screen_df(cells, unknown)


def test_a_gene_behind_what_the_model_reads_is_reported_as_cut(cells, toy_model, capsys):
    token = toy_model.vocabulary.resolve(["TOY1"])[0]
    x = np.asarray(cells.X.todense())
    x[:, 1:200] = np.maximum(x[:, 1:200], 1) * 50
    x[:, [0, 89]] = 1, 100_000  # TOY1 and TOY90
    cells.X = type(cells.X)(x.astype(np.float32))
    gfx.pp.tokenize(cells, model=toy_model)
    assert not (cells.obsm["gfx_tokens"] == token).any()
    n_cells = np.bincount(cells.obsm["gfx_tokens"].ravel(), minlength=len(toy_model.vocabulary))[4:]
    often = [f"TOY{n + 1}" for n in np.argsort(-n_cells) if n != 89][:6]
    cut = r"Of \['TOY1'\]: Cells express them, but behind the 62 genes of a cell that 'toy' reads: cut\."
    with pytest.warns(UserWarning, match=rf"No cell has the genes of \['TOY1'\].*{cut}"):
        delete_genes(cells, ["TOY1", "TOY90"], model=toy_model, key_added="one")
    with pytest.raises(ValueError, match=r"No cell that is screened has any of the genes.*behind the 62 genes"):
        gfx.tl.screen_genes(cells, genes=["TOY1"], model=toy_model)
    classes = {"a": ["TOY1", "TOY90", *often[:3]], "b": often[3:6]}
    with gfx.settings.override(verbosity=2):
        label(cells, classes, model=toy_model)
    assert (
        "1 of 8 labelled genes are in none of the cells. 1 of them: Cells express them, but" in capsys.readouterr().out
    )
    cells.X[:, 0] = 0
    cells.X.eliminate_zeros()
    with pytest.warns(UserWarning, match=r"No cell has the genes of \['TOY1'\]") as warned:
        delete_genes(cells, ["TOY1", "TOY90"], model=toy_model, key_added="two")
    assert not any("cut" in str(warning.message) for warning in warned)


def test_a_result_that_may_not_fit_into_memory_is_announced_before_it_runs(cells, toy_model, monkeypatch):
    monkeypatch.setattr(_perturb, "LARGE_RESULT", 4 * 24 * 2 * 4)
    monkeypatch.setattr(_perturb, "_run", lambda *_, **__: (_ for _ in ()).throw(InterruptedError))
    said = re.escape("2 perturbations of 24 cells are stored by cell and take 0 GB of memory")
    with pytest.warns(UserWarning, match=said), pytest.raises(InterruptedError):
        gfx.tl.delete_genes(cells, ["TOY1", "TOY2"], model=toy_model, controls=["parts"])
    with pytest.raises(InterruptedError):  # without parts of each shift it is a quarter, and no warning
        gfx.tl.delete_genes(cells, ["TOY1", "TOY2"], model=toy_model, controls=None)


def test_the_error_about_a_missing_result_lists_all_results(cells, toy_model):
    gfx.tl.embed(cells, model=toy_model, key_added="mine")
    delete_genes(cells, "TOY90", model=toy_model, key_added="deleted")
    text = r"Run .* first\. Other results: 'deleted' of `gfx.tl.delete_genes`, 'mine' of `gfx.tl.embed`\."
    with pytest.raises(KeyError, match=rf"Did not find a result of `gfx.tl.attention` .* {text}"):
        gfx.get.attention_df(cells)
    with pytest.raises(KeyError, match=r"Results of .*: \['deleted'\]\. Run .* first\. Other results: 'mine' of"):
        gfx.get.deletion_df(cells, key="other")
    assert isinstance(gfx.get.deletion_df(cells), pd.DataFrame)

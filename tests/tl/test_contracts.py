"""What holds for every tool: what it writes and where, copies, views, files, MuData, failures."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import anndata as ad
import dask.array as da
import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import ImplicitModificationWarning
from scipy import sparse

import gfx

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

WIDTH, HEADS, RANKS = 16, 6, 62


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Those that have no `dtype` compute alike on every CPU; few draws of bootstraps and of random genes."""
    monkeypatch.setattr("gfx._engine.device.has_fast_bfloat16", lambda *_, **__: False)
    monkeypatch.setattr("gfx._core.classification.N_DRAWS", 5)
    monkeypatch.setattr("gfx.tl.perturbation._controls.N_RANK_SAMPLE", 30)
    monkeypatch.setattr("gfx._core.linear_head._best_strength", lambda *_: 0.1)


@pytest.fixture(scope="session", autouse=True)
def trained():
    with tempfile.TemporaryDirectory() as place:
        TRAINED["place"] = Path(place)
        yield


TRAINED = {}


@cache
def with_head(model, of):
    """Give a model a random head that classifies genes, or cells, in a folder of the same name."""
    from gfx._engine.classifier import Head, make_classifier, save_classifier
    from gfx.models._vocabulary_file import write_vocabulary

    folder = TRAINED["place"] / of / str(len(list(TRAINED["place"].glob("*/*")))) / model.name
    folder.mkdir(parents=True)
    head = Head(of, "gene", {"labels": ["x", "y"]}) if of == "genes" else Head(of, "mean", {"type": ["a", "b", "c"]})
    save_classifier(make_classifier(model.weights, model.config, head, seed=0, n_layers=model.n_layers), folder)
    write_vocabulary(model.vocabulary, folder)
    return gfx.models.load(folder)


@dataclass(frozen=True)
class Tool:
    """A call, the arrays it writes (slot -> dtype, shape behind cells or genes), where its `uns` is, its tables.

    Others are slots that it writes too, and that tests of its own look into. `of`: it runs classifiers of these.
    """

    function: str
    default_key: str
    arrays: dict
    arguments: dict = field(default_factory=dict)
    genes: tuple = ()
    tables: dict = field(default_factory=dict)
    uns: str = "uns:{key}"
    others: tuple = ()
    of: str | None = None

    def __call__(self, data, **kwargs):
        if isinstance(kwargs.get("model"), Path):
            kwargs["model"] = self.model(gfx.models.load(kwargs["model"])).folder
        elif isinstance(kwargs.get("model"), gfx.models.Model):
            kwargs["model"] = self.model(kwargs["model"])
        return getattr(gfx.tl, self.function)(data, *self.genes, **self.arguments, **kwargs)

    def model(self, model):
        return model if self.of is None else with_head(model, self.of)

    def array_slots(self, key="x"):
        return {slot.format(key=key or self.default_key) for slot in self.arrays}

    def uns_slot(self, key="x"):
        return self.uns.format(key=key or self.default_key)

    def slots(self, key=None):
        others = {slot.format(key=key or self.default_key) for slot in self.others}
        return self.array_slots(key) | others | {self.uns_slot(key)}


ATTENTION = {
    **{f"varm:{{key}}{part}": ("float32", (HEADS,)) for part in ("", "_sd", "_given", "_given_sd", "_random")},
    "var:{key}_n_cells": ("int32", ()),
    **{f"var:{{key}}_{part}": ("float32", ()) for part in ("uniform", "given_uniform", "rank", "random_uniform")},
}
OF_UNITS = {f"varm:{{key}}_groups{part}": ("float32", (12, HEADS)) for part in ("", "_sd", "_given", "_given_sd")} | {
    "varm:{key}_groups_n_cells": ("int32", (12,)),
    "varm:{key}_groups_uniform": ("float32", (12,)),
    "varm:{key}_groups_given_uniform": ("float32", (12,)),
}
PAIRS = tuple(f"varp:{{key}}{part}" for part in ("", "_uniform", "_n_cells", "_coexpression"))
EMBED_GENES = {"varm:{key}": ("float32", (WIDTH,)), "var:{key}_n_cells": ("int32", ())}
PERTURBED = {
    "obsm:{key}": ("float32", (3,)),
    "obsm:{key}_parts": ("float32", (3, 3)),
    "varm:{key}": ("float32", (3,)),
    "varm:{key}_sd": ("float32", (3,)),
    "varm:{key}_n_cells": ("int32", (3,)),
}
SCREENED = [f"TOY{n}" for n in range(1, 200, 29)]  # fewer passes than all genes
GENES = (["TOY90", "TOY48", ("TOY90", "TOY48")],)
ALONE = {"controls": ["parts"]}
STATES = {"groupby": "cell_type", "start": "a", "goal": "b", "n_random": 5, "donor_key": "donor"}
DELETIONS = {
    name: getattr(gfx.get, name) for name in ("deletion_df", "deletion_cells_df", "gene_effects_df", "synergy_df")
}
SCREENS = {name: getattr(gfx.get, name) for name in ("screen_df", "controls_df")}
PROBE = {"method": "linear_probe", "n_splits": 2, "n_repeats": 1, "controls": None}
LABELS = {"x": [f"TOY{n}" for n in range(1, 100, 2)], "y": [f"TOY{n}" for n in range(2, 101, 2)]}
CLASSES = {"varm:{key}": ("float32", (2,)), "varm:{key}_sd": ("float32", (2,)), "var:{key}_n_cells": ("int32", ())}
CELL_CLASSES = {"obsm:{key}": ("float32", (3,))}
GENE_TABLES = {"gene_scores_df": gfx.get.gene_scores_df}
CLASSIFIED = {
    name: getattr(gfx.get, name) for name in ("classification_df", "learning_curve_df", "roc_df", "confusion_df")
}
ATTENTIONS = {
    name: getattr(gfx.get, name)
    for name in (
        *("attention_df", "attention_ranks_df", "attention_heads_df"),
        *("attention_bands_df", "attention_layers_df"),
    )
}

TOOLS = {
    "embed": Tool("embed", "X_gfx", {"obsm:{key}": ("float32", (WIDTH,))}),
    "embed_genes": Tool("embed_genes", "gfx_genes", EMBED_GENES),
    "embed_genes, groups": Tool(
        "embed_genes",
        "gfx_genes",
        EMBED_GENES | {"varm:{key}_groups": ("float32", (3, WIDTH)), "varm:{key}_groups_n_cells": ("int32", (3,))},
        {"groupby": "cell_type"},
    ),
    "delete_genes": Tool("delete_genes", "gfx_delete", PERTURBED, ALONE, GENES, DELETIONS),
    "delete_genes, states": Tool(
        "delete_genes",
        "gfx_delete",
        PERTURBED | {"obsm:{key}_states": ("float32", (3, 3)), "varm:{key}_null": ("float32", (3,))},
        STATES,
        GENES,
        DELETIONS,
    ),
    "overexpress_genes": Tool("overexpress_genes", "gfx_overexpress", PERTURBED, ALONE, GENES, DELETIONS),
    "shift_genes": Tool("shift_genes", "gfx_shift", PERTURBED, ALONE | {"by": ("quartiles", -1)}, GENES, DELETIONS),
    "screen_genes": Tool(
        "screen_genes",
        "gfx_screen",
        {"varm:{key}": ("float32", (7,))},
        {"groupby": "cell_type", "genes": SCREENED},
        tables=SCREENS,
        others=("varm:{key}_groups",),
    ),
    "attention": Tool("attention", "gfx_attention", ATTENTION, tables=ATTENTIONS),
    "attention, groups and pairs": Tool(
        "attention",
        "gfx_attention",
        ATTENTION | OF_UNITS,
        {"groupby": "cell_type", "donor_key": "donor", "genes": SCREENED, "heads": "each"},
        tables=ATTENTIONS | {"attention_pairs_df": gfx.get.attention_pairs_df},
        others=PAIRS,
    ),
    "classify_genes": Tool(
        "classify_genes",
        "gfx_gene_class",
        CLASSES,
        PROBE,
        (LABELS,),
        CLASSIFIED | GENE_TABLES,
        others=("varm:{key}_fold", "var:{key}", "var:{key}_predicted"),
    ),
    "classify_cells": Tool(
        "classify_cells",
        "gfx_cell_class",
        CELL_CLASSES | {"obsm:{key}_fold": ("int16", (1,))},
        PROBE,
        ("cell_type",),
        CLASSIFIED,
        others=("obs:{key}_cell_type",),
    ),
    "predict_genes": Tool(
        "predict_genes",
        "gfx_predicted_genes",
        CLASSES,
        tables=GENE_TABLES,
        others=("var:{key}", "var:{key}_in_training"),
        of="genes",
    ),
    "predict_genes, groups": Tool(
        "predict_genes",
        "gfx_predicted_genes",
        CLASSES | {"varm:{key}_groups": ("float32", (3, 2)), "varm:{key}_groups_n_cells": ("int32", (3,))},
        {"groupby": "cell_type"},
        tables=GENE_TABLES,
        others=("var:{key}", "var:{key}_in_training"),
        of="genes",
    ),
    "predict_cells": Tool(
        "predict_cells",
        "gfx_predicted_cells",
        CELL_CLASSES,
        others=("obs:{key}_type",),
        of="cells",
    ),
}


#: One tool of each function that reads cells in a way of its own.
READERS = [
    "embed",
    "embed_genes, groups",
    "delete_genes",
    "screen_genes",
    "attention",
    "classify_genes",
    "classify_cells",
    "predict_genes",
    "predict_cells",
]
each_reader = pytest.mark.parametrize("tool", READERS, indirect=True)


@pytest.fixture(params=TOOLS)
def tool(request):
    return TOOLS[request.param]


USUAL = {}


@pytest.fixture
def usual(tool, cells, toy_model):
    """The arrays that a tool writes for the cells as they are; run once."""
    name = next(name for name, each in TOOLS.items() if each is tool)
    if name not in USUAL:
        USUAL[name] = arrays(tool(cells, model=toy_model, key_added="x", copy=True), tool)
    return USUAL[name]


def slot(adata, name):
    kind, _, key = name.partition(":")
    value = getattr(adata, kind)[key]
    if isinstance(value, pd.DataFrame):  # expression is known where counts are at hand only
        return value.select_dtypes(np.float32).drop(columns="expression_mean").to_numpy()
    return value


def written(slots, adata, before):
    """Which slots are new or changed; none may have gone."""
    after = slots(adata)
    assert set(before) <= set(after)
    return {name for name, value in after.items() if before.get(name, "absent") != value}


def arrays(adata, tool, key="x"):
    return {name: np.asarray(slot(adata, name)) for name in tool.array_slots(key)}


def assert_same(found, expected, atol=0.0):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_allclose(found[name], value, atol=atol, err_msg=name)


# --- slots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "mine"])
def test_exactly_these_slots_are_written(tool, cells, toy_model, slots, key):
    before = slots(cells)
    assert tool(cells, model=toy_model, key_added=key) is None
    assert written(slots, cells, before) == tool.slots(key)
    for name, (dtype, shape) in tool.arrays.items():
        value = slot(cells, name.format(key=key or tool.default_key))
        assert value.dtype == dtype, name
        assert value.shape == (cells.n_obs if name.startswith("ob") else cells.n_vars, *shape), name


def test_unknown_genes_are_missing_and_never_zero(tool, cells, toy_model):
    tool(cells, model=toy_model)
    unknown = ~cells.var_names.str.startswith("TOY")
    seen = np.asarray((cells.X > 0).sum(axis=0)).ravel() > 0
    for name, value in arrays(cells, tool, None).items():
        if name.startswith("var"):
            if value.dtype == np.float32:
                assert np.isnan(value[unknown]).all(), name
                assert not np.isnan(value[seen & ~unknown]).all(), name
            else:
                assert (value[unknown] == 0).all(), name


def test_a_second_run_gives_the_same(tool, cells, toy_model, slots):
    tool(cells, model=toy_model)
    before = slots(cells)
    tool(cells, model=toy_model)
    assert written(slots, cells, before) == set()


def test_provenance(tool, cells, toy_model):
    tool(cells, model=toy_model, key_added="mine")
    params = slot(cells, tool.uns_slot("mine"))["params"]
    assert params["function"] == f"tl.{tool.function}"
    assert params["model"] == toy_model.name
    assert params["weights_sha256"] == hashlib.sha256(tool.model(toy_model).weights.read_bytes()).hexdigest()
    assert params["vocabulary"] == "toy"
    assert params["vocabulary_sha256"] == toy_model.vocabulary.sha256
    assert params["dtype"] == "float32"
    assert not any(str(toy_model.folder.parent) in str(value) for value in params.values())
    given = {name: value for name, value in tool.arguments.items() if name in {"groupby", "start", "goal"}}
    assert {name: params[name] for name in given} == given


@each_reader
def test_provenance_says_where_the_counts_were(tool, cells, toy_model):
    def layer():
        return slot(cells, tool.uns_slot("mine"))["params"].get("layer")

    tool(cells, model=toy_model, layer="doubled", key_added="mine")
    assert layer() == "doubled"
    gfx.pp.tokenize(cells, model=toy_model, layer="doubled")
    tool(cells, model=toy_model, key_added="mine")  # tokens of the layer are used
    assert layer() == "doubled"
    gfx.pp.tokenize(cells, model=toy_model)
    tool(cells, model=toy_model, key_added="mine")
    assert layer() is None


@each_reader
def test_provenance_says_what_the_tokens_were_made_from(tool, cells, toy_model):
    def source():
        params = slot(cells, tool.uns_slot("mine"))["params"]
        return {name: params.get(name) for name in ("layer", "use_raw", "gene_ids", "counts", "max_length")}

    plain = {"layer": None, "use_raw": False, "gene_ids": None, "counts": "raw", "max_length": 64}
    tool(cells, model=toy_model, key_added="mine")
    assert source() == plain
    gfx.pp.tokenize(cells, model=toy_model)
    tool(cells, model=toy_model, key_added="mine")
    assert source() == plain
    gfx.pp.tokenize(cells, model=toy_model, use_raw=True, gene_ids="ensembl_id", counts="normalized")
    tool(cells, model=toy_model, key_added="mine")
    assert source() == plain | {"use_raw": True, "gene_ids": "ensembl_id", "counts": "normalized"}


# --- what goes in ---------------------------------------------------------------------------------------------------


@each_reader
def test_doubled_counts_rank_the_same(tool, cells, toy_model, usual):
    tool(cells, model=toy_model, key_added="x", layer="doubled")
    assert_same(arrays(cells, tool), usual)


@each_reader
def test_kinds_of_matrices(tool, cells, toy_model, usual):
    for make in (sparse.csc_matrix, sparse.csr_array, lambda x: x.toarray()):
        other = ad.AnnData(make(cells.X), obs=cells.obs, var=cells.var)
        tool(other, model=toy_model, key_added="x")
        assert_same(arrays(other, tool), usual)


@each_reader
def test_dask(tool, cells, toy_model, usual):
    other = ad.AnnData(da.from_array(cells.X.toarray(), chunks=(7, 50)), obs=cells.obs, var=cells.var)
    tool(other, model=toy_model, key_added="x")
    assert_same(arrays(other, tool), usual)


@each_reader
def test_stored_tokens_are_used(tool, cells, toy_model, usual):
    gfx.pp.tokenize(cells, model=toy_model)
    cells.X = None
    tool(cells, model=toy_model, key_added="x")
    assert_same(arrays(cells, tool), usual)


@each_reader
def test_genes_named_in_a_column(tool, cells, toy_model, usual):
    cells.var_names = [f"probe{i}" for i in range(cells.n_vars)]
    gfx.pp.tokenize(cells, model=toy_model, gene_ids="ensembl_id")
    tool(cells, model=toy_model, key_added="x")
    assert_same(arrays(cells, tool), usual)


@each_reader
def test_every_model_reads_its_own_tokens(tool, cells, toy_model, toy_model_v1):
    models = {"x": toy_model, "y": toy_model_v1}
    expected = {}
    for key, model in models.items():
        tool(cells, model=model, key_added=key)
        expected[key] = arrays(cells, tool, key)
    cells.var["names"], cells.var_names = cells.var_names, [f"probe{i}" for i in range(cells.n_vars)]
    gfx.pp.tokenize(cells, model=toy_model, gene_ids="names")
    gfx.pp.tokenize(cells, model=toy_model_v1, gene_ids="ensembl_id", key_added="tokens_v1")
    cells.X = None
    for key, model in models.items():
        tool(cells, model=model, key_added=key)
        assert_same(arrays(cells, tool, key), expected[key])
    assert slot(cells, tool.uns_slot("y"))["params"]["gene_ids"] == "ensembl_id"


@each_reader
def test_model_by_folder_and_by_setting(tool, cells, toy_model):
    tool(cells, model=toy_model, key_added="x")
    tool(cells, model=toy_model.folder, key_added="y")
    with gfx.settings.override(model=str(toy_model.folder)):
        tool(cells, key_added="z", **({"model": toy_model} if tool.of else {}))  # these have to be named
    for name, value in arrays(cells, tool).items():
        np.testing.assert_array_equal(value, np.asarray(slot(cells, name.replace(":x", ":y"))))
        np.testing.assert_array_equal(value, np.asarray(slot(cells, name.replace(":x", ":z"))))


@each_reader
def test_batches_do_not_matter(tool, cells, toy_model, usual):
    with gfx.settings.override(batch_tokens=150):
        tool(cells, model=toy_model, key_added="x")
    assert_same(arrays(cells, tool), usual, atol=1e-5)


@each_reader
def test_order_of_genes_does_not_matter(tool, cells, toy_model, usual):
    shuffled = cells[:, np.random.default_rng(0).permutation(cells.n_vars)].copy()
    tool(shuffled, model=toy_model, key_added="x")
    assert_same(arrays(shuffled[:, cells.var_names], tool), usual, atol=1e-6)


@pytest.mark.parametrize("name", ["embed", "delete_genes", "overexpress_genes", "shift_genes", "predict_cells"])
def test_result_of_a_subset_is_the_subset_of_the_result(name, cells, toy_model):
    tool, subset = TOOLS[name], [5, 2, 17]
    part = cells[subset].copy()
    tool(cells, model=toy_model, key_added="x")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        tool(part, model=toy_model, key_added="x")
    np.testing.assert_allclose(part.obsm["x"], cells.obsm["x"][subset], atol=1e-5)


# --- copies, views, files, MuData -----------------------------------------------------------------------------------


def test_copy(tool, cells, toy_model, slots):
    before = slots(cells)
    copied = tool(cells, model=toy_model, copy=True)
    assert slots(cells) == before
    tool(cells, model=toy_model)
    assert slots(copied) == slots(cells)


def test_view(tool, cells, toy_model, slots):
    before = slots(cells)
    view = cells[:, :150][np.arange(20)]
    expected = view.copy()
    with pytest.warns(ImplicitModificationWarning):
        tool(view, model=toy_model)
    assert not view.is_view
    assert slots(cells) == before
    tool(expected, model=toy_model)
    assert slots(view) == slots(expected)


def test_copy_of_a_view(tool, cells, toy_model, slots):
    view = cells[:20]
    copied = tool(view, model=toy_model, copy=True)
    assert view.is_view
    assert not copied.is_view
    assert set(slots(copied)) - set(slots(view)) == tool.slots()


@each_reader
def test_backed(tool, cells, toy_model, usual, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    tool(backed, model=toy_model, key_added="x")
    assert_same(arrays(backed, tool), usual)
    with pytest.raises(ValueError, match=r"`copy=True` does not work on a file-backed object.*\.to_memory\(\)"):
        tool(backed, model=toy_model, copy=True)
    with pytest.raises(ValueError, match=r"A view of a file cannot hold results.*\.to_memory\(\)"):
        tool(backed[:5], model=toy_model)
    backed.file.close()


@pytest.fixture
def mdata(cells):
    protein = ad.AnnData(np.ones((24, 3), dtype=np.float32), obs=cells.obs[[]].copy())
    protein.var_names = ["CD3", "CD4", "CD8"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mudata announces its next version
        return mudata.MuData({"rna": cells, "protein": protein})


def test_mudata(tool, mdata, cells, toy_model, slots):
    protein = slots(mdata.mod["protein"])
    expected = tool(cells, model=toy_model, copy=True)
    tool(mdata, model=toy_model, mod="rna")
    assert slots(mdata.mod["rna"]) == slots(expected)
    assert slots(mdata.mod["protein"]) == protein
    assert not set(mdata.obsm) & set(expected.obsm)  # the container itself is not ours to fill
    with pytest.raises(ValueError, match=r"2 modalities.*`mod=` one of \['rna', 'protein'\]"):
        tool(mdata, model=toy_model)
    with pytest.raises(KeyError, match=r"Did not find modality 'atac'.*Present: \['rna', 'protein'\]"):
        tool(mdata, model=toy_model, mod="atac")


def test_mudata_view(tool, mdata, toy_model, slots):
    before = slots(mdata.mod["rna"])
    view = mdata[np.arange(20)]
    with pytest.warns(ImplicitModificationWarning):
        tool(view, model=toy_model, mod="rna")
    assert set(slots(view.mod["rna"])) - set(before) == tool.slots()
    assert slots(mdata.mod["rna"]) == before


def test_mudata_copy(tool, mdata, toy_model, slots):
    before = slots(mdata.mod["rna"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="mudata")
        copied = tool(mdata, model=toy_model, mod="rna", copy=True)
    assert isinstance(copied, mudata.MuData)
    assert slots(mdata.mod["rna"]) == before
    assert set(slots(copied.mod["rna"])) - set(before) == tool.slots()


def test_mod_is_for_mudata(tool, cells, toy_model):
    with pytest.raises(TypeError, match=r"`mod='rna'` is for MuData; found AnnData"):
        tool(cells, model=toy_model, mod="rna")
    with pytest.raises(TypeError, match="Expected an AnnData or MuData, found ndarray"):
        tool(np.ones((3, 3)), model=toy_model)


def write_and_read(adata, path, how):
    if how == "h5ad":
        adata.write_h5ad(path)
        return ad.read_h5ad(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="zarr|anndata")
        adata.write_zarr(path)
        return ad.read_zarr(path)


def tables(tool, adata, key):
    return {name: get(adata, key=key) for name, get in tool.tables.items()}


def assert_same_tables(found, expected):
    for name, table in expected.items():
        pd.testing.assert_frame_equal(found[name], table, check_dtype=False, check_index_type=False, obj=name)


#: Zarr is slow: these write arrays, texts, tables and mappings.
AS_ZARR = {"embed_genes, groups", "classify_genes"}
FILES = [
    pytest.param(name, *file, marks=[pytest.mark.slow] * (file == ("zarr", None) and name not in AS_ZARR))
    for name in TOOLS
    for file in [("h5ad", "mine"), ("zarr", None)]
]


def plain(params):
    """Lists come back from files as arrays."""
    return {name: list(value) if isinstance(value, list | np.ndarray) else value for name, value in params.items()}


@pytest.mark.parametrize(("name", "how", "key"), FILES)
def test_files(name, cells, toy_model, tmp_path, how, key):
    tool = TOOLS[name]
    tool(cells, model=toy_model, key_added=key)
    read = write_and_read(cells, tmp_path / f"cells.{how}", how)
    assert_same(arrays(read, tool, key), arrays(cells, tool, key))
    expected, found = slot(cells, tool.uns_slot(key)), slot(read, tool.uns_slot(key))
    assert plain(found["params"]) == plain(expected["params"])
    assert set(found) == set(expected)
    for entry, value in expected.items():
        if isinstance(value, np.ndarray) and value.dtype != object:
            np.testing.assert_array_equal(found[entry], value)
            assert found[entry].dtype == value.dtype
        elif isinstance(value, np.ndarray):
            assert list(found[entry]) == list(value)
        elif isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(found[entry], value, check_dtype=False, check_index_type=False, obj=entry)
        elif entry == "tasks":
            assert isinstance(found[entry], Mapping)
            assert [(task, list(names)) for task, names in found[entry].items()] == [
                (task, list(names)) for task, names in value.items()
            ]
        elif isinstance(value, str):
            assert found[entry] == value
    assert_same_tables(tables(tool, read, key), tables(tool, cells, key))
    write_and_read(read, tmp_path / f"again.{how}", how)


def test_subsets_of_a_result(tool, cells, toy_model, tmp_path):
    tool(cells, model=toy_model, key_added="mine")
    part = cells[[3, 1, 2], [10, 0, 1, 7]]
    for name, value in arrays(cells, tool, "mine").items():
        rows = [3, 1, 2] if name.startswith("ob") else [10, 0, 1, 7]
        np.testing.assert_array_equal(np.asarray(slot(part, name)), value[rows])
    here = tables(tool, part, "mine")
    assert_same_tables(tables(tool, write_and_read(part.copy(), tmp_path / "part.h5ad", "h5ad"), "mine"), here)
    for table in here.values():
        if "gene" in table:
            assert set(table["gene"]) <= set(part.var_names)
        if "cell" in table:
            assert set(table["cell"]) <= set(part.obs_names)


# --- failures -------------------------------------------------------------------------------------------------------


def log_normalised(adata):
    adata.X = adata.X.astype(np.float64)
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray() / adata.X.sum(axis=1) * 1e4).astype(np.float32))
    del adata.raw, adata.layers["doubled"]


def negative(adata):
    adata.X = adata.X - adata.X.multiply(2)


def mouse(adata):
    adata.var_names = [f"ENSMUSG{n:011d}" for n in range(adata.n_vars)]


def no_cells_with_genes(adata):
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)


def other_tokens(adata):
    gfx.pp.tokenize(adata, model=OTHER["model"])


def names_lost(adata):
    gfx.pp.tokenize(adata, model=OTHER["same"], gene_ids="ensembl_id")
    del adata.var["ensembl_id"]
    adata.var_names = [f"probe{i}" for i in range(adata.n_vars)]


OTHER = {}


@pytest.fixture
def others(toy_model, toy_model_v1):
    OTHER.update(model=toy_model_v1, same=toy_model)


def nothing(_adata):
    pass


FAILURES = {
    "log-normalised": (log_normalised, {}, ValueError, r"`gfx\.pp\.tokenize\(adata, counts='log1p'\)`"),
    "negative": (negative, {}, ValueError, "negative values"),
    "mouse": (mouse, {}, ValueError, "mouse"),
    "all cells empty": (no_cells_with_genes, {}, ValueError, r"No cell has a gene.*`gfx\.pp\.check\(adata\)`"),
    "tokens of another vocabulary": (
        other_tokens,
        {},
        ValueError,
        r"made for the vocabulary 'toy-v1', this model reads 'toy'.*`gfx\.pp\.tokenize\(adata, model=\.\.\.\)`",
    ),
    "no such layer": (nothing, {"layer": "counts"}, KeyError, r"Did not find 'counts' in `adata\.layers`"),
    "no such model": (nothing, {"model": "V2-104Q"}, ValueError, "V2-104M"),
    "slash in the key": (nothing, {"key_added": "a/b"}, ValueError, r"`key_added='a/b'` has a '/'"),
}


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("failure", FAILURES)
def test_failures_leave_everything_as_it_was(tool, cells, toy_model, slots, failure):
    spoil, arguments, error, text = FAILURES[failure]
    spoil(cells)
    before = slots(cells)
    with pytest.raises(error, match=text):
        tool(cells, **({"model": toy_model} | arguments))
    assert slots(cells) == before


@pytest.mark.usefixtures("others")
def test_an_object_without_cells_is_refused_as_such(tool, cells, toy_model):
    with pytest.raises(ValueError, match=r"^The object has no cells\.$"):
        tool(cells[:0].copy(), model=toy_model)


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("name", [name for name in TOOLS if name not in {"embed", "classify_cells", "predict_cells"}])
def test_gene_names_that_are_gone_are_not_passed_over(name, cells, toy_model, slots):
    names_lost(cells)
    before = slots(cells)
    with pytest.raises(
        ValueError, match=r"knows none of the genes here, such as \['probe0'.*`adata\.var\['ensembl_id'\]`,"
    ):
        TOOLS[name](cells, model=toy_model)
    assert slots(cells) == before


@each_reader
def test_log_normalised_cells_after_the_call_that_was_named(tool, cells, toy_model, usual):
    log_normalised(cells)
    gfx.pp.tokenize(cells, model=toy_model, counts="log1p")
    tool(cells, model=toy_model, key_added="x")
    assert_same(arrays(cells, tool), usual, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["embed", "embed_genes", "delete_genes", "overexpress_genes", "shift_genes", "screen_genes"]
)
@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_the_model_does_not_have(name, cells, toy_model, slots, layer):
    before = slots(cells)
    with pytest.raises(ValueError, match=rf"`hidden_layer={layer}` is outside this model of 3 layers"):
        TOOLS[name](cells, model=toy_model, hidden_layer=layer)
    assert slots(cells) == before


@pytest.mark.parametrize("name", ["embed", "delete_genes", "screen_genes", "classify_cells"])
def test_pooling_that_the_model_does_not_have(name, cells, toy_model, toy_model_v1, slots):
    before = slots(cells)
    with pytest.raises(ValueError, match=r"'toy-v1' has no <cls> token.*Use `pooling='mean'`"):
        TOOLS[name](cells, model=toy_model_v1, pooling="cls")
    also = "" if name in {"embed", "classify_cells"} else ", 'genes'"
    with pytest.raises(ValueError, match=rf"`pooling` is one of \['auto', 'mean', 'cls'{also}\], found 'max'"):
        TOOLS[name](cells, model=toy_model, pooling="max")
    assert slots(cells) == before


@pytest.mark.parametrize(
    "name", ["embed_genes", "embed_genes, groups", "delete_genes, states", "screen_genes", "predict_genes"]
)
def test_no_such_group_column(name, cells, toy_model, slots):
    before = slots(cells)
    arguments = TOOLS[name].arguments | {"groupby": "cell_typ"}
    call = getattr(gfx.tl, TOOLS[name].function)
    with pytest.raises(KeyError, match=r"Did not find 'cell_typ' in `adata\.obs`\. Did you mean 'cell_type'\?"):
        call(cells, *TOOLS[name].genes, model=TOOLS[name].model(toy_model), **arguments)
    assert slots(cells) == before


MASKS = {
    "no such column": ("chosn", KeyError, r"Did not find 'chosn' in `adata\.obs`\. Did you mean 'chosen'"),
    "not truth values": ("cell_type", ValueError, "`mask_obs` is one truth value per cell"),
    "another length": (
        np.ones(3, dtype=bool),
        ValueError,
        r"expected bool of shape \(24,\), found bool of shape \(3,\)",
    ),
    "no cell": (np.zeros(24, dtype=bool), ValueError, "`mask_obs` selects no cell"),
    "only empty cells": ("empty", ValueError, "None of the cells that `mask_obs` selects has a gene"),
}


@pytest.mark.parametrize(
    "name",
    [
        "embed_genes",
        "embed_genes, groups",
        "screen_genes",
        "attention",
        "classify_genes",
        "classify_cells",
        "predict_genes",
        "predict_cells",
    ],
)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_that_select_nothing(name, cells, toy_model, slots, mask):
    mask, error, text = MASKS[mask]
    cells.X = sparse.csr_matrix(cells.X.multiply(np.arange(24)[:, None] != 3))
    cells.obs["chosen"] = True
    cells.obs["empty"] = np.arange(24) == 3
    before = slots(cells)
    with pytest.raises(error, match=text):
        TOOLS[name](cells, model=toy_model, mask_obs=mask)
    assert slots(cells) == before


@pytest.mark.parametrize(
    "name",
    [
        "embed_genes",
        "embed_genes, groups",
        "screen_genes",
        "attention",
        "classify_genes",
        "predict_genes",
        "predict_genes, groups",
    ],
)
def test_masked_cells_count_as_absent(name, cells, toy_model):
    tool = TOOLS[name]
    chosen = np.arange(24) % 4 > 0
    part = tool(cells[chosen], model=toy_model, key_added="x", copy=True)
    cells.obs["chosen"] = chosen
    for mask in ("chosen", chosen):
        tool(cells, model=toy_model, key_added="x", mask_obs=mask)
        assert_same(arrays(cells, tool), arrays(part, tool), atol=1e-6)


def test_failing_halfway_writes_nothing(tool, cells, toy_model, slots, monkeypatch):
    """The model gives up in its last batch."""
    from gfx._engine.blocks import Block

    forward, n_calls = Block.finish, []

    def until_the_fifth(self, *args, **kwargs):
        n_calls.append(1)
        if len(n_calls) == 5:
            msg = "the device was lost"
            raise RuntimeError(msg)
        return forward(self, *args, **kwargs)

    before = slots(cells)
    monkeypatch.setattr(Block, "finish", until_the_fifth)
    with gfx.settings.override(batch_tokens=150), pytest.raises(RuntimeError, match="the device was lost"):
        tool(cells, model=toy_model)
    assert slots(cells) == before

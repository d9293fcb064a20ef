from __future__ import annotations

import re
import warnings
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import gfx

# The toy cells' states are drawn at random, and most of the time nothing separates them.
pytestmark = pytest.mark.filterwarnings("ignore:Held-out (cells|donors) of")

#: In nearly all of the toy cells.
GENE, OTHER = "TOY90", "TOY48"
WITH_STATES = {"groupby": "condition", "start": "sick", "goal": "healthy"}
EVERY = ["parts", "random_sets", "random_weights", "baselines", "centroids"]

#: Most tests are about effects, not about their controls.
delete_genes = partial(gfx.tl.delete_genes, controls=["parts"])


@pytest.mark.parametrize("positions", ["close", "keep"])
@pytest.mark.parametrize("hidden_layer", [-2, -1])
def test_effects_are_those_of_the_published_model(cells, any_model, slow, assert_effects, hidden_layer, positions):
    """Two genes, each and together; with states; against lists, one cell at a time."""
    delete_genes(
        cells,
        [GENE, (GENE, OTHER)],
        model=any_model,
        groupby="cell_type",
        start="b",
        goal="c",
        hidden_layer=hidden_layer,
        positions=positions,
    )
    tokens = slow.tokens(cells)
    vectors = np.array([slow.cell(row, slow.pooling, hidden_layer) for row in tokens])
    centroids = [vectors[cells.obs["cell_type"] == state].mean(axis=0) for state in "abc"]
    starts = [row if state == "b" else [] for row, state in zip(tokens, cells.obs["cell_type"], strict=True)]
    for number, names in enumerate([(GENE,), (GENE, OTHER)]):
        effects = slow.effects(starts, names, goals=centroids, hidden_layer=hidden_layer, hold=positions == "keep")
        assert 0 < len(effects) < 8 * (number + 1)
        assert_effects(cells, number, effects, "gfx_delete")
        table = cells.uns["gfx_delete"]["state_table"].query(f"perturbation == '{'+'.join(names)}'")
        parts = table[["toward_composition_mean", "toward_position_mean", "toward_context_mean"]]
        expected = np.mean([effect.toward_parts for effect in effects.values()], axis=0)
        np.testing.assert_allclose(parts, expected, atol=1e-5)
        np.testing.assert_allclose(parts.sum(axis=1), table["toward_mean"], atol=1e-6)
    assert np.nanmax(cells.varm["gfx_delete_sd"]) > 0.001


@pytest.mark.parametrize("pooling", ["auto", "mean", "genes", "cls"])
def test_each_way_to_compare_cells_is_that_of_the_published_model(cells, any_model, slow, assert_effects, pooling):
    """Shift and parts by each of them; the parts add up, and each is something."""
    if pooling == "cls" and not any_model.vocabulary.has_cls:
        pytest.skip("this family has no <cls>")
    how = slow.pooling if pooling == "auto" else pooling
    delete_genes(cells, GENE, model=any_model, pooling=pooling)
    assert_effects(cells, 0, slow.effects(slow.tokens(cells), [GENE], how=how), "gfx_delete")
    parts = cells.obsm["gfx_delete_parts"][:, 0]
    np.testing.assert_allclose(parts.sum(axis=1), cells.obsm["gfx_delete"][:, 0], atol=1e-6)
    largest = np.nanmax(abs(parts), axis=0)
    assert (largest[1:] > 1e-4).all()
    assert largest[0] > 1e-5 if how == "mean" else largest[0] == 0
    assert cells.uns["gfx_delete"]["params"]["pooling"] == how


@pytest.mark.parametrize("pooling", ["mean", "genes", "cls"])
def test_kept_positions_leave_no_position_part(cells, toy_model, pooling):
    arguments = {"model": toy_model, "pooling": pooling, "groupby": "cell_type", "start": "a", "goal": "b"}
    delete_genes(cells, GENE, positions="keep", key_added="held", **arguments)
    delete_genes(cells, GENE, key_added="moved", **arguments)
    held, moved = cells.obsm["held_parts"], cells.obsm["moved_parts"]
    assert (held[..., 1][~np.isnan(held[..., 1])] == 0).all()
    np.testing.assert_allclose(held[..., [0, 2]], moved[..., [0, 2]], atol=1e-6)
    assert np.nanmax(abs(moved[..., 1])) > 1e-3
    assert cells.uns["held"]["params"]["positions"] == "keep"
    assert (cells.uns["held"]["state_table"]["toward_position_mean"] == 0).all()


def test_the_last_gene_leaves_every_position_as_it_was(cells, toy_model_v1):
    """Nothing stands behind it, so closing up and keeping positions are the same."""
    one = cells[[0]].copy()
    gfx.pp.tokenize(one, model=toy_model_v1)
    tokens = one.obsm["gfx_tokens"][0]
    last = toy_model_v1.vocabulary.symbols[tokens[tokens > 0][-1]]
    delete_genes(one, last, model=toy_model_v1, pooling="mean")
    composition, position, context = one.obsm["gfx_delete_parts"][0, 0]
    assert abs(position) < 1e-6
    assert composition != 0
    assert abs(context) > 1e-6


def test_without_their_parts_shifts_are_the_same(cells, toy_model):
    """And nothing stands where the parts would: one pass was made for each cell and perturbation."""
    chosen = {"model": toy_model, "groupby": "condition", "start": "sick", "goal": "healthy"}
    delete_genes(cells, [GENE, "TOY48"], key_added="split", **chosen)
    gfx.tl.delete_genes(cells, [GENE, "TOY48"], controls=None, **chosen)
    for slot in ("", "_states"):
        np.testing.assert_allclose(cells.obsm[f"gfx_delete{slot}"], cells.obsm[f"split{slot}"], atol=1e-6)
    assert "split_parts" in cells.obsm
    assert "gfx_delete_parts" not in cells.obsm
    for table in (gfx.get.deletion_df(cells, key="gfx_delete"), gfx.get.deletion_cells_df(cells, key="gfx_delete")):
        assert not [column for column in table if "composition" in column]


TABLE = ["perturbation", "n_cells", "shift_mean", "shift_sd", "composition_mean", "position_mean", "context_mean"]
TABLE += ["rank_mean", "random_mean", "random_sd", "n_random", "random_n_cells", "z", "p"]
TABLE += ["random_weights_shift_mean", "detection", "expression_mean", "logfc"]
STATE_TABLE = ["perturbation", "state", "role", "n_cells", "toward_mean", "toward_sd", "toward_composition_mean"]
STATE_TABLE += ["toward_position_mean", "toward_context_mean", "toward_random_mean", "toward_random_sd"]
STATE_TABLE += ["toward_n_random", "toward_random_n_cells", "toward_z", "toward_p"]


def test_tables_summarize_the_cells(cells, toy_model):
    delete_genes(cells, [GENE, (GENE, OTHER)], model=toy_model, groupby="cell_type", start="a", goal="c", key_added="x")
    result = cells.uns["x"]
    assert result["perturbations"].tolist() == [GENE, f"{GENE}+{OTHER}"]
    assert result["ensembl_ids"].tolist() == ["ENSG00000000090", "ENSG00000000090+ENSG00000000048"]
    assert result["states"].tolist() == ["a", "b", "c"]
    table = result["table"]
    assert table.columns.tolist() == TABLE
    for at, row in table.iterrows():
        values = cells.obsm["x"][:, at]
        values = values[~np.isnan(values)].astype(np.float64)
        assert row["n_cells"] == len(values) > 2
        assert row["shift_mean"] == pytest.approx(values.mean())
        assert row["shift_sd"] == pytest.approx(np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1)))
        parts = np.nanmean(cells.obsm["x_parts"][:, at].astype(np.float64), axis=0)
        np.testing.assert_allclose(row[["composition_mean", "position_mean", "context_mean"]].tolist(), parts)
        assert 0 <= row["rank_mean"] <= 1
    assert (table["n_random"] == 0).all()
    assert table[["detection", "expression_mean", "logfc"]].isna().all(axis=None)  # nobody asked for baselines
    of_random = ["random_mean", "random_sd", "random_n_cells", "z", "p", "random_weights_shift_mean"]
    assert table[of_random].isna().all(axis=None)
    states = result["state_table"]
    assert states.columns.tolist() == STATE_TABLE
    states = states.set_index(["perturbation", "state"])
    assert states["role"].tolist() == ["start", "alternative", "goal"] * 2
    for (name, state), row in states.iterrows():
        values = cells.obsm["x_states"][:, result["perturbations"].tolist().index(name), "abc".index(state)]
        assert row["toward_mean"] == pytest.approx(np.nanmean(values.astype(np.float64)))
        assert row["toward_sd"] == pytest.approx(np.nanstd(values.astype(np.float64), ddof=1))
        assert row["n_cells"] == (~np.isnan(values)).sum()


def test_rank_of_the_deleted_gene(cells, toy_model):
    """The gene that stands first in its cell has rank 0, the last one 1."""
    gfx.pp.tokenize(cells, model=toy_model)
    symbols = toy_model.vocabulary.symbols
    row = cells.obsm["gfx_tokens"][0]
    row = row[row > 3]
    one = cells[[0]].copy()
    delete_genes(one, [symbols[row[0]], symbols[row[-1]], symbols[row[len(row) // 2]]], model=toy_model)
    ranks = one.uns["gfx_delete"]["table"]["rank_mean"]
    np.testing.assert_allclose(ranks, [0, 1, (len(row) // 2) / (len(row) - 1)], atol=1e-6)
    assert one.uns["gfx_delete"]["table"]["shift_sd"].isna().all()  # one cell has no spread


WITHOUT_CONTROLS = {"params", "slots", "perturbations", "ensembl_ids", "note", "table", "controls"}


OF_STATES = {"states", "state_table"}


OF_RANDOM_SETS = {"random_sets", "genes_of_all_ranks"}


def test_states_of_an_earlier_run_do_not_stay(cells, toy_model):
    delete_genes(cells, [GENE, OTHER], model=toy_model, groupby="cell_type", start="a", goal="b")
    delete_genes(cells, GENE, model=toy_model)
    assert "gfx_delete_states" not in cells.obsm
    assert set(cells.uns["gfx_delete"]) == WITHOUT_CONTROLS
    assert not {"groupby", "start", "goal"} & set(cells.uns["gfx_delete"]["params"])
    assert cells.varm["gfx_delete"].shape == cells.varm["gfx_delete_n_cells"].shape == (cells.n_vars, 1)


def test_nothing_of_an_earlier_run_with_everything_stays(cells, toy_model, slots):
    fresh = cells.copy()
    arguments = {"model": toy_model, "groupby": "cell_type", "start": "a", "goal": "b"}
    gfx.tl.delete_genes(cells, [GENE, (GENE, OTHER)], n_random=3, donor_key="donor", **arguments)
    everything = WITHOUT_CONTROLS | OF_STATES | OF_RANDOM_SETS | {"random_states", "donors", "donor_states", "synergy"}
    assert set(cells.uns["gfx_delete"]) == everything
    assert "gfx_delete_null" in cells.varm
    delete_genes(cells, GENE, model=toy_model)
    delete_genes(fresh, GENE, model=toy_model)
    assert slots(cells) == slots(fresh)


def few_genes(cells):
    """Cell 0 has only the gene, cell 1 only both genes, no cell has TOY7."""
    counts = cells.X.toarray()
    gene, other = (cells.var_names.get_loc(name) for name in (GENE, OTHER))
    counts[:2] = 0
    counts[0, gene] = counts[1, gene] = counts[1, other] = 3
    counts[:, cells.var_names.get_loc("TOY7")] = 0
    cells.X = sparse.csr_matrix(counts)


def test_cells_of_nothing_but_the_deleted_genes(cells, any_model):
    few_genes(cells)
    delete_genes(cells, [GENE, (GENE, OTHER)], model=any_model)
    shift = cells.obsm["gfx_delete"]
    assert np.isnan(shift[0]).all()
    assert np.isnan(shift[1]).tolist() == [False, True]
    assert (~np.isnan(shift)).sum(axis=0).tolist() == cells.uns["gfx_delete"]["table"]["n_cells"].tolist()


@pytest.mark.parametrize("controls", [None, EVERY[:-1]])
def test_genes_of_no_cell(cells, toy_model, controls):
    few_genes(cells)
    with pytest.warns(UserWarning, match=r"No cell has the genes of \['TOY7', 'TOY7\+TOY90'\]") as caught:
        gfx.tl.delete_genes(cells, ["TOY7", GENE, ("TOY7", GENE)], model=toy_model, controls=controls, n_random=3)
    assert caught[0].filename == __file__
    assert np.isnan(cells.obsm["gfx_delete"]).all(axis=0).tolist() == [True, False, True]
    assert np.isnan(cells.varm["gfx_delete"]).all(axis=0).tolist() == [True, False, True]
    table = cells.uns["gfx_delete"]["table"].set_index("perturbation")
    assert table["n_cells"].tolist()[::2] == [0, 0]
    missing = ["shift_mean", "shift_sd", "rank_mean", "random_mean", "z", "p", "random_weights_shift_mean"]
    assert table.loc[["TOY7", "TOY7+TOY90"], missing].isna().all(axis=None)
    assert table["n_random"].tolist() == [0, 3 if controls else 0, 0]


def test_many_genes_of_no_cell_are_not_all_named(cells, toy_model):
    cells.X = sparse.csr_matrix(cells.X.multiply(~cells.var_names.isin([f"TOY{n}" for n in range(1, 13)])))
    with pytest.warns(UserWarning, match=r"\['TOY1', .*'TOY9', 'TOY10'\] and 2 more, together with another gene"):
        delete_genes(cells, [GENE, *(f"TOY{n}" for n in range(1, 13))], model=toy_model)


@pytest.mark.parametrize("states", [{}, {"groupby": "condition", "start": "sick", "goal": "healthy"}])
def test_no_perturbation_in_any_cell(cells, toy_model, tmp_path, value_of, states):
    """All that it is compared with is empty, and files take it."""
    few_genes(cells)
    with pytest.warns(UserWarning, match="has the genes of"):
        gfx.tl.delete_genes(cells, ["TOY7", ("TOY7", GENE)], model=toy_model, donor_key="donor", **states)
    result = cells.uns["gfx_delete"]
    assert result["random_sets"].empty
    assert result["donors"].empty
    assert "synergy" not in result
    assert value_of(result["controls"], "rank", "slope", column="n") == 100  # of genes that are there
    assert np.isnan(cells.varm["gfx_delete_null"]).all()
    assert gfx.get.deletion_df(cells)["donor_p"].isna().all()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert_nested_equal(ad.read_h5ad(tmp_path / "cells.h5ad").uns["gfx_delete"], result)


def test_genes_of_no_cell_of_the_start(cells, toy_model):
    counts = cells.X.toarray()
    counts[np.ix_(cells.obs["condition"] == "sick", cells.var_names == GENE)] = 0
    cells.X = sparse.csr_matrix(counts)
    with pytest.warns(UserWarning, match=rf"No cell of the state 'sick' has the genes of \['{GENE}'\]"):
        delete_genes(cells, GENE, model=toy_model, groupby="condition", start="sick", goal="healthy")
    assert np.isnan(cells.obsm["gfx_delete_states"]).all()
    assert cells.uns["gfx_delete"]["state_table"]["n_cells"].tolist() == [0, 0]


def test_genes_outside_the_object_move_cells_too(cells, toy_model):
    """Tokens hold genes that were since left out of the object: they are deleted all the same."""
    gfx.pp.tokenize(cells, model=toy_model)
    delete_genes(cells, GENE, model=toy_model)
    part = cells[:, [name for name in cells.var_names if name != GENE][:50]].copy()
    delete_genes(part, GENE, model=toy_model, key_added="again")
    np.testing.assert_array_equal(part.obsm["again"], cells.obsm["gfx_delete"])
    np.testing.assert_array_equal(part.varm["again"], part.varm["gfx_delete"])


@pytest.mark.parametrize("how", ["h5ad", "zarr"])
def test_everything_comes_back_from_files(cells, toy_model, tmp_path, how):
    gfx.tl.delete_genes(
        cells, [GENE, (GENE, OTHER)], model=toy_model, n_random=3, controls=EVERY, donor_key="donor", **WITH_STATES
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="zarr|anndata")
        getattr(cells, f"write_{how}")(tmp_path / "cells")
        read = getattr(ad, f"read_{how}")(tmp_path / "cells")
    expected = cells.uns["gfx_delete"]
    tables = {name for name, value in expected.items() if hasattr(value, "columns")}
    assert {"table", "state_table", "random_sets", "random_states", "donors", "donor_states", "synergy"} <= tables
    assert_nested_equal(read.uns["gfx_delete"], expected)
    for key in ("gfx_delete", "gfx_delete_parts", "gfx_delete_states"):
        np.testing.assert_array_equal(read.obsm[key], cells.obsm[key])
    for key in ("gfx_delete", "gfx_delete_sd", "gfx_delete_n_cells", "gfx_delete_null"):
        np.testing.assert_array_equal(read.varm[key], cells.varm[key])


def assert_nested_equal(found, expected, where="uns"):
    """Compare what `uns` holds with what came back from a file."""
    if hasattr(expected, "columns"):
        pd.testing.assert_frame_equal(found, expected, check_index_type=False, obj=where, check_dtype=False)
    elif hasattr(expected, "items"):
        assert set(found) == set(expected), where
        for key, value in expected.items():
            assert_nested_equal(found[key], value, f"{where}[{key!r}]")
    else:
        np.testing.assert_array_equal(found, expected, err_msg=where)


ARGUMENTS = {
    "two random sets": ({"n_random": 2}, ValueError, "`n_random` is 3 or more, found 2"),
    "true": ({"n_random": True}, TypeError, "`n_random` is a whole number, found True"),
    "half a set": ({"n_random": 2.5}, TypeError, "`n_random` is a whole number"),
    "positions": ({"positions": "hold"}, ValueError, r"`positions` is one of \['close', 'keep'\], found 'hold'"),
    "control": (
        {"controls": ["random_sets", "twins"]},
        ValueError,
        r"one of \['parts', 'random_sets', 'random_weights', 'baselines', 'centroids', None\], found 'twins'",
    ),
    "centroids without states": (
        {"controls": "centroids"},
        ValueError,
        '`controls="centroids"` recomputes the centroids of states: give `groupby`, `start` and `goal`',
    ),
    "pooling": ({"pooling": "max"}, ValueError, r"`pooling` is one of \['auto', 'mean', 'cls', 'genes'\], found 'max'"),
    "no such donors": (
        {"donor_key": "donors"},
        KeyError,
        r"Did not find 'donors' in `adata\.obs`\. Did you mean 'donor'",
    ),
    "missing donors": (
        {"donor_key": "some"},
        ValueError,
        r"`adata\.obs\['some'\]` names no donor for 3 cells\. Leave these out",
    ),
    "donors named nan": ({"donor_key": "text"}, ValueError, r"\['text'\]` names no donor for 3 cells"),
    "seed": ({"rng": "seed"}, TypeError, "`rng` is a whole number, found 'seed'"),
    "generator": ({"rng": np.random.default_rng(0)}, TypeError, "`rng` is a whole number"),
}


@pytest.mark.parametrize("wrong", ARGUMENTS)
def test_arguments_that_cannot_be(cells, toy_model, slots, wrong):
    arguments, error, text = ARGUMENTS[wrong]
    cells.obs["some"] = cells.obs["donor"].astype(object).where(np.arange(24) > 2)
    cells.obs["text"] = cells.obs["some"].astype(str)
    before = slots(cells)
    with pytest.raises(error, match=text):
        delete_genes(cells, GENE, model=toy_model, **arguments)
    assert slots(cells) == before


def test_the_model_gives_up_at_the_very_end(cells, toy_model, slots, monkeypatch):
    """When all effects are there, and random genes are run."""
    from gfx._engine.blocks import Block

    forward, calls = Block.finish, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == last:
            msg = "the device was lost"
            raise RuntimeError(msg)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Block, "finish", counted)
    arguments = {"model": toy_model, "n_random": 3, **WITH_STATES}
    last = None
    gfx.tl.delete_genes(cells, GENE, copy=True, **arguments)
    before, last = slots(cells), len(calls)
    calls.clear()
    with pytest.raises(RuntimeError, match="the device was lost"):
        gfx.tl.delete_genes(cells, GENE, **arguments)
    assert slots(cells) == before


def test_a_long_call_says_what_it_costs_before_it_is_paid(cells, toy_model, monkeypatch, caplog):
    caplog.set_level("INFO", logger="gfx")
    gfx.tl.delete_genes(cells, [GENE, OTHER], model=toy_model, controls=None)
    assert not [message for message in caplog.messages if "passes" in message]
    monkeypatch.setattr("gfx.tl._prepare.LONG_CALL", 5)
    gfx.tl.delete_genes(cells, [GENE, OTHER], model=toy_model, controls=None)
    n = int(cells.uns["gfx_delete"]["table"]["n_cells"].sum())
    (message,) = [message for message in caplog.messages if "passes" in message]
    assert re.fullmatch(rf"{n} passes of the network, about \d+ s", message)


def test_blocks_that_are_there_cost_nothing(cells, toy_model, monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", logger="gfx")
    monkeypatch.setattr("gfx.tl._prepare.LONG_CALL", 5)
    for _ in range(2):
        gfx.tl.delete_genes(cells, GENE, model=toy_model, controls=None, store=tmp_path / "store")
    assert sum("passes of the network" in message for message in caplog.messages) == 1


def test_embedding_states_is_part_of_the_cost(cells, toy_model, monkeypatch, caplog):
    caplog.set_level("INFO", logger="gfx")
    monkeypatch.setattr("gfx.tl._prepare.LONG_CALL", 5)
    gfx.tl.delete_genes(cells, GENE, model=toy_model, controls=None, **WITH_STATES)
    (message,) = [message for message in caplog.messages if "passes of the network" in message]
    n_perturbed = int(cells.uns["gfx_delete"]["table"]["n_cells"].sum())
    assert int(message.split()[0]) == n_perturbed + cells.n_obs

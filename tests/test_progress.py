"""Progress bars and messages as a notebook stores them, and the width of messages."""

from __future__ import annotations

import re
from typing import Any

import pytest

import gfx
from gfx import _log

nbclient = pytest.importorskip("nbclient", reason="no notebook can be run: nbclient is not installed")
pytest.importorskip("ipykernel", reason="no notebook can be run: ipykernel is not installed")

BARS = """
import sys, time
{without}
from gfx import _log, settings
settings.verbosity = 2
with _log.progress(3, "outer", "fit") as bar:
    for _ in range(3):
        time.sleep(1.1)
        bar.update()
        with _log.progress(2, "inner", "cell") as inner:
            time.sleep(1.1)
            inner.update()
with _log.progress(2, "second", "cell") as bar:
    time.sleep(1.2)
    bar.update()
"""

CALLS = """
import gfx
gfx.settings.verbosity = 2
adata = gfx.datasets.toy(30)
gfx.tl.embed(adata)
gfx.tl.delete_genes(adata, ["CD3D", "MS4A1"], n_random=3)
gfx.tl.screen_genes(adata, genes=["CD3D", "MS4A1"], groupby="cell_type", start="T cell", goal="B cell")
"""

TRAININGS = """
import tempfile, gfx
gfx.settings.verbosity = 2
adata = gfx.datasets.toy(100)
small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
curriculum = [(64, 12), (64, 12)]
with tempfile.TemporaryDirectory() as runs:
    gfx.models.pretrain(adata, runs + "/own", gene_ids="ensembl_id", curriculum=curriculum, config=small, held_out=0.2)
    how = gfx.models.FineTuning(n_epochs=20)
    gfx.models.fine_tune_cells(adata, "cell_type", runs + "/types", model=runs + "/own", method=how)
"""


def executed(*cells: str) -> tuple[list[Any], list[dict[str, str]]]:
    """Run a notebook; return the outputs of its cells as they are stored, and the states of displays on the way."""
    import nbformat

    class Client(nbclient.NotebookClient):
        def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
            if msg["msg_type"] in {"display_data", "update_display_data"}:
                states.append(dict(msg["content"]["data"]))
            return super().process_message(msg, cell, cell_index)

    states: list[dict[str, str]] = []
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    Client(notebook, timeout=300, kernel_name="python3").execute()
    return [cell["outputs"] for cell in notebook.cells], states


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("without", ["", 'sys.modules["ipywidgets"] = None'])
def test_a_cell_has_one_bar_which_is_gone_when_it_ends(without: str) -> None:
    (outputs,), states = executed(BARS.format(without=without))
    shown = [state["text/plain"] for state in states if state["text/plain"]]
    assert any(line.startswith("outer:  67%") for line in shown)
    assert any(line.startswith("second:") for line in shown)
    assert not any("inner" in line for line in shown)
    assert [output["data"] for output in outputs] == [{"text/plain": "", "text/html": ""}]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_notebook_stores_no_more_than_short_messages() -> None:
    (outputs,), _ = executed(CALLS)
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    text = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert max(map(len, text.splitlines())) <= _log._WIDTH == 88
    for name in ("'X_gfx'", "'gfx_delete'", "'gfx_screen'"):
        message = text.partition(f"added {name}")
        assert message[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_trainings_show_the_same_bar_and_no_table_of_losses() -> None:
    pytest.importorskip("accelerate")
    (outputs,), states = executed(TRAININGS)
    assert not [state for state in states if state.get("text/html")]
    shown = [state["text/plain"] for state in states if state["text/plain"]]
    assert {re.match(r"\w+:", line)[0] for line in shown} >= {"training:"}
    assert any("held-out loss=" in line for line in shown)
    assert [output["data"] for output in outputs if output["output_type"] != "stream"] == [
        {"text/plain": "", "text/html": ""}
    ]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    text = " ".join("".join(output["text"] for output in outputs if output["output_type"] == "stream").split())
    assert text.count("trained on 80 cells for 12 epochs: loss of held-out cells") == 2
    assert not re.search(r"\d\d:\d\d|'eval_loss'", text)


def test_messages_are_broken_into_lines_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    with gfx.settings.override(verbosity=2):
        _log.info("word " * 30 + "end\n  table   of numbers")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "  table   of numbers"
    assert [len(line) for line in lines[:-1]] == [84, 68]
    assert " ".join(lines[:-1]) == "word " * 30 + "end"

"""Texts that several docstrings share."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable")


def shared(**texts: str) -> Callable[[F], F]:
    """Fill lines of a docstring that hold nothing but ``{name}`` with a text, indented like that line."""

    def fill(function: F) -> F:
        def text(found: re.Match[str]) -> str:
            indent, name = found.groups()
            lines = inspect.cleandoc(texts[name]).splitlines()
            return "\n".join(indent + line if line else "" for line in lines)

        function.__doc__ = re.sub(r"^([ \t]*)\{(\w+)\}$", text, function.__doc__ or "", flags=re.M)
        return function

    return fill


MODEL = """
model
    Published name, folder, or what :func:`gfx.models.load` returned. `None`: `gfx.settings.model`, else `mini`.
layer
    Layer with the raw counts; `None`: `X`.
"""

STATES = """
groupby
    Column of `obs` with cell states.
start, goal
    Perturb genes in the cells of state `start` and ask whether they move towards `goal`; all other states of
    `groupby` are alternatives. A state is the mean embedding of its cells.
"""

CENTROIDS = """
centroids
    ``"whole"``: states are means of cells as they are, so a gene that marks a state moves cells out of it by
    definition. ``"without"``: for each perturbation, means of cells without its genes; costs a pass over all cells
    of all states that have them. Movements towards states then have no z, for random sets are not taken out.
"""

CONTROLS = """
null
    ``"rank"``: beside each perturbation, 100 random sets of genes of neighbouring rank in up to 8 of the same cells
    each; and 200 random genes of all ranks, which a network of the same shape with random weights reads as well. A
    number: that many sets. `None` leaves all of this out.
donor_key
    Column of `obs` with the donor of each cell: means and intervals are then over donors, tests over donors and random
    sets, and the state axis is tested on donors held out. Without, no p-value comes from cells, for cells are not
    replicates.
"""

READOUT = """
hidden_layer
    Which hidden states: -1 the last block's, -2 those of the block before, 0 the embedding's.
pooling
    ``"cls"``: a cell's shift is that of `<cls>`. ``"mean"``: that of the mean over its genes. ``"genes"``: the mean
    of the shifts of its other genes, as the V1 family was published; states are compared with the mean over genes.
    ``"auto"``: ``"cls"`` where the family has it, else ``"genes"``.
rng
    Seed of the random sets, the random network, and the folds.
"""

OUTPUT = """
key_added
    Where to store the result; see below.
mod
    Modality of a MuData.
copy
    Work on a copy and return it.
"""

METHOD = """
method
    ``"fine_tune"`` or ``"linear_probe"``; see above.
"""

FOLDS = """
n_splits
    Folds.
n_seeds
    How often the folds are drawn anew, and networks trained.
"""

ADAPTER = """
adapter
    ``"lora"`` trains low-rank adapters beside the weights :cite:p:`Hu2022`, in blocks that are not frozen, with `peft`;
    ``"lora-8bit"`` and ``"lora-4bit"`` hold the network in 8 or 4 bits meanwhile, with `bitsandbytes`, on CUDA only.
    The adapters are added to the weights in the end, so that the result is a model like any other.
"""

RUNNING = """
batch_size
    Cells in a forward pass at most; `None`: as many as fit a number of tokens, halved when memory runs out.
device
    Such as ``"cpu"`` or ``"cuda:0"``. `None`: the setting, else what is there.
dtype
    Precision of the forward pass. `None`: bfloat16 where it is fast, else float32.
"""

_SLOTS_OF_PERTURBATIONS = """
`.obsm['{key}' | key_added]` : :class:`numpy.ndarray` (float32, `(n_obs, n_perturbations)`)
    Shift of each cell; NaN for cells that were not perturbed: those that lack a gene or are not of state `start`.
`.obsm['{key}_parts' | key_added + '_parts']` : :class:`numpy.ndarray` (float32, `(n_obs, n_perturbations, 3)`)
    What of it is composition, position and context; they add up to the shift.
`.obsm['{key}_states' | key_added + '_states']` : :class:`numpy.ndarray` (float32, 3 dimensions)
    With states, `(n_obs, n_perturbations, n_states)`: change of the cosine to each state, in the order of `uns`.
`.varm['{key}' | key_added]` : :class:`numpy.ndarray` (float32, `(n_vars, n_perturbations)`)
    Shift of each other gene, mean over the cells that have it; NaN where none does.
`.varm['{key}_sd' | key_added + '_sd']` : :class:`numpy.ndarray` (float32, `(n_vars, n_perturbations)`)
    Its standard deviation over these cells.
`.varm['{key}_n_cells' | key_added + '_n_cells']` : :class:`numpy.ndarray` (int32, `(n_vars, n_perturbations)`)
    How many cells these are.
`.varm['{key}_null' | key_added + '_null']` : :class:`numpy.ndarray` (float32, `(n_vars, n_perturbations)`)
    With `null`, its mean shift when random sets beside the perturbation are perturbed.
`.uns['{key}' | key_added]` : :class:`dict`
    `params`; `perturbations`, their names, and `ensembl_ids`; `states`; `table` and `state_table`, see
    :func:`gfx.get.deletion_df`; `synergy`, see :func:`gfx.get.synergy_df`; `random_sets` and `random_states`, see
    :func:`gfx.get.random_sets_df`; `genes_of_all_ranks`, see :func:`gfx.get.rank_trend_df`; `donors` and
    `donor_states`; `controls`, see :func:`gfx.get.controls_df`: how effects follow the rank, how far a random network
    ranks alike, whether start and goal can be told apart in cells held out, and what detection, expression, rank and
    fold change tell; `note`, what the p-values are over.
"""


def perturbation_slots(key: str) -> str:
    """Say what a function that perturbs genes writes, under its own name or another."""
    return _SLOTS_OF_PERTURBATIONS.replace("{key}", key)


PERTURBATION_ERRORS = """
ValueError
    A gene that the model does not know, a gene or set given twice, `start` without `goal`, no raw counts, tokens of
    another vocabulary, or a value outside the choices.
KeyError
    No such column in `obs`, or no such state in it.
TypeError
    Genes that are no names.
"""

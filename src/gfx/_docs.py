"""Texts that several docstrings share: a parameter that several functions take is described here, once.

A function that is decorated with :func:`shared` writes a line that holds nothing but ``{layer}`` where the parameter
`layer` is described, and that line becomes the name and the text of the table below. A text of one function alone, or
of a few, is given by name: ``@shared(slots=SLOTS)`` fills ``{slots}``. Every room may import this module.
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable")

#: Entries as they appear in a docstring. In brackets is the placeholder's name where it is not the parameter's.
_PARAMETERS = """
adata
    Cells × genes, with raw counts in `X` or `layer`, or with tokens from :func:`gfx.pp.tokenize`.
adata [after_tokenizing]
    After :func:`gfx.pp.tokenize`.
adata [after_attention]
    After :func:`gfx.tl.attention`.
adata [after_perturbing]
    After :func:`gfx.tl.delete_genes`, :func:`gfx.tl.overexpress_genes` or :func:`gfx.tl.shift_genes`.
adata [after_screening]
    After :func:`gfx.tl.screen_genes`.
adata [after_classifying]
    After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.classify_cells`.
adata [after_scoring]
    After :func:`gfx.tl.classify_genes` or :func:`gfx.tl.predict_genes`.
model
    A published name, a folder, or what :func:`gfx.models.load` returned. `None` uses `gfx.settings.model`, or else
    the embedded model `mini`.
layer
    Layer of the AnnData that holds the counts. `None` uses `X`.
use_raw
    Whether to use the counts and the genes of `adata.raw`.
gene_ids
    Column of `var` that holds Ensembl ids or gene symbols. `None` uses the index. Ensembl ids with or without
    version, symbols, aliases and retired ids may be mixed.
mask_obs
    Cells to use: a boolean column of `obs`, or a boolean array. `None` uses all cells.
groupby
    Column of `obs` with groups of cells, each of which gets results of its own in addition to those of all cells.
    Cells without a group count only for the results of all cells.
groupby [states]
    Column of `obs` with cell states, such as a condition. The embedding of a state is the mean over its cells.
start
    State whose cells are perturbed. `None` perturbs all cells.
goal
    State that perturbed cells are compared with: do they shift toward it? All other states of `groupby` are
    alternatives.
hidden_layer
    Network layer whose hidden states are used: -1 is the last layer, -2 the one before it, and 0 the input
    embedding.
pooling
    How a cell becomes one vector. ``"cls"``: the hidden state of its `<cls>` token. ``"mean"``: the mean over its
    genes, without special tokens. ``"auto"``: ``"cls"`` where the model family has this token, else ``"mean"``.
pooling [pooling_of_shifts]
    How the shift of a cell is measured. ``"cls"``: 1 - cosine between the hidden states of its `<cls>` token before
    and after. ``"mean"``: the same with the mean over its genes. ``"genes"``: the mean of the shifts of its other
    genes, the published measure of the V1 family. ``"auto"``: ``"cls"`` where the model family has this token, else
    ``"mean"``.
positions
    ``"close"``: the genes behind a deleted gene move up by one position, as in the published method. ``"keep"``:
    all other genes keep their positions.
controls
    What to compare results with, a sequence of names; `None` runs no control. ``"random_sets"``: rank-matched
    random gene sets in the same cells. ``"random_weights"``: the same model with random weights. ``"baselines"``:
    what is known without a model, such as detection, expression and fold change.
n_random
    Number of rank-matched random gene sets for each perturbation.
donor_key
    Column of `obs` with the donor of each cell. Means, intervals and tests are then over donors. Without it no
    p-value comes from cells, because cells are not replicates.
store
    Folder where finished blocks of cells are kept. A call that is repeated with the same store goes on where it
    stopped, and gives the same result. `None` keeps nothing.
folder
    Folder where the trained model is kept. A call that is repeated with the same folder goes on where it stopped.
    `None` keeps no model.
rng
    Seed of everything that the call draws at random.
key_added
    Name to store the result under. `None` uses the default names below; with a name, several results fit side by
    side.
mod
    Modality of a MuData that holds the RNA counts. `None` uses the only one.
copy
    Whether to return an updated copy and leave `adata` as it is.
key
    The `key_added` of that call. `None` reads the result under the default name, or else the only result there is.
n_splits
    Number of cross-validation folds.
n_repeats
    Number of repeats, each with new folds and seeds.
max_cells
    Largest number of cells to use, drawn at random. `None` uses all cells.
learning_curve
    Additional training-set sizes, in cells, for a learning curve. Evaluation always uses all selected cells.
task
    Classification task, ``"labels"`` or the name of the column that the classes came from. `None` is the only one.
unit
    What is counted: ``"gene"``, ``"occurrence"`` (a gene in a cell) or ``"cell"``. `None` is genes, or else cells.
group
    A group of the `groupby` of that call. `None` is all cells that were used.
names
    Column of `var` with gene names to show. `None` uses `var_names`.
min_cells
    Genes in fewer cells than this are left out.
min_cells [min_cells_of_sets]
    Perturbations in fewer cells than this are left out.
ax
    Axes to draw on. `None` makes a new figure.
ax [two_axes]
    Two axes to draw on. `None` makes a new figure.
figsize
    Width and height of a new figure, in inches.
cmap
    Name of a matplotlib colour map, or the map itself.
palette
    Colours of the groups, in their order. `None` uses matplotlib's colour cycle.
show
    Whether to call :func:`matplotlib.pyplot.show`. `None` follows scanpy's setting.
"""


def _entries(text: str) -> dict[str, str]:
    """Cut a text into its entries, by the name of their placeholders."""
    entries = {}
    for entry in re.split(r"^(?=\S)", text.strip(), flags=re.M)[1:]:
        name, placeholder, description = re.fullmatch(r"(\w+)(?: \[(\w+)\])?\n(.*)", entry, flags=re.S).groups()
        entries[placeholder or name] = f"{name}\n{description.rstrip()}"
    return entries


#: What each placeholder is filled with.
TEXTS: dict[str, str] = _entries(_PARAMETERS)


def shared(**texts: str) -> Callable[[F], F]:
    """Fill lines of a docstring that hold nothing but ``{name}``, indented like that line.

    Parameters
    ----------
    texts
        Texts for this function alone; all others come from the table.
    """

    def fill(function: F) -> F:
        def text(placeholder: re.Match[str]) -> str:
            indent, name = placeholder.groups()
            lines = textwrap.dedent((TEXTS | texts)[name]).strip().splitlines()
            return "\n".join(indent + line if line else "" for line in lines)

        function.__doc__ = re.sub(r"^([ \t]*)\{(\w+)\}$", text, function.__doc__ or "", flags=re.M)
        return function

    return fill


# Texts of rooms that do not use the table yet.

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

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
    Name of a published model, folder of a model, or a model from :func:`gfx.models.load`. `None` uses
    `gfx.settings.model`, or, if that is not set, the built-in model `mini`.
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
    Column of `obs` with groups of cells. Results are computed for each group in addition to those for all cells.
    Cells without a group contribute only to the results for all cells.
groupby [classes]
    Column of `obs` with the class of each cell, or several columns, each of which is a task. Cells whose class is
    missing or blank are left out of that task.
groupby [states]
    Column of `obs` with cell states, such as a condition. The embedding of a state is the mean over its cells.
start
    State whose cells are perturbed. `groupby`, `start` and `goal` go together; without them, all cells are
    perturbed.
goal
    State toward which the shift of the perturbed cells is measured. All other states of `groupby` are
    alternatives.
hidden_layer
    Network layer whose hidden states are used: -1 is the last layer, -2 the one before it, and 0 the input
    embedding.
pooling
    How a cell is embedded as one vector. ``"cls"``: the hidden state of its `<cls>` token. ``"mean"``: the mean of
    the hidden states of its genes, without special tokens. ``"auto"``: ``"cls"`` where the model family has this
    token, else ``"mean"``.
pooling [pooling_of_head]
    Which vector of a cell is classified. ``"cls"``: the hidden state of `<cls>`. ``"mean"``: the mean over genes.
    ``"auto"``: ``"cls"`` where the model family has this token, else ``"mean"``.
pooling [pooling_of_shifts]
    How the shift of a cell is measured. ``"cls"``: 1 - cosine between the hidden states of its `<cls>` token before
    and after the perturbation. ``"mean"``: 1 - cosine between the means over its genes. ``"genes"``: the mean of
    the shifts of its other genes, which is the published measure of the V1 family. ``"auto"``: ``"cls"`` where the
    model family has this token, else ``"mean"``.
positions
    ``"close"``: the genes behind a deleted gene move up by one position, as in the published method. ``"keep"``:
    all other genes keep their positions.
controls [controls_of_classifiers]
    What the model is compared with in the same folds. ``"random_weights"``: the same method with a random-weights
    model, of which no layer is frozen. ``"baselines"``: methods that need no model. `None` makes no comparison.
controls [controls_of_perturbations]
    What to compare results with, a sequence of names; `None` runs no control. ``"parts"``: split each shift into
    composition, position and context, which takes one more pass. ``"random_sets"``: rank-matched random gene sets
    in the same cells. ``"random_weights"``: the same model with random weights. ``"baselines"``: detection,
    expression, rank and fold change. On request also ``"centroids"``: a marker gene helps define its own
    state, so this gives the shift toward centroids of cells without the perturbed genes, at the cost of a pass over
    the cells of all states for each perturbation.
n_random
    Number of rank-matched random gene sets for each perturbation, each of which is perturbed in up to eight cells.
    `None` takes 50 sets, or fewer if the perturbation itself is done in fewer cells, and so many cells that the
    sets need no more passes than the perturbation.
donor_key
    Column of `obs` with the donor of each cell. Means, intervals and tests are then over donors. Without donors
    there are no p-values over replicates, because cells are not replicates.
store
    Folder where finished blocks of cells are kept. If an interrupted call is repeated with the same store, it
    continues where it stopped and gives the same result. `None` keeps no blocks.
folder
    Folder for a classifier that is trained on all labels and can be used for prediction. It must be new, empty, or
    that of an interrupted call. If an interrupted call is repeated with the same folder, fine-tuning continues
    where it stopped, and a linear probe starts again. `None` keeps no classifier.
folder [folder_of_model]
    Folder for the classifier. It must be new, empty, or that of an interrupted call, which is then continued.
rng
    Seed of everything that the call draws at random.
key_added
    Name under which the result is stored. `None` uses the default names below. With different names, one object can
    hold several results.
mod
    Modality of a MuData that holds the RNA counts. `None` uses the only modality.
copy
    Whether to return an updated copy and leave `adata` as it is.
key
    The `key_added` of the call that made the result. `None` reads the result under the default name, or, if there
    is no such result, the only one.
labels
    Classes and their genes, as symbols or Ensembl ids, such as ``{"insensitive": [...], "sensitive": [...]}``; or a
    column of `var` that is empty for genes without a class. With two classes, scores and ROC curves are those of
    the second class.
unknown
    What to do with genes in `labels` that the model does not know: ``"raise"`` an error, or ``"drop"`` them.
method
    ``"fine_tune"`` trains the network together with a classification head; to change the training options, pass a
    :class:`gfx.models.FineTuning`. ``"linear_probe"``, or a :class:`gfx.models.LinearProbe`, leaves the network
    unchanged and fits logistic regression on the hidden states of the last but one layer, which is fast enough for
    a CPU.
n_splits
    Number of cross-validation folds.
n_repeats
    Number of repeats, each with new folds and seeds.
max_cells
    Largest number of cells to use, drawn at random. `None` uses all cells.
max_cells [max_cells_with_labels]
    Largest number of cells to use, drawn at random among those that have a labelled gene.
learning_curve
    Additional training-set sizes, in cells, for a learning curve. Evaluation always uses all cells, or genes, of a
    fold.
task
    Classification task: ``"labels"``, or the name of the column with the classes. `None` uses the only task.
unit
    What is counted: ``"gene"``, ``"occurrence"`` (a gene in a cell) or ``"cell"``. `None` counts genes if genes
    were classified, and cells otherwise.
group
    A group of `groupby` in the call that made the result. `None` gives the result for all cells that were used.
n_names
    Number of genes to name.
names
    Column of `var` with gene names to show. `None` uses `var_names`.
min_cells
    Genes in fewer cells than this are left out.
min_cells [min_cells_of_groups]
    Genes in fewer cells than this, in either group, are left out.
min_cells [min_perturbed_cells]
    Genes that are in fewer perturbed cells than this are left out.
min_cells [min_cells_of_sets]
    Perturbations in fewer cells than this are left out.
statistic [statistic_of_attention]
    Which attention to tabulate: ``"received"``, what each gene receives from an average position of the cell, or
    ``"given"``, what it gives to other genes.
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
    Whether to show the figure. A function that shows its figure returns `None`, otherwise the axes it drew on, as
    scanpy's plots do. `None` shows it, unless `ax` is given or ``scanpy.settings.autoshow`` is `False`.
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

    `texts` are those of this function alone; all others come from the table.
    """

    def fill(function: F) -> F:
        def text(placeholder: re.Match[str]) -> str:
            indent, name = placeholder.groups()
            lines = textwrap.dedent((TEXTS | texts)[name]).strip().splitlines()
            return "\n".join(indent + line if line else "" for line in lines)

        function.__doc__ = re.sub(r"^([ \t]*)\{(\w+)\}$", text, function.__doc__ or "", flags=re.M)
        return function

    return fill

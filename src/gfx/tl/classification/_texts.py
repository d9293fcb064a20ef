"""Parameter texts that the functions of this room share."""

from __future__ import annotations

LABELS = """
labels
    Classes and their genes, as symbols or Ensembl ids, such as ``{"insensitive": [...], "sensitive": [...]}``; or a
    column of `var`, empty for genes without a class. With two classes, scores and curves are those of the second.
"""

GROUPBY = """
groupby
    Column of `obs` with the class of each cell, or several columns; cells without a class, missing or blank, are left
    out of that task.
"""

UNKNOWN = """
unknown
    What to do with genes in `labels` that the model does not know: ``"raise"`` an error, or ``"drop"`` them.
"""

METHOD = """
method
    ``"fine_tune"`` trains the network with a head, as :class:`gfx.models.FineTuning` says, of which one with choices of
    your own can be given. ``"linear_probe"``, or a :class:`gfx.models.LinearProbe`, leaves the network as it is and
    fits logistic regression on its states, one network layer before the last: fast enough for a CPU.
"""

POOLING = """
pooling
    What a head on cells reads: ``"cls"``, the state of `<cls>`; ``"mean"``, the mean over genes; ``"auto"``, `<cls>`
    where the model's family has one.
"""

CONTROLS = """
controls
    What the model is compared with in the same folds: ``"random_weights"``, the same method with a network of random
    weights, none of which is frozen; ``"baselines"``, what is known without a model. `None` compares with nothing.
"""

FOLDER = """
folder
    Folder for a model trained on all labels, for the functions that predict, and for what a stopped call leaves: when
    it is repeated with the same folder, fine-tuning goes on where it was; a linear head begins again. The folder is
    new, empty, or that of such a call. `None` keeps no model.
"""

OWN_FOLDER = """
folder
    Where the classifier is kept: new, empty, or the folder of a call that was stopped, which goes on where it was.
"""

ERRORS = """
KeyError
    No such column in `var` or `obs`.
ImportError
    An adapter or a search without the package that it needs.
"""

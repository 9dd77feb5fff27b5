"""What a task is: data split once and for all, ready to train and to measure on.

Built in chapter 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Task:
    """A data set, split once and for all, ready for `fit` and `accuracy`.

    Parameters
    ----------
    name : str
    train, validation, test : DataLoader
        Batches ``(inputs, labels)``, or dictionaries for transformers. `train` is
        shuffled, the others keep their order.
    classes : tuple of str
        What label 0, 1, ... mean; empty for language modelling.
    source : str
        Where the data comes from, and its licence.
    metric : str
        A name of `companion.evaluation.metrics.METRICS`: what is measured on the test split. Validation
        always goes by the loss.
    """

    name: str
    train: DataLoader
    validation: DataLoader
    test: DataLoader
    classes: tuple[str, ...]
    source: str
    metric: str = "loss"

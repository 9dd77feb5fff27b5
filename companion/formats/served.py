"""What formats have in common: a layer as it stands in a file, and a model that an engine runs.

Built in chapter 15.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from companion.formats.onnx.graphs import Description


@dataclass(frozen=True)
class Matrix:
    """Integers and scales as they were read back, or values where a format has no integers.

    Parameters
    ----------
    integers : ndarray of int, shape (rows, columns or more), optional
        Signed. Columns beyond the layer's fill up a block.
    scales : ndarray of float32, shape (rows, blocks), optional
        A scale that several blocks share stands there once for each, or once for all.
    values : ndarray of float32, shape (rows, columns), optional
        In place of the two.

    Examples
    --------
    >>> Matrix(np.array([[-8, 7]]), np.array([[0.5]])).scales.shape
    (1, 1)
    """

    integers: np.ndarray | None = None
    scales: np.ndarray | None = None
    values: np.ndarray | None = None


def first_line(error: BaseException) -> str:
    """What an engine says first, or else the kind of its error.

    Examples
    --------
    >>> first_line(ValueError("no file", "at all")), first_line(KeyError())
    ("('no file', 'at all')", 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ServedModel(nn.Module):
    """A model that an engine of its own computes, from a file, in place of PyTorch.

    Examples
    --------
    >>> from companion.formats.onnx.model import OnnxModel
    >>> issubclass(OnnxModel, ServedModel)
    True
    """

    description: Description
    loss_type: str = ""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens it knows."""

    @abstractmethod
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        stop: bool = True,
        settings: Mapping | None = None,
    ) -> Iterator[int]:
        """Go on with a text of shape (1, length), token by token, each as soon as it is known."""

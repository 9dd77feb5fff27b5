"""`Matrix`: what a file holds of one rounded layer, whatever the file's format.

Built in chapter 15.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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

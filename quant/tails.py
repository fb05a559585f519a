# mypy: allow-untyped-defs, allow-untyped-calls
"""Importances estimated from the weights alone, for a model that nobody calibrated: columns with heavy tails.

How much the columns of a matrix matter depends on the activations that meet them, which the weights do not hold. But
training leaves a trace: where a channel carries large activations, a few weights of its column grow far beyond the
others. So the column's kurtosis (1 for equal magnitudes, 3 for a Gaussian, no unit) tells important columns apart:

    importance = (n * sum x^4 / (sum x^2)^2)^2          sums over the n rows of a column

Equal tails everywhere give equal importances, and then nothing but the squared error of the weights counts. A column's
size plays no part: large columns often meet small activations. What it was found on, how it compares with measured
importances, and what else was tried: docs/LOG.md.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from weightsmith.quant.kernels import inner, kernel
from weightsmith.types import Rows

ARITHMETIC_VERSION = 1  # changes whenever the same input would give other bytes
_AT_ONCE = 1024  # columns: their sums stay in the cache

_SUMS = types.void(
    types.Array(types.float32, 2, "C", readonly=True),
    types.Array(types.float64, 2, "C"),
)


@inner
def _square(x, r, c):
    return np.float64(x[r, c]) * np.float64(x[r, c])


@kernel(_SUMS)
def _add(x, sums):
    n_rows, n_columns = x.shape
    whole = n_rows // 8 * 8
    for first in range(0, n_columns, _AT_ONCE):
        last = min(first + _AT_ONCE, n_columns)
        for r in range(0, whole, 8):  # eight rows for one load and store of the sums, which would take half of the time
            for c in range(first, last):
                s0, s1, s2, s3 = _square(x, r, c), _square(x, r + 1, c), _square(x, r + 2, c), _square(x, r + 3, c)
                s4, s5, s6, s7 = _square(x, r + 4, c), _square(x, r + 5, c), _square(x, r + 6, c), _square(x, r + 7, c)
                sums[0, c] = sums[0, c] + s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7
                fourths = sums[1, c] + s0 * s0 + s1 * s1 + s2 * s2 + s3 * s3
                sums[1, c] = fourths + s4 * s4 + s5 * s5 + s6 * s6 + s7 * s7
        for r in range(whole, n_rows):
            for c in range(first, last):
                square = _square(x, r, c)
                sums[0, c] += square
                sums[1, c] += square * square


class Tails:
    """Sums over the rows of a matrix, added in their order: however they are cut, the result is the same to the bit."""

    def __init__(self, row_len: int) -> None:
        self._sums = np.zeros((2, row_len), np.float64)  # of x^2 and of x^4
        self._rows = 0

    def add(self, rows: Rows) -> None:
        """Take in further rows, float32 [rows, row_len]."""
        _add(np.require(rows, np.float32, ["C", "A"]), self._sums)
        self._rows += len(rows)

    def importance(self) -> NDArray[np.float32]:
        """Importance of every column, float32 [row_len], at least 1; all 1 if a weight is NaN or Inf."""
        squares, fourths = self._sums
        if not np.isfinite(self._sums).all():
            return np.ones(len(squares), np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            kurtosis = np.where(squares > 0, fourths / squares * (self._rows / squares), 1.0)
        found: NDArray[np.float32] = np.square(np.maximum(kurtosis, 1.0)).astype(np.float32)
        return found

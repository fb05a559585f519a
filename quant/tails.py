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

from weightsmith.quant import codecs
from weightsmith.quant.kernels import float_of, half_value, inner, kernel
from weightsmith.types import Packed, Rows

ARITHMETIC_VERSION = 1  # changes whenever the same input would give other bytes
_AT_ONCE = 1024  # columns: their sums stay in the cache
_ROWS = 8

_SUMS = types.void(
    types.Array(types.float32, 2, "C", readonly=True),
    types.Array(types.float64, 2, "C"),
)
_SUMS_16 = types.void(
    types.Array(types.uint16, 2, "C", readonly=True),
    types.boolean,
    types.Array(types.float64, 2, "C"),
)


@inner
def _more(weight, squares, fourths):
    square = np.float64(weight) * np.float64(weight)
    return squares + square, fourths + square * square


@inner
def _add_columns(x, n_rows, first, squares, fourths):
    # Eight rows for one load and store of the sums, and rows as slices: numba checks no sign of an index then, and LLVM
    # makes SIMD code of it (7.6 thousand million weights a second and core, 1.9 with x[r, c]).
    last = first + squares.size
    whole = n_rows // _ROWS * _ROWS
    for r in range(0, whole, _ROWS):
        x0, x1, x2, x3 = x[r, first:last], x[r + 1, first:last], x[r + 2, first:last], x[r + 3, first:last]
        x4, x5, x6, x7 = x[r + 4, first:last], x[r + 5, first:last], x[r + 6, first:last], x[r + 7, first:last]
        for c in range(squares.size):
            a, b = _more(x0[c], squares[c], fourths[c])
            a, b = _more(x1[c], a, b)
            a, b = _more(x2[c], a, b)
            a, b = _more(x3[c], a, b)
            a, b = _more(x4[c], a, b)
            a, b = _more(x5[c], a, b)
            a, b = _more(x6[c], a, b)
            squares[c], fourths[c] = _more(x7[c], a, b)
    for r in range(whole, n_rows):
        row = x[r, first:last]
        for c in range(squares.size):
            squares[c], fourths[c] = _more(row[c], squares[c], fourths[c])


@kernel(_SUMS)
def _add(x, sums):
    n_rows, n_columns = x.shape
    for first in range(0, n_columns, _AT_ONCE):
        last = min(first + _AT_ONCE, n_columns)
        _add_columns(x, n_rows, first, sums[0, first:last], sums[1, first:last])


@kernel(_SUMS_16)
def _add_16(x, is_brain, sums):
    # As _add, of halves or bfloats; what is widened of them stays in the first cache.
    n_rows, n_columns = x.shape
    widened = np.empty((_ROWS, _AT_ONCE), np.float32)
    for first in range(0, n_columns, _AT_ONCE):
        last = min(first + _AT_ONCE, n_columns)
        squares, fourths = sums[0, first:last], sums[1, first:last]
        for r in range(0, n_rows, _ROWS):
            n = min(_ROWS, n_rows - r)
            for i in range(n):
                row, wide = x[r + i, first:last], widened[i]
                if is_brain:
                    for c in range(row.size):
                        wide[c] = float_of(np.int32(np.int32(row[c]) << np.int32(16)))
                else:
                    for c in range(row.size):
                        wide[c] = half_value(np.int32(row[c]))
            _add_columns(widened, n, 0, squares, fourths)


class Tails:
    """Sums over the rows of a matrix, added in their order: however they are cut, the result is the same to the bit."""

    def __init__(self, row_len: int) -> None:
        self._sums = np.zeros((2, row_len), np.float64)  # of x^2 and of x^4
        self._rows = 0

    def add(self, rows: Rows) -> None:
        """Take in further rows, float32 [rows, row_len]."""
        _add(np.require(rows, np.float32, ["C", "A"]), self._sums)
        self._rows += len(rows)

    def add_stored(self, codec: str, packed: Packed) -> None:
        """Take in further rows as they are stored, uint8 [rows, row_bytes]; raises as `codecs.decode`."""
        if codec not in ("F16", "BF16"):
            self.add(codecs.decode(codec, packed, self._sums.shape[1]))
            return
        bits = np.require(np.ascontiguousarray(packed).view(np.uint16), requirements="A")
        _add_16(bits, codec == "BF16", self._sums)
        self._rows += len(packed)

    def importance(self) -> NDArray[np.float32]:
        """Importance of every column, float32 [row_len], at least 1; all 1 if a weight is NaN or Inf."""
        squares, fourths = self._sums
        if not np.isfinite(self._sums).all():
            return np.ones(len(squares), np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            kurtosis = np.where(squares > 0, fourths / squares * (self._rows / squares), 1.0)
        found: NDArray[np.float32] = np.square(np.maximum(kurtosis, 1.0)).astype(np.float32)
        return found

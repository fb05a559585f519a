"""Packed linears before they are scaled: the numbers that were stored, and the scale of each.

Codes less their zero for even steps, levels for 4-bit floats, 8-bit floats as such. What numbers there are says where
else a weight could have been rounded to (`quant.bounds`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant.steps import Lattice
from weightsmith.types import Rows


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """weight = numbers * scales, all float32 [rows, in].

    low, high: least and largest number where numbers are whole; table: or all numbers, ascending. slack: what else a
    value may be off by.
    """

    numbers: Rows
    scales: Rows
    low: Rows | float = 0.0
    high: Rows | float = 0.0
    table: NDArray[np.float32] | None = None
    slack: Rows | float = 0.0

    @classmethod
    def of(cls, lattice: Lattice, bits: int) -> Units:
        """Of codes of `bits` on even steps."""
        columns = lattice.codes.shape[1]
        zeros = lattice.zeros.astype(np.float32).repeat(lattice.group_size, axis=1)[:, :columns]
        scales = lattice.scales.repeat(lattice.group_size, axis=1)[:, :columns]
        return cls(lattice.codes - zeros, scales, -zeros, np.float32((1 << bits) - 1) - zeros)

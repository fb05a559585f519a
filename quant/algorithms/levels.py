# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-subclassing-any
"""The values that codes stand for before they are scaled: whole numbers, or the 16 uneven ones of the IQ4 layouts.

Which of the two is decided by the type of the argument `table` while a kernel is compiled: None means whole numbers.
The table's nearest value is found by halving: four comparisons with midpoints and selections between constants, the
same for every lane. Weights near zero are frequent, so the steps there are small (10) and grow to 24.

Ref: ggml-common.h, kvalues_iq4nl.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from weightsmith.quant.algorithms.lanes import clip, load, nearest, quotient, spread, store_bytes, where
from weightsmith.quant.kernels import inner

IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_K = tuple(np.float32(value) for value in IQ4)
_M = tuple(np.float32(value) for value in (IQ4[1:] + IQ4[:-1]) / 2)  # exact


@inner
def _halve(v):
    """The four comparisons as masks, the most significant first."""
    a = v >= _M[7]
    b = v >= where(a, _M[11], _M[3])
    c = v >= where(a, where(b, _M[13], _M[9]), where(b, _M[5], _M[1]))
    above = where(b, where(c, _M[14], _M[12]), where(c, _M[10], _M[8]))
    below = where(b, where(c, _M[6], _M[4]), where(c, _M[2], _M[0]))
    return a, b, c, v >= where(a, above, below)


@inner
def _quarter(c, d, first):
    return where(c, where(d, _K[first + 3], _K[first + 2]), where(d, _K[first + 1], _K[first]))


@inner
def _from_table(v):
    a, b, c, d = _halve(v)
    above = where(b, _quarter(c, d, 12), _quarter(c, d, 8))
    below = where(b, _quarter(c, d, 4), _quarter(c, d, 0))
    return where(a, above, below)


@inner
def nearest_index(v):
    """Position of the nearest value of IQ4, as a float lane."""
    a, b, c, d = _halve(v)
    high = where(a, np.float32(8.0), np.float32(0.0)) + where(b, np.float32(4.0), np.float32(0.0))
    return high + (where(c, np.float32(2.0), np.float32(0.0)) + where(d, np.float32(1.0), np.float32(0.0)))


# Given as `table` where no |v| is above `within(top)`: whole numbers that need no clipping.
WHOLE = 0
TAME = np.float32(2.0**100)  # inverse scales up to this times any weight of a tile are no Inf


def nearest_value(v: Any, top: Any, table: Any) -> Any:
    """Nearest of the whole numbers -top..top - 1 (table None; WHOLE where v is known to lie `within` them), or of IQ4
    (table True); inside kernels only."""
    raise NotImplementedError


@overload(nearest_value)
def _nearest_value(v, top, table):
    if isinstance(table, types.NoneType):
        return lambda v, top, table: clip(nearest(v), np.float32(0.0) - top, top - np.float32(1.0))
    if isinstance(table, types.Integer):
        return lambda v, top, table: nearest(v)
    return lambda v, top, table: _from_table(v)


@inner
def within(top):
    """Magnitude up to which numbers round to -top..top - 1, less what three roundings may have added."""
    return top - np.float32(0.51)


def moment(weight: Any, v: Any, c: Any, table: Any) -> Any:
    """weight * v * c, multiplied in ggml's order: whole numbers last, values of IQ4 before v; inside kernels only."""
    raise NotImplementedError


@overload(moment)
def _moment(weight, v, c, table):
    if isinstance(table, types.NoneType | types.Integer):
        return lambda weight, v, c, table: weight * v * c
    return lambda weight, v, c, table: weight * c * v


@inner
def signed_codes(tile, integers, d, codes, top):
    """Codes nearest to x / (d * integer), -top..top - 1, plus top, into codes (uint8 [width, 16])."""
    n_sub = integers.shape[0]
    sub = tile.shape[1] // n_sub
    for k in range(n_sub):
        inv = quotient(spread(np.float32(1.0)), d * load(integers, k))
        for e in range(k * sub, k * sub + sub):
            code = clip(nearest(load(tile[0], e) * inv), np.float32(0.0) - top, top - np.float32(1.0))
            store_bytes(codes, e, code + top)


@inner
def table_codes(tile, integers, d, codes):
    """Positions in IQ4 of the values nearest to x / (d * integer) into codes (uint8 [width, 16])."""
    n_sub = integers.shape[0]
    sub = tile.shape[1] // n_sub
    for k in range(n_sub):
        inv = quotient(spread(np.float32(1.0)), d * load(integers, k))
        for e in range(k * sub, k * sub + sub):
            store_bytes(codes, e, nearest_index(load(tile[0], e) * inv))

"""Largest and smallest weights of a block, as the reference's plain loops find them, by integer reductions.

A reduction over floats may not be reordered (NaN, signed zeros), so LLVM leaves it scalar. Over integers it may:

- float bits, read as int32, order non-negative floats; read as uint32, the largest has the largest magnitude among
  the negative ones. Two maxima give the largest magnitude and its sign, and only a tie of +a and -a needs a look back
  for which came first;
- `bits ^ ((bits >> 31) & 0x7fffffff)` orders all floats as int32 (-0 just below +0).

NaN has larger bits than Inf in both orders, so it always reaches the scale and is noticed there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from weightsmith.quant.kernels import bits_of, float_of, inner

SIGN = np.int32(0x7FFFFFFF)


@inner
def first_largest(x: Any, b: int) -> np.float32:
    """The weight of largest magnitude of block `b` of x (float32 [n_blocks, width]); the first of several."""
    above = np.int32(0)
    below = np.uint32(0)
    for j in range(x.shape[1]):
        bits = bits_of(x[b, j])
        above = max(above, bits)
        below = max(below, np.uint32(bits))
    under = np.int32(below & np.uint32(0x7FFFFFFF)) if below >= np.uint32(0x80000000) else np.int32(0)
    negative = under > above
    if under == above:
        for j in range(x.shape[1]):
            bits = bits_of(x[b, j])
            if np.int32(bits & SIGN) == above:
                negative = bits < np.int32(0)
                break
    size = float_of(max(above, under))
    return np.float32(-size if negative else size)


@inner
def ordered(bits: np.int32) -> np.int32:
    """Float bits as an int32 that sorts like the float; its own inverse."""
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & SIGN))


@inner
def span(x: Any, b: int) -> tuple[np.float32, np.float32]:
    """Smallest and largest weight of block `b` of x (float32 [n_blocks, width]); a zero minimum is the first zero."""
    low = np.int32(0x7FFFFFFF)
    high = np.int32(-0x80000000)
    for j in range(x.shape[1]):
        key = ordered(bits_of(x[b, j]))
        low = min(low, key)
        high = max(high, key)
    least, most = float_of(ordered(low)), float_of(ordered(high))
    if least == np.float32(0.0):
        for j in range(x.shape[1]):
            if x[b, j] == np.float32(0.0):
                least = x[b, j]
                break
    return least, most

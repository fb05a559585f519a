# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-subclassing-any
"""Sixteen blocks of a tensor as a tile [element, lane], scaled by powers of two to a common size.

Every block is multiplied by the power of two that brings its largest weight into [1, 2). That is exact, so a search
sees the same numbers for a row of 1e-30 and one of 1e+30 and squares neither underflow nor overflow. Half precision is
rounded at the true size (`stored`): small models have scales below 2**-14, where half has few bits left, and the search
must see what the file will hold.
"""

from __future__ import annotations

import numpy as np

from weightsmith.quant.algorithms.lanes import (
    LANES,
    eleven_bits,
    larger,
    larger_bits,
    load,
    magnitude,
    store,
    where,
)
from weightsmith.quant.algorithms.transposed import to_lanes
from weightsmith.quant.kernels import bits_of, float_of, half_bits, inner

TOO_LARGE = np.int32(0x7C00)  # what a kernel returns for weights that are no numbers, or out of reach
ZERO = np.float32(0.0)
HALF = np.float32(0.5)
LEAST_HALF = np.float32(2.0**-24)
LEAST_NORMAL = np.float32(2.0**-14)
MOST_HALF = np.float32(65504.0)
INFINITE = np.float32(np.inf)


def reach_bits(largest: float) -> np.int32:
    """Bits of the largest magnitude that `largest` times a half-precision scale can stand for."""
    return np.float32(65504.0 * largest).view(np.int32)


@inner
def fill(rows, first, importance, tiles, units):
    """Bring blocks first..first+15 of rows (float32 [n_blocks, width]) into tiles[0] and their weights into tiles[1].

    importance: float32 [period, width]; block b has importance[b % period]. tiles: float32 [2, width, 16], width whole
    sixteens. units: float32 [2, 16], the blocks' powers of two and their inverses. Lanes past the end repeat the last
    block. Returns the bits of the largest magnitude; those of Inf and NaN are larger than any number's.
    """
    width, period = rows.shape[1], importance.shape[0]
    again = LANES % period == 0 and first > 0  # then all tiles of a call have the same importances
    at = np.empty((2, LANES), np.int64)
    for lane in range(LANES):
        at[0, lane] = min(first + lane, rows.shape[0] - 1)
        at[1, lane] = at[0, lane] % period
    for e in range(0, width, LANES):
        to_lanes(rows, at[0], e, tiles[0])
    if not again:
        for e in range(0, width, LANES):
            to_lanes(importance, at[1], e, tiles[1])
    size = magnitude(load(tiles[0], 0))
    for e in range(1, width):
        size = larger_bits(size, magnitude(load(tiles[0], e)))
    store(units, 0, size)
    worst = np.int32(0)
    for lane in range(LANES):
        top = bits_of(units[0, lane])
        worst = max(worst, top)
        exponent = min(max(np.int32(top >> np.int32(23)), np.int32(1)), np.int32(253))
        if top == np.int32(0):
            exponent = np.int32(127)
        units[0, lane] = float_of(np.int32(exponent << np.int32(23)))
        units[1, lane] = float_of(np.int32(np.int32(np.int32(254) - exponent) << np.int32(23)))
    shrink = load(units, 1)
    for e in range(width):
        store(tiles[0], e, load(tiles[0], e) * shrink)
    return worst


@inner
def _half_size(size):
    normal = eleven_bits(size)
    normal = where(normal > MOST_HALF, INFINITE, normal)
    return where(size < LEAST_NORMAL, (size + HALF) - HALF, normal)  # the last place of 0.5 is the smallest half


@inner
def half(v):
    """Lanes rounded to half precision; beyond it they are infinite."""
    rounded = _half_size(larger(v, ZERO - v))
    return where(v < ZERO, ZERO - rounded, rounded)


@inner
def stored(v, units):
    """What remains of a scale in every lane once it is stored in half precision at its block's true size.

    A scale that would round to zero becomes the smallest half instead: with smaller integers it may still serve.
    """
    true = v * load(units, 0)
    size = larger(true, ZERO - true)
    rounded = _half_size(size)
    rounded = where(rounded == ZERO, LEAST_HALF, rounded)
    rounded = where(size == ZERO, ZERO, rounded)
    return where(true < ZERO, ZERO - rounded, rounded) * load(units, 1)


@inner
def halves(v, units, out):
    """Half-precision bits of a scale in every lane at true size, into out (int32 [16]); the largest magnitude."""
    scratch = np.empty((1, LANES), np.float32)
    store(scratch, 0, v)
    worst = np.int32(0)
    for lane in range(LANES):
        out[lane] = half_bits(scratch[0, lane] * units[0, lane])
        worst = max(worst, np.int32(out[lane] & np.int32(0x7FFF)))
    return worst

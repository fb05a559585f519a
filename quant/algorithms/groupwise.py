# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The search of `rtn` for float32 on a CPU: a group of columns, sixteen rows of the matrix at a time.

Rows lie in lanes (`lanes`) and do not depend on each other, so they are shared out to threads and the result depends on
neither. A group of sixteen rows is read once and stays in the cache while every candidate is tried on it. A candidate
is given up when it has lost as much as the best so far in every lane: all terms are positive, so that changes nothing.

Losses and the sums of least squares are taken in runs of RUN columns, for whole rows may have thousands of them.
Otherwise the operations are `rtn`'s, one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import types
from torch import Tensor
from torch.nn import functional

from weightsmith.quant.algorithms.lanes import (
    LANES,
    any_lane,
    clip,
    larger,
    load,
    load_at,
    nearest,
    quotient,
    smaller,
    spread,
    store,
    store_at,
    where,
)
from weightsmith.quant.algorithms.rowwise import share_out
from weightsmith.quant.algorithms.tiles import HALF, INFINITE, ZERO, half
from weightsmith.quant.kernels import inner, kernel

if TYPE_CHECKING:
    from weightsmith.quant.algorithms.rtn import Grid

_F2 = types.Array(types.float32, 2, "C", readonly=True)
_F1 = types.Array(types.float32, 1, "C", readonly=True)
_OUT = types.Array(types.float32, 2, "C")
_LIMITS = types.UniTuple(types.float32, 3)  # least zero, zero of a symmetric grid, top
# w [columns, rows], importance [columns], shares, limits, symmetric?, columns of a group, then scales and zeros
# [groups, rows] and the largest reference scale of every row [1, rows], first and last sixteen
SEARCH = types.void(_F2, _F1, _F1, _LIMITS, types.boolean, types.int64, _OUT, _OUT, _OUT, types.int64, types.int64)
RUN = 32
ONE = np.float32(1.0)
TWO = np.float32(2.0)


@inner
def _limited(zero, limits):
    """A zero within the grid's limits; that of a group whose scale is 0 may be NaN and becomes the least."""
    return smaller(larger(nearest(zero), limits[0]), limits[2])


@inner
def _lost(tile, h, scale, zero, top, least):
    """What codes of a scale and zero lose; no less than `least` in any lane if that is not below it in some."""
    by = quotient(spread(ONE), scale)
    low, high = ZERO - zero, top - zero
    total = spread(ZERO)
    for start in range(0, tile.shape[0], RUN):
        part = spread(ZERO)
        for e in range(start, min(start + RUN, tile.shape[0])):
            w = load(tile, e)
            error = clip(nearest(w * by), low, high) * scale - w
            part = part + error * error * h[e]
        total = total + part
        if not any_lane(total < least):
            break
    return total


@inner
def _offer(tile, h, top, best, scale, zero):
    """The better of the best (scale, zero, loss) and a candidate, lane by lane."""
    scale = half(scale)
    loss = _lost(tile, h, scale, zero, top, best[2])
    better = loss < best[2]
    return where(better, scale, best[0]), where(better, zero, best[1]), where(better, loss, best[2])


@inner
def _refine(tile, h, limits, symmetric, best):
    """Offer the least-squares scale of the best codes, and for an asymmetric grid the best zero for it."""
    top = limits[2]
    zero = best[1]
    by = quotient(spread(ONE), best[0])
    low, high = ZERO - zero, top - zero
    above, below = spread(ZERO), spread(ZERO)
    for start in range(0, tile.shape[0], RUN):
        part_above, part_below = spread(ZERO), spread(ZERO)
        for e in range(start, min(start + RUN, tile.shape[0])):
            w = load(tile, e)
            step = clip(nearest(w * by), low, high)
            weighted = step * h[e]
            part_above = part_above + weighted * w
            part_below = part_below + weighted * step
        above, below = above + part_above, below + part_below
    best = _offer(tile, h, top, best, above / below, zero)
    if symmetric:
        return best
    apart = spread(ZERO)
    whole = ZERO
    for start in range(0, tile.shape[0], RUN):
        part, part_whole = spread(ZERO), ZERO
        for e in range(start, min(start + RUN, tile.shape[0])):
            w = load(tile, e)
            code = clip(nearest(w * by), low, high) + zero
            part = part + (code - w / best[0]) * h[e]
            part_whole += h[e]
        apart = apart + part
        whole += part_whole
    return _offer(tile, h, top, best, best[0], _limited(apart / whole, limits))


@inner
def _symmetric(tile, h, shares, limits, extreme):
    """The reference, its scale before rounding, and the best of shrunken ranges of either sign."""
    zero, top = spread(limits[1]), limits[2]
    raw = larger(extreme, ZERO - extreme) * (TWO / top)
    best = (half(raw), zero, spread(INFINITE))
    best = _offer(tile, h, top, best, raw, zero)
    for i in range(shares.size):
        best = _offer(tile, h, top, best, extreme * shares[i], zero)
    return best, raw


@inner
def _asymmetric(tile, h, shares, limits, low, high):
    """The reference, its scale before rounding, and the best of shrunken ranges and zeros around the middle."""
    top = limits[2]
    raw = (larger(high, ZERO) - smaller(low, ZERO)) / top
    scale = half(raw)
    zero = _limited((ZERO - smaller(low, ZERO)) * quotient(spread(ONE), scale), limits)
    best = (scale, zero, spread(INFINITE))
    best = _offer(tile, h, top, best, scale, zero)
    for i in range(shares.size):
        scale = (high - low) * shares[i]
        middle = nearest(top * HALF - (high + low) / (TWO * scale))
        for step in range(-1, 2):
            best = _offer(tile, h, top, best, scale, _limited(middle + np.float32(step), limits))
    return best, raw


@kernel(SEARCH)
def _search(w, h, shares, limits, symmetric, size, scales, zeros, reach, first, last):  # noqa: PLR0913, PLR0917  (a kernel)
    room = np.empty((size, LANES), np.float32)
    for lanes in range(first, last):
        at = min(lanes * LANES, w.shape[1] - LANES)
        worst = spread(ZERO)
        for group in range(scales.shape[0]):
            start = group * size
            count = min(size, w.shape[0] - start)
            tile, weights = room[:count], h[start : start + count]
            v = load_at(w, start, at)
            low, high, extreme, most = v, v, v, larger(v, ZERO - v)
            for e in range(count):
                v = load_at(w, start + e, at)
                store(tile, e, v)
                low, high = smaller(low, v), larger(high, v)
                length = larger(v, ZERO - v)
                further = length > most  # the first of several
                extreme, most = where(further, v, extreme), where(further, length, most)
            if count < size:  # a short group is filled up with zeros
                low, high = smaller(low, ZERO), larger(high, ZERO)
            if symmetric:
                best, raw = _symmetric(tile, weights, shares, limits, extreme)
            else:
                best, raw = _asymmetric(tile, weights, shares, limits, low, high)
            worst = larger(worst, raw)
            for _ in range(2):
                best = _refine(tile, weights, limits, symmetric, best)
            store_at(scales, group, at, best[0])
            store_at(zeros, group, at, best[1])
        store_at(reach, 0, at, worst)


def search(wt: Tensor, grid: Grid, importance: Tensor, shares: list[float]) -> tuple[Tensor, Tensor, float]:
    """Scales and zeros [groups, out] for wt [in, out], and the largest scale of `rtn.reference` before rounding.

    importance: float32 [in], as it is to be used. shares: factors of `rtn`'s candidates, in turn. float32, contiguous.
    """
    rows = wt.shape[1]
    if rows < LANES:
        wt = functional.pad(wt, (0, LANES - rows))
    scales = torch.empty(grid.groups(len(wt)), wt.shape[1])
    zeros, reach = torch.empty_like(scales), torch.empty(1, wt.shape[1])
    told = (
        wt.numpy(),
        importance.numpy(),
        np.array(shares, np.float32),
        (np.float32(grid.least_zero), np.float32(grid.middle), np.float32(grid.top)),
        grid.sym,
        grid.size(len(wt)),
        *(one.numpy() for one in (scales, zeros, reach)),
    )
    share_out(_search, told, wt.shape[1], wt.numel())
    return scales[:, :rows].contiguous(), zeros[:, :rows].contiguous(), float(reach.max()) if rows else 0.0

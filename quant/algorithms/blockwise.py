# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The least-squares scales of `descent` for float32 on a CPU, where a block is a group with a scale and nothing else.

With steps s of a block's columns, its square C of H and the slope p there, moving the scale d by m lowers the loss by
2 m (s . p) - m^2 (s . C s). The best m is (s . p) / (s . C s); d + m is rounded to a half, and taken if the loss falls.
Then the slope of the blocks behind follows, so the next block is moved on what this one left.

Sixteen rows lie in lanes (`lanes`) and are shared out to threads; a stripe of blocks stays in the cache. Sums over
columns are taken for four columns at once, which hides how long an addition takes. C is symmetric, so what lies below
its diagonal is counted twice instead of read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import types
from torch import Tensor
from torch.nn import functional

from weightsmith.quant.algorithms.lanes import LANES, any_lane, load, load_at, quotient, spread, store, store_at, where
from weightsmith.quant.algorithms.rowwise import fetch, share_out
from weightsmith.quant.algorithms.tiles import ZERO, half
from weightsmith.quant.kernels import inner, kernel

if TYPE_CHECKING:
    from weightsmith.quant.algorithms.columns import Columns

_F2 = types.Array(types.float32, 2, "C", readonly=True)
_F1 = types.Array(types.float32, 1, "C", readonly=True)
_U2 = types.Array(types.uint8, 2, "C", readonly=True)
_I1 = types.Array(types.int64, 1, "C", readonly=True)
_OUT = types.Array(types.float32, 2, "C")
# slope, weights [n, rows], square [n, n], codes [n, rows], table, scales and zeros [blocks, rows], ends of blocks,
# then new scales [blocks, rows] and weights [n, rows], first and last sixteen
REFIT = types.void(_F2, _F2, _F2, _U2, _F1, _F2, _F2, _I1, _OUT, _OUT, types.int64, types.int64)
TWO = np.float32(2.0)


@inner
def _steps(codes, table, zero, start, stop, at, steps):
    """What codes of a block stand for, less its zero."""
    for j in range(start, stop):
        code = load_at(codes, j, at)
        value = code
        for e in range(table.size):
            value = where(code == np.float32(e), table[e], value)
        store(steps, j, value - zero)


@inner
def _products(slope, steps, square, start, stop):
    """s . p and s . C s of a block."""
    linear, own, mixed = spread(ZERO), spread(ZERO), spread(ZERO)
    fours = stop - (stop - start) % 4
    for i in range(start, fours, 4):
        s0, s1, s2, s3 = load(steps, i), load(steps, i + 1), load(steps, i + 2), load(steps, i + 3)
        v0 = s1 * square[i, i + 1] + s2 * square[i, i + 2] + s3 * square[i, i + 3]
        v1 = s2 * square[i + 1, i + 2] + s3 * square[i + 1, i + 3]
        v2 = s3 * square[i + 2, i + 3]
        v3 = spread(ZERO)
        for j in range(i + 4, stop):
            s = load(steps, j)
            v0 = v0 + s * square[i, j]
            v1 = v1 + s * square[i + 1, j]
            v2 = v2 + s * square[i + 2, j]
            v3 = v3 + s * square[i + 3, j]
        mixed = mixed + (s0 * v0 + s1 * v1 + s2 * v2 + s3 * v3)
    for i in range(fours, stop):
        v = spread(ZERO)
        for j in range(i + 1, stop):
            v = v + load(steps, j) * square[i, j]
        mixed = mixed + load(steps, i) * v
    for i in range(start, stop):
        s = load(steps, i)
        linear = linear + s * load(slope, i)
        own = own + s * s * square[i, i]
    return linear, own + TWO * mixed


@inner
def _follow(slope, moved, square, start, stop):
    """Take what columns from `start` to `stop` moved off the slope behind them."""
    n = slope.shape[0]
    fours = n - (n - stop) % 4
    for j in range(stop, fours, 4):
        v0, v1, v2, v3 = load(slope, j), load(slope, j + 1), load(slope, j + 2), load(slope, j + 3)
        for i in range(start, stop):
            m = load(moved, i)
            v0 = v0 - m * square[j, i]
            v1 = v1 - m * square[j + 1, i]
            v2 = v2 - m * square[j + 2, i]
            v3 = v3 - m * square[j + 3, i]
        store(slope, j, v0)
        store(slope, j + 1, v1)
        store(slope, j + 2, v2)
        store(slope, j + 3, v3)
    for j in range(fours, n):
        v = load(slope, j)
        for i in range(start, stop):
            v = v - load(moved, i) * square[j, i]
        store(slope, j, v)


@kernel(REFIT)
def _refit(slope, q, square, codes, table, scales, zeros, ends, new, out, first, last):  # noqa: PLR0913, PLR0917  (a kernel)
    n = slope.shape[0]
    here, steps, moved = (
        np.empty((n, LANES), np.float32),
        np.empty((n, LANES), np.float32),
        np.empty((n, LANES), np.float32),
    )
    for lanes in range(first, last):
        at = min(lanes * LANES, slope.shape[1] - LANES)
        fetch(slope, at, here)
        start = 0
        for block in range(ends.size):
            stop = ends[block]
            _steps(codes, table, load_at(zeros, block, at), start, stop, at, steps)
            linear, bent = _products(here, steps, square, start, stop)
            scale = load_at(scales, block, at)
            to = half(scale + where(bent > ZERO, quotient(linear, bent), ZERO))
            by = to - scale
            better = TWO * by * linear - by * by * bent > ZERO  # false for NaN
            scale = where(better, to, scale)
            store_at(new, block, at, scale)
            for i in range(start, stop):
                before, after = load_at(q, i, at), load(steps, i) * scale
                store_at(out, i, at, after)
                store(moved, i, after - before)
            if stop < n and any_lane(better):
                _follow(here, moved, square, start, stop)
            start = stop


def refit(
    slope: Tensor, square: Tensor, grid: Columns, blocks: slice, *, ends: list[int], codes: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """New scales [blocks, out] of neighbouring blocks, and what their columns' codes stand for then, [n, out].

    slope, codes, q: of these columns, [n, out]; square: [n, n] of H; ends: of blocks among them. float32.
    """
    rows = slope.shape[1]
    arrays = [slope, q, codes, grid.d[blocks], grid.zeros[blocks]]
    if rows < LANES:
        arrays = [functional.pad(one, (0, LANES - rows)) for one in arrays]
    given = [one.contiguous().numpy() for one in arrays]
    scales, out = torch.empty(len(ends), max(rows, LANES)), torch.empty(len(slope), max(rows, LANES))
    table = torch.zeros(0) if grid.levels.table is None else grid.levels.table
    told = (
        *given[:2],
        square.contiguous().numpy(),
        given[2],
        table.numpy(),
        *given[3:],
        np.array(ends, np.int64),
        scales.numpy(),
        out.numpy(),
    )
    share_out(_refit, told, max(rows, LANES), slope.numel())
    return scales[:, :rows], out[:, :rows]

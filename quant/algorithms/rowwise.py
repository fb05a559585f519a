# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The loops of `descent` for float32 on a CPU: a chunk of columns, sixteen rows of the matrix at a time.

Rows do not depend on each other, so they lie in lanes (`lanes`), are shared out to threads, and the result depends on
neither. Sixteen rows of a chunk stay in the cache, where column by column over all rows would read memory anew for
every column. What a column's move means to those behind it is applied at once within SUB columns, and to the rest of
the chunk when those are done; each takes it in the order of columns either way. Products and differences are rounded
one by one, as a decoder will.

Matrices come as in `columns`, transposed, so sixteen rows are neighbours in memory. Where their number is no multiple
of sixteen, the last lanes overlap the ones before: inputs are not written to, so both find the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import types
from torch import Tensor
from torch.nn import functional

from weightsmith.quant.algorithms.lanes import (
    LANES,
    any_lane,
    clip,
    load,
    load_at,
    nearest,
    spread,
    store,
    store_at,
    where,
)
from weightsmith.quant.kernels import inner, kernel

if TYPE_CHECKING:
    from weightsmith.quant.algorithms.columns import Columns

_F2 = types.Array(types.float32, 2, "C", readonly=True)
_F1 = types.Array(types.float32, 1, "C", readonly=True)
_OUT = types.Array(types.float32, 2, "C")
_U2 = types.Array(types.uint8, 2, "C")
_I1 = types.Array(types.int64, 1, "C", readonly=True)
# two of values [n, rows], square [n, n]; steps, their inverses, zeros and offsets [groups, rows]; group of each column
# [n]; table, edges and top of the levels; codes [n, rows], out [n, rows], first and last sixteen. Arrays one by one:
# taking one out of a tuple counts its references, which costs more than a column.
FEED = DESCEND = types.void(
    *(_F2, _F2, _F2), *(_F2, _F2, _F2, _F2), _I1, *(_F1, _F1, types.float32), _U2, _OUT, types.int64, types.int64
)
SUB = 8
LEAST = 1 << 16  # weights for which a further thread pays


@inner
def _round(x, step, inverse, zero, offset, table, edges, top):
    """Nearest codes to weights, and the weights they stand for."""
    v = (x - offset) * inverse
    if table.size:
        v = v + zero
        code = spread(np.float32(0.0))
        value = spread(table[0])
        for e in range(edges.size):
            above = v >= edges[e]
            code = where(above, np.float32(e + 1), code)
            value = where(above, table[e + 1], value)
    else:
        code = clip(nearest(v) + zero, np.float32(0.0), top)
        value = code
    return code, (value - zero) * step + offset


@inner
def fetch(values, at, tile):
    """Sixteen rows from `at` on of columns values [n, rows] into a tile [n, 16]."""
    for i in range(tile.shape[0]):
        store(tile, i, load_at(values, i, at))


@inner
def _answer_near(tile, moves, square, i, stop):
    """Take what column i moved off the columns behind it, before `stop`."""
    by = load(moves, i % SUB)
    for j in range(i + 1, stop):
        store(tile, j, load(tile, j) - by * square[i, j])


@inner
def _answer_far(tile, moves, square, start):
    """Take what SUB columns from `start` on moved off all columns behind them, four of which are at work at once."""
    stop = tile.shape[0]
    fours = stop - (stop - start - SUB) % 4
    for j in range(start + SUB, fours, 4):
        v0, v1, v2, v3 = load(tile, j), load(tile, j + 1), load(tile, j + 2), load(tile, j + 3)
        for k in range(SUB):
            by = load(moves, k)
            v0 = v0 - by * square[start + k, j]
            v1 = v1 - by * square[start + k, j + 1]
            v2 = v2 - by * square[start + k, j + 2]
            v3 = v3 - by * square[start + k, j + 3]
        store(tile, j, v0)
        store(tile, j + 1, v1)
        store(tile, j + 2, v2)
        store(tile, j + 3, v3)
    for j in range(fours, stop):
        v = load(tile, j)
        for k in range(SUB):
            v = v - load(moves, k) * square[start + k, j]
        store(tile, j, v)


@kernel(FEED)
def _feed(w, own, square, steps, inverse, zeros, offsets, labels, table, edges, top, codes, off, first, last):  # noqa: PLR0913, PLR0917  (a kernel)
    n = w.shape[0]
    tile = np.empty((n, LANES), np.float32)
    moves = np.empty((SUB, LANES), np.float32)
    for lanes in range(first, last):
        at = min(lanes * LANES, w.shape[1] - LANES)
        fetch(w, at, tile)
        for start in range(0, n, SUB):
            stop = min(start + SUB, n)
            for i in range(start, stop):
                group = labels[i]
                step, inv = load_at(steps, group, at), load_at(inverse, group, at)
                zero, offset = load_at(zeros, group, at), load_at(offsets, group, at)
                code, q = _round(load(tile, i), step, inv, zero, offset, table, edges, top)
                before = load_at(own, i, at)
                store_at(codes, i, at, code)
                store_at(off, i, at, before - q)
                store(moves, i - start, q - before)
                _answer_near(tile, moves, square, i, stop)
            if stop < n:
                _answer_far(tile, moves, square, start)


@kernel(DESCEND)
def _descend(slope, old, square, steps, inverse, zeros, offsets, labels, table, edges, top, codes, new, first, last):  # noqa: PLR0913, PLR0917  (a kernel)
    n = slope.shape[0]
    tile = np.empty((n, LANES), np.float32)
    moves = np.empty((SUB, LANES), np.float32)
    for lanes in range(first, last):
        at = min(lanes * LANES, slope.shape[1] - LANES)
        fetch(slope, at, tile)
        for start in range(0, n, SUB):
            stop = min(start + SUB, n)
            stirred = False
            for i in range(start, stop):
                group = labels[i]
                step, inv = load_at(steps, group, at), load_at(inverse, group, at)
                zero, offset = load_at(zeros, group, at), load_at(offsets, group, at)
                before = load_at(old, i, at)
                wanted = before + load(tile, i) / square[i, i]
                code, q = _round(wanted, step, inv, zero, offset, table, edges, top)
                moved = q - before
                apart = where(moved == np.float32(0.0), np.float32(0.0), np.float32(1.0)) > np.float32(0.0)
                store_at(new, i, at, q)
                store(moves, i - start, moved)
                if any_lane(apart):
                    stirred = True
                    store_at(codes, i, at, where(apart, code, load_at(codes, i, at)))
                    _answer_near(tile, moves, square, i, stop)
            if stirred and stop < n:
                _answer_far(tile, moves, square, start)


def share_out(loop: Callable[..., Any], told: tuple[Any, ...], rows: int, weights: int) -> None:
    """Run a loop for all sixteens of `rows`, on as many threads as torch has where that pays for so many weights."""
    count = -(-rows // LANES)
    threads = max(1, min(torch.get_num_threads(), weights // LEAST))
    if threads == 1:
        loop(*told, 0, count)
        return
    spans = list(itertools.pairwise(count * part // threads for part in range(threads + 1)))
    with ThreadPoolExecutor(threads - 1) as pool:
        jobs = [pool.submit(loop, *told, *span) for span in spans[1:]]
        loop(*told, *spans[0])
        for job in jobs:
            job.result()


def _run(
    loop: Callable[..., Any], values: list[Tensor], square: Tensor, grid: Columns, labels: Tensor, out: Any
) -> Any:
    """Run a loop over `values` [n, rows] into `out`, codes uint8 (used as they are) and floats of the same shape."""
    rows = values[0].shape[1]
    offsets = torch.zeros_like(grid.steps) if grid.offsets is None else grid.offsets
    arrays = [[*values], [square], [grid.steps, grid.inverse, grid.zeros, offsets], [*out]]
    if rows < LANES:
        arrays = [
            [functional.pad(one, (0, LANES - rows)) if one is not square else one for one in part] for part in arrays
        ]
    given, (corner,), fields, (codes, made) = ([one.contiguous() for one in part] for part in arrays)
    empty = torch.zeros(0)
    levels = grid.levels
    tables = [(empty if one is None else one).numpy() for one in (levels.table, levels.edges)]
    told = (
        *(one.numpy() for one in given),
        corner.numpy(),
        *(one.numpy() for one in fields),
        labels.numpy(),
        *tables,
        np.float32(levels.top),
        codes.numpy(),
        made.numpy(),
    )
    share_out(loop, told, rows, values[0].numel())
    return codes[:, :rows], made[:, :rows]


def feed(wt: Tensor, own: Tensor, square: Tensor, grid: Columns, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, out] of columns wt [n, out] with feedback among them, and W - Q [n, out]. See `descent`.

    own: the weights before any feedback. square: of the answers. labels: the group of every column, int64 [n].
    """
    found: tuple[Tensor, Tensor] = _run(
        _feed, [wt, own], square, grid, labels, (torch.empty_like(wt, dtype=torch.uint8), torch.empty_like(wt))
    )
    return found


def descend(
    slope: Tensor, square: Tensor, grid: Columns, labels: Tensor, *, codes: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """New codes and weights [n, out] of columns: each the best while all others stand; square: of H."""
    found: tuple[Tensor, Tensor] = _run(
        _descend, [slope, q], square, grid, labels, (codes.clone(), torch.empty_like(q))
    )
    return found

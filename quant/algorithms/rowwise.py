# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The loops of `descent` for float32 on a CPU: a chunk of columns, one row of the matrix after the other.

Rows do not depend on each other, so they are shared out to threads and the result does not depend on their number. A
chunk's rows and its square of H or U stay in the cache, where column by column over all rows would read memory anew
for every column. Products and differences are rounded one by one, as a decoder will.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from weightsmith.quant.kernels import inner, kernel

_F2 = types.Array(types.float32, 2, "C")
_F1 = types.Array(types.float32, 1, "C")
_U2 = types.Array(types.uint8, 2, "C")
# values [rows, n], square [n, n], grid [4, rows, n], table, edges, codes [rows, n], out [rows, n], top, first, last row
LOOP = types.void(
    _F2, _F2, types.Array(types.float32, 3, "C"), _F1, _F1, _U2, _F2, types.float32, types.int64, types.int64
)
STEP, INVERSE, ZERO, OFFSET = range(4)
LEAST = 1 << 16  # weights for which a further thread pays


@inner
def _round(x, grid, r, i, table, edges, top):
    """Nearest code to a weight, and the weight it stands for."""
    zero = grid[ZERO, r, i]
    v = np.float32(np.float32(x - grid[OFFSET, r, i]) * grid[INVERSE, r, i])
    if table.size:
        v = np.float32(v + zero)
        code = np.float32(0.0)
        for e in range(edges.size):
            code += np.float32(1.0) if v >= edges[e] else np.float32(0.0)
        value = table[np.int64(code)]
    else:
        code = np.float32(min(max(np.float32(np.rint(v) + zero), np.float32(0.0)), top))
        value = code
    q = np.float32(np.float32(np.float32(value - zero) * grid[STEP, r, i]) + grid[OFFSET, r, i])
    return code, q


@inner
def _answer(row, square, i, by):
    """Take by * square[i] off what follows place i."""
    for j in range(i + 1, row.size):
        row[j] = np.float32(row[j] - np.float32(square[i, j] * by))


@kernel(LOOP)
def _feed(w, square, grid, table, edges, codes, errors, top, first, last):  # noqa: PLR0913, PLR0917  (a kernel)
    for r in range(first, last):
        row = w[r]
        for i in range(row.size):
            code, q = _round(row[i], grid, r, i, table, edges, top)
            codes[r, i] = np.uint8(code)
            errors[r, i] = np.float32(np.float32(row[i] - q) / square[i, i])
            _answer(row, square, i, errors[r, i])


@kernel(LOOP)
def _descend(slope, square, grid, table, edges, codes, q, top, first, last):  # noqa: PLR0913, PLR0917  (a kernel)
    """q comes in as the weights and goes out as the new ones."""
    for r in range(first, last):
        row = slope[r]
        for i in range(row.size):
            old = q[r, i]
            code, new = _round(np.float32(old + np.float32(row[i] / square[i, i])), grid, r, i, table, edges, top)
            if new != old:
                codes[r, i] = np.uint8(code)
                q[r, i] = new
                _answer(row, square, i, np.float32(new - old))


def _run(
    loop: Callable[..., Any], values: Tensor, square: Tensor, grid: Tensor, levels: Any, codes: Tensor, out: Tensor
) -> None:
    rows, n = values.shape
    empty = np.zeros(0, np.float32)
    table = empty if levels.table is None else levels.table.numpy()
    edges = empty if levels.edges is None else levels.edges.numpy()
    arrays = (values.numpy(), square.contiguous().numpy(), grid.numpy(), table, edges, codes.numpy(), out.numpy())
    threads = max(1, min(torch.get_num_threads(), rows * n // LEAST))
    bounds = [rows * part // threads for part in range(threads + 1)]
    if threads == 1:
        loop(*arrays, np.float32(levels.top), 0, rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(loop, *arrays, np.float32(levels.top), first, last)
            for first, last in itertools.pairwise(bounds)
        ]
        for job in jobs:
            job.result()


def feed(wt: Tensor, square: Tensor, grid: Tensor, levels: Any) -> tuple[Tensor, Tensor]:
    """Codes and errors [n, out] of columns wt [n, out] with feedback among them; square: of U. See `descent`.

    grid: float32 [4, out, n] of steps, their inverses, zeros and offsets. levels: of a `Columns`.
    """
    w = wt.T.contiguous()
    codes, errors = torch.empty_like(w, dtype=torch.uint8), torch.empty_like(w)
    _run(_feed, w, square, grid, levels, codes, errors)
    return codes.T, errors.T


def descend(
    slope: Tensor, square: Tensor, grid: Tensor, levels: Any, *, codes: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """New codes and weights [n, out] of columns: each the best while all others stand; square: of H."""
    rows, new = codes.T.contiguous(), q.T.contiguous()
    _run(_descend, slope.T.contiguous(), square, grid, levels, rows, new)
    return rows.T, new.T

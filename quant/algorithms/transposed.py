# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Sixteen rows to sixteen lanes and back: transposing 16 x 16 elements in registers.

Blocks lie one after another in memory, a search works on [element, lane] (see `lanes`). Element by element that turning
takes as long as several steps of a search; sixteen vectors that are interleaved with each other four times over, i with
i + 8, are transposed after 64 shuffles. Only data moves, so it is exact, NaN included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from weightsmith.quant.algorithms.lanes import LANES
from weightsmith.quant.kernels import inner

_WORD = ir.IntType(32)


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of sixteen vectors of sixteen."""
    half = LANES // 2
    kind = ir.VectorType(_WORD, LANES)
    low = ir.Constant(kind, [i // 2 + LANES * (i % 2) for i in range(LANES)])
    high = ir.Constant(kind, [i // 2 + half + LANES * (i % 2) for i in range(LANES)])
    for _ in range(4):
        pairs = [(rows[i], rows[i + half]) for i in range(half)]
        rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in (low, high)]
    return rows


def _element(context: Any, builder: Any, array_type: Any, array: Any, row: Any, column: Any) -> tuple[Any, Any]:
    """Where [row, column] of a C-contiguous array is, as a pointer to sixteen neighbours, and what an element takes."""
    found = context.make_array(array_type)(context, builder, array)
    width = cgutils.unpack_tuple(builder, found.shape)[1]
    pointer = builder.gep(found.data, [builder.add(builder.mul(row, width), column)])
    vector = ir.VectorType(found.data.type.pointee, LANES)
    return builder.bitcast(pointer, vector.as_pointer()), array_type.dtype.bitwidth // 8


@intrinsic
def to_lanes(_typing: Any, rows: Any, at: Any, column: Any, tile: Any) -> Any:
    """Elements column to column + 15 of the rows that `at` (int64 [16]) names, into the same rows of a tile [n, 16].

    Both are C-contiguous and of one type; no bounds check.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start = context.cast(builder, args[2], sig.args[2], types.int64)
        named = context.make_array(sig.args[1])(context, builder, args[1]).data
        found = []
        for lane in range(LANES):
            row = builder.load(builder.gep(named, [ir.Constant(ir.IntType(64), lane)]))
            address, size = _element(context, builder, sig.args[0], args[0], row, start)
            found.append(builder.load(address))
            found[-1].align = size
        for i, turned in enumerate(_transpose(builder, found)):
            row, zero = (ir.Constant(ir.IntType(64), number) for number in (i, 0))
            address, size = _element(context, builder, sig.args[3], args[3], builder.add(start, row), zero)
            builder.store(turned, address).align = size
        return context.get_dummy_value()

    return types.void(rows, at, column, tile), generate


@intrinsic
def _from_lanes(_typing: Any, tile: Any, first: Any, rows: Any) -> Any:
    """Rows first to first + 15 of a tile [n, 16] as columns first to first + 15 of rows [16, n]; no bounds check."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start = context.cast(builder, args[1], sig.args[1], types.int64)
        numbers = [ir.Constant(ir.IntType(64), i) for i in range(LANES)]
        found = []
        for i in numbers:
            address, size = _element(context, builder, sig.args[0], args[0], builder.add(start, i), numbers[0])
            found.append(builder.load(address))
            found[-1].align = size
        for i, turned in zip(numbers, _transpose(builder, found), strict=True):
            address, size = _element(context, builder, sig.args[2], args[2], i, start)
            builder.store(turned, address).align = size
        return context.get_dummy_value()

    return types.void(tile, first, rows), generate


@inner
def lay(packed, turned, out, first):
    """Write blocks first to first + 15 of out (uint8 [n_blocks, nbytes]), less those past its end.

    packed: uint8 [n, 16], byte j of every lane's block, n = nbytes rounded up to whole sixteens; turned: room, [16, n].
    """
    for j in range(0, packed.shape[0], LANES):
        _from_lanes(packed, j, turned)
    for lane in range(min(LANES, out.shape[0] - first)):
        row, block = out[first + lane], turned[lane]
        for j in range(row.shape[0]):
            row[j] = block[j]


@inner
def room(nbytes):
    """For `lay`: bytes of a tile of blocks, uint8 [n, 16] and [16, n]."""
    n = (nbytes + LANES - 1) // LANES * LANES
    return np.zeros((n, LANES), np.uint8), np.empty((LANES, n), np.uint8)

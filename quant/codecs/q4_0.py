# mypy: allow-untyped-defs, allow-untyped-calls
"""Q4_0: 32 weights share a half-precision scale d; each is a code q of 0..15 around 8.

    18 bytes: d (f16) | 16 bytes of nibbles (low: weight j, high: weight j + 16)         w = d * (q - 8)

The weight of largest magnitude, the first of several, sits on code 0: d = w / -8, so d's sign is opposite to its.
q = min(15, trunc(w * (1 / d) + 8.5)) in float32. d is rounded to half only when stored. In an all-zero block the first
weight is the largest: +0 gives d = -0, and -0 gives d = +0 (as the gguf package does; ggml's C code takes +0 as the
largest there, so its d is always -0; both decode to zeros).

Ref: ggml-quants.c, quantize_row_q4_0_ref and dequantize_row_q4_0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant.algorithms import lone, weighted
from weightsmith.quant.algorithms.lanes import LANES
from weightsmith.quant.algorithms.tiles import TOO_LARGE, fill, halves, reach_bits
from weightsmith.quant.extremes import first_largest
from weightsmith.quant.kernels import (
    DECODE,
    ENCODE,
    decode_blocks,
    encode_blocks,
    half_bits,
    half_value,
    inverse,
    kernel,
)
from weightsmith.quant.lattice import Lattice, Shape, blocks_of, empty, fields, half_at, join, opened, put_half
from weightsmith.types import Packed, Rows

LATTICE = Shape(32, 32, 15, 8)
ARITHMETIC_VERSION = lone.ARITHMETIC_VERSION
_SHAPE = (1, 32, np.float32(8.0), np.float32(7.0), np.float32(1.0), np.float32(1.0), np.float32(2.0))
_REACH = reach_bits(8.0)


@kernel(ENCODE)
def _encode(x, out):
    side = x.shape[1] // 2
    worst = np.int32(0)
    for b in range(x.shape[0]):
        d = np.float32(first_largest(x, b) / np.float32(-8.0))
        scale = inverse(d)
        half = half_bits(d)
        worst = max(worst, np.int32(half & np.int32(0x7FFF)))
        out[b, 0] = half & 0xFF
        out[b, 1] = half >> 8
        for j in range(side):
            low = min(np.int32(np.float32(np.float32(x[b, j] * scale) + np.float32(8.5))), np.int32(15))
            high = min(np.int32(np.float32(np.float32(x[b, j + side] * scale) + np.float32(8.5))), np.int32(15))
            out[b, 2 + j] = np.uint8(low | np.int32(high << np.int32(4)))
    return worst


@kernel(weighted.SEARCH)
def _search(x, importance, out, effort, guided):
    tile, weights = np.empty((2, 32, LANES), np.float32), np.empty((32, LANES), np.float32)
    units, state = np.empty((2, LANES), np.float32), np.empty((lone.N_STATE, 1, LANES), np.float32)
    codes, half = np.empty((32, LANES), np.uint8), np.empty(LANES, np.int32)
    means, cache = np.empty((1, LANES), np.float32), np.empty(1, np.float32)
    chosen = lone.PLANS[lone.plan(effort, guided)]
    worst = np.int32(0)
    for first in range(0, x.shape[0], LANES):
        if fill(x, first, importance, tile, units) > _REACH:
            return TOO_LARGE
        if guided:
            lone.row_means(x, first, importance.shape[0], units, cache, means)
        ref = lone.reference_scale(tile, means, weights, _SHAPE, guided)
        d = lone.search_scale(tile, units, state, _SHAPE, chosen, ref)
        lone.scale_codes(tile, d, _SHAPE[2], codes)
        worst = max(worst, halves(d, units, half))
        for lane in range(min(LANES, x.shape[0] - first)):
            row = out[first + lane]
            row[0] = half[lane] & 0xFF
            row[1] = half[lane] >> 8
            for j in range(16):
                row[2 + j] = codes[j, lane] | codes[16 + j, lane] << 4
    return worst


@kernel(DECODE)
def _decode(packed, out):
    side = out.shape[1] // 2
    for b in range(packed.shape[0]):
        d = half_value(np.int32(packed[b, 0] | np.int32(packed[b, 1]) << 8))
        for j in range(side):
            pair = np.int32(packed[b, 2 + j])
            out[b, j] = np.float32(d * np.float32(np.int32((pair & np.int32(15)) - np.int32(8))))
            out[b, j + side] = np.float32(d * np.float32(np.int32((pair >> np.int32(4)) - np.int32(8))))


def encode(
    rows: Rows, *, importance: NDArray[np.float32] | None = None, effort: str = "normal", measured: bool = True
) -> Packed:
    """Pack float32 [rows, row_len]; importance: float32 [row_len], measured or not.

    effort: fast (plain rounding), normal or best.

    Raises IntegrityError for NaN or Inf, UnsupportedError if d leaves F16's range.
    """
    if effort == "fast":
        return encode_blocks("Q4_0", _encode, rows)
    return weighted.encode("Q4_0", _search, rows, importance=importance, effort=effort, measured=measured)


def decode(packed: Packed, row_len: int) -> Rows:
    """Unpack to float32 [rows, row_len]."""
    return decode_blocks("Q4_0", _decode, packed, row_len)


def unpack(packed: Packed) -> Lattice:
    """The codes and halfs of packed rows."""
    blocks = blocks_of("Q4_0", packed)
    codes = fields(blocks[:, 2:], 4).reshape(-1, 32)
    return opened(LATTICE, len(packed), codes, half_at(blocks, 0))


def pack(lattice: Lattice) -> Packed:
    """The inverse of `unpack`."""
    blocks = empty("Q4_0", lattice)
    put_half(blocks, 0, lattice.d)
    codes = lattice.codes.reshape(-1, 2, 16)
    blocks[:, 2:] = join(codes, 4)
    return blocks.reshape(len(lattice.codes), -1)

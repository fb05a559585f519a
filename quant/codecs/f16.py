"""F16: IEEE half precision, 2 bytes a weight, little endian: 11 significant bits, up to 65504, steps of 6e-8 near zero.

Rounded to nearest, ties to even. A weight that would round to infinity (65520 and beyond) is refused.
"""

from __future__ import annotations

import numpy as np

from weightsmith.quant.kernels import (
    DECODE_16,
    ENCODE_16,
    bits_of,
    half_bits,
    half_value,
    kernel,
    raise_unfit,
)
from weightsmith.types import Packed, Rows

OVERFLOW = 0x477FF000  # bits of 65520, halfway between the largest half and the next power of two


@kernel(ENCODE_16)
def _encode(x, out):  # type: ignore[no-untyped-def]
    worst = np.int32(0)
    for i in range(x.size):
        worst = max(worst, np.int32(bits_of(x[i]) & np.int32(0x7FFFFFFF)))
        out[i] = np.uint16(half_bits(x[i]))
    return worst


@kernel(DECODE_16)
def _decode(packed, out):  # type: ignore[no-untyped-def]
    for i in range(packed.size):
        out[i] = half_value(np.int32(packed[i]))


def encode(rows: Rows) -> Packed:
    """Round float32 [rows, row_len] to halves; IntegrityError for NaN or Inf, UnsupportedError from 65520 on."""
    halves = np.empty(rows.shape, np.uint16)
    if _encode(rows.reshape(-1), halves.reshape(-1)) >= OVERFLOW:
        raise_unfit("F16", rows)
    return halves.view(np.uint8)


def decode(packed: Packed, row_len: int) -> Rows:
    """Widen halves to float32 [rows, row_len]; exact. NaN and Inf pass through (see `check_finite`)."""
    halves = np.require(packed.view(np.uint16), requirements="A")
    rows = np.empty((packed.shape[0], row_len), np.float32)
    _decode(halves.reshape(-1), rows.reshape(-1))
    return rows

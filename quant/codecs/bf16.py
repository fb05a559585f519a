"""BF16: the upper half of a float32, 2 bytes a weight, little endian. 8 significant bits over float32's whole range.

Rounded to nearest, ties to even, by adding 0x7fff plus the lowest kept bit. NaN is refused, so no case of the addition
can turn one into another value; a weight that would round to infinity (from 3.3961775e38 on) is refused as well.
"""

from __future__ import annotations

import numpy as np

from weightsmith.quant.kernels import ENCODE_16, bits_of, kernel, raise_unfit
from weightsmith.types import Packed, Rows

OVERFLOW = 0x7F7F8000  # bits of the first float32 that rounds to infinity


@kernel(ENCODE_16)
def _encode(x, out):  # type: ignore[no-untyped-def]
    worst = np.int32(0)
    for i in range(x.size):
        bits = np.uint32(bits_of(x[i]))
        worst = max(worst, np.int32(bits & np.uint32(0x7FFFFFFF)))
        even = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        out[i] = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
    return worst


def encode(rows: Rows) -> Packed:
    """Round float32 [rows, row_len] to BF16; IntegrityError for NaN or Inf, UnsupportedError beyond 3.39e38."""
    halves = np.empty(rows.shape, np.uint16)
    if _encode(rows.reshape(-1), halves.reshape(-1)) >= OVERFLOW:
        raise_unfit("BF16", rows)
    return halves.view(np.uint8)


def decode(packed: Packed, row_len: int) -> Rows:
    """Widen BF16 to float32 [rows, row_len]; exact. NaN and Inf pass through (see `check_finite`)."""
    bits = np.empty((packed.shape[0], row_len), np.uint32)
    np.left_shift(packed.view(np.uint16), 16, out=bits, dtype=np.uint32)
    return bits.view(np.float32)

"""F32: IEEE single precision, 4 bytes a weight, little endian. Encoding and decoding only look at the same bytes."""

from __future__ import annotations

import numpy as np

from weightsmith.quant.finite import check_finite
from weightsmith.types import Packed, Rows


def encode(rows: Rows) -> Packed:
    """The bytes of float32 [rows, row_len], sharing its memory; IntegrityError for NaN or Inf."""
    packed = rows.view(np.uint8)
    check_finite("F32", packed)
    return packed


def decode(packed: Packed, row_len: int) -> Rows:
    """The bytes as float32 [rows, row_len], sharing memory where alignment allows."""
    return np.require(packed.view(np.float32), requirements="A")

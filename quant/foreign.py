"""Decoding what has no codec file here: ggml's other block layouts through the gguf package, and plain numbers.

Integers are weights only as far as float32 holds them exactly; a matrix of packed codes in I32, say, is none. F8_E5M2
is the upper byte of a half. F8_E4M3 is the "fn" kind of ML frameworks: bias 7, no infinity, S.1111.111 is NaN.
Ref: Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv:2209.05433.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import UnsupportedError
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import Packed, Rows

_INTEGERS = {"I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8"}


def decode(codec: str, packed: Packed) -> Rows:
    """Unpack uint8 [rows, row_bytes] to float32 [rows, row_len].

    Raises UnsupportedError if nobody here knows the layout or float32 cannot hold the values.
    """
    if codec in _INTEGERS:
        return _integers(codec, packed.view(_INTEGERS[codec]))
    if codec == "F64":
        return _double(packed.view(np.float64))
    if codec in ("F8_E4M3", "F8_E5M2"):
        return _float8(codec)[packed]
    return _ggml(codec, packed)


def _integers(codec: str, values: NDArray[np.integer]) -> Rows:
    rows = values.astype(np.float32)
    if values.itemsize > 2 and values.size and max(int(values.max()), -int(values.min())) > 1 << 24:
        raise UnsupportedError(f"{codec} values beyond 2**24 are no weights that float32 can hold exactly")
    return rows


def _double(values: NDArray[np.float64]) -> Rows:
    with np.errstate(over="ignore"):
        rows = values.astype(np.float32)
    lost = np.isinf(rows) & np.isfinite(values)
    if lost.any():
        raise UnsupportedError(f"F64 value outside F32's range (found {values[lost][0]:g})")
    return rows


@cache
def _float8(codec: str) -> Rows:
    """The float32 value of each of the 256 bytes."""
    bytes_ = np.arange(256, dtype=np.uint16)
    if codec == "F8_E5M2":
        return (bytes_ << 8).view(np.float16).astype(np.float32)
    exponent, fraction = (bytes_ >> 3) & 15, (bytes_ & 7).astype(np.float32)
    size = np.where(
        exponent > 0,
        np.ldexp(1 + fraction / 8, exponent.astype(np.int32) - 7),
        np.ldexp(fraction / 8, -6),
    ).astype(np.float32)
    size[(bytes_ & 127) == 127] = np.nan
    return np.where(bytes_ >> 7, -size, size)


def _ggml(codec: str, packed: Packed) -> Rows:
    from gguf import GGMLQuantizationType  # noqa: PLC0415  (a heavy import that few files need)
    from gguf.quants import dequantize  # noqa: PLC0415

    unknown = UnsupportedError(
        f"tensors stored as {codec} cannot be decoded", hint="Start from an F16, BF16 or F32 checkpoint."
    )
    if BLOCKS[codec].id < 0 or codec not in GGMLQuantizationType.__members__:
        raise unknown
    if not len(packed):
        return np.empty((0, packed.shape[1] // BLOCKS[codec].nbytes * BLOCKS[codec].weights), np.float32)
    try:
        # Damaged scales (NaN, Inf) are check_finite's business and should not also print numpy's warnings.
        with np.errstate(all="ignore"):
            rows: Rows = dequantize(packed, GGMLQuantizationType[codec])
    except NotImplementedError as error:
        raise unknown from error
    return rows

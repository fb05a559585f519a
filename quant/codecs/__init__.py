"""Codecs: float32 rows to packed blocks and back, one file per block layout.

A codec is found by its file's name: `q4_0.py` is Q4_0. Each offers `encode(rows) -> Packed` and `decode(packed,
row_len) -> Rows` and is imported when it is first used, because most need numba. Layouts without a file can only be
decoded (`quant.foreign`). Both directions work on whole rows, so any slab of rows can be handed to any thread, and the
bytes do not depend on how rows were grouped. The kernels run without the GIL: threads over slabs use all cores.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.quant import finite, foreign
from weightsmith.quant.blocks import BLOCKS, row_nbytes
from weightsmith.quant.lattice import Lattice
from weightsmith.quant.uncollected import uncollected
from weightsmith.types import Packed, Rows

_LONE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
SEARCHED = frozenset({*_LONE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"})
OPEN = SEARCHED  # what `unpack` opens, so that error feedback can choose its codes


@cache
def writable() -> tuple[str, ...]:
    """Names of the codecs that can be written, in the order of `quant.blocks`; imports none of them."""
    files = {module.name.upper() for module in pkgutil.iter_modules(__path__)}
    return tuple(name for name in BLOCKS if name in files)


@cache
def _module(codec: str) -> ModuleType:
    with uncollected():
        return importlib.import_module(f"{__name__}.{codec.lower()}")


def heeds_importance(codec: str, effort: str) -> bool:
    """Whether encoding looks at importances: `fast` is plain rounding for blocks that share nothing."""
    return codec in SEARCHED and not (effort == "fast" and codec in _LONE)


def encode(
    codec: str,
    rows: Rows,
    *,
    importance: NDArray[np.float32] | None = None,
    effort: str = "normal",
    measured: bool = True,
) -> Packed:
    """Pack float32 [rows, row_len] into uint8 [rows, row_bytes]; F32 shares memory with `rows`.

    importance (float32 [row_len]; measured: an imatrix row, else an estimate, see `quant.tails`) and effort ("fast",
    "normal", "best") guide the layouts in SEARCHED; the others know one way only. Raises UsageError (no such effort),
    UnsupportedError (a layout that cannot be written or does not divide the row, or a weight outside its range) and
    IntegrityError (NaN or Inf, importances that do not fit). The caller knows the tensor and adds it to the error.
    """
    if codec not in writable():
        raise UnsupportedError(f"{codec} cannot be written", hint=f"Writable: {', '.join(writable())}.")
    row_nbytes(codec, rows.shape[1])
    guide = {"importance": importance, "effort": effort, "measured": measured} if codec in SEARCHED else {}
    packed: Packed = _module(codec).encode(np.require(rows, np.float32, ["C", "A"]), **guide)
    return packed


def decode(codec: str, packed: Packed, row_len: int) -> Rows:
    """Unpack uint8 [rows, row_bytes] into float32 [rows, row_len]; F32 may share memory with `packed`.

    Raises UnsupportedError (unknown layout) and IntegrityError (row_bytes does not fit row_len). NaN and Inf in the
    bytes come out as such; `check_finite` looks for them.
    """
    expected = row_nbytes(codec, row_len)
    if packed.shape[1] != expected:
        raise IntegrityError(f"{packed.shape[1]} bytes in a row of {row_len} {codec} weights, expected {expected}")
    packed = np.ascontiguousarray(packed)
    rows: Rows = _module(codec).decode(packed, row_len) if codec in writable() else foreign.decode(codec, packed)
    return rows


def check_finite(codec: str, packed: Packed) -> None:
    """Raise IntegrityError if the bytes of a float layout, or a block layout's scales, hold NaN or Inf."""
    finite.check_finite(codec, packed)


def unpack(codec: str, packed: Packed) -> Lattice:
    """Packed rows (uint8 [rows, row_bytes]) of a layout in OPEN as codes, integers and halfs."""
    found: Lattice = _module(codec).unpack(packed)
    return found


def pack(codec: str, lattice: Lattice) -> Packed:
    """The inverse of `unpack`."""
    packed: Packed = _module(codec).pack(lattice)
    return packed

"""How a codec's loops become machine code, and the bit tricks they share.

`kernel` is numba's `njit` with the settings that the promise "same bytes on every machine and thread count" rests on:
no fastmath, no parallel loops, and LLVM as numba drives it never contracts a*b + c into a fused multiply-add.
Reductions are therefore taken over integers (maxima of float bit patterns), which may be reordered freely, so the loops
still become SIMD code. Two habits make LLVM do that:

- the width of a block is read from the array (`x.shape[1]`), not written as a constant: a loop of constant length is
  unrolled into scalar code before the vectoriser sees it (measured: 3.6 against 14 GB/s for Q8_0);
- every intermediate is cast (`np.int32(...)`), because numba widens int32 + int32 to int64.

numba has no float16 on the CPU, so half precision is done on the bits. `half_bits` rounds to nearest, ties to even, as
IEEE 754 conversion does: for normal results by integer addition of 0xfff + (bit 13), for subnormal ones by adding 0.5
in float32, whose last place is exactly 2**-24, the smallest half. Both directions are tested on every half and on the
float neighbours of every rounding boundary.

Compiled code is cached on disk, beside the source or in the user's cache folder where that is read-only. numba compares
it with the kernel's own file only, so code that is older than any file of `quant` outside `codecs`, from which
functions are inlined, is dropped here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.quant.blocks import BLOCKS, row_nbytes
from weightsmith.quant.uncollected import uncollected
from weightsmith.types import Packed, Rows

F = TypeVar("F", bound=Callable[..., Any])

INF_HALF = 0x7C00
MAX_FLOAT = np.float32(np.finfo(np.float32).max)


def _array(dtype: Any, ndim: int, *, readonly: bool = False) -> Any:
    return types.Array(dtype, ndim, "C", readonly=readonly)


# A parameter declared read-only takes writable arrays too, so one compiled version serves both.
ENCODE = types.int32(_array(types.float32, 2, readonly=True), _array(types.uint8, 2))
DECODE = types.void(_array(types.uint8, 2, readonly=True), _array(types.float32, 2))
ENCODE_16 = types.int32(_array(types.float32, 1, readonly=True), _array(types.uint16, 1))
DECODE_16 = types.void(_array(types.uint16, 1, readonly=True), _array(types.float32, 1))

_OPTIONS = {"nogil": True, "error_model": "numpy"}  # numpy's model: x / 0 is Inf, with no branch that raises


class Lazy:
    """A kernel that is compiled, or loaded from the cache, at its first call; safe from several threads."""

    __slots__ = ("_compiled", "_function", "_lock", "_signature")

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self._function, self._signature = function, signature
        self._compiled: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """Run the kernel; TypeError if an array is of another dtype, rank or layout than it is compiled for."""
        if self._compiled is None:
            with self._lock:
                if self._compiled is None:
                    with uncollected():
                        self._compiled = _compile(self._function, self._signature)
        return self._compiled(*args)


def _compile(function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    try:
        dispatcher = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no writable cache folder anywhere: compile for this process alone
        dispatcher = njit(**_OPTIONS)(function)
    else:
        _drop_stale(Path(dispatcher.stats.cache_path), function)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return cast(Callable[..., Any], dispatcher)


def _drop_stale(cache: Path, function: Callable[..., Any]) -> None:
    shared = [source for source in Path(__file__).parent.rglob("*.py") if source.parent.name != "codecs"]
    newest = max((source.stat().st_mtime for source in shared), default=0.0)
    stem = Path(function.__code__.co_filename).stem
    for index in cache.glob(f"{stem}.{function.__qualname__}-*.nbi"):
        with contextlib.suppress(OSError):  # another process dropped it, or the folder cannot be written
            if index.stat().st_mtime <= newest:
                index.unlink()


def kernel(signature: Any) -> Callable[[Callable[..., Any]], Lazy]:
    """Decorate a loop over blocks: compiled once, without the GIL, for exactly `signature` (see ENCODE, DECODE)."""
    return lambda function: Lazy(function, signature)


def inner(function: F) -> F:
    """Decorate a function that only kernels call, and that LLVM may inline: without the wrappers Python would need."""
    return cast(F, njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function))


def _bitcast(source: Any, target: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(target))

    return target(source), generate


def _bits_of(_typing: Any, value: Any) -> Any:
    return _bitcast(types.float32, types.int32)


def _float_of(_typing: Any, bits: Any) -> Any:
    return _bitcast(types.int32, types.float32)


bits_of = intrinsic(_bits_of)  # float32 -> int32 with the same bits
float_of = intrinsic(_float_of)  # int32 -> float32 with the same bits


@inner
def half_bits(value: np.float32) -> np.int32:
    """Round a float32 to half precision (nearest, ties to even; too large becomes Inf): its 16 bits as int32."""
    bits = bits_of(value)
    size = np.int32(bits & np.int32(0x7FFFFFFF))
    tie = np.int32((size >> np.int32(13)) & np.int32(1))
    normal = np.int32(np.int32(size + np.int32(0xFFF) + tie - np.int32(0x38000000)) >> np.int32(13))
    normal = min(normal, np.int32(0x7C00))
    if size > np.int32(0x7F800000):
        normal = np.int32(0x7E00)
    small = np.int32(bits_of(np.float32(float_of(size) + np.float32(0.5))) - np.int32(0x3F000000))
    half = small if size < np.int32(0x38800000) else normal
    return np.int32(half | np.int32((bits >> np.int32(16)) & np.int32(0x8000)))


@inner
def half_value(half: np.int32) -> np.float32:
    """The float32 that 16 half-precision bits (as int32) stand for; exact."""
    sign = np.int32((half & np.int32(0x8000)) << np.int32(16))
    size = np.int32((half & np.int32(0x7FFF)) << np.int32(13))
    exponent = np.int32(half & np.int32(0x7C00))
    normal = np.int32(size + np.int32(0x38000000))
    if exponent == np.int32(0x7C00):
        normal = np.int32(size + np.int32(0x70000000))
    small = bits_of(np.float32(float_of(np.int32(size + np.int32(0x38800000))) - np.float32(2.0**-14)))
    bits = small if exponent == np.int32(0) else normal
    return np.float32(float_of(np.int32(bits | sign)))


@inner
def inverse(scale: np.float32) -> np.float32:
    """1 / scale, or 0 where that is no finite number.

    Below 2**-128 the reciprocal overflows and the reference's codes are undefined; as half such a scale is zero.
    """
    value = np.float32(np.float32(1.0) / scale)
    return value if abs(value) <= MAX_FLOAT else np.float32(0.0)


def encode_blocks(codec: str, run: Lazy, rows: Rows) -> Packed:
    """Pack `rows` (float32 [rows, row_len], C order) with an ENCODE kernel; uint8 [rows, row_bytes].

    The kernel returns the largest half-precision magnitude among its scales, which is Inf or NaN if and only if a
    weight was, or the weights are too large. Raises IntegrityError (NaN, Inf) and UnsupportedError (too large).
    """
    block = BLOCKS[codec]
    packed = np.empty((rows.shape[0], row_nbytes(codec, rows.shape[1])), np.uint8)
    if run(rows.reshape(-1, block.weights), packed.reshape(-1, block.nbytes)) >= INF_HALF:
        raise_unfit(codec, rows)
    return packed


def decode_blocks(codec: str, run: Lazy, packed: Packed, row_len: int) -> Rows:
    """Unpack uint8 [rows, row_bytes] (C order) with a DECODE kernel; float32 [rows, row_len]."""
    block = BLOCKS[codec]
    rows = np.empty((packed.shape[0], row_len), np.float32)
    run(packed.reshape(-1, block.nbytes), rows.reshape(-1, block.weights))
    return rows


def raise_unfit(codec: str, rows: Rows) -> None:
    """Raise for rows that `codec` cannot hold: IntegrityError for NaN or Inf, else UnsupportedError with the worst."""
    finite = np.isfinite(rows)
    if not finite.all():
        raise IntegrityError(
            f"{rows.size - np.count_nonzero(finite)} weights are no finite numbers (found {rows[~finite][0]})",
            hint="The checkpoint is damaged; fetch it again.",
        )
    worst = rows.flat[np.abs(rows).argmax()]
    hint = "Use F32." if codec == "BF16" else "Use BF16 or F32."
    if codec not in ("F16", "BF16"):
        raise UnsupportedError(
            f"a {codec} block's scale is outside F16's range (found the weight {worst:g})", hint=hint
        )
    raise UnsupportedError(f"outside {codec}'s range (found {worst:g})", hint=hint)

"""One of Grok-1's files: a pickled numpy array, or a QuantizedWeight8bit of two, as positions in the file.

    __main__.QuantizedWeight8bit {weight: int8 [..., in, out], scales: bfloat16 [..., groups, out]}

An array is made in four steps: a call of numpy's _reconstruct gives an empty one, a call of numpy.dtype its type, and
two BUILDs set the type's byte order and the array's (version, shape, type, column order, bytes). The bytes lie in the
file as one BINBYTES, up to 3.2 GB, and are never read here: the machine steps over them and notes where they are. The
rest is some 320 bytes.

Ref: QuantizedWeight8bit in model.py and fast_unpickle in checkpoint.py of xai-org/grok-1; array_reduce and
arraydescr_reduce in numpy's _core/src/multiarray.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.pickles.machine import Dialect, Machine, Mark, are_counts, run
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import TensorInfo

QUANTIZED, ARRAY, DTYPE = "__main__.QuantizedWeight8bit", "numpy.ndarray", "numpy.dtype"
BFLOAT16 = "ml_dtypes.bfloat16"
RECONSTRUCT = frozenset(("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"))
TYPES = {"i1": "I8", "f4": "F32"}
MAX_FRAMING = 1 << 16  # bytes of a file that are no array; published files have 330

_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes [start, start + size) of the file."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Type:
    codec: str


@dataclass(slots=True)
class _Array:
    """An array whose BUILD is still to come, as long as it has no data. Mutable, because the memo holds it too."""

    codec: str = ""
    shape: tuple[int, ...] = ()
    data: Payload | None = None


@dataclass(slots=True)
class _Pair:
    weight: _Array | None = None
    scales: _Array | None = None


class _File:
    """An open file as bytes to slice, read page by page; what is longer than `MAX_FRAMING` in all is damaged."""

    def __init__(self, handle: int, size: int, path: Path) -> None:
        self.handle, self.size, self.path = handle, size, path
        self.left = MAX_FRAMING
        self.page, self.page_at = b"", 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: slice) -> bytes:
        start, stop = at.start, min(at.stop, self.size)
        self.left -= max(0, stop - start)
        if self.left < 0:
            raise IntegrityError(f"more than {MAX_FRAMING} bytes beside the arrays", path=self.path)
        if not self.page_at <= start <= stop <= self.page_at + len(self.page):
            self.page, self.page_at = os.pread(self.handle, max(_PAGE, stop - start), start), start
        return self.page[start - self.page_at : stop - self.page_at]


def read_arrays(handle: int, size: int, *, path: Path) -> dict[str, TensorInfo]:
    """The arrays of an open file of `size` bytes, by "" or by "weight" and "scales"; reads no values.

    Raises UnsafeInputError (anything but such arrays), IntegrityError (damaged), UnsupportedError (column order).
    """
    value = run(_File(handle, size, path), _DIALECT, path=path)
    found: dict[str, Any] = {"": value} if type(value) is _Array else {}
    if type(value) is _Pair:
        found = {"weight": value.weight, "scales": value.scales}
    if not found or any(type(array) is not _Array or array.data is None for array in found.values()):
        raise UnsupportedError(f"the pickle holds a {type(value).__name__.strip('_')}, expected an array", path=path)
    return {field: _placed(field, array, path) for field, array in found.items()}


def _placed(field: str, array: _Array, path: Path) -> TensorInfo:
    assert array.data is not None
    needed = math.prod(array.shape) * BLOCKS[array.codec].nbytes
    if needed != array.data.size:
        text = f"{array.codec} of shape {list(array.shape)} takes {needed} bytes, the array has {array.data.size}"
        raise IntegrityError(text, path=path, tensor=field or None)
    name = f"{path.name}.{field}" if field else path.name
    return TensorInfo(name, array.shape, array.codec, needed, path, array.data.start)


def _call(machine: Machine, called: Mark, given: tuple[Any, ...]) -> Any:
    if called.name in RECONSTRUCT and len(given) == 3:
        kind, shape, code = given
        if type(kind) is Mark and kind.name == ARRAY and shape == (0,) and type(code) is Payload and code.size == 1:
            return _Array()
    if called.name == DTYPE and len(given) == 3 and type(given[1]) is bool and type(given[2]) is bool:
        kind = given[0]
        if type(kind) is Mark and kind.name == BFLOAT16:
            return _Type("BF16")
        if type(kind) is str and kind in TYPES:
            return _Type(TYPES[kind])
        if type(kind) is str:
            raise UnsupportedError(f"an array of numpy type {kind[:20]!r}, expected i1 or f4", path=machine.path)
    raise machine.unsafe(f"a call of {called.name} with other arguments than numpy writes")


def _build(machine: Machine, target: Any, state: Any) -> None:
    if type(target) is _Type and _is_type_state(state):
        if state[1] == ">":
            raise UnsupportedError("an array in big endian, only little endian is read", path=machine.path)
    elif type(target) is _Array and target.data is None and _is_array_state(state):
        if state[3]:
            raise UnsupportedError("an array in column order, only row order is read", path=machine.path)
        target.shape, target.codec, target.data = state[1], state[2].codec, state[4]
    elif type(target) is _Pair and type(state) is dict and set(state) == {"weight", "scales"}:
        if target.weight is not None or any(type(value) is not _Array for value in state.values()):
            raise machine.unsafe("a QuantizedWeight8bit of anything but two arrays")
        target.weight, target.scales = state["weight"], state["scales"]
    else:
        raise machine.unsafe("an object that sets a state which arrays do not have (BUILD)")


def _is_type_state(state: Any) -> bool:
    """(version, byte order, subtype, names, fields, size, alignment, flags) of a type without parts."""
    if (
        type(state) is not tuple
        or len(state) not in (8, 9)
        or any(type(item) not in (int, str, type(None)) for item in state)
    ):
        return False
    return state[1] in ("|", "<", "=", ">") and state[2:5] == (None, None, None)


def _is_array_state(state: Any) -> bool:
    if type(state) is not tuple or len(state) != 5:
        return False
    version, shape, kind, columns, data = state
    fits = type(version) is int and version == 1 and are_counts(shape) and type(columns) is bool
    return fits and type(kind) is _Type and type(data) is Payload


def _new(machine: Machine) -> None:
    """NEWOBJ: an object of a class without having called its __init__."""
    given, class_ = machine.pop(), machine.pop()
    if type(class_) is not Mark or class_.name != QUANTIZED or given != ():
        raise machine.unsafe("an object of another class than QuantizedWeight8bit")
    machine.stack.append(_Pair())


def _skip(form: str) -> Any:
    """Step over bytes whose length is a number of `form`."""

    def step(machine: Machine) -> None:
        length = machine.number(form)
        if length > len(machine.data) - machine.at:
            raise machine.damaged(f"{length} bytes at {machine.at} are more than the file has")
        machine.stack.append(Payload(machine.at, length))
        machine.at += length

    return step


_DIALECT = Dialect(
    frozenset((QUANTIZED, ARRAY, DTYPE, BFLOAT16, *RECONSTRUCT)),
    _call,
    _build,
    {b"\x81": _new, b"C": _skip("<B"), b"B": _skip("<I"), b"\x8e": _skip("<Q")},
)

"""A machine that steps through a state dict's pickle and runs nothing.

Pickle is a stack language. GLOBAL and STACK_GLOBAL name a function or class, REDUCE calls what lies on the stack,
BUILD sets an object's state, INST, OBJ and NEWOBJ make objects, EXT names by number. Here:

- a name yields a `Mark`, a piece of text, and only if it is in `NAMES`;
- REDUCE does not call: it looks at which mark it was given and builds a `Strided` or an empty dict itself, if the
  arguments have exactly the types that torch writes;
- BUILD is accepted for the one thing torch writes with it, `_metadata` on a state dict, and ignored;
- every opcode that a state dict does not need is unsafe, whatever it would do.

Values are numbers, texts, tuples, lists, dicts, marks and strided views. Keys are texts or whole numbers, so that no
value can make hashing expensive (a tuple of a tuple, twice each, doubles with every level), and no value is ever
printed, compared or walked. Steps and bytes are limited, so memory is too.

Ref: Lib/pickletools.py of CPython, for each opcode's argument.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, UnsafeInputError

MAX_STEPS = 2_000_000
MAX_STACK = 1_000_000

DICT, VIEW, PARAMETER = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
STORAGES = {
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
NAMES = frozenset((DICT, VIEW, PARAMETER, *STORAGES))

_OTHERS = {
    b"i": "INST", b"o": "OBJ", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x82": "EXT1", b"\x83": "EXT2",
    b"\x84": "EXT4", b"P": "PERSID", b"\x97": "NEXT_BUFFER", b"\x96": "BYTEARRAY8", b"I": "INT", b"S": "STRING",
    b"2": "DUP", b"0": "POP", b"1": "POP_MARK",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mark:
    """A name of NAMES, as text and nothing more."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """One storage: `count` values of `codec` in the member data/`key`."""

    codec: str
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class Strided:
    """A view into a storage; offset and strides count values."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def run(data: bytes, *, path: Path) -> Any:
    """Step through the pickle `data` and return the value at its end.

    Raises UnsafeInputError (an opcode, name or call that a state dict does not need), IntegrityError (damaged).
    """
    machine = _Machine(data, path)
    return machine.run()


class _Machine:
    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under each MARK
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            opcode = self.take(1)
            if opcode == b".":
                return self.finish()
            step = _STEPS.get(opcode)
            if step is None:
                name = _OTHERS.get(opcode, "which weights do not need")
                raise self.unsafe(f"the opcode {opcode!r} ({name}) at byte {self.at - 1}")
            step(self)
            if len(self.stack) > MAX_STACK or len(self.below) > MAX_STACK:
                raise self.damaged("more values on the stack than any checkpoint needs")
        raise self.damaged(f"more than {MAX_STEPS} steps")

    def finish(self) -> Any:
        if self.below or len(self.stack) != 1:
            raise self.damaged("it ends with more or less than one value")
        if self.at != len(self.data):
            raise self.damaged(f"{len(self.data) - self.at} bytes after its end")
        return self.stack[0]

    def unsafe(self, what: str) -> UnsafeInputError:
        return UnsafeInputError(
            f"the pickle holds {what}", path=self.path, hint="Nothing was run. Do not load this file with anything."
        )

    def damaged(self, what: str) -> IntegrityError:
        return IntegrityError(f"the pickle is damaged: {what}", path=self.path, hint="Pull the file again.")

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise self.damaged("it ends early")
        self.at += count
        return piece

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def text(self, length: int) -> str:
        try:
            return self.take(length).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise self.damaged("a text is no UTF-8") from error

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 512)
        if end < 0:
            raise self.damaged("a name without an end")
        text = self.text(end - self.at)
        self.at += 1
        return text

    def pop(self) -> Any:
        if not self.stack:
            raise self.damaged("a value is missing on the stack")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.below:
            raise self.damaged("a mark is missing on the stack")
        values, self.stack = self.stack, self.below.pop()
        return values

    def name(self, module: object, name: object) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
        if full not in NAMES or full.rpartition(".")[0] != module:
            raise self.unsafe(f"the name {full[:100]!r}, which weights do not need")
        self.stack.append(Mark(full))

    def remember(self, index: int) -> None:
        if not self.stack:
            raise self.damaged("a value is missing on the stack")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.damaged(f"it recalls value {index}, which it never stored")
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1] if self.stack else None
        if type(target) is not list:
            raise self.unsafe(f"values appended to a {type(target).__name__}")
        target.extend(values)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1] if self.stack else None
        if type(target) is not dict:
            raise self.unsafe(f"items set on a {type(target).__name__}")
        if len(flat) % 2:
            raise self.damaged("a key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.unsafe(f"a {type(key).__name__} as a key")
            target[key] = value

    def set_item(self) -> None:
        value = self.pop()
        self.set_items([self.pop(), value])

    def reduce(self) -> None:
        given, called = self.pop(), self.pop()
        if type(called) is not Mark or type(given) is not tuple:
            raise self.unsafe(f"a call of a {type(called).__name__}")
        if called.name == DICT and given == ():
            self.stack.append({})
        elif called.name == VIEW:
            self.stack.append(self.view(given))
        elif called.name == PARAMETER and len(given) == 3 and type(given[0]) is Strided:
            self.stack.append(given[0])
        else:
            raise self.unsafe(f"a call of {called.name} with other arguments than torch writes")

    def view(self, given: tuple[Any, ...]) -> Strided:
        if len(given) not in (6, 7):
            raise self.unsafe("a tensor with other parts than torch writes")
        storage, offset, size, stride, grad, hooks, *more = given
        fits = type(storage) is Storage and type(grad) is bool and type(hooks) is dict and not hooks
        fits = fits and is_count(offset) and are_counts(size) and are_counts(stride) and len(size) == len(stride)
        if not fits or any(more):
            raise self.unsafe("a tensor with other parts than torch writes")
        return Strided(storage, offset, size, stride)

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        if type(target) is not dict or type(state) is not dict or set(state) != {"_metadata"}:
            raise self.unsafe("an object that sets its own state (BUILD)")

    def persistent(self) -> None:
        id_ = self.pop()
        fits = type(id_) is tuple and len(id_) == 5 and type(id_[0]) is str and id_[0] == "storage"
        if not fits or type(id_[1]) is not Mark or type(id_[2]) is not str or not is_count(id_[4]):
            raise self.unsafe("a reference that is no storage")
        codec, key = STORAGES.get(id_[1].name), id_[2]
        if codec is None or not (key.isascii() and key.isalnum() and len(key) <= 64):
            raise self.unsafe(f"a storage of {id_[1].name} under the key {key[:80]!r}")
        self.stack.append(Storage(codec, key, id_[4]))

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def protocol(self) -> None:
        version = self.take(1)[0]
        if self.at != 2 or not 2 <= version <= 5:
            raise self.damaged(f"protocol {version} at byte {self.at - 2}, expected 2 to 5 at the start")

    def long(self) -> None:
        data = self.take(self.take(1)[0])
        if len(data) > 8:
            raise self.damaged("a number of more than eight bytes")
        self.stack.append(int.from_bytes(data, "little", signed=True))

    def global_name(self) -> None:
        module = self.line()
        self.name(module, self.line())

    def stack_name(self) -> None:
        name = self.pop()
        self.name(self.pop(), name)


def is_count(value: object) -> bool:
    """A whole number that can be an offset or a length."""
    return type(value) is int and 0 <= value < 1 << 62


def are_counts(value: object) -> bool:
    """A tuple of a few counts."""
    return type(value) is tuple and len(value) <= 16 and all(is_count(item) for item in value)


_Step = Callable[[_Machine], object]


def _push(make: Callable[[_Machine], Any]) -> _Step:
    def step(machine: _Machine) -> None:
        value = make(machine)  # first: it may exchange the stack
        machine.stack.append(value)

    return step


_STEPS: dict[bytes, _Step] = {
    b"\x80": _Machine.protocol,
    b"\x95": lambda m: m.take(8),  # FRAME: a hint for streams
    b"(": _Machine.mark,
    b"c": _Machine.global_name,
    b"\x93": _Machine.stack_name,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.recall(m.number("<B")),
    b"j": lambda m: m.recall(m.number("<I")),
    b"X": _push(lambda m: m.text(m.number("<I"))),
    b"\x8c": _push(lambda m: m.text(m.number("<B"))),
    b"K": _push(lambda m: m.number("<B")),
    b"M": _push(lambda m: m.number("<H")),
    b"J": _push(lambda m: m.number("<i")),
    b"\x8a": _Machine.long,
    b"N": _push(lambda _: None),
    b"\x88": _push(lambda _: True),
    b"\x89": _push(lambda _: False),
    b")": _push(lambda _: ()),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"t": _push(lambda m: tuple(m.pop_mark())),
    b"}": _push(lambda _: {}),
    b"]": _push(lambda _: []),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_mark()),
    b"s": _Machine.set_item,
    b"u": lambda m: m.set_items(m.pop_mark()),
}

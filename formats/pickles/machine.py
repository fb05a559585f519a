"""A machine that steps through a pickle of tensors and runs nothing.

Pickle is a stack language. GLOBAL and STACK_GLOBAL name a function or class, REDUCE calls what lies on the stack,
BUILD sets an object's state, INST, OBJ and NEWOBJ make objects, EXT names by number. Here:

- a name yields a `Mark`, a piece of text, and only if the `Dialect` has it;
- REDUCE does not call, BUILD and NEWOBJ set and make nothing: the dialect looks at which mark it was given and builds
  a plain value of its own, if the arguments have exactly the types that the one program writes;
- every opcode that such a pickle does not need is unsafe, whatever it would do.

Values are numbers, texts, tuples, lists, dicts, marks and what the dialect builds. Keys are texts or whole numbers, so
that no value can make hashing expensive (a tuple of a tuple, twice each, doubles with every level), and no value is
ever printed, compared or walked. Steps and bytes are limited, so memory is too.

`statedict` is the dialect of torch.save, `formats.grok1.pickled` that of Grok-1's arrays.

Ref: Lib/pickletools.py of CPython, for each opcode's argument.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from weightsmith.errors import IntegrityError, UnsafeInputError

MAX_STEPS = 2_000_000
MAX_STACK = 1_000_000

_OTHERS = {
    b"i": "INST", b"o": "OBJ", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x82": "EXT1", b"\x83": "EXT2",
    b"\x84": "EXT4", b"P": "PERSID", b"\x97": "NEXT_BUFFER", b"\x96": "BYTEARRAY8", b"I": "INT", b"S": "STRING",
    b"2": "DUP", b"0": "POP", b"1": "POP_MARK",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mark:
    """A name that the dialect has, as text and nothing more."""

    name: str


class Source(Protocol):
    """The pickle's bytes: bytes themselves, or a file that is read piece by piece."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: slice, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one program's pickles mean. names: all that they may name. call: REDUCE of a mark with its arguments to a
    value. build: BUILD, the target stays on the stack. steps: opcodes beyond those that every dialect has. Both
    functions raise `machine.unsafe` for anything that the program does not write.
    """

    names: frozenset[str]
    call: Callable[[Machine, Mark, tuple[Any, ...]], Any]
    build: Callable[[Machine, Any, Any], None]
    steps: Mapping[bytes, Callable[[Machine], object]]


def run(data: Source, dialect: Dialect, *, path: Path) -> Any:
    """Step through the pickle `data` and return the value at its end.

    Raises UnsafeInputError (an opcode, name or call that the dialect does not have), IntegrityError (damaged).
    """
    return Machine(data, dialect, path).run()


class Machine:
    """The state of one run; dialects see it as the first argument of what they do."""

    def __init__(self, data: Source, dialect: Dialect, path: Path) -> None:
        self.data, self.dialect, self.path, self.at = data, dialect, path, 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under each MARK
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Run to STOP."""
        for _ in range(MAX_STEPS):
            opcode = self.take(1)
            if opcode == b".":
                return self.finish()
            step = _STEPS.get(opcode) or self.dialect.steps.get(opcode)
            if step is None:
                name = _OTHERS.get(opcode, "which weights do not need")
                raise self.unsafe(f"the opcode {opcode!r} ({name}) at byte {self.at - 1}")
            step(self)
            if len(self.stack) > MAX_STACK or len(self.below) > MAX_STACK:
                raise self.damaged("more values on the stack than any checkpoint needs")
        raise self.damaged(f"more than {MAX_STEPS} steps")

    def finish(self) -> Any:
        """The one value that is left at STOP."""
        if self.below or len(self.stack) != 1:
            raise self.damaged("it ends with more or less than one value")
        if self.at != len(self.data):
            raise self.damaged(f"{len(self.data) - self.at} bytes after its end")
        return self.stack[0]

    def unsafe(self, what: str) -> UnsafeInputError:
        """The error for what no such pickle holds."""
        return UnsafeInputError(
            f"the pickle holds {what}", path=self.path, hint="Nothing was run. Do not load this file with anything."
        )

    def damaged(self, what: str) -> IntegrityError:
        """The error for what cannot be a whole pickle."""
        return IntegrityError(f"the pickle is damaged: {what}", path=self.path, hint="Pull the file again.")

    def take(self, count: int) -> bytes:
        """The next bytes."""
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise self.damaged("it ends early")
        self.at += count
        return piece

    def number(self, form: str) -> int:
        """The next number, by its form in `struct`."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def text(self, length: int) -> str:
        """The next bytes as text."""
        try:
            return self.take(length).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise self.damaged("a text is no UTF-8") from error

    def line(self) -> str:
        """The next text up to a newline."""
        length = self.data[self.at : self.at + 512].find(b"\n")
        if length < 0:
            raise self.damaged("a name without an end")
        text = self.text(length)
        self.at += 1
        return text

    def pop(self) -> Any:
        """The value on top of the stack, taken off."""
        if not self.stack:
            raise self.damaged("a value is missing on the stack")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """The values above the last mark, taken off with it."""
        if not self.below:
            raise self.damaged("a mark is missing on the stack")
        values, self.stack = self.stack, self.below.pop()
        return values

    def name(self, module: object, name: object) -> None:
        """A mark on the stack for a name of the dialect."""
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
        if full not in self.dialect.names or full.rpartition(".")[0] != module:
            raise self.unsafe(f"the name {full[:100]!r}, which weights do not need")
        self.stack.append(Mark(full))

    def remember(self, index: int) -> None:
        """Put the value on top into the memo."""
        if not self.stack:
            raise self.damaged("a value is missing on the stack")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        """A value of the memo on the stack."""
        if index not in self.memo:
            raise self.damaged(f"it recalls value {index}, which it never stored")
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        """The topmost values as one tuple."""
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def append(self, values: list[Any]) -> None:
        """Extend the list on top."""
        target = self.stack[-1] if self.stack else None
        if type(target) is not list:
            raise self.unsafe(f"values appended to a {type(target).__name__}")
        target.extend(values)

    def set_items(self, flat: list[Any]) -> None:
        """Fill the dict on top."""
        target = self.stack[-1] if self.stack else None
        if type(target) is not dict:
            raise self.unsafe(f"items set on a {type(target).__name__}")
        if len(flat) % 2:
            raise self.damaged("a key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.unsafe(f"a {type(key).__name__} as a key")
            if key in target:  # no pickle of a dict says one twice, and readers may differ in which they believe
                raise self.damaged(f"the key {str(key)[:80]!r} occurs twice")
            target[key] = value

    def set_item(self) -> None:
        """SETITEM."""
        value = self.pop()
        self.set_items([self.pop(), value])

    def reduce(self) -> None:
        """REDUCE, by the dialect."""
        given, called = self.pop(), self.pop()
        if type(called) is not Mark or type(given) is not tuple:
            raise self.unsafe(f"a call of a {type(called).__name__}")
        self.stack.append(self.dialect.call(self, called, given))

    def build(self) -> None:
        """BUILD, by the dialect."""
        state = self.pop()
        if not self.stack:
            raise self.damaged("a value is missing on the stack")
        self.dialect.build(self, self.stack[-1], state)

    def mark(self) -> None:
        """MARK."""
        self.below.append(self.stack)
        self.stack = []

    def protocol(self) -> None:
        """PROTO."""
        version = self.take(1)[0]
        if self.at != 2 or not 2 <= version <= 5:
            raise self.damaged(f"protocol {version} at byte {self.at - 2}, expected 2 to 5 at the start")

    def long(self) -> None:
        """LONG1."""
        data = self.take(self.take(1)[0])
        if len(data) > 8:
            raise self.damaged("a number of more than eight bytes")
        self.stack.append(int.from_bytes(data, "little", signed=True))

    def global_name(self) -> None:
        """GLOBAL."""
        module = self.line()
        self.name(module, self.line())

    def stack_name(self) -> None:
        """STACK_GLOBAL."""
        name = self.pop()
        self.name(self.pop(), name)


def is_count(value: object) -> bool:
    """A whole number that can be an offset or a length."""
    return type(value) is int and 0 <= value < 1 << 62


def are_counts(value: object) -> bool:
    """A tuple of a few counts."""
    return type(value) is tuple and len(value) <= 16 and all(is_count(item) for item in value)


_Step = Callable[[Machine], object]


def _push(make: Callable[[Machine], Any]) -> _Step:
    def step(machine: Machine) -> None:
        value = make(machine)  # first: it may exchange the stack
        machine.stack.append(value)

    return step


_STEPS: dict[bytes, _Step] = {
    b"\x80": Machine.protocol,
    b"\x95": lambda m: m.take(8),  # FRAME: a hint for streams
    b"(": Machine.mark,
    b"c": Machine.global_name,
    b"\x93": Machine.stack_name,
    b"R": Machine.reduce,
    b"b": Machine.build,
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
    b"\x8a": Machine.long,
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
    b"s": Machine.set_item,
    b"u": lambda m: m.set_items(m.pop_mark()),
}
LISTED = frozenset([*_STEPS, b"."])  # the opcodes that are known; the last one ends a pickle

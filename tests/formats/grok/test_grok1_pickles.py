"""Pickles that are no Grok-1 arrays: refused by name, and nothing in them runs."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.grok import grok1
from weightsmith import formats
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError, UnsafeInputError, UnsupportedError, WeightsmithError
from weightsmith.formats.grok1 import layout
from weightsmith.formats.grok1.pickled import read_arrays


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    grok1.write_grok1(tmp_path, layers=1)
    return tmp_path / "ckpt-0"


def hostile() -> Iterator[tuple[str, bytes, type[Exception]]]:
    """Pickles that are no Grok-1 array, each with what is wrong and the error for it."""
    good = io.BytesIO()
    grok1.quantized(np.ones((64, 64), np.int8), np.ones((1, 64), np.uint16)).write(good)
    sound = good.getvalue()
    reduce_ = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."
    yield "a call of system", reduce_, UnsafeInputError
    yield "another class", sound.replace(b"QuantizedWeight8bit", b"QuantizedWeight9bit"), UnsafeInputError
    yield "another module", sound.replace(b"\x08__main__", b"\x08builtins"), UnsafeInputError
    yield "numpy's own loader", sound.replace(b"\x0c_reconstruct", b"\x0cfrombuffer__"), UnsafeInputError
    yield "another field", sound.replace(b"\x06scales", b"\x06scalez"), UnsafeInputError
    yield "an object array", b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02O8\x89\x88\x87R.", UnsupportedError
    yield "a class called", b"\x80\x04\x8c\x08__main__\x8c\x13QuantizedWeight8bit\x93)R.", UnsafeInputError
    yield (
        "a class made with arguments",
        b"\x80\x04\x8c\x08__main__\x8c\x13QuantizedWeight8bit\x93K\x01\x85\x81.",
        UnsafeInputError,
    )
    yield "torch's names", b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R.", UnsafeInputError
    yield "a persistent id", b"\x80\x04K\x01Q.", UnsafeInputError
    yield "an out of band buffer", b"\x80\x05\x97.", UnsafeInputError
    yield "only a number", b"\x80\x04K\x01.", UnsupportedError
    yield "an unfinished pair", b"\x80\x04\x8c\x08__main__\x8c\x13QuantizedWeight8bit\x93)\x81.", UnsupportedError
    yield "bytes beyond the file", b"\x80\x04B\xff\xff\xff\xff.", IntegrityError
    yield "very many bytes", b"\x80\x04\x8e" + b"\xff" * 8 + b".", IntegrityError
    yield "a long text", b"\x80\x04X\xff\xff\x00\x00" + b"a" * 70000, IntegrityError
    yield "many steps", b"\x80\x04" + b"N0" * 5 + b"N" * 70000 + b".", UnsafeInputError
    yield "much framing", b"\x80\x04" + b"N" * 70000 + b".", IntegrityError
    yield "bytes after the end", sound + b"x", IntegrityError
    yield "an early end", sound[:-200], IntegrityError
    yield "nothing", b"", IntegrityError
    wrong = io.BytesIO()
    grok1.plain(("f4", (64, 65), bytes(4 * 64 * 64))).write(wrong)
    yield "a shape that the bytes do not fill", wrong.getvalue(), IntegrityError
    turned = io.BytesIO()
    made = grok1.Pickle()
    made.array(np.ones((4, 4), np.float32), columns=True)
    made.write(turned)
    yield "column order", turned.getvalue(), UnsupportedError


@pytest.mark.parametrize(("case", "data", "error"), list(hostile()), ids=[case for case, _, _ in hostile()])
def test_hostile_pickles_are_refused(case: str, data: bytes, error: type[Exception], copy: Path) -> None:
    del case
    (copy / layout.file_name(4)).write_bytes(data)
    before = set(sys.modules)
    with pytest.raises(error):
        formats.open_reader(copy, allow_pickle=True)
    assert set(sys.modules) == before  # nothing was imported


def opened(data: bytes, path: Path) -> dict[str, Any]:
    path.write_bytes(data)
    with path.open("rb") as file:
        return dict(read_arrays(file.fileno(), len(data), path=path))


SOUND = io.BytesIO()
grok1.quantized(np.ones((8, 33), np.int8), np.ones((1, 33), np.uint16)).write(SOUND)
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(changes=CHANGES, cut=st.integers(0, 40), at=st.integers(0, 10**6))
def test_mutated_files_end_in_an_error_of_ours_or_in_sound_ranges(
    changes: list[tuple[int, int]], cut: int, at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(SOUND.getvalue())
    for place, value in changes:
        data[place % len(data)] = value
    at %= len(data)
    mutated = bytes(data[:at] + data[at + cut :])
    try:
        found = opened(mutated, tmp_path_factory.getbasetemp() / "mutated")
    except WeightsmithError:
        return
    for info in found.values():
        assert 0 <= info.offset <= info.offset + info.nbytes <= len(mutated)
        assert info.nbytes == math.prod(info.shape) * {"I8": 1, "BF16": 2, "F32": 4}[info.codec]


NAMES = ("numpy", "dtype", "ndarray", "i1", "__main__", "QuantizedWeight8bit", "numpy.core.multiarray", "_reconstruct")
CODES = b"()}N\x88\x89\x94\x85\x87tuRb\x81\x93."
OPCODES = [b"\x80\x04", b"K\x01", b"h\x00", b"C\x01b", *(bytes([code]) for code in CODES)]
OPCODES += [b"\x8c" + bytes([len(name)]) + name.encode() for name in NAMES]


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(OPCODES), max_size=30))
def test_strung_together_opcodes_end_in_an_error_of_ours(
    parts: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(WeightsmithError):
        opened(b"\x80\x04" + b"".join(parts), tmp_path_factory.getbasetemp() / "strung")


def test_exit_codes(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / layout.file_name(4)).write_bytes(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.")
    assert run(["convert", str(copy), "--to", "gguf", "-o", str(copy / "out.gguf"), "--allow-pickle"]) == 4
    assert "posix.system" in capsys.readouterr().err

"""Zip files in torch.save's form with any pickle in them, written with zipfile."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path

from weightsmith.formats.pickles import read_tensors
from weightsmith.types import TensorInfo

ROOT = "consolidated.00"


def archive(data: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> bytes:
    """Bytes of a .pth with `data` as its pickle; `members` by name below the root, with "_" for "."."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        file.writestr(f"{ROOT}/data.pkl", data)
        for key, content in (storages or {}).items():
            file.writestr(f"{ROOT}/data/{key}", content)
        for name, content in members.items():
            file.writestr(f"{ROOT}/{name.replace('_', '.')}", content)
    return buffer.getvalue()


def sparse(path: Path, members: dict[str, bytes | int]) -> None:
    """A zip64 file whose members are bytes or, as a number, so many zeros that take no room on the disk."""
    directory = b""
    with path.open("wb") as file:
        for member, content in members.items():
            local, text_, size = (
                file.tell(),
                f"{ROOT}/{member}".encode(),
                content if isinstance(content, int) else len(content),
            )
            wide = struct.pack("<2H3Q", 1, 24, size, size, local)
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 45, 8, 0, 0, 0, 0, 0, 0, len(text_), 0) + text_)
            if isinstance(content, int):
                file.seek(content, os.SEEK_CUR)
            else:
                file.write(content)
            fields = (45, 45, 8, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(text_), len(wide), 0, 0, 0, 0, 0xFFFFFFFF)
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + text_ + wide
        begin, count = file.tell(), len(members)
        record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), begin)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(directory), 1)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        file.write(directory + record + locator + end)


def read(path: Path) -> dict[str, TensorInfo]:
    handle = os.open(path, os.O_RDONLY)
    try:
        return read_tensors(handle, path.stat().st_size, path=path)
    finally:
        os.close(handle)


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return (
        b"\x8a\x08" + value.to_bytes(8, "little", signed=True) if value >= 1 << 31 else b"J" + struct.pack("<i", value)
    )


def ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def storage(key: str = "0", count: int = 6, kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(
    *, offset: int = 0, size: tuple[int, ...] = (2, 3), stride: tuple[int, ...] = (3, 1), of: bytes | None = None
) -> bytes:
    parts = (of or storage()) + number(offset) + ints(size) + ints(stride) + b"\x89"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + name("collections", "OrderedDict") + b")RtR"


def state_dict(*items: tuple[str, bytes]) -> bytes:
    """A pickle of a dict with these keys and, as opcodes, values."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items) + b"u."


class Runs:
    """What a hostile author would pickle: a call of `function` with `arguments`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def unlisted(listed: Collection[bytes]) -> dict[str, bytes]:
    """A pickle for every opcode that exists and is not `listed`, with a stack and an argument that would suit it."""
    found = {}
    for opcode in pickletools.opcodes:
        code = opcode.code.encode("latin-1")
        if code not in listed:
            argument = _ARGUMENTS.get(opcode.arg.name if opcode.arg else "", b"\x01\0\0\0\0\0\0\0a")
            found[opcode.name] = b"\x80\x02(" + text("a") + text("b") + code + argument + b"."
    return found


_ARGUMENTS = {
    "": b"",
    "stringnl": b"'a'\n",
    "stringnl_noescape": b"a\n",
    "stringnl_noescape_pair": b"os\nsystem\n",
    "decimalnl_short": b"1\n",
    "decimalnl_long": b"1L\n",
    "floatnl": b"1.0\n",
    "unicodestringnl": b"a\n",
}


def hostile() -> dict[str, bytes]:
    """Pickles that would run something if they were loaded, by what they use."""
    deep = b"\x80\x02" + b"(" * 500_000 + b"."
    cases = {
        f"system, protocol {protocol}": pickle.dumps({"w": Runs(os.system, "true")}, protocol) for protocol in range(6)
    }
    cases |= {f"eval, protocol {protocol}": pickle.dumps(Runs(eval, "1"), protocol) for protocol in (2, 4, 5)}
    return cases | {
        "stack global": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        "a name by another path": b"\x80\x04\x8c\x05torch\x8c\x19_utils._rebuild_tensor_v2\x93.",
        "a name that begins like an allowed one": state_dict(("w", name("torch._utils", "_rebuild_tensor_v2x"))),
        "a name with a newline trick": state_dict(("w", name("collections.OrderedDict", ""))),
        "getattr": state_dict(("w", name("builtins", "getattr") + b"(" + text("a") + text("b") + b"tR")),
        "torch.load": state_dict(("w", name("torch", "load") + text("x") + b"\x85R")),
        "pip": state_dict(("w", name("pip", "main") + b"]\x85R")),
        "call of a text": b"\x80\x02" + text("os.system") + b")R.",
        "call of a dict": b"\x80\x02})R.",
        "call of a storage's name": state_dict(("w", name("torch", "FloatStorage") + b")R")),
        "call without a tuple": state_dict(("w", name("collections", "OrderedDict") + b"]R")),
        "build on a tensor": state_dict(("w", tensor() + b"}b")),
        "build with a slot state": state_dict(("w", name("collections", "OrderedDict") + b")R(N}tb")),
        "build of other keys": b"\x80\x02}}" + text("__class__") + b"Nsb.",
        "inst": b"\x80\x02(S'true'\nios\nsystem\n.",
        "inst of an allowed name": b"\x80\x02(icollections\nOrderedDict\n.",
        "obj": b"\x80\x02(" + name("os", "system") + text("true") + b"o.",
        "obj of an allowed name": b"\x80\x02(" + name("collections", "OrderedDict") + b"o.",
        "newobj": b"\x80\x02" + name("collections", "OrderedDict") + b")\x81.",
        "newobj with keywords": b"\x80\x04" + name("collections", "OrderedDict") + b")}\x92.",
        "ext1": b"\x80\x02\x82\x01.",
        "ext2": b"\x80\x02\x83\x01\x00.",
        "ext4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "persistent id as text": b"\x80\x02Pstorage\n.",
        "persistent id that is no storage": b"\x80\x02" + text("module") + b"Q.",
        "a module as storage": b"\x80\x02(" + text("module") + text("a") + text("b") + text("c") + b"K\x01tQ.",
        "a key that leaves the folder": state_dict(("w", tensor(of=storage("../0")))),
        "a key with a slash": state_dict(("w", tensor(of=storage("0/../../x")))),
        "a tuple as key": b"\x80\x02}K\x01K\x02\x86Ns.",
        "out of band buffer": b"\x80\x05\x97.",
        "a set": b"\x80\x04\x8f.",
        "hooks": b"\x80\x02}" + text("w") + tensor()[: -len(b"\x89ccollections\nOrderedDict\n)RtR")]
        + b"\x89}" + text("k") + text("v") + b"stRs.",
        "deep marks": deep,
        "deep tuples": b"\x80\x02)" + b"\x85" * 500_000 + b".",
        "doubling tuples": b"\x80\x02K\x01" + b"q\x00h\x00\x86" * 200_000 + b".",
        "doubling tuples as key": b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 100 + b"Ns.",
        "doubling lists": b"\x80\x02]" + b"q\x00(h\x00h\x00e" * 100_000 + b".",
        "a memo at the far end": b"\x80\x02Nr\xff\xff\xff\xff.",
        "a text longer than the file": b"\x80\x02X\xff\xff\xff\xffabc.",
        "too many steps": b"\x80\x02" + b"}" * 2_500_000 + b".",
    }  # fmt: skip

"""The zip file that torch.save writes: where each member's bytes lie.

    ROOT/data.pkl   the pickle        ROOT/data/KEY   one storage, raw        ROOT/byteorder   "little"

Members are stored, not compressed, so a storage is a range of the file and can be read at a position. Sizes come from
the central directory at the end (local headers leave them zero where a data descriptor follows); files beyond 4 GB
have zip64 records. Every count and offset is held against the file before it is used. Refused: compressed or encrypted
members, names that leave their folder, members that overlap or whose two headers disagree.

Files from before torch 1.6 are a tar file or several pickles in a row; they are refused by name.

Ref: PKWARE APPNOTE 6.3.10; caffe2/serialize/inline_container.cc in pytorch.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from weightsmith.errors import IntegrityError, UnsafeInputError, UnsupportedError
from weightsmith.safename import check_name

MAX_DIRECTORY = 64 << 20  # bytes
AGAIN = "Pull the file again; it may be truncated."
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x2041  # flag bits 0, 6 and 13
_PROTOCOLS = tuple(b"\x80" + bytes([version]) for version in range(2, 6))
_OLD = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that begins what torch wrote before 1.6, as a pickle
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Member:
    """One member: its data is bytes [start, start + size) of the file."""

    name: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Archive:
    """A checked archive: `root`, the folder that all members are in, and the members by name below it."""

    root: str
    members: dict[str, Member]


def is_pickled(start: bytes) -> bool:
    """Whether a file of these first 512 bytes can be a pickle by itself, in a zip or in a tar file."""
    return start[:4] == b"PK\3\4" or start[:2] in _PROTOCOLS or start[257:262] == b"ustar"


def is_saved(start: bytes) -> bool:
    """Whether a file of these first 512 bytes looks like what some version of torch.save wrote."""
    if start[:4] == b"PK\3\4":
        return start[30 : 30 + int.from_bytes(start[26:28], "little")].endswith(b"/data.pkl")
    return is_pickled(start) and (start[:1] != b"\x80" or _OLD in start[:32])


def read_archive(handle: int, size: int, *, path: Path) -> Archive:
    """Find the members of an open file of `size` bytes.

    Raises IntegrityError (no sound zip file), UnsafeInputError (a hostile name), UnsupportedError (another form).
    """
    _check_start(os.pread(handle, 512, 0), path)
    begin, length, count = _directory(handle, size, path)
    entries = os.pread(handle, length, begin)
    if len(entries) != length:
        raise IntegrityError("the file ends within its directory", path=path, hint=AGAIN)
    found: list[tuple[Member, int]] = []
    at = 0
    for _ in range(count):
        member, local, at = _entry(entries, at, path)
        found.append((_located(handle, member, local, begin, path), local))
    if at != length:
        raise IntegrityError(f"{length - at} bytes of the directory belong to no member", path=path)
    _check_overlap(found, path)
    return _rooted([member for member, _ in found], path)


def _check_start(start: bytes, path: Path) -> None:
    if start.startswith(_POINTER):
        raise IntegrityError("a git-LFS pointer, not the weights it stands for", path=path, hint="Run `git lfs pull`.")
    if start[:2] in _PROTOCOLS and _OLD not in start[:32]:
        raise UnsafeInputError("a pickle by itself, which torch.save never wrote", path=path, hint="Nothing was run.")
    if start[:1] == b"\x80" or start[257:262] == b"ustar":
        raise UnsupportedError(
            "the form that torch wrote before version 1.6 (a bare pickle or a tar file)",
            path=path,
            hint="Have its author save it again with a newer torch, best as safetensors. Or load it by torch.load(..., "
            "weights_only=True) where there is nothing to lose, and save what comes out.",
        )
    if start[:4] != b"PK\3\4":
        raise IntegrityError(f"begins with {start[:4]!r}, expected the zip file that torch.save writes", path=path)


def _directory(handle: int, size: int, path: Path) -> tuple[int, int, int]:
    """Offset, length and entries of the central directory."""
    tail_at = max(0, size - _END.size - 0xFFFF)
    tail = os.pread(handle, size - tail_at, tail_at)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise IntegrityError("no directory at the end of the zip file", path=path, hint=AGAIN)
    _, disk, disk_begin, here, count, length, begin, comment = _END.unpack_from(tail, at)
    end_at = tail_at + at
    if end_at + _END.size + comment != size:
        raise IntegrityError("bytes after the end of the zip file", path=path)
    locator = os.pread(handle, _LOCATOR.size, max(0, end_at - _LOCATOR.size))
    if locator[:4] == b"PK\6\7":
        _, _, at64, _ = _LOCATOR.unpack(locator)
        record = os.pread(handle, _END64.size, at64) if at64 < size else b""
        if len(record) != _END64.size or record[:4] != b"PK\6\6":
            raise IntegrityError("the zip64 record is missing", path=path, hint=AGAIN)
        _, _, _, _, disk, disk_begin, here, count, length, begin = _END64.unpack(record)
        end_at = at64
    if disk or disk_begin or here != count:
        raise UnsupportedError("a zip file in several volumes", path=path)
    if length > MAX_DIRECTORY or begin + length > end_at or count * _ENTRY.size > length:
        raise IntegrityError(
            f"a directory of {count} members in {length} bytes at {begin} does not fit the file", path=path, hint=AGAIN
        )
    return begin, length, count


def _entry(entries: bytes, at: int, path: Path) -> tuple[Member, int, int]:
    """The member at `at` (its start still unknown), its local header's offset, and where the next entry begins."""
    if len(entries) - at < _ENTRY.size or entries[at : at + 4] != b"PK\1\2":
        raise IntegrityError("a damaged entry in the directory", path=path)
    fields = _ENTRY.unpack_from(entries, at)
    flags, method, stored, size, local = fields[3], fields[4], fields[8], fields[9], fields[16]
    name_at = at + _ENTRY.size
    extra_at = name_at + fields[10]
    end = extra_at + fields[11] + fields[12]
    if end > len(entries):
        raise IntegrityError("a damaged entry in the directory", path=path)
    try:
        name = entries[name_at:extra_at].decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError("a member's name is no UTF-8", path=path) from error
    check_name(name, path=path)
    size, stored, local = _wide(entries[extra_at : extra_at + fields[11]], [size, stored, local], path)
    if method or flags & _ENCRYPTED or size != stored:
        how = "encrypted" if flags & _ENCRYPTED else "compressed"
        raise UnsupportedError(f"the member {name!r} is {how}; torch.save stores members as they are", path=path)
    return Member(name, -1, size), local, end


def _wide(extra: bytes, values: list[int], path: Path) -> list[int]:
    """`values` with those that are all ones taken from the zip64 field, which lists just those."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind != 1:
            continue
        wide = iter(struct.unpack_from(f"<{len(field) // 8}Q", field))
        values = [next(wide, -1) if value == 0xFFFFFFFF else value for value in values]
    if min(values) < 0:
        raise IntegrityError("a damaged zip64 field", path=path)
    return values


def _located(handle: int, member: Member, local: int, limit: int, path: Path) -> Member:
    """`member` with its data's start, by its local header; everything must end before `limit`."""
    header = os.pread(handle, _LOCAL.size + len(member.name.encode()), local) if local < limit else b""
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise IntegrityError(f"the member {member.name!r} is not where the directory says", path=path, hint=AGAIN)
    fields = _LOCAL.unpack_from(header)
    if fields[3] or fields[2] & _ENCRYPTED or header[_LOCAL.size :][: fields[9]] != member.name.encode():
        raise UnsafeInputError(f"the two headers of the member {member.name!r} disagree", path=path)
    start = local + _LOCAL.size + fields[9] + fields[10]
    if start + member.size > limit:
        raise IntegrityError(f"the member {member.name!r} ends behind the file's end", path=path, hint=AGAIN)
    return Member(member.name, start, member.size)


def _check_overlap(found: list[tuple[Member, int]], path: Path) -> None:
    reached = 0
    for member, local in sorted(found, key=lambda item: item[1]):
        if local < reached:
            raise UnsafeInputError(f"the member {member.name!r} overlaps another", path=path)
        reached = member.start + member.size


def _rooted(members: list[Member], path: Path) -> Archive:
    pickles = [member.name for member in members if member.name.endswith("/data.pkl") and member.name.count("/") == 1]
    if len(pickles) != 1:
        raise IntegrityError(f"{len(pickles)} members named ROOT/data.pkl, expected the one of torch.save", path=path)
    root = pickles[0].removesuffix("/data.pkl")
    below: dict[str, Member] = {}
    for member in members:
        head, _, name = member.name.partition("/")
        if head != root:
            raise UnsafeInputError(f"the member {member.name!r} lies outside {root!r}", path=path)
        if name in below:
            raise UnsafeInputError(f"the member {member.name!r} occurs twice", path=path)
        below[name] = member
    return Archive(root, below)

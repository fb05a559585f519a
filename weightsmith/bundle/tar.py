"""Tar, the little of it that a bundle needs: regular files, one after the other, each in blocks of 512 bytes.

Written is POSIX ustar; a size of 8 GiB and more, which its octal digits cannot hold, is binary (high bit set, big
endian: GNU tar, star, bsdtar, Go's archive/tar and Python's tarfile read that). Read are ustar and GNU headers, and the
extended headers of POSIX pax where they say `path` or `size`, so a layout that another tar packed is read too.

Nothing is unpacked: `members` gives offsets. Every size is held against the bytes that are there before it is used, and
whatever is no regular file or folder (links, devices, fifos, sparse files) is refused, whatever its name.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from weightsmith.errors import IntegrityError, UnsafeInputError
from weightsmith.safename import check_name

BLOCK = 512
MAX_MEMBERS = 500_000
MAX_EXTENDED = 1 << 20
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a fifo",
    b"S": "a sparse file",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file: where its bytes begin, and how many they are."""

    offset: int
    size: int


def header(name: str, size: int) -> bytes:
    """The block before the bytes of the regular file `name` (at most 100 bytes of ASCII)."""
    digits = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    parts = (
        name.encode("ascii").ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,  # mode, owner, group
        digits + b"%011o\0" % 0,  # size, time
        b" " * 8 + b"0" + b"\0" * 100,  # checksum, kind, link
        b"ustar\x0000" + b"\0" * 64 + b"0000000\0" * 2,  # magic, owner's and group's names, device
    )
    block = b"".join(parts).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(size: int) -> int:
    """The bytes that `size` bytes take in the archive."""
    return -(-size // BLOCK) * BLOCK


def members(file: BinaryIO, total: int, path: object) -> dict[str, Member]:
    """Every regular file of the archive of `total` bytes, by its checked name.

    Raises IntegrityError (no tar, cut off, damaged, a name twice) and UnsafeInputError (names, links, devices).
    """
    found: dict[str, Member] = {}
    where, extended = 0, dict[str, str]()
    while True:
        block = _at(file, where, BLOCK, total, path)
        if not block.strip(b"\0"):
            return found
        kind, size = block[156:157], _size(block, path)
        if kind in b"xg":
            if size > MAX_EXTENDED:
                raise UnsafeInputError(f"an extended header of {size} bytes", path=str(path))
            told = _extended(_at(file, where + BLOCK, size, total, path), path)
            extended |= told if kind == b"x" else {}
            where += BLOCK + padded(size)
            continue
        name = extended.get("path") or _name(block, path)
        size = _decimal(extended["size"], path) if "size" in extended else size
        extended = {}
        if kind not in (b"0", b"\0", b"5"):
            what = _KINDS.get(kind, f"of kind {kind!r}")
            raise UnsafeInputError(f"{name!r} is {what}", path=str(path), hint="Only plain files belong in a bundle.")
        if size > total - where - BLOCK:
            raise IntegrityError(f"{name!r} has {size} bytes, the file ends before", path=str(path))
        plain = name.removeprefix("./").rstrip("/") if kind == b"5" else name.removeprefix("./")
        if plain or kind != b"5":
            check_name(plain, path=str(path))
        if kind != b"5":
            if plain in found:
                raise IntegrityError(f"{plain!r} is there twice", path=str(path))
            found[plain] = Member(where + BLOCK, size)
        if len(found) > MAX_MEMBERS:
            raise UnsafeInputError(f"more than {MAX_MEMBERS} files", path=str(path))
        where += BLOCK + (padded(size) if kind != b"5" else 0)


def _at(file: BinaryIO, offset: int, nbytes: int, total: int, path: object) -> bytes:
    if nbytes > total - offset:
        raise IntegrityError("cut off, or not a tar", path=str(path), hint="Copy the bundle again.")
    file.seek(offset)
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise IntegrityError("it became shorter while it was read", path=str(path))
    return data


def _size(block: bytes, path: object) -> int:
    """The size in a header whose checksum is right."""
    told = block[148:156].rstrip(b" \0").lstrip(b" ")
    if not told.isdigit() or _octal(told) != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise IntegrityError("not a tar, or a damaged one", path=str(path), hint="A bundle is an uncompressed tar.")
    if block[257:262] != b"ustar":
        raise IntegrityError("a tar of another form than ustar", path=str(path))
    field = block[124:136]
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field.strip(b" \0") or b"0")
    if size < 0:
        raise IntegrityError("a size that is no number", path=str(path))
    return size


def _octal(text: bytes) -> int:
    try:
        return int(text, 8) if text.isdigit() else -1
    except ValueError:
        return -1


def _decimal(text: str, path: object) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise IntegrityError("a size that is no number", path=str(path))
    return int(text)


def _name(block: bytes, path: object) -> str:
    parts = [block[:100].split(b"\0")[0]]
    if block[257:263] == b"ustar\0":  # GNU's form has other things there
        parts.insert(0, block[345:500].split(b"\0")[0])
    try:
        return "/".join(part.decode() for part in parts if part)
    except UnicodeDecodeError as error:
        raise UnsafeInputError("a name that is not UTF-8", path=str(path)) from error


def _extended(data: bytes, path: object) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`; only `path` and `size` matter here."""
    found = {}
    while data.strip(b"\0"):
        digits = data.split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = data[:length]
        if length <= len(digits) + 1 or len(record) != length or record[-1:] != b"\n":
            raise IntegrityError("a damaged extended header", path=str(path))
        key, mark, value = record[len(digits) + 1 : -1].partition(b"=")
        if mark and key in (b"path", b"size"):
            try:
                found[key.decode()] = value.decode()
            except UnicodeDecodeError as error:
                raise UnsafeInputError("a name that is not UTF-8", path=str(path)) from error
        data = data[length:]
    return found

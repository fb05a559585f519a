"""A .pth file's state dict as named positions in the file.

A tensor in it is a view: a storage, an offset, a size and strides, and several tensors may share one storage (Meta's
conversion scripts warn of that). So what counts is the view and never "the storage's bytes". A view whose values lie
one after another is a range of the file; another one (a transposed or a cut matrix) would have to be gathered, no
published checkpoint holds one, and it is refused by name. A storage that no tensor names may be there; its bytes are
ignored.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.pickles.archive import AGAIN, Archive, read_archive
from weightsmith.formats.pickles.machine import run
from weightsmith.formats.pickles.statedict import STATE_DICT, Storage, Strided
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import TensorInfo

MAX_PICKLE = 8 << 20  # bytes; the largest published state dict takes some 300 KB
MAX_NAME = 1024  # characters


def read_tensors(handle: int, size: int, *, path: Path) -> dict[str, TensorInfo]:
    """Tensors of an open .pth file of `size` bytes, in its order; reads headers and the pickle only.

    Raises UnsafeInputError (anything but a plain state dict), IntegrityError (damaged), UnsupportedError (another form
    of file, a tensor that is no contiguous view).
    """
    archive = read_archive(handle, size, path=path)
    _check_byteorder(handle, archive, path)
    member = archive.members["data.pkl"]
    if member.size > MAX_PICKLE:
        raise IntegrityError(f"a pickle of {member.size} bytes, expected at most {MAX_PICKLE}", path=path)
    value = run(os.pread(handle, member.size, member.start), STATE_DICT, path=path)
    if type(value) is not dict or not value:
        raise UnsupportedError(f"the pickle holds a {type(value).__name__}, expected named tensors", path=path)
    return {_name(name, path): _placed(name, view, archive, path) for name, view in value.items()}


def _check_byteorder(handle: int, archive: Archive, path: Path) -> None:
    member = archive.members.get("byteorder")
    if member is None:  # torch before 2.1
        return
    order = os.pread(handle, min(member.size, 16), member.start)
    if order != b"little":
        raise UnsupportedError(f"the byte order is {order!r}, only little endian is read", path=path)


def _name(name: object, path: Path) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise IntegrityError("a tensor's name is empty, too long or no text", path=path)
    return name


def _placed(name: str, view: object, archive: Archive, path: Path) -> TensorInfo:
    if type(view) is not Strided:
        raise UnsupportedError(f"a {type(view).__name__}, expected a tensor", path=path, tensor=name)
    storage, item = view.storage, BLOCKS[view.storage.codec].nbytes
    start = _start(name, storage, archive, path)
    count = math.prod(view.size)
    if not _contiguous(view):
        raise UnsupportedError(
            f"a view of size {view.size} with strides {view.stride}, whose values do not lie one after another",
            path=path,
            tensor=name,
            hint="Save it again after calling .contiguous() on every tensor.",
        )
    if view.offset + count > storage.count:
        raise IntegrityError(
            f"values {view.offset} to {view.offset + count} of a storage that has {storage.count}",
            path=path,
            tensor=name,
        )
    return TensorInfo(name, view.size, storage.codec, count * item, path, start + view.offset * item)


def _start(name: str, storage: Storage, archive: Archive, path: Path) -> int:
    member = archive.members.get(f"data/{storage.key}")
    if member is None:
        raise IntegrityError(f"its storage {storage.key!r} is missing", path=path, tensor=name, hint=AGAIN)
    needed = storage.count * BLOCKS[storage.codec].nbytes
    if member.size != needed:
        raise IntegrityError(
            f"its storage has {member.size} bytes, {storage.count} values of {storage.codec} take {needed}",
            path=path,
            tensor=name,
            hint=AGAIN,
        )
    return member.start


def _contiguous(view: Strided) -> bool:
    """Whether the last axis moves fastest and nothing is skipped; the stride of an axis of one says nothing."""
    expected = 1
    for size, stride in zip(reversed(view.size), reversed(view.stride), strict=True):
        if size != 1 and stride != expected:
            return math.prod(view.size) == 0
        expected *= size
    return True

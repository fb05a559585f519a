"""Putting files where another program looks, all of them or none, and never over what is not ours.

| way | |
|---|---|
| link | a reflink (shares blocks until one side changes) where the file system has them, else a hard link |
| symlink | a symbolic link to the catalog's file, for another file system; it breaks when the entry is removed |
| copy | the bytes once more |

A file appears by `link(2)` from a hidden name beside it, which fails if anything has the name, so two processes, or the
other program, cannot overwrite each other here. The hidden file `.weightsmith-ID` is locked while it is filled; what a
killed run left of it is removed by the next link into that folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weightsmith.atomic import disk_errors, need_space
from weightsmith.errors import OutputExistsError, UsageError, WeightsmithError
from weightsmith.progress import progress
from weightsmith.store import File, is_free, reflink, sha256_file

Way = Literal["link", "symlink", "copy"]
_HIDDEN = re.compile(r"\.weightsmith-[0-9a-f]{32}")
_FRESH = 60.0  # seconds in which a hidden file may not be locked yet
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP)


@dataclass(frozen=True, slots=True)
class Wish:
    """What shall stand at `target`: a catalog's `file` that lies at `source`, a small `text`, or a link `to`."""

    target: Path
    source: Path | None = None
    file: File | None = None
    text: bytes | None = None
    to: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The wishes of one program, in the order in which they may become visible."""

    root: Path
    ref: str
    wishes: Sequence[Wish]
    undo: str
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Placed:
    """What became of a wish. how: reflink, hardlink, symlink, copy, written, or "there" (it was)."""

    path: Path
    how: str


def fulfil(wishes: Iterable[Wish], way: Way) -> list[Placed]:
    """Make every wish true, in order; what was made is taken back if one cannot be. Raises as `links.link` says."""
    wishes = list({wish.target: wish for wish in wishes}.values())  # two files of the same bytes are one blob
    for folder in {wish.target.parent for wish in wishes}:
        _sweep(folder)
    there = {wish.target for wish in wishes if _stands(wish)}
    missing = [wish for wish in wishes if wish.target not in there]
    if way == "copy":
        _need_space(missing)
    placed: list[Placed] = []
    made: list[Path] = []
    try:
        for wish in wishes:
            if wish.target in there:
                placed.append(Placed(wish.target, "there"))
                continue
            made += _folders(wish.target.parent)
            placed.append(Placed(wish.target, _make(wish, way)))
            made.append(wish.target)
    except BaseException:
        _take_back(made)
        raise
    return placed


def _stands(wish: Wish) -> bool:
    """Whether what is wished for is there already. Raises OutputExistsError if something else is."""
    target = wish.target
    if not os.path.lexists(target):
        return False
    if wish.to is not None:
        same = target.is_symlink() and os.readlink(target) == wish.to
    elif wish.text is not None:
        same = target.is_file() and target.stat().st_size == len(wish.text) and target.read_bytes() == wish.text
    else:
        same = wish.source is not None and wish.file is not None and _holds(target, wish.source, wish.file)
    if not same:
        hint = "It is left as it is. Remove it, or choose another name or folder."
        raise OutputExistsError("something else stands there", path=target, hint=hint)
    return True


def _holds(target: Path, source: Path, file: File) -> bool:
    if not target.is_file():
        return False
    if os.path.samefile(target, source):
        return True
    if target.stat().st_size != file.size:
        return False
    with progress(f"compare {target.name}", file.size) as ticker:
        return sha256_file(target, ticker) == file.sha256


def _need_space(wishes: Sequence[Wish]) -> None:
    total = sum(wish.file.size for wish in wishes if wish.file is not None)
    if wishes:
        near = next(parent for parent in wishes[0].target.parents if parent.is_dir())
        need_space(near, total)


def _folders(folder: Path) -> list[Path]:
    """Make `folder`; returns the ones that were missing, outermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()][::-1]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _make(wish: Wish, way: Way) -> str:
    target = wish.target
    try:
        if wish.to is not None:
            os.symlink(wish.to, target)
            return "symlink"
        if wish.source is None:
            return _appear(target, lambda hidden: hidden.write_bytes(wish.text or b""), "written")
        source = wish.source.resolve(strict=True)
        if way == "symlink":
            os.symlink(source, target)
            return "symlink"
        if way == "copy":
            return _appear(target, lambda hidden: shutil.copyfile(source, hidden), "copy")  # fills the locked file
        return _linked(source, target)
    except FileExistsError as error:
        raise OutputExistsError("something came to stand there meanwhile", path=target) from error


def _linked(source: Path, target: Path) -> str:
    hidden = _hidden(target)
    if reflink(source, hidden):
        return _appear(target, lambda _: None, "reflink", hidden=hidden)
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in _NO_LINK:
            hint = "--symlink makes a symbolic link, --copy a second copy of the bytes."
            raise UsageError(f"no hard link is possible: {error.strerror}", path=target, hint=hint) from error
        raise WeightsmithError(f"cannot link: {error.strerror}", path=target) from error
    return "hardlink"


def _hidden(target: Path) -> Path:
    return target.with_name(f".weightsmith-{uuid.uuid4().hex}")


def _appear(target: Path, fill: Callable[[Path], object], how: str, *, hidden: Path | None = None) -> str:
    """Fill a hidden file, then give it its name if nothing has that."""
    hidden = hidden or _hidden(target)
    handle = None
    try:
        with disk_errors(target):
            handle = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX)
            fill(hidden)
        os.link(hidden, target)
    finally:
        hidden.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)
    return how


def _sweep(folder: Path) -> None:
    """Remove hidden files in `folder` whose maker is gone; best effort, since the folder is another's."""
    try:
        found = [one for one in os.scandir(folder) if _HIDDEN.fullmatch(one.name)]
    except OSError:
        return  # to be made, or not ours to read
    for one in found:
        try:
            status = one.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and time.time() - status.st_ctime > _FRESH and is_free(Path(one.path)):
                os.unlink(one.path)
        except OSError:
            continue  # it went meanwhile, or may not be removed


def _take_back(made: Sequence[Path]) -> None:
    for path in reversed(made):
        try:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError:
            continue  # somebody else put something into the folder

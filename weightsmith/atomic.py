"""Outputs that appear by rename, so no reader ever sees half a file or half a folder.

What is in the making is `NAME.part` beside its final place, locked while its writer lives. A part without a living
writer is what a killed run left behind; the next run for the same output takes it over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightsmith.errors import DISK_HINT, OutputExistsError, ResourceError, WeightsmithError
from weightsmith.safename import check_name
from weightsmith.sizes import spelled

_LARGE = 1 << 18  # bytes of a write that is worth a hint to the kernel


def part_path(path: Path) -> Path:
    """Where the unfinished form of `path` lies."""
    return path.with_name(path.name + ".part")


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError if `path` exists and must not be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError("the output already exists", path=path, hint="Choose another -o, or pass --force.")


def need_space(path: Path, nbytes: int) -> None:
    """Raise ResourceError unless the file system that holds `path` has `nbytes` free (bytes)."""
    folder = path if path.is_dir() else path.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ResourceError(
            f"needs {spelled(nbytes)} on disk, {spelled(free)} are free",
            path=folder,
            hint=DISK_HINT,
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Translate operating-system failures while writing `path` into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError("the disk is full", path=path, hint=DISK_HINT) from error
        raise WeightsmithError(f"cannot write: {error.strerror or error}", path=path) from error


def sync_folder(path: Path) -> None:
    """Make renames inside folder `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make the folder `path` and what is missing above it, durably; harmless if it is there."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def _open_locked(path: Path, flags: int, *, folder: bool = False) -> int:
    """Open the part of `path` (made if absent) and lock it for this process: the handle, which holds the lock."""
    part = part_path(path)
    while True:
        try:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if folder and not os.path.lexists(part):
                    part.mkdir(exist_ok=True)
                handle = os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except WeightsmithError as error:
            kind = getattr(error.__cause__, "errno", None)
            if kind in (errno.ENOTDIR, errno.EISDIR, errno.ELOOP) and os.path.lexists(part):
                hint = "Remove it if nothing is writing it."
                raise OutputExistsError("something of another kind is in the way", path=part, hint=hint) from error
            if kind == errno.ENOENT and folder and path.parent.is_dir():
                continue  # its writer finished and renamed it between our two steps
            raise
        if not _locked_soon(handle):
            os.close(handle)
            raise OutputExistsError("another process is writing this output", path=path)
        # Its last writer may have renamed or removed it before we got the lock: then this handle is the finished
        # output, which must not be touched, and the part is to be made anew.
        if _is_same(handle, part):
            return handle
        os.close(handle)


def _locked_soon(handle: int) -> bool:
    """Lock an open file; not at once, because who only looks whether it is free holds it for a moment."""
    for _ in range(20):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.005)
    return False


def _is_same(handle: int, part: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(part))
    except FileNotFoundError:
        return False


def _write_at(handle: int, offset: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    begin, size = offset, len(view)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done
    if size >= _LARGE and hasattr(os, "posix_fadvise"):
        # Linux begins to bring what was written to the disk, and keeps it in memory while it does. Only a hint: where
        # it is refused, the final fsync waits longer.
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle, begin, size, os.POSIX_FADV_DONTNEED)


class AtomicFile:
    """A file of known size written at offsets under its `.part` name; `commit` renames it into place.

    keep: a part of the same size that an earlier run left is taken over with what it holds, not emptied.
    Raises OutputExistsError (already there, or another process is writing it) and ResourceError (disk).
    """

    def __init__(self, path: Path, size: int, *, overwrite: bool = False, keep: bool = False) -> None:
        refuse_existing(path, overwrite=overwrite)
        self.path, self.size, self.overwrite = path, size, overwrite
        self.part = part_path(path)
        self.handle = _open_locked(path, os.O_RDWR | os.O_CREAT)
        try:
            refuse_existing(path, overwrite=overwrite)  # again: its writer may have finished meanwhile
            if not (keep and os.fstat(self.handle).st_size == size):
                with disk_errors(path):
                    os.ftruncate(self.handle, 0)
            need_space(path, size - 512 * os.fstat(self.handle).st_blocks)
            with disk_errors(path):
                os.ftruncate(self.handle, size)
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at byte `offset`; safe from several threads."""
        with disk_errors(self.path):
            _write_at(self.handle, offset, data)

    def read(self, offset: int, nbytes: int) -> bytes:
        """What lies at byte `offset`; fewer bytes at the end of the file. Safe from several threads."""
        with disk_errors(self.path):
            return os.pread(self.handle, nbytes, offset)

    def suspend(self) -> None:
        """Leave the part for a later run that opens it with `keep`; nothing happens after `commit` or `abort`."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def commit(self) -> Path:
        """Flush to disk and rename into place."""
        refuse_existing(self.path, overwrite=self.overwrite)
        with disk_errors(self.path):
            os.fsync(self.handle)
            os.replace(self.part, self.path)
            os.close(self.handle)
            self.handle = -1
            sync_folder(self.path.parent)
        return self.path

    def abort(self) -> None:
        """Remove the unfinished file; nothing happens after `commit` or a second time."""
        if self.handle >= 0:
            self.part.unlink(missing_ok=True)
            os.close(self.handle)
            self.handle = -1


class AtomicFolder:
    """A flat folder of files of known size, written as `NAME.part/`; `commit` renames it into place.

    With `overwrite`, what stood there moves aside to `NAME.part.old` and comes back if the rename fails; a run killed
    between the two renames is repaired by the next one. Raises as AtomicFile does.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        refuse_existing(path, overwrite=overwrite)
        self.path, self.overwrite = path, overwrite
        self.part = part_path(path)
        self.old = path.with_name(path.name + ".part.old")
        self.files: dict[str, int] = {}
        self.handle = _open_locked(path, os.O_RDONLY | os.O_DIRECTORY, folder=True)
        try:
            with disk_errors(path):
                if os.path.lexists(self.old) and not os.path.lexists(path):
                    os.rename(self.old, path)
                _remove(self.old)
                for entry in list(os.scandir(self.part)):
                    _remove(Path(entry.path))
            refuse_existing(path, overwrite=overwrite)  # again: its writer may have finished meanwhile
        except BaseException:
            self.abort()
            raise

    def create(self, name: str, size: int) -> None:
        """Add a file of `size` bytes, zeros until they are written."""
        check_name(name, path=self.path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with disk_errors(self.path / name):
            self.files[name] = os.open(name, flags, 0o666, dir_fd=self.handle)
            os.ftruncate(self.files[name], size)

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at byte `offset` of file `name`; safe from several threads."""
        with disk_errors(self.path / name):
            _write_at(self.files[name], offset, data)

    def commit(self) -> Path:
        """Flush every file and the folder to disk and rename it into place."""
        refuse_existing(self.path, overwrite=self.overwrite)
        with disk_errors(self.path):
            for handle in self.files.values():
                os.fsync(handle)
            os.fsync(self.handle)
            self._swap()
            self._release()
            sync_folder(self.path.parent)
            _remove(self.old)
        return self.path

    def _swap(self) -> None:
        if not os.path.lexists(self.path):
            os.rename(self.part, self.path)
            return
        os.rename(self.path, self.old)
        try:
            os.rename(self.part, self.path)
        except BaseException:
            os.rename(self.old, self.path)
            raise

    def _release(self) -> None:
        while self.files:
            os.close(self.files.popitem()[1])
        os.close(self.handle)
        self.handle = -1

    def abort(self) -> None:
        """Remove the unfinished folder; nothing happens after `commit` or a second time."""
        if self.handle >= 0:
            shutil.rmtree(self.part, ignore_errors=True)
            self._release()


def _remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file by rename, durably."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file by rename, durably."""
    file = AtomicFile(path, len(data), overwrite=True)
    try:
        file.write(0, data)
    except BaseException:
        file.abort()
        raise
    file.commit()

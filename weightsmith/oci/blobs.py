"""HOME/blobs/sha256: files by content, each one file with the names it has in models/.

A blob of a model's file is a hard link, so nothing lies twice and `models/NAME/TAG` stays a real folder. Manifests and
statements are small files of their own. A name outside `[0-9a-f]{64}` never becomes part of a path, and nothing is
opened or replaced through a symbolic link.

When the same content comes a second time as another file, the blob that is there is hashed before it takes the new
one's place: what was just verified is not given up for what may have rotted.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
from pathlib import Path

from weightsmith.atomic import disk_errors, make_folder, write_bytes
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UnsupportedError, WeightsmithError
from weightsmith.oci.manifest import digest_of
from weightsmith.store import HEX, File, sha256_file

log = logging.getLogger(__name__)

MAX_DOCUMENT = 64 << 20  # of what is read into memory at once
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class CannotLinkError(WeightsmithError):
    """The file system refuses a hard link that the layout needs."""


def folder(home: Path) -> Path:
    """Where the blobs of `home` lie."""
    return home / "blobs" / "sha256"


def prepare(home: Path) -> None:
    """Make the folder of blobs; raises UnsafeInputError if a link leads somewhere else instead."""
    for place in (home / "blobs", folder(home)):
        if place.is_symlink():
            raise UnsafeInputError("a link is where blobs belong", path=place, hint="Move the whole home, not a part.")
    with disk_errors(folder(home)):
        make_folder(folder(home))


def blob_path(home: Path, digest: str) -> Path:
    """Where the blob `digest` (`sha256:HEX` or HEX) lies, or would; raises UnsafeInputError for what is no digest."""
    bare = digest.removeprefix("sha256:")
    if not HEX.fullmatch(bare):
        raise UnsafeInputError(f"{digest!r} is no SHA-256 digest", path=home, hint="It is sha256: and 64 hex digits.")
    return folder(home) / bare


def read(home: Path, digest: str) -> bytes:
    """The blob `digest`, verified against it.

    Raises NotFoundError, IntegrityError (other bytes), UnsafeInputError (no digest, or a link lies there) and
    UnsupportedError (more than 64 MiB: open the file instead).
    """
    path = blob_path(home, digest)
    if plain(path) is None:
        raise NotFoundError("the catalog has no such blob", path=path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError("the catalog has no such blob", path=path) from error
    with os.fdopen(handle, "rb") as file:
        if os.fstat(handle).st_size > MAX_DOCUMENT:
            raise UnsupportedError("too large to be read at once", path=path, hint="Open the file instead.")
        data = file.read(MAX_DOCUMENT + 1)
    if hashlib.sha256(data).hexdigest() != path.name:
        raise IntegrityError("the blob's bytes are not those of its name", path=path, hint="It has to be made anew.")
    return data


def write(home: Path, data: bytes) -> str:
    """Keep the small document `data` as a blob; returns its digest. What lies there with other bytes is replaced."""
    digest = digest_of(data)
    path = blob_path(home, digest)
    status = plain(path)
    if status is None or status.st_size != len(data) or path.read_bytes() != data:
        write_bytes(path, data)
    return digest


def share(home: Path, path: Path, file: File, scratch: Path) -> None:
    """Make `path`, which holds `file`, and its blob one file. scratch: a name free to be overwritten.

    Raises CannotLinkError where the file system refuses, NotFoundError if `path` is gone or of another size.
    """
    blob, own = blob_path(home, file.sha256), plain(path)
    if own is None or own.st_size != file.size:
        raise NotFoundError(f"not there with its {file.size} bytes", path=path)
    if adopt(home, path, file, scratch):
        return
    if plain(blob) is None:
        link(path, blob)
    else:
        log.warning("%s was damaged; %s takes its place", blob, path)
        _replace(path, blob, scratch)


def adopt(home: Path, path: Path, file: File, scratch: Path) -> bool:
    """Let `path`, which holds `file`, be the blob, if there is a sound one; True if they are one file now."""
    blob = blob_path(home, file.sha256)
    there = plain(blob)
    if there is None or there.st_size != file.size:
        return False
    if os.path.samestat(there, path.lstat()):
        return True
    if sha256_file(blob) != file.sha256:
        return False
    _replace(blob, path, scratch)
    return True


def plain(path: Path) -> os.stat_result | None:
    """The status of the file `path`, None if there is none; raises UnsafeInputError for a link or anything else."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeInputError("not a plain file", path=path, hint="Remove it; weightsmith put no such thing there.")
    return status


def link(source: Path, target: Path) -> None:
    """A hard link, or CannotLinkError saying so."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        if not os.path.samefile(source, target):
            raise WeightsmithError("a file is in the way", path=target) from None
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise CannotLinkError(f"cannot be hard-linked: {error.strerror}", path=source) from error
        raise WeightsmithError(f"cannot link: {error.strerror or error}", path=target) from error


def _replace(source: Path, target: Path, scratch: Path) -> None:
    scratch.unlink(missing_ok=True)
    link(source, scratch)
    with disk_errors(target):
        os.replace(scratch, target)

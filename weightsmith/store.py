"""Where models lie on disk: the home folder, staging folders, locks, hashing, taking files in, and the record.

    HOME/models/NAME/TAG/     the files under their real names, and weightsmith.json, the record
    HOME/blobs/, index.json   the same files by content: an OCI image layout (see oci/)
    HOME/staging/ID/          what is being made; its `.lock` is held while its maker lives
    HOME/downloads/KEY/       downloads, unfinished or waiting for the rest of their checkpoint (see sources/keep.py)
    HOME/hub/                 listings of hub repositories by commit, for `--offline` (see sources/hub.py)

Everything below HOME is on one file system, so finished work moves into place by one rename. Locks are flock on an
open file: the kernel frees them with the process that held them, so nothing is ever left locked, and a staging
folder whose lock is free belongs to a killed run and may go.

The record is JSON beside the files, so a folder can be carried away whole. Its `digest` is the identity of a
checkpoint: SHA-256 over the lines `sha256 size path`, sorted by path, so it depends on the bytes alone.

A user's file is taken in by reflink (a copy that shares its blocks until one side changes; Linux FICLONE on btrfs,
XFS and others), else by hard link, else by copy. It is never moved, changed or deleted. After a hard link both names
are one file: whoever edits it in place edits both, and the recorded sha256 shows it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.atomic import disk_errors, need_space
from weightsmith.errors import IntegrityError, UnsafeInputError, WeightsmithError
from weightsmith.progress import Ticker
from weightsmith.safename import check_name

log = logging.getLogger(__name__)

RECORD = "weightsmith.json"
HEX = re.compile(r"[0-9a-f]{64}")  # a SHA-256, before it becomes part of a path
MAX_RECORD = 32 << 20
_REMAKE = "Remove the folder and pull or make it again."
CHUNK = 1 << 20
_FICLONE = 0x40049409  # linux/fs.h, _IOW(0x94, 9, int)


@dataclass(frozen=True, slots=True)
class File:
    """One file of an entry: path relative to its folder, bytes, SHA-256 as hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint of the catalog.

    container: of `weightsmith.formats`. type: of its weights, the most frequent one ("Q4_0", "BF16"). parent: digest of
    what it was made from, and parent_ref its name then. origin: where it was pulled from (see `sources.Fetched`).
    recipe: how it was made. created: UTC, ISO 8601. evaluations: results in the order they came. nbytes: of all files.
    alias_of: the tag that an alias stands for (its files are links to the same bytes). chat_template: SHA-256 of its
    UTF-8 bytes, "" where there is none, None where nobody looked (records from before it was noted).
    """

    name: str
    tag: str
    folder: Path
    container: str
    type: str
    files: tuple[File, ...]
    digest: str
    created: str
    origin: dict[str, Any] = field(default_factory=dict)
    parent: str | None = None
    parent_ref: str | None = None
    recipe: dict[str, Any] | None = None
    licence: str | None = None
    evaluations: tuple[dict[str, Any], ...] = ()
    alias_of: str | None = None
    chat_template: str | None = None

    @property
    def ref(self) -> str:
        """`name:tag`."""
        return f"{self.name}:{self.tag}"

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def path(self) -> Path:
        """What to open: the GGUF file (the first of its splits), else the folder."""
        ggufs = [file.path for file in self.files if file.path.endswith(".gguf")]
        return self.folder / min(ggufs) if self.container == "gguf" and ggufs else self.folder


def digest_of(files: Iterable[File]) -> str:
    """The identity of a checkpoint that consists of `files`, as 64 hex digits."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"{file.sha256} {file.size} {file.path}\n".encode())
    return digest.hexdigest()


def record_text(entry: Entry) -> str:
    """The record of `entry`, as it is written; where it lies is not part of it."""
    record = asdict(entry)
    del record["folder"]
    return json.dumps({"format": 1, **record}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_record(folder: Path) -> Entry:
    """The entry whose files and record lie in `folder` = models/NAME/TAG. Raises IntegrityError naming the record."""
    path = folder / RECORD
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_RECORD)
    except OSError as error:
        raise IntegrityError("the record is damaged", path=path, hint=_REMAKE) from error
    return parse_record(data, folder, path)


def parse_record(data: bytes, folder: Path, path: Path) -> Entry:
    """The entry that a record says, to lie in `folder`; raises IntegrityError naming `path`, where it was read."""
    hint = _REMAKE
    try:
        raw = json.loads(data)
        if raw.pop("format") != 1:
            raise IntegrityError("the record is of a newer version", path=path, hint="Update weightsmith.")
        files = tuple(File(str(check_name(f["path"])), f["size"], f["sha256"]) for f in raw.pop("files"))
        evaluations = tuple(raw.pop("evaluations"))
        entry = Entry(folder=folder, files=files, evaluations=evaluations, **raw)
        sound = entry.digest == digest_of(files) and (entry.name, entry.tag) == (folder.parent.name, folder.name)
        sound = sound and isinstance(entry.origin, dict)
        sound = sound and (not entry.chat_template or HEX.fullmatch(entry.chat_template) is not None)
        sound = sound and all(isinstance(f.size, int) and HEX.fullmatch(f.sha256) for f in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnsafeInputError) as error:
        raise IntegrityError("the record is damaged", path=path, hint=hint) from error
    if not sound:
        raise IntegrityError("the record contradicts itself or its place", path=path, hint=hint)
    return entry


def home() -> Path:
    """The folder of the catalog: $WEIGHTSMITH_HOME, else the platform's place for a program's data."""
    given = os.environ.get("WEIGHTSMITH_HOME")
    if given:
        return Path(os.path.expanduser(given)).absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "weightsmith"
    data = os.environ.get("XDG_DATA_HOME", "")
    base = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return base / "weightsmith"


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path` (made if absent), waiting for whoever holds it; `shared` lets readers in together.

    Its holder may remove it, and the folder it lies in.
    """
    while True:
        handle = _open_lock(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            if _is_at(handle, path):  # else it was removed while we waited, and the next one to come makes it anew
                yield
                return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _open_lock(path: Path) -> int:
    while True:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # the folder was removed between our two steps


def _try_lock(path: Path) -> int | None:
    """Open and lock `path` without waiting; None when someone holds it."""
    handle = _open_lock(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock of the file or folder `path`; True where there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return not os.path.lexists(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


class Staging:
    """A folder of this process below HOME/staging, locked until `release` or the end of the process."""

    def __init__(self, root: Path) -> None:
        base = root / "staging"
        # One process at a time makes or sweeps: a folder that exists but is not locked yet must not look abandoned.
        with locked(base / ".lock"):
            sweep(root, _holding=True)
            with disk_errors(base):
                self.base = base / uuid.uuid4().hex
                self.base.mkdir()
                self.folder = self.base / "files"
                self.folder.mkdir()
            self._handle: int | None = _open_lock(self.base / ".lock")
            fcntl.flock(self._handle, fcntl.LOCK_EX)  # waits for a moment if somebody looks whether it is free

    def release(self) -> None:
        """Remove what is left of the folder and free its lock; harmless when repeated."""
        if self._handle is not None:
            with locked(self.base.parent / ".lock"):  # a sweep must not meet a folder that is half gone
                shutil.rmtree(self.base, ignore_errors=True)
                os.close(self._handle)
            self._handle = None


def sweep(root: Path, *, _holding: bool = False) -> int:
    """Remove staging folders that a killed run left behind; return how many."""
    base = root / "staging"
    if not base.is_dir():
        return 0
    if not _holding:
        with locked(base / ".lock"):
            return sweep(root, _holding=True)
    removed = 0
    for folder in base.iterdir():
        if folder.is_symlink() or not folder.is_dir():
            continue
        handle = _try_lock(folder / ".lock")
        if handle is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)
            removed += 1
            log.info("removed what an interrupted run left in %s", folder)
    return removed


def sha256_file(path: Path, ticker: Ticker | None = None) -> str:
    """SHA-256 of a regular file as 64 hex digits; counts bytes on `ticker`."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with disk_errors(path), open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if ticker is not None:
                ticker.update(count)
    return digest.hexdigest()


def take_in(source: Path, target: Path, *, own: bool = False) -> str:
    """Make `target` hold what `source` (its links followed) holds, without moving or changing `source`.

    own: `source` is the catalog's, which nobody edits, so that a hard link comes before a reflink: one file, one blob.
    Returns "reflink", "hardlink" or "copy". Raises UnsafeInputError (not a regular file), ResourceError (disk full).
    """
    source = source.resolve(strict=True)
    status = source.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeInputError("not a regular file", path=source, hint="Only plain files are taken in.")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    if not own and reflink(source, target):
        return "reflink"
    try:
        os.link(source, target)
        return "hardlink"
    except FileExistsError as error:
        raise WeightsmithError("a file is in the way", path=target) from error
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP):
            raise WeightsmithError(f"cannot link: {error.strerror}", path=target) from error
    if own and reflink(source, target):
        return "reflink"
    need_space(target, status.st_size)
    with disk_errors(target):
        shutil.copyfile(source, target)
    return "copy"


def reflink(source: Path, target: Path) -> bool:
    """Make the new file `target` share the blocks of `source`; False where the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    with disk_errors(target):
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(source, "rb") as file:
            fcntl.ioctl(out, _FICLONE, file.fileno())
    except OSError:
        target.unlink()
        return False
    finally:
        os.close(out)
    return True


def freed_bytes(paths: Iterable[Path]) -> int:
    """Bytes that removing the files `paths` frees: what has another name besides these stays and counts nothing."""
    names: Counter[tuple[int, int]] = Counter()
    found: dict[tuple[int, int], os.stat_result] = {}
    for path in paths:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # somebody finished meanwhile
        if stat.S_ISREG(status.st_mode):
            inode = status.st_dev, status.st_ino
            names[inode] += 1
            found[inode] = status
    return sum(status.st_size for inode, status in found.items() if status.st_nlink <= names[inode])

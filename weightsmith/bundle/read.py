"""Taking a bundle in. It may have been made by anybody, so all of it is held against the rest before it is believed.

1. The archive's headers are walked (tar.py): regular files, checked names, sizes that are there.
2. index.json, manifests and records are read, each at most 64 MiB, and hashed. A record must give the very manifest
   that it is a statement about, so that names, sizes and hashes of files come from one place; all must be there.
3. What is in the catalog already is left out; the rest must have room on the disk.
4. Files are written into staging folders, hashed on the way, and opened by their container's reader. Only when all of
   them are sound do the entries appear, each by one rename; then what was attached to them is attached.

A process that dies before the last step leaves nothing that can be seen. What a record says of origin and quality is
the word of who made the bundle: the entry's origin says that it was imported, and a lock (`pull --locked`) tells
whether it is what was wanted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from weightsmith import oci
from weightsmith.atomic import disk_errors, need_space
from weightsmith.bundle import tar
from weightsmith.bundle.write import BLOBS, RECORD
from weightsmith.catalog import Catalog, Reservation, check_word
from weightsmith.errors import IntegrityError, NotFoundError, OutputExistsError, UnsafeInputError, UsageError
from weightsmith.oci.manifest import ARTIFACT, CONFIG, MANIFEST
from weightsmith.progress import Ticker, progress
from weightsmith.sources.choose import check_all
from weightsmith.store import CHUNK, HEX, Entry, File, parse_record, sha256_file, take_in
from weightsmith.store import RECORD as RECORD_NAME

MAX_DOCUMENT = 64 << 20
MAX_MANIFESTS = 100_000
MAX_DEPTH = 40


@dataclass(frozen=True, slots=True)
class Imported:
    """One entry of the bundle. new: it was not there before. statements: how many are attached to it by the bundle."""

    entry: Entry
    new: bool
    statements: int


@dataclass(frozen=True, slots=True)
class _Statement:
    artifact_type: str
    media_type: str
    digest: str
    annotations: dict[str, str]


class _Bundle:
    """An open bundle: its members, and what its index says."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.members = tar.members(file, os.fstat(file.fileno()).st_size, path)
        if "oci-layout" not in self.members or "index.json" not in self.members:
            hint = "A bundle is what `weightsmith export` writes."
            raise IntegrityError("a tar, but not of an OCI image layout", path=path, hint=hint)
        self.index = self.read("index.json")
        self.models: dict[str, bytes] = {}  # manifests by digest
        self.statements: dict[str, list[_Statement]] = {}  # by the digest of the manifest that they are about
        for descriptor in self._listed():
            self._sort(descriptor)

    def read(self, name: str) -> bytes:
        """The small member `name`."""
        member = self.members[name]
        if member.size > MAX_DOCUMENT:
            raise UnsafeInputError(f"{name} has {member.size} bytes", path=self.path)
        self.file.seek(member.offset)
        return self.file.read(member.size)

    def document(self, digest: object) -> bytes:
        """The small blob `digest`, hashed."""
        name = self.blob(digest)
        data = self.read(name)
        if hashlib.sha256(data).hexdigest() != name.removeprefix(BLOBS):
            raise IntegrityError(f"{name} holds other bytes than its name says", path=self.path, hint=_AGAIN)
        return data

    def blob(self, digest: object) -> str:
        """The name of the member that is the blob `digest`."""
        bare = digest.removeprefix("sha256:") if isinstance(digest, str) else ""
        if not HEX.fullmatch(bare) or digest == bare:
            raise UnsafeInputError(f"{digest!r} is no SHA-256 digest", path=self.path)
        if BLOBS + bare not in self.members:
            raise IntegrityError(f"blob {bare} is named but not there", path=self.path, hint=_AGAIN)
        return BLOBS + bare

    def copy(self, file: File, target: Path, ticker: Ticker) -> None:
        """Write the blob of `file` to the new file `target`, hashed on the way."""
        member = self.members[self.blob(f"sha256:{file.sha256}")]
        digest, left = hashlib.sha256(), member.size
        self.file.seek(member.offset)
        with disk_errors(target), open(target, "xb") as out:
            while left and (chunk := self.file.read(min(CHUNK, left))):
                digest.update(chunk)
                out.write(chunk)
                ticker.update(len(chunk))
                left -= len(chunk)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != file.sha256:
            raise IntegrityError(f"blob {file.sha256} holds other bytes ({file.path})", path=self.path, hint=_AGAIN)

    def entries(self, catalog: Catalog) -> list[tuple[Entry, str]]:
        """Every entry with the digest of its manifest, held against that."""
        found = []
        for subject, statements in self.statements.items():
            for one in statements:
                if one.artifact_type == RECORD:
                    found.append((self._entry(catalog, self.document(one.digest), subject), subject))
        if not found:
            hint = "It was not written by `weightsmith export`."
            raise IntegrityError("no records of entries in it", path=self.path, hint=hint)
        if len({entry.ref for entry, _ in found}) < len(found):
            raise IntegrityError("two records of one name and tag", path=self.path)
        return sorted(found, key=lambda one: (one[0].alias_of is not None, one[0].ref))

    def _entry(self, catalog: Catalog, data: bytes, subject: str) -> Entry:
        raw = self._json(data)
        name, tag = raw.get("name"), raw.get("tag")
        if not isinstance(name, str) or not isinstance(tag, str):
            raise IntegrityError("a record without a name", path=self.path)
        try:
            folder = catalog.models / check_word(name, "name") / check_word(tag, "tag")
        except UsageError as error:
            raise UnsafeInputError(error.message, path=self.path) from error
        entry = parse_record(data, folder, self.path)
        _refuse_odd(entry, self.path)
        if self.models.get(subject) != oci.manifest_of(catalog.home, entry)[1]:
            raise IntegrityError(f"the record of {entry.ref} contradicts its manifest", path=self.path)
        for file in entry.files:
            if self.members[self.blob(f"sha256:{file.sha256}")].size != file.size:
                raise IntegrityError(f"{file.path} of {entry.ref} has another size", path=self.path, hint=_AGAIN)
        origin = {**entry.origin, "imported": f"sha256:{hashlib.sha256(self.index).hexdigest()}"}
        return dataclasses.replace(entry, origin=origin)

    def _listed(self) -> list[dict[str, Any]]:
        listed = self._json(self.index).get("manifests")
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise IntegrityError("index.json lists no manifests", path=self.path)
        if len(listed) > MAX_MANIFESTS:
            raise UnsafeInputError(f"more than {MAX_MANIFESTS} manifests", path=self.path)
        return listed

    def _sort(self, descriptor: dict[str, Any]) -> None:
        digest = descriptor.get("digest")
        if descriptor.get("mediaType") != MANIFEST:
            return  # an index of indexes, or another artifact: not ours
        data = self.document(digest)
        if descriptor.get("size") != len(data):
            raise IntegrityError(f"{digest} is listed with another size", path=self.path)
        manifest = self._json(data)
        kind = manifest.get("artifactType")
        if kind == ARTIFACT:
            self.models[str(digest)] = data
            with contextlib.suppress(KeyError, TypeError):
                if manifest["config"]["mediaType"] == CONFIG:
                    self.document(manifest["config"]["digest"])
            return
        try:
            subject, layer = manifest["subject"]["digest"], manifest["layers"][0]
            notes = {str(key): str(value) for key, value in manifest.get("annotations", {}).items()}
            parts = (manifest["config"]["digest"], layer["digest"])
            one = _Statement(str(kind), str(layer["mediaType"]), layer["digest"], notes)
        except (KeyError, IndexError, TypeError, AttributeError):
            return  # another artifact
        _refuse_controls([one.artifact_type, one.media_type, notes], self.path)
        for part in parts:
            self.document(part)  # here, not when it is attached: then entries would be visible already
        self.statements.setdefault(str(subject), []).append(one)

    def _json(self, data: bytes) -> dict[str, Any]:
        try:
            found = json.loads(data, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise IntegrityError("a document in it is not JSON", path=self.path) from error
        if not isinstance(found, dict):
            raise IntegrityError("a document in it is no object", path=self.path)
        return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


_AGAIN = "The bundle is damaged: copy or make it again. Nothing was imported."


def take(
    catalog: Catalog, path: Path, *, overwrite: bool = False, allow_pickle: bool = False, dry_run: bool = False
) -> list[Imported]:
    """Take every entry of the bundle `path` in; returns them all, also those that were there already.

    Raises OutputExistsError (a name is taken by other bytes), IntegrityError, UnsafeInputError, ResourceError (no
    room), and what opening a container raises; then nothing was imported.
    """
    with _opened(path) as bundle:
        found = bundle.entries(catalog)
        there = {entry.ref: _standing(catalog, entry, overwrite) for entry, _ in found}
        fresh = [entry for entry, _ in found if there[entry.ref] is None]
        _need_room(catalog, fresh)
        if not dry_run:
            _bring(catalog, bundle, fresh, overwrite, allow_pickle)
        told = []
        for entry, subject in found:
            kept = entry if dry_run else there[entry.ref] or catalog.get(entry.ref)
            statements = [one for one in bundle.statements[subject] if one.artifact_type != RECORD]
            for one in () if dry_run else statements:
                oci.attach(
                    catalog.home,
                    kept,
                    artifact_type=one.artifact_type,
                    media_type=one.media_type,
                    data=bundle.document(one.digest),
                    annotations=one.annotations,
                )
            told.append(Imported(kept, there[entry.ref] is None, len(statements)))
    return told


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Bundle]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError("no such file", path=path) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UsageError("not a plain file", path=path, hint="A bundle is one file, as `weightsmith export` writes.")
    with os.fdopen(handle, "rb") as file:
        yield _Bundle(file, path)


def _standing(catalog: Catalog, entry: Entry, overwrite: bool) -> Entry | None:
    """The entry of that name with the same bytes; None if the name is free, or to be freed."""
    if not catalog.has(entry.name, entry.tag):
        return None
    try:
        there = catalog.get(entry.ref)
    except IntegrityError:
        if overwrite:
            return None
        raise
    if there.digest == entry.digest:
        return there
    if overwrite:
        return None
    hint = "Nothing was imported. Remove it first, or pass --force."
    raise OutputExistsError(f"{entry.ref} is in the catalog with other bytes", hint=hint)


def _need_room(catalog: Catalog, entries: list[Entry]) -> None:
    missing = {file.sha256: file.size for entry in entries for file in entry.files}
    total = sum(size for sha256, size in missing.items() if not oci.blob_path(catalog.home, sha256).is_file())
    if total:
        need_space(next(near for near in (catalog.home, *catalog.home.parents) if near.is_dir()), total)


def _bring(catalog: Catalog, bundle: _Bundle, entries: list[Entry], overwrite: bool, allow_pickle: bool) -> None:
    """Stage all of them, then let them appear."""
    total = sum(entry.nbytes for entry in entries)
    staged: dict[str, Path] = {}
    with ExitStack() as stack:
        ready: list[tuple[Entry, Reservation]] = []
        with progress(f"import {bundle.path.name}", total) as ticker:
            for entry in entries:
                reservation = stack.enter_context(catalog.reserve(entry.name, entry.tag))
                for file in entry.files:
                    target = reservation.folder / file.path
                    with disk_errors(target):
                        target.parent.mkdir(parents=True, exist_ok=True)
                    _fill(catalog, bundle, file, target, staged, ticker)
                reservation.examine(entry, allow_pickle=allow_pickle)
                ready.append((entry, reservation))
        for entry, reservation in ready:
            reservation.restore(entry, overwrite=overwrite)


def _fill(catalog: Catalog, bundle: _Bundle, file: File, target: Path, staged: dict[str, Path], ticker: Ticker) -> None:
    """The file from what is on this machine, if that is sound; else out of the bundle."""
    near = staged.get(file.sha256)
    if near is not None:
        take_in(near, target, own=True)
        ticker.update(file.size)
        return
    blob = oci.blob_path(catalog.home, file.sha256)
    if blob.is_file() and not blob.is_symlink() and blob.stat().st_size == file.size:
        take_in(blob, target, own=True)
        if sha256_file(target, ticker) == file.sha256:
            staged[file.sha256] = target
            return
        target.unlink()
    bundle.copy(file, target, ticker)
    staged[file.sha256] = target


def _refuse_odd(entry: Entry, path: Path) -> None:
    """Fields of a record that its readers rely on: types, names, and nothing that would act on a terminal."""
    words = [entry.container, entry.type, entry.created]
    texts = [entry.parent_ref, entry.licence]
    sound = all(isinstance(word, str) for word in words) and all(isinstance(text, str | None) for text in texts)
    sound = sound and (
        entry.parent is None or (isinstance(entry.parent, str) and HEX.fullmatch(entry.parent) is not None)
    )
    sound = sound and isinstance(entry.recipe, dict | None)
    sound = sound and all(isinstance(item, dict) for item in entry.evaluations)
    sound = sound and all(not isinstance(file.size, bool) and file.size >= 0 for file in entry.files)
    if not sound:
        raise IntegrityError(f"the record of {entry.ref} has fields of other kinds", path=path)
    if entry.alias_of is not None:
        try:
            check_word(entry.alias_of if isinstance(entry.alias_of, str) else "", "tag")
        except UsageError as error:
            raise UnsafeInputError(error.message, path=path) from error
    names = check_all(sorted(file.path for file in entry.files), where=str(path))
    folders = {parent.as_posix() for name in names for parent in Path(name).parents}
    if len(set(names)) < len(entry.files) or folders & set(names) or RECORD_NAME in names:
        raise UnsafeInputError(f"the files of {entry.ref} cannot lie beside each other", path=path)
    _refuse_controls([*words, *texts, entry.origin, entry.recipe, list(entry.evaluations)], path)


def _refuse_controls(value: Any, path: Path) -> None:
    """Raise UnsafeInputError if a text in `value` holds what a terminal would act on, or if it is nested deep."""
    stack = [(value, 0)]
    while stack:
        one, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise UnsafeInputError(f"values nested more than {MAX_DEPTH} deep", path=path)
        if isinstance(one, dict):
            stack += [(inner, depth + 1) for inner in (*one.keys(), *one.values())]
        elif isinstance(one, list):
            stack += [(inner, depth + 1) for inner in one]
        elif isinstance(one, str) and any(
            unicodedata.category(c) in ("Cc", "Cs", "Cf") and c not in "\n\t" for c in one
        ):
            raise UnsafeInputError(f"a text with control characters: {one[:80]!r}", path=path)

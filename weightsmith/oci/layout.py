"""The image layout of a home: written from the records, and what of it belongs to whom.

`sync` is the whole of it: every entry's files linked, its manifest and configuration written, then the index. It is
called under the catalog's lock after each change and reads no weights, so a home that has no blobs yet, or whose last
writer died, is whole after the next write. An entry whose files cannot be linked (the file system has no hard links,
they belong to someone else, they are damaged) is left out of the index and works as before.

A blob belongs to the entries that reach it: by their files, their manifest, or what is attached to that. What no entry
reaches is stray, and `gc` removes it, but not while a record cannot be read: nobody knows what it would reach.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from weightsmith import inventory
from weightsmith.atomic import disk_errors, sync_folder, write_text
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError
from weightsmith.oci import blobs
from weightsmith.oci.blobs import CannotLinkError
from weightsmith.oci.manifest import ARTIFACT, INDEX, MANIFEST, config_of, described, manifest_of, to_json
from weightsmith.store import HEX, Entry, File

log = logging.getLogger(__name__)

LAYOUT = '{"imageLayoutVersion":"1.0.0"}'
REF_NAME = "org.opencontainers.image.ref.name"


def publish(home: Path, files_in: Path, entry: Entry, *, scratch: Path) -> None:
    """Link the files of `entry`, which lie in `files_in`, to blobs and write its manifest; the lock is held.

    Raises CannotLinkError (no hard links there) and NotFoundError (a file is gone or has another size).
    """
    blobs.prepare(home)
    for file in entry.files:
        blobs.share(home, files_in / file.path, file, scratch)
    blobs.write(home, config_of(entry))
    blobs.write(home, manifest_of(home, entry)[1])
    with disk_errors(blobs.folder(home)):
        sync_folder(blobs.folder(home))


def sync(home: Path) -> list[Entry]:
    """Bring layout and index to what the records say; the lock is held. Returns the entries that are in the index."""
    models = home / "models"
    for model in models.iterdir() if models.is_dir() else ():
        if model.is_dir() and not model.is_symlink():
            inventory.recover(model)
    blobs.prepare(home)
    listed, refused = [], 0
    for entry in inventory.read_all(models)[0]:
        try:
            _complete(home, entry)
        except CannotLinkError as error:
            refused += 1
            log.info("%s: %s", entry.ref, error)
        except (NotFoundError, UnsafeInputError) as error:
            log.info("%s is not in the image layout: %s", entry.ref, error)
        else:
            listed.append(entry)
    if refused:
        log.warning(
            "%d models are not in the image layout of %s, because their files cannot be hard-linked there; "
            "they work, but tools for OCI layouts do not see them",
            refused,
            home,
        )
    for name, text in (("oci-layout", LAYOUT), ("index.json", _index(home, listed))):
        if _text(home / name) != text:
            write_text(home / name, text)
    return listed


def _complete(home: Path, entry: Entry) -> None:
    """Make up for what an entry lacks in the layout, by stat alone: a blob that is there is taken for what it says."""
    for file in entry.files:
        there = blobs.plain(blobs.blob_path(home, file.sha256))
        if there is None or there.st_size != file.size:
            publish(home, entry.folder, entry, scratch=home / "models" / ".link")
            return
    blobs.write(home, config_of(entry))
    blobs.write(home, manifest_of(home, entry)[1])


def _text(path: Path) -> str | None:
    try:
        return None if path.is_symlink() else path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _index(home: Path, entries: list[Entry]) -> str:
    manifests: list[dict[str, Any]] = []
    subjects: dict[str, None] = {}
    for entry in entries:
        digest, data = manifest_of(home, entry)
        subjects[digest] = None
        notes = {REF_NAME: entry.ref}
        manifests.append(described(MANIFEST, data, artifactType=ARTIFACT, annotations=notes))
    for subject in sorted(subjects):
        for digest in marked(home, subject):
            with contextlib.suppress(NotFoundError, IntegrityError):
                data = blobs.read(home, digest)
                manifests.append(described(MANIFEST, data, artifactType=str(json.loads(data)["artifactType"])))
    return to_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).decode()


def marks(home: Path, subject: str) -> Path:
    """The folder that names the statements about the manifest `subject`."""
    return home / "referrers" / blobs.blob_path(home, subject).name


def marked(home: Path, subject: str) -> list[str]:
    """Digests (hex) of the manifests that are attached to the manifest `subject`, sorted."""
    try:
        return sorted(name for name in os.listdir(marks(home, subject)) if HEX.fullmatch(name))
    except FileNotFoundError:
        return []


def reached(home: Path, entry: Entry) -> dict[str, Path]:
    """Every blob that `entry` needs, by hex digest; what is attached to it included."""
    manifest, data = manifest_of(home, entry)
    names = {file.sha256 for file in entry.files} | {_hex(manifest), _hex(json.loads(data)["config"]["digest"])}
    for referrer in marked(home, manifest):
        names.add(referrer)
        with contextlib.suppress(NotFoundError, IntegrityError):
            content = json.loads(blobs.read(home, referrer))
            names |= {_hex(part["digest"]) for part in (content["config"], *content["layers"])}
    return {name: blobs.blob_path(home, name) for name in sorted(names)}


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def holders(home: Path, entries: Iterable[Entry]) -> dict[Path, set[str]]:
    """Every blob and mark that `entries` reach, and the `name:tag` of those that do."""
    found: dict[Path, set[str]] = {}
    for entry in entries:
        subject = manifest_of(home, entry)[0]
        names = [marks(home, subject) / name for name in marked(home, subject)]
        for path in [*reached(home, entry).values(), *names]:
            found.setdefault(path, set()).add(entry.ref)
    return found


def exclusive(home: Path, gone: Sequence[Entry], rest: Iterable[Entry], *, doubt: bool = False) -> list[Path]:
    """Blobs and marks that `gone` reaches and `rest` does not. doubt: there are more, unknown, so statements stay."""
    needed = holders(home, rest)
    mine = {blobs.blob_path(home, file.sha256) for entry in gone for file in entry.files}
    return [path for path in (mine if doubt else holders(home, gone)) if path not in needed]


def drop(home: Path, paths: Iterable[Path]) -> None:
    """Remove blobs and marks that nobody needs any more; the lock is held. Marks go first, then what they name."""
    for path in sorted(paths, key=lambda path: path.is_relative_to(home / "blobs")):
        with disk_errors(path), contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if not path.is_relative_to(home / "blobs"):
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()


def stray(home: Path) -> list[Path]:
    """Blobs and marks that no entry reaches; none while a record cannot be read."""
    entries, faults = inventory.read_all(home / "models")
    if faults:
        return []
    needed = holders(home, entries)
    return [
        path
        for folder in (*_ours(home / "referrers"), *(one for one in _ours(home / "blobs") if one.name == "sha256"))
        for path in _ours(folder)
        if HEX.fullmatch(path.name.removesuffix(".part")) and path not in needed and not path.is_dir()
    ]


def _ours(folder: Path) -> list[Path]:
    """What lies in `folder`, sorted; nothing through a link, or if it is gone."""
    try:
        return [] if folder.is_symlink() else sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def unlinked(home: Path) -> list[tuple[Path, File]]:
    """Files of entries that lie there beside their blob: bytes stored twice."""
    found = []
    for entry in inventory.read_all(home / "models")[0]:
        for file in entry.files:
            path, blob = entry.folder / file.path, blobs.blob_path(home, file.sha256)
            with contextlib.suppress(UnsafeInputError):
                own, there = blobs.plain(path), blobs.plain(blob)
                if own is not None and there is not None and not os.path.samestat(own, there):
                    found.append((path, file))
    return found


def unite(home: Path) -> None:
    """Make files that lie beside their blob be the blob, where it is sound; the lock is held. Reads those blobs."""
    for path, file in unlinked(home):
        with contextlib.suppress(CannotLinkError):
            if not blobs.adopt(home, path, file, home / "models" / ".link"):
                log.warning("the blob of %s is damaged", path)

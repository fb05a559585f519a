"""The image layout of a home: written from the records, and what of it belongs to whom.

`sync` is the whole of it: every entry's files linked, its manifest and configuration written, then the index. It reads
no weights, so a home that has no blobs yet, or whose last writer died, is whole after the next write. An entry whose
files cannot be linked (the file system has no hard links, they belong to someone else, they are damaged) is left out of
the index and works as before. `begin`, `refresh` and `done` do the same for one entry. All of it is under the catalog's
lock.

A blob belongs to the entries that reach it: by their files, their manifest, or what is attached to that. What no entry
reaches is stray, and `gc` removes it, but not while a record cannot be read: nobody knows what it would reach.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from weightsmith import inventory
from weightsmith.atomic import disk_errors, sync_folder
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError
from weightsmith.oci import blobs, index
from weightsmith.oci.blobs import CannotLinkError
from weightsmith.oci.manifest import config_of, digest_of, manifest_of
from weightsmith.store import HEX, Entry, File, read_record

log = logging.getLogger(__name__)


def publish(home: Path, files_in: Path, entry: Entry, *, scratch: Path) -> None:
    """Link the files of `entry`, which lie in `files_in`, to blobs and write its manifest.

    Raises CannotLinkError (no hard links there) and NotFoundError (a file is gone or has another size).
    """
    blobs.prepare(home)
    for file in entry.files:
        blobs.share(home, files_in / file.path, file, scratch)
    blobs.write(home, config_of(entry))
    blobs.write(home, manifest_of(home, entry)[1])
    with disk_errors(blobs.folder(home)):
        sync_folder(blobs.folder(home))


def begin(home: Path) -> None:
    """Before a change: see to it that the index tells the truth, and note that it soon will not."""
    if not index.is_sound(home):
        sync(home)
    index.mark(home)


def done(home: Path) -> None:
    """After a change, when index and blobs say the same again."""
    index.unmark(home)


def sync(home: Path) -> None:
    """Bring layout and index to what all records say."""
    models = home / "models"
    for model in models.iterdir() if models.is_dir() else ():
        if model.is_dir() and not model.is_symlink():
            inventory.recover(model)
    blobs.prepare(home)
    made = index.Index()
    refused: list[str] = []
    for entry in inventory.read_all(models)[0]:
        _list(home, entry, made, refused)
    if refused:
        log.warning(
            "%d models are not in the image layout of %s, because their files cannot be hard-linked there; "
            "they work, but tools for OCI layouts do not see them",
            len(refused),
            home,
        )
    index.save(home, made)


def refresh(home: Path, ref: str) -> None:
    """Bring the index to what the record of `ref` says, or that there is none any more."""
    known = index.load(home)
    if known is None:
        sync(home)
        return
    name, _, tag = ref.partition(":")
    refused: list[str] = []
    former = known.named.pop(ref, None)
    with contextlib.suppress(IntegrityError):
        _list(home, read_record(home / "models" / name / tag), known, refused)
    if former is not None and former["digest"] not in known.digests():
        for statement in marked(home, former["digest"]):
            known.statements.pop(f"sha256:{statement}", None)
    if refused:
        log.warning("%s is not in the image layout, because its files cannot be hard-linked; it works", ref)
    index.save(home, known)


def _list(home: Path, entry: Entry, made: index.Index, refused: list[str]) -> None:
    """Put `entry` into the index, and what is attached to it, with everything that it needs."""
    try:
        digest, data = _complete(home, entry)
    except CannotLinkError as error:
        refused.append(entry.ref)
        log.info("%s: %s", entry.ref, error)
    except (NotFoundError, UnsafeInputError) as error:
        log.info("%s is not in the image layout: %s", entry.ref, error)
    else:
        made.name(entry.ref, data)
        for statement in marked(home, digest):
            if f"sha256:{statement}" not in made.statements:
                with contextlib.suppress(NotFoundError, IntegrityError):
                    made.state(blobs.read(home, statement))


def _complete(home: Path, entry: Entry) -> tuple[str, bytes]:
    """Make up for what an entry lacks in the layout, by stat alone: a blob that is there is taken for what it says."""
    for file in entry.files:
        there = blobs.plain(blobs.blob_path(home, file.sha256))
        if there is None or there.st_size != file.size:
            publish(home, entry.folder, entry, scratch=home / "models" / ".link")
            break
    else:
        blobs.write(home, config_of(entry))
        blobs.write(home, manifest_of(home, entry)[1])
    return manifest_of(home, entry)


def marks(home: Path, subject: str) -> Path:
    """The folder that names the statements about the manifest `subject`."""
    return home / "referrers" / blobs.blob_path(home, subject).name


def marked(home: Path, subject: str) -> list[str]:
    """Digests (hex) of the manifests that are attached to the manifest `subject`, sorted."""
    try:
        return sorted(name for name in os.listdir(marks(home, subject)) if HEX.fullmatch(name))
    except FileNotFoundError:
        return []


def reached(home: Path, entry: Entry, *, statements: bool = True) -> set[Path]:
    """Every blob that `entry` needs and, with `statements`, the blobs and marks of what is attached to it."""
    subject, _ = manifest_of(home, entry)
    digests = {file.sha256 for file in entry.files} | {subject, digest_of(config_of(entry))}
    found = set()
    for referrer in marked(home, subject) if statements else ():
        digests.add(referrer)
        found.add(marks(home, subject) / referrer)
        with contextlib.suppress(NotFoundError, IntegrityError):
            content = json.loads(blobs.read(home, referrer))
            digests |= {part["digest"] for part in (content["config"], *content["layers"])}
    return found | {blobs.blob_path(home, digest) for digest in digests}


def holders(home: Path, entries: Iterable[Entry]) -> dict[Path, set[str]]:
    """Every blob and mark that `entries` reach, and the `name:tag` of those that do."""
    found: dict[Path, set[str]] = {}
    for entry in entries:
        for path in reached(home, entry):
            found.setdefault(path, set()).add(entry.ref)
    return found


def exclusive(home: Path, gone: Entry, *, but: Collection[str] = ()) -> list[Path]:
    """Blobs and marks that only `gone` reaches, of all that the index names (`but` for the entries `name:tag`).

    What is attached to it stays while an entry is not in the index: its record may be damaged, and it may be its own.
    """
    known = index.load(home) or index.Index()
    rest = {str(one["digest"]) for ref, one in known.named.items() if ref not in but}
    subject = manifest_of(home, gone)[0]
    if subject in rest:
        return []
    doubt = len(inventory.folders(home / "models")) > len(known.named)
    found = reached(home, gone, statements=not doubt)
    own = {f"sha256:{name}" for name in marked(home, subject)}
    for digest in rest | (known.statements.keys() - (set() if doubt else own)):
        with contextlib.suppress(OSError):
            data = blobs.blob_path(home, digest).read_bytes()
            found -= {path for path in found if path.name.encode() in data}
    return sorted(found)


def drop(home: Path, paths: Iterable[Path]) -> None:
    """Remove blobs and marks that nobody needs any more. Marks go first, then what they name."""
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

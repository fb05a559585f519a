"""Which blobs belong to which entries, for a whole catalog at once, as its manifests say.

The index names the manifest of every entry and a manifest names all that belongs to it, so no record is read; only
where the index lacks an entry, or its manifest cannot be read as one, does the entry's record say it. Nothing is
hashed: this is for counting bytes, and what removes blobs looks again (`layout.exclusive`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weightsmith.errors import IntegrityError
from weightsmith.oci import blobs, index, layout
from weightsmith.oci.manifest import config_of, digest_of, manifest_of
from weightsmith.store import HEX, read_record


@dataclass(frozen=True, slots=True)
class Holding:
    """SHA-256 of an entry's files; and of its manifest, configuration, and what is attached to it."""

    files: frozenset[str]
    beside: frozenset[str]


def holdings(home: Path, entries: Iterable[tuple[str, Path]]) -> dict[str, Holding]:
    """What each of `entries` (`name:tag`, folder) holds, by `name:tag`. One that is gone or damaged holds nothing."""
    known = index.load(home)
    named = known.named if known is not None else {}
    try:
        subjects = set(os.listdir(home / "referrers"))
    except OSError:
        subjects = set()
    found: dict[str, Holding] = {}
    by_manifest: dict[str, Holding] = {}
    for ref, folder in entries:
        digest = str(named[ref]["digest"]) if ref in named else ""
        one = by_manifest.get(digest) or _listed(home, digest, subjects) or _recorded(home, folder, subjects)
        found[ref] = one
        if digest:
            by_manifest[digest] = one
    return found


def _listed(home: Path, digest: str, subjects: set[str]) -> Holding | None:
    """What the manifest `digest` says, None if there is none that says it."""
    parts = _parts(home, digest)
    if parts is None:
        return None
    config, *files = parts
    name = digest.removeprefix("sha256:")
    return Holding(frozenset(files), frozenset({config, name, *_attached(home, name, subjects)}))


def _recorded(home: Path, folder: Path, subjects: set[str]) -> Holding:
    """What the record in `folder` says."""
    try:
        entry = read_record(folder)
    except IntegrityError:
        return Holding(frozenset(), frozenset())
    name = manifest_of(home, entry)[0].removeprefix("sha256:")
    config = digest_of(config_of(entry)).removeprefix("sha256:")
    files = frozenset(file.sha256 for file in entry.files)
    return Holding(files, frozenset({config, name, *_attached(home, name, subjects)}))


def _attached(home: Path, name: str, subjects: set[str]) -> set[str]:
    """The blobs of all statements about the manifest `name`."""
    found: set[str] = set()
    for statement in layout.marked(home, name) if name in subjects else ():
        found |= {statement, *(_parts(home, f"sha256:{statement}") or ())}
    return found


def _parts(home: Path, digest: str) -> list[str] | None:
    """SHA-256 of configuration and layers of the manifest `digest`; None if it is not there or says no such thing."""
    name = digest.removeprefix("sha256:")
    if not HEX.fullmatch(name):
        return None
    try:
        with open(f"{home}/blobs/sha256/{name}", "rb") as file:
            manifest = json.loads(file.read(blobs.MAX_DOCUMENT))
        parts = [part["digest"].removeprefix("sha256:") for part in (manifest["config"], *manifest["layers"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return parts if all(HEX.fullmatch(part) for part in parts) else None

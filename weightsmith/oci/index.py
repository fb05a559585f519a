"""index.json: the manifests of all entries by name, and those of statements about them.

Written whole by `layout.sync`, and changed in place of one entry by everything else: with thousands of entries nobody
wants to compute thousands of manifests to add one. So that the index can be trusted, HOME/models/.changing lies there
while a change is under way. Who finds it, or no index that can be read, writes the whole anew before anything else.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.atomic import disk_errors, sync_folder, write_bytes
from weightsmith.oci.manifest import ARTIFACT, INDEX, MANIFEST, described, to_json

LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
REF_NAME = "org.opencontainers.image.ref.name"
Descriptor = dict[str, Any]


@dataclass(slots=True)
class Index:
    """Descriptors of entries by `name:tag`, and of statements by digest."""

    named: dict[str, Descriptor] = field(default_factory=dict)
    statements: dict[str, Descriptor] = field(default_factory=dict)

    def name(self, ref: str, manifest: bytes) -> None:
        """List the manifest of `ref`."""
        self.named[ref] = described(MANIFEST, manifest, artifactType=ARTIFACT, annotations={REF_NAME: ref})

    def state(self, manifest: bytes) -> None:
        """List the manifest of a statement."""
        found = described(MANIFEST, manifest, artifactType=str(json.loads(manifest)["artifactType"]))
        self.statements[found["digest"]] = found

    def digests(self) -> set[str]:
        """Digests of the entries' manifests."""
        return {str(descriptor["digest"]) for descriptor in self.named.values()}

    def data(self) -> bytes:
        """The file."""
        manifests = [self.named[ref] for ref in sorted(self.named)]
        manifests += [self.statements[digest] for digest in sorted(self.statements)]
        return to_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests})


def load(home: Path) -> Index | None:
    """The index of `home`; None if there is none that could be ours."""
    raw = _held(home / "index.json")
    if raw is None or _held(home / "oci-layout") != LAYOUT:
        return None
    index = Index()
    try:
        for descriptor in json.loads(raw)["manifests"]:
            ref, digest = descriptor.get("annotations", {}).get(REF_NAME), descriptor["digest"]
            (index.named if ref else index.statements)[ref or digest] = descriptor
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return index if index.data() == raw else None


def save(home: Path, index: Index) -> None:
    """Write layout and index, where they are not as they should be."""
    for path, data in ((home / "oci-layout", LAYOUT), (home / "index.json", index.data())):
        if _held(path) != data:
            write_bytes(path, data)


def _held(path: Path) -> bytes | None:
    try:
        return None if path.is_symlink() else path.read_bytes()
    except OSError:
        return None


def _mark(home: Path) -> Path:
    return home / "models" / ".changing"


def is_sound(home: Path) -> bool:
    """Whether no change was left half done and there is an index."""
    return not os.path.lexists(_mark(home)) and load(home) is not None


def mark(home: Path) -> None:
    """Say, durably, that a change is under way; the lock is held."""
    with disk_errors(_mark(home)):
        _mark(home).unlink(missing_ok=True)
        os.close(os.open(_mark(home), os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        sync_folder(home / "models")


def unmark(home: Path) -> None:
    """The change is done."""
    with disk_errors(_mark(home)):
        _mark(home).unlink(missing_ok=True)

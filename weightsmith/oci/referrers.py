"""Statements about an entry: any bytes, as an OCI artifact whose `subject` is the entry's manifest.

    manifest   OCI image manifest v1 with the statement's artifactType, the empty config, one layer, the subject
    layer      the statement itself, of its own media type

What is attached lies in blobs/ like everything else, and an empty file HOME/referrers/SUBJECT/REFERRER says that it is
attached: a copy of the layout finds it by the manifest's subject, as image-spec v1.1 and the referrers API of
distribution-spec v1.1 do. The same statement attached twice is one. It goes when the last entry with its subject goes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from weightsmith.atomic import disk_errors, make_folder, write_bytes
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UnsupportedError, UsageError
from weightsmith.oci import blobs, layout
from weightsmith.oci.manifest import MANIFEST, described, digest_of, manifest_of, to_json
from weightsmith.store import RECORD, Entry, locked, read_record

log = logging.getLogger(__name__)

_FAULTS = (IntegrityError, NotFoundError, UnsafeInputError, UnsupportedError)
CREATED = "org.opencontainers.image.created"
EMPTY_TYPE, EMPTY = "application/vnd.oci.empty.v1+json", b"{}"


@dataclass(frozen=True, slots=True)
class Attached:
    """One statement: digest of its manifest, types, digest of its bytes (for `read`), annotations, UTC ISO 8601."""

    digest: str
    artifact_type: str
    media_type: str
    data: str
    annotations: dict[str, str]
    created: str


def attach(
    catalog_home: Path,
    entry: Entry,
    *,
    artifact_type: str,
    media_type: str,
    data: bytes,
    annotations: Mapping[str, str] | None = None,
) -> str:
    """Hang the statement `data` on the manifest of `entry`; returns the digest of the statement's manifest.

    The same data with the same types and annotations is attached once. The time is now, unless `annotations` has an
    org.opencontainers.image.created. Raises NotFoundError if the catalog does not hold `entry` as it is.
    """
    if not artifact_type or not media_type or len(data) > blobs.MAX_DOCUMENT:
        limit = f"at most {blobs.MAX_DOCUMENT >> 20} MiB, not {len(data)} bytes"
        raise UsageError(f"a statement has an artifact type, a media type and {limit}")
    notes = {str(key): str(value) for key, value in (annotations or {}).items()}
    subject, content = manifest_of(catalog_home, entry)
    with locked(catalog_home / "models" / ".lock"):
        folder = catalog_home / "models" / entry.name / entry.tag
        if not (folder / RECORD).is_file() or manifest_of(catalog_home, read_record(folder))[0] != subject:
            raise NotFoundError(f"{entry.ref} is not in the catalog, or not as it was", path=catalog_home)
        for there in attached(catalog_home, entry, artifact_type):
            same = (there.media_type, there.data) == (media_type, digest_of(data))
            if same and there.annotations == {CREATED: there.created} | notes:
                return there.digest
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        manifest = to_json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "artifactType": artifact_type,
                "config": described(EMPTY_TYPE, EMPTY),
                "layers": [described(media_type, data)],
                "subject": described(MANIFEST, content),
                "annotations": {CREATED: now, **notes},
            }
        )
        layout.begin(catalog_home)
        blobs.write(catalog_home, data)
        blobs.write(catalog_home, EMPTY)
        digest = blobs.write(catalog_home, manifest)
        mark = layout.marks(catalog_home, subject) / digest.removeprefix("sha256:")
        with disk_errors(mark):
            make_folder(mark.parent)
        write_bytes(mark, b"")
        layout.refresh(catalog_home, entry.ref)
        layout.done(catalog_home)
    return digest


def attached(catalog_home: Path, entry: Entry, artifact_type: str | None = None) -> list[Attached]:
    """What is attached to `entry` (of one type, or all), oldest first. What is damaged is warned about and left out."""
    subject, found = manifest_of(catalog_home, entry)[0], []
    for name in layout.marked(catalog_home, subject):
        digest = f"sha256:{name}"
        try:
            one = _parsed(digest, json.loads(blobs.read(catalog_home, digest)), subject)
        except (*_FAULTS, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            log.warning("a statement about %s cannot be read: %s", entry.ref, error)
            continue
        if artifact_type in (None, one.artifact_type):
            found.append(one)
    return sorted(found, key=lambda one: (one.created, one.digest))


def _parsed(digest: str, manifest: dict[str, Any], subject: str) -> Attached:
    if manifest["subject"]["digest"] != subject:
        raise IntegrityError(f"it is about {manifest['subject']['digest']}", path=digest)
    layer = manifest["layers"][0]
    notes = {str(key): str(value) for key, value in manifest["annotations"].items()}
    return Attached(
        digest, str(manifest["artifactType"]), str(layer["mediaType"]), str(layer["digest"]), notes, notes[CREATED]
    )

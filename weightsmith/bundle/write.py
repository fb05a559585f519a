"""Writing a bundle: its size is known before the first byte, and every file is hashed on its way into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from weightsmith import oci
from weightsmith.atomic import AtomicFile
from weightsmith.bundle import tar
from weightsmith.catalog import Catalog
from weightsmith.errors import IntegrityError
from weightsmith.oci.index import LAYOUT, REF_NAME
from weightsmith.oci.manifest import ARTIFACT, INDEX, MANIFEST, config_of, described, to_json
from weightsmith.oci.referrers import CREATED, EMPTY, EMPTY_TYPE
from weightsmith.progress import Ticker, progress
from weightsmith.store import CHUNK, Entry, record_text

RECORD = "application/vnd.weightsmith.record.v1+json"
LINEAGE = "application/vnd.weightsmith.lineage.v1+json"
BLOBS = "blobs/sha256/"


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle: its entries, files of the archive, and bytes."""

    path: Path
    entries: tuple[Entry, ...]
    blobs: int
    nbytes: int


def export(catalog: Catalog, entries: Iterable[Entry], path: Path, *, overwrite: bool = False) -> Exported:
    """Write `entries` with their lineage and what is attached to them into the new file `path`.

    Raises OutputExistsError, ResourceError, and IntegrityError for a file that is not what its record says.
    """
    chosen = sorted({entry.ref: entry for entry in entries}.values(), key=lambda entry: entry.ref)
    index, documents = _documents(catalog, chosen)
    files = {file.sha256: (entry.folder / file.path, file.size) for entry in chosen for file in entry.files}
    heads = {"oci-layout": LAYOUT, "index.json": index}
    sizes = {name: len(data) for name, data in heads.items()}
    sizes |= {
        f"{BLOBS}{name}": len(documents[name]) if name in documents else files[name][1]
        for name in sorted(documents.keys() | files.keys())
    }
    total = sum(tar.BLOCK + tar.padded(size) for size in sizes.values()) + 2 * tar.BLOCK
    out = AtomicFile(path, total, overwrite=overwrite)
    try:
        where = 0
        with progress(f"export {path.name}", total) as ticker:
            for name, size in sizes.items():
                out.write(where, tar.header(name, size))
                where += tar.BLOCK
                bare = name.removeprefix(BLOBS)
                data = heads[name] if name in heads else documents.get(bare)
                if data is None:
                    _copy(files[bare][0], bare, size, out, where, ticker)
                else:
                    out.write(where, data)
                where += tar.padded(size)
        out.commit()
    except BaseException:
        out.abort()
        raise
    return Exported(path, tuple(chosen), len(sizes) - 2, total)


def public(entry: Entry) -> Entry:
    """`entry` without what concerns this machine: folders, and from which bundle it came."""
    origin = {key: value for key, value in entry.origin.items() if key != "imported"}
    if origin.get("kind") == "path":
        name = PurePath(str(origin.get("path") or origin.get("source") or "")).name
        origin = {key: value for key, value in origin.items() if key not in ("path", "asked", "taken")} | {
            "source": name
        }
    return replace(entry, origin=origin)


def _documents(catalog: Catalog, entries: Sequence[Entry]) -> tuple[bytes, dict[str, bytes]]:
    """index.json, and every small blob by its hash."""
    kept: dict[str, bytes] = {hashlib.sha256(EMPTY).hexdigest(): EMPTY}
    models: list[dict[str, Any]] = []
    about: dict[str, dict[str, Any]] = {}

    def keep(data: bytes) -> None:
        kept[hashlib.sha256(data).hexdigest()] = data

    def state(kind: str, data: bytes, subject: bytes, notes: Mapping[str, str]) -> None:
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": kind,
            "config": described(EMPTY_TYPE, EMPTY),
            "layers": [described(kind, data)],
            "subject": described(MANIFEST, subject),
            "annotations": dict(notes),
        }
        keep(data)
        keep(to_json(manifest))
        about[_hex(to_json(manifest))] = described(MANIFEST, to_json(manifest), artifactType=kind)

    for entry in entries:
        _, manifest = oci.manifest_of(catalog.home, entry)
        keep(manifest)
        keep(config_of(entry))
        models.append(described(MANIFEST, manifest, artifactType=ARTIFACT, annotations={REF_NAME: entry.ref}))
        state(RECORD, record_text(public(entry)).encode(), manifest, {CREATED: entry.created, REF_NAME: entry.ref})
        attached = oci.attached(catalog.home, entry)
        for one in attached:
            statement = oci.read(catalog.home, one.digest)
            keep(statement)
            keep(oci.read(catalog.home, one.data))
            about[_hex(statement)] = described(MANIFEST, statement, artifactType=one.artifact_type)
        line = [json.loads(record_text(public(one))) for one in catalog.lineage(entry.ref)[1:]]
        if line and not any(one.artifact_type == LINEAGE for one in attached):
            state(LINEAGE, to_json(line), manifest, {CREATED: entry.created})
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*models, *(about[name] for name in sorted(about))]}
    return to_json(index), kept


def _hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _copy(source: Path, sha256: str, size: int, out: AtomicFile, where: int, ticker: Ticker) -> None:
    digest, done = hashlib.sha256(), 0
    with open(source, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            done += len(chunk)
            if done > size:
                break
            digest.update(chunk)
            out.write(where + done - len(chunk), chunk)
            ticker.update(len(chunk))
    if done != size or digest.hexdigest() != sha256:
        hint = "Nothing was written. Repair it: weightsmith verify --integrity --repair"
        raise IntegrityError("not what its record says", path=source, hint=hint)

"""The manifest of an entry: CNCF ModelPack, one raw layer per file.

    manifest   OCI image manifest v1, artifactType application/vnd.cncf.model.manifest.v1+json
    config     application/vnd.cncf.model.config.v1+json: format, precision or quantization, licence, source, diffIds
    layers     application/vnd.cncf.model.{weight,weight.config,doc,code,dataset}.v1.raw, org.cncf.model.filepath

Both are functions of what was made, not of where and when: no name, no tag, no time, no path of this machine. The same
files with the same origin have the same manifest in every catalog, an alias has that of what it stands for, and what
was attached to one (see referrers.py) is attached to all. So the form below is fixed: another form would be another
digest, and statements would hang on nothing. What the specification has no field for is in annotations:
`weightsmith.digest` (see `store.digest_of`), `weightsmith.parent` (that digest of what it was made from) and
`weightsmith.recipe`.

JSON is written with sorted keys and no spaces. As layers are neither packed nor compressed, a layer's digest is also
its diffId and the file's SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from weightsmith.store import Entry

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
FILEPATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"  # what oras names a file by

_FULL = {"F64", "F32", "F16", "BF16"}
_DOCS = {"license", "licence", "readme", "notice", "use_policy", "copying", "authors", "citation", "changelog"}
_SUFFIXES = {
    "doc": {".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".html", ".cff"},
    "code": {".py", ".sh", ".ipynb", ".c", ".cpp", ".h", ".js", ".ts"},
    "dataset": {".parquet", ".csv", ".arrow"},
    "weight.config": {
        *(".json", ".jsonl", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".txt", ".chk"),
        *(".model", ".tiktoken", ".jinja", ".vocab", ".merges"),
    },
}


def to_json(value: Any) -> bytes:
    """The one form in which manifests, configurations and the index are written."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(data: bytes) -> str:
    """`sha256:HEX` of `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def described(media_type: str, data: bytes, **more: Any) -> dict[str, Any]:
    """The descriptor of a blob that holds `data`."""
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}


def media_type(path: str) -> str:
    """The media type of the layer that holds the file `path` of a checkpoint."""
    name = PurePosixPath(path.lower())
    kind = "doc" if name.name.split(".")[0] in _DOCS else None
    kind = kind or next((kind for kind, suffixes in _SUFFIXES.items() if name.suffix in suffixes), "weight")
    return f"application/vnd.cncf.model.{kind}.v1.raw"


def config_of(entry: Entry) -> bytes:
    """The configuration blob of `entry`."""
    where = _origin(entry)
    descriptor: dict[str, Any] = {key: value for key, value in where.items() if value is not None}
    if entry.licence:
        descriptor["licenses"] = [entry.licence]
    config = {"format": entry.container}
    if entry.type:
        config["precision" if entry.type in _FULL else "quantization"] = entry.type.lower()
    diffs = [f"sha256:{file.sha256}" for file in sorted(entry.files, key=lambda file: file.path)]
    return to_json({"descriptor": descriptor, "config": config, "modelfs": {"type": "layers", "diffIds": diffs}})


def manifest_of(home: Path, entry: Entry) -> tuple[str, bytes]:
    """Digest and bytes of the manifest of `entry`; nothing is read."""
    layers = [
        {
            "mediaType": media_type(file.path),
            "digest": f"sha256:{file.sha256}",
            "size": file.size,
            "annotations": {FILEPATH: file.path, TITLE: file.path},
        }
        for file in sorted(entry.files, key=lambda file: file.path)
    ]
    where = _origin(entry)
    notes = {
        "weightsmith.digest": entry.digest,
        "weightsmith.parent": entry.parent,
        "weightsmith.recipe": to_json(entry.recipe).decode() if entry.recipe is not None else None,
        "org.opencontainers.image.licenses": entry.licence,
        "org.opencontainers.image.source": where["sourceURL"],
        "org.opencontainers.image.revision": where["revision"],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": ARTIFACT,
        "config": described(CONFIG, config_of(entry)),
        "layers": layers,
        "annotations": {key: value for key, value in notes.items() if value},
    }
    data = to_json(manifest)
    return digest_of(data), data


def _origin(entry: Entry) -> dict[str, str | None]:
    """Where the world finds it; what was taken from a path of this machine has no such place."""
    origin = {key: value for key, value in entry.origin.items() if isinstance(value, str)}
    kind, url, revision = origin.get("kind"), None, None
    if kind == "hf" and "repo" in origin:
        url = f"{origin.get('endpoint', 'https://huggingface.co').rstrip('/')}/{origin['repo']}"
        revision = origin.get("commit")
    elif kind == "pypi" and "package" in origin:
        url, revision = f"https://pypi.org/project/{origin['package']}/", origin.get("version")
    elif kind == "url":
        url = origin.get("url")
    return {"sourceURL": url, "revision": revision}

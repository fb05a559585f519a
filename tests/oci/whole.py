"""What a whole store is, checked from the files alone, with none of the code that wrote them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.craft import STRING, gguf, kv
from weightsmith.catalog import Catalog, Entry

MODEL = "application/vnd.cncf.model.manifest.v1+json"
REF = "org.opencontainers.image.ref.name"


def model(text: str = "a") -> bytes:
    """A GGUF file without tensors; `text` makes it another one."""
    return gguf([kv("general.architecture", STRING, "llama"), kv("general.name", STRING, text)], [], b"")


def put(catalog: Catalog, ref: str, text: str = "a", *, more: dict[str, bytes] | None = None, **record: Any) -> Entry:
    """Commit an entry of one small GGUF file and `more`."""
    name, tag = ref.split(":")
    with catalog.reserve(name, tag) as reservation:
        for path, data in {"model.gguf": model(text), **(more or {})}.items():
            (reservation.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (reservation.folder / path).write_bytes(data)
        return reservation.commit(**record)


def blob(home: Path, descriptor: dict[str, Any]) -> bytes:
    """The blob of a descriptor, which must have its size and digest."""
    algorithm, _, name = descriptor["digest"].partition(":")
    data = (home / "blobs" / algorithm / name).read_bytes()
    assert len(data) == descriptor["size"], descriptor
    assert hashlib.new(algorithm, data).hexdigest() == name, descriptor
    return data


def check(home: Path) -> dict[str, Any]:
    """Assert that `home` is a valid image layout in which nothing dangles; its manifests, by name or digest."""
    assert json.loads((home / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((home / "index.json").read_bytes())
    assert index["schemaVersion"] == 2
    found = {}
    for descriptor in index["manifests"]:
        manifest = json.loads(blob(home, descriptor))
        assert manifest["mediaType"] == descriptor["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
        assert manifest["artifactType"] == descriptor["artifactType"]
        for part in (manifest["config"], *manifest["layers"], manifest.get("subject", descriptor)):
            blob(home, part)
        name = descriptor.get("annotations", {}).get(REF, descriptor["digest"])
        assert name not in found
        found[name] = manifest
    for mark in (home / "referrers").glob("*/*"):
        manifest = json.loads((home / "blobs" / "sha256" / mark.name.removesuffix(".part")).read_bytes())
        assert manifest["subject"]["digest"] == f"sha256:{mark.parent.name}"
    return found


def check_settled(home: Path) -> dict[str, Any]:
    """As `check`; besides, the index holds every record, files are blobs, no byte lies twice, none is left over."""
    found = check(home)
    records = {
        f"{path.parent.parent.name}:{path.parent.name}": json.loads(path.read_bytes())
        for path in (home / "models").glob("[!.]*/[!.]*/weightsmith.json")
    }
    assert {name for name in found if not name.startswith("sha256:")} == records.keys()
    inodes: dict[str, int] = {}
    needed = set()
    for ref, record in records.items():
        for file in record["files"]:
            path = home / "models" / ref.replace(":", "/") / file["path"]
            data = path.read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"]), path
            assert inodes.setdefault(file["sha256"], path.stat().st_ino) == path.stat().st_ino, path
            assert (home / "blobs" / "sha256" / file["sha256"]).stat().st_ino == path.stat().st_ino
    index = json.loads((home / "index.json").read_bytes())["manifests"]
    models = {descriptor["digest"] for descriptor in index if descriptor["artifactType"] == MODEL}
    for descriptor in index:
        manifest = json.loads(blob(home, descriptor))
        needed |= {part["digest"] for part in (descriptor, manifest["config"], *manifest["layers"])}
        assert "subject" not in manifest or manifest["subject"]["digest"] in models
    assert {f"sha256:{path.name}" for path in (home / "blobs" / "sha256").iterdir()} == needed
    assert [path.name for path in (home / "models").glob("*/.*")] == []
    return found

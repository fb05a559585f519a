"""What `du` counts by: the manifests say what the records say, and where they do not, the records are asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oci.whole import put
from weightsmith import oci, store, usage
from weightsmith.catalog import Catalog
from weightsmith.oci.layout import reached
from weightsmith.store import read_record

KIND = "application/vnd.test.statement.v1"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Two entries that share a file, an alias, a copy with another origin, statements."""
    catalog = Catalog(tmp_path / "home")
    entry = put(catalog, "m:t", "a", more={"shared.txt": b"shared", "own.txt": b"own"})
    put(catalog, "m:u", "b", more={"deep/shared.txt": b"shared"})
    put(catalog, "n:t", "a", origin={"kind": "url", "url": "https://host/a.gguf"})
    with catalog.reserve("m", "prod") as reservation:
        reservation.link(entry)
    for data in (b"one", b"two"):
        oci.attach(catalog.home, entry, artifact_type=KIND, media_type=KIND, data=data)
    return catalog


def told(catalog: Catalog) -> dict[str, set[str]]:
    found = oci.holdings(catalog.home, [(entry.ref, entry.folder) for entry in catalog.summaries()])
    return {ref: set(one.files | one.beside) for ref, one in found.items()}


def by_record(catalog: Catalog) -> dict[str, set[str]]:
    blobs = catalog.home / "blobs"
    found = {entry.ref: reached(catalog.home, entry) for entry in catalog.entries()}
    return {ref: {path.name for path in paths if path.is_relative_to(blobs)} for ref, paths in found.items()}


@pytest.mark.parametrize("harm", ["none", "no index", "manifest gone", "manifest damaged", "manifest of other kind"])
def test_manifests_say_what_records_say(harm: str, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_record(catalog)
    assert len(expected["m:t"]) == 3 + 2 + 2 * 2 + 1, "files, manifest and configuration, two statements, the empty one"
    read: list[str] = []

    def record(folder: Path) -> store.Entry:
        read.append(f"{folder.parent.name}:{folder.name}")
        return read_record(folder)

    monkeypatch.setattr("weightsmith.oci.held.read_record", record)
    manifest = oci.blob_path(catalog.home, oci.manifest_of(catalog.home, catalog.get("m:u"))[0])
    if harm == "no index":
        (catalog.home / "index.json").unlink()
    elif harm == "manifest gone":
        manifest.unlink()
    elif harm != "none":
        manifest.write_bytes(b"[" * 9000 if harm == "manifest damaged" else b'{"config": {}, "layers": [7]}')
    assert told(catalog) == expected
    assert read == {"none": [], "no index": ["m:prod", "m:t", "m:u", "n:t"]}.get(harm, ["m:u"])


def test_du_tells_what_rm_frees(catalog: Catalog) -> None:
    """For each entry, and with each removed: the bytes on the disk before and after."""
    shrinks = ("index.json", "models/.index")

    def measured() -> int:
        now = usage.on_disk([catalog.home])
        return now - sum((catalog.home / name).stat().st_size for name in shrinks if (catalog.home / name).exists())

    found, models = usage.by_entry(catalog)
    assert usage.total(found) == usage.on_disk([catalog.models]) - _hidden(catalog.models)
    assert set(models) == {"m", "n"}
    for ref in ("m:prod", "n:t", "m:t", "m:u"):
        (one,) = usage.by_entry(catalog, [ref])[0]
        before = measured()
        assert catalog.remove(ref).freed == one.freed == before - measured(), ref


def test_a_file_that_left_the_folder_is_counted_as_gone(catalog: Catalog) -> None:
    (catalog.get("m:t").folder / "own.txt").unlink()
    by_ref = {one.entry.ref: one for one in usage.by_entry(catalog)[0]}
    assert by_ref["m:t"].nbytes == by_ref["m:prod"].nbytes - len(b"own") + _difference(catalog)


def _difference(catalog: Catalog) -> int:
    """The alias's record has other lengths than the one of what it stands for."""
    sizes = [(catalog.get(ref).folder / store.RECORD).stat().st_size for ref in ("m:t", "m:prod")]
    return sizes[0] - sizes[1]


def _hidden(models: Path) -> int:
    """Files of the catalog itself, beside the entries."""
    return sum(path.stat().st_size for path in models.iterdir() if path.is_file())

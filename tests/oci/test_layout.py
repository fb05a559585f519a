"""The catalog as an image layout: what is in it, that nothing lies twice, old homes, file systems without links."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from tests.oci.whole import check, check_settled, model, put
from weightsmith import oci, store, usage
from weightsmith.catalog import Catalog
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, WeightsmithError
from weightsmith.oci import manifest
from weightsmith.store import RECORD

FILES = {
    "config.json": b"{}",
    "README.md": b"words",
    "LICENSE": b"terms",
    "deep/tokenizer.model": b"pieces",
    "code.py": b"pass",
    "data.parquet": b"rows",
    "empty": b"",
    "also_empty": b"",
}


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "home")


def test_an_entry_is_a_manifest_whose_layers_are_its_files(catalog: Catalog) -> None:
    origin = {"kind": "hf", "repo": "o/r", "commit": "c" * 40, "endpoint": "https://huggingface.co", "licence": "mit"}
    entry = put(catalog, "m:original", more=FILES, origin=origin)
    (found,) = check_settled(catalog.home).values()
    layers = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in found["layers"]}
    assert {name: layer["digest"] for name, layer in layers.items()} == {
        file.path: f"sha256:{file.sha256}" for file in entry.files
    }
    assert {name: layer["mediaType"].removeprefix("application/vnd.cncf.model.") for name, layer in layers.items()} == {
        "README.md": "doc.v1.raw",
        "LICENSE": "doc.v1.raw",
        "also_empty": "weight.v1.raw",
        "empty": "weight.v1.raw",
        "code.py": "code.v1.raw",
        "config.json": "weight.config.v1.raw",
        "data.parquet": "dataset.v1.raw",
        "deep/tokenizer.model": "weight.config.v1.raw",
        "model.gguf": "weight.v1.raw",
    }
    assert list(layers) == sorted(layers)
    config = json.loads(oci.read(catalog.home, found["config"]["digest"]))
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in found["layers"]]}
    assert config["config"] == {"format": "gguf"}
    assert config["descriptor"] == {
        "licenses": ["mit"],
        "revision": "c" * 40,
        "sourceURL": "https://huggingface.co/o/r",
    }
    digest, data = oci.manifest_of(catalog.home, entry)
    assert json.loads(data) == found
    assert oci.read(catalog.home, digest) == data


def test_the_form_of_a_manifest_is_fixed(catalog: Catalog) -> None:
    """Statements hang on the digest: another form would lose them all."""
    entry = put(catalog, "m:original", licence="mit", recipe={"target": "gguf", "version": "0"})
    assert oci.manifest_of(catalog.home, entry)[0] == (
        "sha256:235b2d9746fb8bff22e64dfc9a0916a04da9f941addb54973da3da5a08e8e868"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-00001-of-00002.safetensors", "weight"),
        ("model.safetensors.index.json", "weight.config"),
        ("consolidated.00.pth", "weight"),
        ("ckpt-0/tensor00000_000", "weight"),
        ("tokenizer.tok.json", "weight.config"),
        ("chat_template.jinja", "weight.config"),
        ("merges.txt", "weight.config"),
        ("LICENSE.txt", "doc"),
        ("docs/USE_POLICY.md", "doc"),
        ("readme", "doc"),
        ("Model.GGUF", "weight"),
    ],
)
def test_media_types(name: str, kind: str) -> None:
    assert manifest.media_type(name) == f"application/vnd.cncf.model.{kind}.v1.raw"


def test_a_path_of_this_machine_is_in_no_manifest(catalog: Catalog) -> None:
    put(catalog, "m:t", origin={"kind": "path", "source": "/secret/place", "path": "/secret/place"})
    assert not [path for path in (catalog.home / "blobs" / "sha256").iterdir() if b"secret" in path.read_bytes()]


def test_the_same_files_are_one_manifest_and_one_set_of_bytes(catalog: Catalog, tmp_path: Path) -> None:
    first, second = put(catalog, "m:a"), put(catalog, "other:b")
    assert first.path.samefile(second.path)
    found = check_settled(catalog.home)
    assert found["m:a"] == found["other:b"]
    elsewhere = Catalog(tmp_path / "elsewhere")
    third = put(elsewhere, "x:y")
    assert oci.manifest_of(elsewhere.home, third) == oci.manifest_of(catalog.home, first)
    with catalog.reserve("m", "prod") as reservation:
        alias = reservation.link(first)
    assert alias.path.samefile(first.path)
    assert oci.manifest_of(catalog.home, alias) == oci.manifest_of(catalog.home, first)
    check_settled(catalog.home)


def test_replaced_and_removed_entries_leave_nothing(catalog: Catalog) -> None:
    put(catalog, "m:t", "a", more={"config.json": b"{}"})
    put(catalog, "m:t", "b", more={"config.json": b"{}"}, overwrite=True)
    put(catalog, "n:t", "c", more={"config.json": b"{}"})
    check_settled(catalog.home)
    catalog.remove("m:t")
    check_settled(catalog.home)
    catalog.remove("n:t")
    assert check_settled(catalog.home) == {}
    assert list((catalog.home / "blobs" / "sha256").iterdir()) == []


@pytest.mark.parametrize("how", ["next write", "gc"])
def test_a_home_without_blobs_is_taken_over(catalog: Catalog, how: str) -> None:
    """As it was before there was a layout: one entry and a copy of it, each with bytes of its own."""
    first, second = put(catalog, "m:a"), put(catalog, "m:b")
    shutil.rmtree(catalog.home / "blobs")
    (catalog.home / "index.json").unlink()
    (catalog.home / "oci-layout").unlink()
    data = second.path.read_bytes()
    second.path.unlink()
    second.path.write_bytes(data)
    if how == "next write":
        put(catalog, "n:c", "c")
        assert check(catalog.home).keys() == {"m:a", "m:b", "n:c"}
    (twice,) = [item for item in usage.garbage(catalog) if item.what == usage.TWICE] or [None]
    assert (twice is not None) == (how == "next write")
    usage.collect(catalog, usage.garbage(catalog))
    check_settled(catalog.home)
    assert first.path.samefile(second.path)


def test_gc_says_what_a_second_copy_would_free(catalog: Catalog) -> None:
    put(catalog, "m:a")
    second = put(catalog, "m:b")
    second.path.unlink()
    second.path.write_bytes(model())
    found = usage.garbage(catalog)
    assert [(item.path, item.what, item.nbytes) for item in found] == [(second.path, usage.TWICE, len(model()))]
    assert usage.collect(catalog, found) == len(model())
    assert usage.garbage(catalog) == []
    check_settled(catalog.home)


def test_a_rotten_blob_does_not_replace_what_was_just_verified(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    first = put(catalog, "m:a")
    os.chmod(first.path, 0o644)
    first.path.write_bytes(bytes(len(model())))
    with caplog.at_level(logging.WARNING):
        second = put(catalog, "m:b")
    assert "was damaged" in caplog.text
    assert second.path.read_bytes() == model()
    assert oci.blob_path(catalog.home, second.files[0].sha256).samefile(second.path)
    found = usage.garbage(catalog)
    assert [item.path for item in found] == [first.path]
    usage.collect(catalog, found)
    assert first.path.read_bytes() == model(), "gc healed it by the sound blob"


def test_strays_are_garbage_and_what_is_in_the_making_is_not(catalog: Catalog) -> None:
    entry = put(catalog, "m:a")
    folder = catalog.home / "blobs" / "sha256"
    (folder / ("0" * 64)).write_bytes(b"12345")
    (folder / f"{'1' * 64}.part").write_bytes(b"123")
    marks = catalog.home / "referrers" / ("2" * 64)
    marks.mkdir(parents=True)
    (marks / ("3" * 64)).touch()
    found = usage.garbage(catalog)
    assert sorted((item.path.name[0], item.nbytes) for item in found) == [("0", 5), ("1", 3), ("3", 0)]
    assert usage.collect(catalog, found) == 8
    assert not marks.exists()
    check_settled(catalog.home)
    # An entry that came after the look is nobody's garbage.
    planned = [usage.Garbage(oci.blob_path(catalog.home, entry.files[0].sha256), "a blob of no entry", 1, 0.0)]
    assert usage.collect(catalog, planned) == 0
    check_settled(catalog.home)


def test_a_damaged_record_keeps_its_blobs_and_everybodys_statements(catalog: Catalog) -> None:
    good, bad = put(catalog, "m:a", "a"), put(catalog, "m:b", "b")
    stated = oci.attach(catalog.home, bad, artifact_type="x/y", media_type="text/plain", data=b"it is good")
    kept = (bad.folder / RECORD).read_text()
    (bad.folder / RECORD).write_text("{")
    size = good.nbytes
    assert usage.garbage(catalog) == []
    assert catalog.remove("m:a").freed >= size
    usage.collect(catalog, usage.garbage(catalog))
    check(catalog.home)
    (bad.folder / RECORD).write_text(kept)
    usage.collect(catalog, usage.garbage(catalog))
    assert [one.digest for one in oci.attached(catalog.home, bad)] == [stated]
    check_settled(catalog.home)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK])
def test_a_file_system_without_hard_links_is_told(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with caplog.at_level(logging.WARNING):
        entry = put(catalog, "m:t")
        put(catalog, "m:u")
    assert "cannot be hard-linked" in caplog.text
    assert catalog.get("m:t").path.read_bytes() == model()
    assert check(catalog.home) == {}, "no entry is promised that is not there"
    freed = catalog.remove("m:t").freed
    assert freed == entry.nbytes + len(store.record_text(entry).encode())
    monkeypatch.undo()
    usage.collect(catalog, usage.garbage(catalog))
    assert check_settled(catalog.home).keys() == {"m:u"}


@pytest.mark.parametrize("where", ["weights", "manifest"])
def test_a_link_planted_at_a_blob_is_refused(catalog: Catalog, tmp_path: Path, where: str) -> None:
    """R15: nothing is opened, written or removed through a link that somebody put there."""
    entry = put(catalog, "m:t")
    digest = entry.files[0].sha256 if where == "weights" else oci.manifest_of(catalog.home, entry)[0]
    catalog.remove("m:t")
    victim = tmp_path / "victim"
    victim.write_bytes(model())
    blob = oci.blob_path(catalog.home, digest)
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.symlink_to(victim)
    with pytest.raises(UnsafeInputError):
        put(catalog, "m:t")
    with pytest.raises(UnsafeInputError):
        oci.read(catalog.home, digest)
    assert victim.read_bytes() == model()
    usage.collect(catalog, usage.garbage(catalog))
    assert victim.read_bytes() == model()
    assert not blob.is_symlink()


@pytest.mark.parametrize("digest", ["", "sha256:", "a" * 63, "A" * 64, f"sha256:../{'a' * 61}", f"md5:{'a' * 64}"])
def test_what_is_no_digest_becomes_no_path(catalog: Catalog, digest: str) -> None:
    """R11."""
    with pytest.raises(UnsafeInputError):
        oci.blob_path(catalog.home, digest)
    with pytest.raises(UnsafeInputError):
        oci.read(catalog.home, digest)


def test_read_verifies(catalog: Catalog) -> None:
    entry = put(catalog, "m:t")
    digest, data = oci.manifest_of(catalog.home, entry)
    assert oci.read(catalog.home, digest) == oci.read(catalog.home, digest.removeprefix("sha256:")) == data
    oci.blob_path(catalog.home, digest).write_bytes(data + b" ")
    with pytest.raises(IntegrityError):
        oci.read(catalog.home, digest)
    with pytest.raises(NotFoundError):
        oci.read(catalog.home, "0" * 64)
    usage.collect(catalog, [])  # gc makes it anew
    assert oci.read(catalog.home, digest) == data


@pytest.mark.parametrize("name", ["index.json", "oci-layout", "models/.link", "models/.changing", "index.json.part"])
def test_a_link_planted_where_the_layout_is_written_is_not_followed(
    catalog: Catalog, tmp_path: Path, name: str
) -> None:
    """R15, for everything that has a fixed name."""
    put(catalog, "m:a")
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    touched = victim.stat().st_mtime_ns
    (catalog.home / name).unlink(missing_ok=True)
    (catalog.home / name).symlink_to(victim)
    second = put(catalog, "m:b", "a", overwrite=True) if not name.endswith(".part") else None
    if second is None:
        with pytest.raises(WeightsmithError):
            put(catalog, "m:b", "b")
        (catalog.home / name).unlink()
    assert (victim.read_bytes(), victim.stat().st_mtime_ns) == (b"precious", touched)
    usage.collect(catalog, usage.garbage(catalog))
    assert (victim.read_bytes(), victim.stat().st_mtime_ns) == (b"precious", touched)
    check_settled(catalog.home)


@pytest.mark.parametrize("name", ["blobs", "blobs/sha256"])
def test_a_folder_of_blobs_that_leads_elsewhere_is_refused(catalog: Catalog, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ("0" * 64)).write_bytes(b"precious")
    (catalog.home / name).parent.mkdir(parents=True, exist_ok=True)
    (catalog.home / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInputError):
        put(catalog, "m:a")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["0" * 64]
    assert usage.garbage(catalog) == []


def test_a_change_that_was_left_half_done_is_made_up_for(catalog: Catalog) -> None:
    """The mark of a killed run makes the next writer look at everything."""
    put(catalog, "m:a", "a")
    put(catalog, "m:b", "b")
    index = json.loads((catalog.home / "index.json").read_bytes())
    index["manifests"].pop()
    (catalog.home / "index.json").write_bytes(manifest.to_json(index))
    put(catalog, "m:c", "c")
    assert check(catalog.home).keys() == {"m:a", "m:c"}, "an index that could be right is believed"
    (catalog.models / ".changing").touch()
    put(catalog, "m:d", "d")
    check_settled(catalog.home)
    assert not (catalog.models / ".changing").exists()


@pytest.mark.parametrize("junk", [b"", b"{}", b"[]", b'{"manifests": [1]}', b"\xff", b"[" * 100000])
def test_an_index_that_is_none_is_written_anew(catalog: Catalog, junk: bytes) -> None:
    put(catalog, "m:a", "a")
    (catalog.home / "index.json").write_bytes(junk)
    put(catalog, "m:b", "b")
    check_settled(catalog.home)


def test_looking_reads_no_blob(
    catalog: Catalog, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`list`, `show` and `path` are as they were: they work where there are no blobs at all."""
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(catalog.home))
    put(catalog, "m:a", "a")
    told = []
    for gone in (False, True):
        if gone:
            shutil.rmtree(catalog.home / "blobs")
            (catalog.home / "index.json").unlink()
        for args in (["list"], ["show", "m:a"], ["path", "m:a"], ["lineage", "m:a"]):
            assert run([*args, "--json"]) == 0
            told.append(capsys.readouterr())
    assert told[:4] == told[4:]

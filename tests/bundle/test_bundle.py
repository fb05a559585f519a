"""export and import through the command line: two homes, equal digests; and what hostile hands make of the file."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.loopback.pull import ROOT
from tests.oci.whole import check, check_settled, model, put
from weightsmith import oci
from weightsmith.bundle import tar
from weightsmith.bundle.write import LINEAGE, RECORD
from weightsmith.catalog import Catalog
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError, UnsafeInputError

SAFELY: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4

Told = Callable[..., dict[str, Any]]
ORIGIN = {"kind": "hf", "source": "hf://org/m@" + "a" * 40, "repo": "org/m", "commit": "a" * 40, "revision": "main"}


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    def call(*args: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert run([*map(str, args), "--json", "-q"]) == code
        parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
        return parsed

    return call


@pytest.fixture
def first(tmp_path: Path) -> Catalog:
    """m:original (two files), m:q8_0 made from it and judged, an alias of that; a statement about it."""
    catalog = Catalog(tmp_path / "weightsmith-home")
    parent = put(catalog, "m:original", "full", more={"sub/notes.txt": b"notes", "empty.txt": b""}, origin=ORIGIN)
    made = put(catalog, "m:q8_0", "small", parent=parent, recipe={"target": "gguf:Q8_0"})
    made = catalog.evaluated(made.ref, {"kind": "gate", "gate": "close", "passed": True, "missed": [], "when": "2026"})
    with catalog.reserve("m", "prod") as reservation:
        reservation.link(made)
    kind = "application/vnd.in-toto+json"
    oci.attach(catalog.home, made, artifact_type=kind, media_type=kind, data=b'{"says": 1}', annotations={"by": "me"})
    return catalog


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Catalog]:
    """Move to another machine: a new home each time."""

    def go() -> Catalog:
        home = tmp_path / f"home-{len(list(tmp_path.glob('home-*')))}"
        monkeypatch.setenv("WEIGHTSMITH_HOME", str(home))
        return Catalog(home)

    return go


@pytest.fixture
def bundle(first: Catalog, told: Told, tmp_path: Path) -> Path:
    told("export", "m:q8_0", "m:prod", "--with-parents", "-o", tmp_path / "m.tar")
    return tmp_path / "m.tar"


def test_there_and_back(first: Catalog, bundle: Path, told: Told, elsewhere: Any, tmp_path: Path) -> None:
    ours = told("list")["models"]
    shown = told("show", "m:q8_0")["catalog"]
    second = elsewhere()
    found = told("import", bundle)
    assert [(one["ref"], one["new"]) for one in found["models"]] == [
        ("m:original", True),
        ("m:q8_0", True),
        ("m:prod", True),
    ]
    theirs = told("list")["models"]
    drop = {"path"}
    assert [{k: v for k, v in one.items() if k not in drop} for one in theirs] == [
        {k: v for k, v in one.items() if k not in drop} for one in ours
    ]
    again = told("show", "m:q8_0")["catalog"]
    assert again["lineage"] == shown["lineage"] == ["m:q8_0", "m:original"]
    assert again["evaluations"] == shown["evaluations"]
    assert again["gates"] == shown["gates"]
    assert told("show", "m:original")["catalog"]["origin"]["imported"].startswith("sha256:")
    for one in first.entries():
        for file in one.files:
            there = second.home / "models" / one.name / one.tag / file.path
            assert there.read_bytes() == (one.folder / file.path).read_bytes()
    check_settled(second.home)
    (said,) = oci.attached(second.home, second.get("m:q8_0"), "application/vnd.in-toto+json")
    assert said == oci.attached(first.home, first.get("m:q8_0"), "application/vnd.in-toto+json")[0]
    assert told("verify", "--integrity")["passed"]
    # What came from there goes on from here as the same bytes.
    told("export", "m:q8_0", "m:prod", "--with-parents", "-o", tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == bundle.read_bytes()
    # A second import says that all is there, and changes nothing.
    before = sorted((str(p), p.stat().st_mtime_ns) for p in second.models.rglob("*") if p.name != ".index")
    assert [one["new"] for one in told("import", bundle)["models"]] == [False] * 3
    after = sorted((str(p), p.stat().st_mtime_ns) for p in second.models.rglob("*") if p.name != ".index")
    assert [one for one in after if not one[0].endswith("models/.lock")] == [
        one for one in before if not one[0].endswith("models/.lock")
    ]


def test_the_bytes_depend_on_the_entries_alone(first: Catalog, told: Told, tmp_path: Path) -> None:
    told("export", "m:original", "m:q8_0", "-o", tmp_path / "a.tar")
    shutil.move(first.home, tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))
    os.environ["WEIGHTSMITH_HOME"] = str(tmp_path / "moved")
    told("export", "m:q8_0", "m:original", "m:q8_0", "-o", tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_what_is_written_is_a_tar_of_an_image_layout(bundle: Path, tmp_path: Path) -> None:
    """Read by Python's tarfile, and checked as a layout by none of the code that wrote it."""
    with tarfile.open(bundle) as archive:
        members = archive.getmembers()
        assert [one.name for one in members] == ["oci-layout", "index.json", *sorted(one.name for one in members[2:])]
        assert {(one.mtime, one.uid, one.gid, one.mode, one.uname, one.type) for one in members} == {
            (0, 0, 0, 0o644, "", tarfile.REGTYPE)
        }
        archive.extractall(tmp_path / "layout", **SAFELY)
    found = check(tmp_path / "layout")
    assert {"m:original", "m:q8_0", "m:prod"} <= found.keys()
    kinds = sorted(one["artifactType"] for one in found.values() if "subject" in one)
    assert kinds.count(RECORD) == 3
    assert "application/vnd.in-toto+json" in kinds


def test_lineage_comes_along_without_its_bytes(first: Catalog, told: Told, elsewhere: Any, tmp_path: Path) -> None:
    told("export", "m:q8_0", "-o", tmp_path / "m.tar")
    second = elsewhere()
    told("import", tmp_path / "m.tar")
    assert [one["ref"] for one in told("list")["models"]] == ["m:q8_0"]
    (line,) = oci.attached(second.home, second.get("m:q8_0"), LINEAGE)
    ((parent,),) = [json.loads(oci.read(second.home, line.data))]
    assert (parent["tag"], parent["digest"]) == ("original", first.get("m:original").digest)
    assert parent["origin"]["commit"] == "a" * 40
    told("export", "m:q8_0", "-o", tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "m.tar").read_bytes()


def test_places_of_this_machine_stay_here(told: Told, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "weightsmith-home")
    where = str(tmp_path / "secret" / "weights")
    origin = {"kind": "path", "source": where, "path": where, "asked": [where, ""], "taken": "hardlink"}
    put(catalog, "m:original", origin=origin)
    told("export", "m", "-o", tmp_path / "m.tar")
    data = (tmp_path / "m.tar").read_bytes()
    assert b"secret" not in data
    assert b'"source": "weights"' in data


def test_a_name_that_is_taken(first: Catalog, bundle: Path, told: Told, elsewhere: Any) -> None:
    second = elsewhere()
    put(second, "m:q8_0", "something else")
    assert "other bytes" in told("import", bundle, code=2)["error"]["message"]
    assert [one["ref"] for one in told("list")["models"]] == ["m:q8_0"], "all or nothing"
    told("import", bundle, "--force")
    assert second.get("m:q8_0").digest == first.get("m:q8_0").digest
    check_settled(second.home)


def test_a_dry_run_imports_nothing(bundle: Path, told: Told, elsewhere: Any) -> None:
    second = elsewhere()
    assert [one["new"] for one in told("import", bundle, "--dry-run")["models"]] == [True] * 3
    assert not second.home.exists()


def test_a_damaged_entry_is_not_exported(first: Catalog, told: Told, tmp_path: Path) -> None:
    path = first.get("m:q8_0").path
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "not what its record says" in told("export", "m:q8_0", "-o", tmp_path / "m.tar", code=3)["error"]["message"]
    assert list(tmp_path.glob("m.tar*")) == []
    (tmp_path / "m.tar").write_text("mine")
    told("export", "m:original", "-o", tmp_path / "m.tar", code=2)
    assert (tmp_path / "m.tar").read_text() == "mine"


def test_a_full_disk_is_told_before_anything_is_written(
    bundle: Path, told: Told, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = elsewhere()
    usage = shutil.disk_usage(bundle)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    told("import", bundle, code=6)
    assert list((second.home / "models").rglob("*")) == []
    assert not (second.home / "staging").exists()


def _members(bundle: Path) -> dict[str, bytes]:
    with tarfile.open(bundle) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive.getmembers()}  # type: ignore[union-attr]


def _pack(path: Path, members: dict[str, bytes], *more: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info, data in more:
            archive.addfile(info, io.BytesIO(data))
    return path


def _nothing(catalog: Catalog) -> None:
    """Nothing of an import can be seen, and nothing is left in staging."""
    assert catalog.entries() == []
    blobs = catalog.home / "blobs"
    assert [path for path in blobs.rglob("*") if path.is_file()] == [] if blobs.exists() else True
    staging = catalog.home / "staging"
    assert [path for path in staging.iterdir() if path.is_dir()] == [] if staging.exists() else True


def test_another_tars_archive_is_read(bundle: Path, told: Told, elsewhere: Any, tmp_path: Path) -> None:
    """The same layout, packed by Python's tarfile with folders, pax headers and a leading ./"""
    folder = tmp_path / "layout"
    with tarfile.open(bundle) as archive:
        archive.extractall(folder, **SAFELY)
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as archive:
            archive.add(folder, ".")
        elsewhere()
        assert len(told("import", tmp_path / f"{number}.tar")["models"]) == 3


def test_every_flipped_byte_of_a_blob_is_found(bundle: Path, told: Told, elsewhere: Any, tmp_path: Path) -> None:
    second = elsewhere()
    members = _members(bundle)
    for name, data in members.items():
        if name.startswith("blobs/") and data:
            spoiled = data[:-1] + bytes([data[-1] ^ 1])
            path = _pack(tmp_path / "spoiled.tar", {**members, name: spoiled})
            assert told("import", path, code=3)["error"]["kind"] == "IntegrityError", name
            _nothing(second)


def _odd(kind: bytes, name: str = "blobs/sha256/extra", to: str = "/etc/passwd") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info, b""


def _plain(name: str) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = 1
    return info, b"x"


@pytest.mark.parametrize(
    "extra",
    [
        _odd(tarfile.SYMTYPE),
        _odd(tarfile.LNKTYPE, to="index.json"),
        _odd(tarfile.CHRTYPE),
        _odd(tarfile.BLKTYPE),
        _odd(tarfile.FIFOTYPE),
        _odd(tarfile.GNUTYPE_SPARSE),
        _odd(tarfile.SYMTYPE, "blobs", "/tmp"),
        _odd(tarfile.DIRTYPE, "../out"),
        _plain("../../escape"),
        _plain("/etc/cron.d/x"),
        _plain("blobs/../../x"),
        _plain("a//b"),
        _plain("C:\\x"),
        _plain("nul"),
        _plain("a\nb"),
        _plain("x" * 300),
    ],
    ids=lambda one: f"{one[0].type!r} {one[0].name[:20]!r}",
)
def test_links_devices_and_names_that_leave(
    extra: tuple[tarfile.TarInfo, bytes], bundle: Path, told: Told, elsewhere: Any, tmp_path: Path
) -> None:
    second = elsewhere()
    path = _pack(tmp_path / "hostile.tar", _members(bundle), extra)
    assert told("import", path, code=4)["error"]["kind"] == "UnsafeInputError"
    _nothing(second)


def _remade(bundle: Path, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The bundle with another record of m:original, every hash above it made right again."""
    members = _members(bundle)
    index = json.loads(members["index.json"])
    for descriptor in index["manifests"]:
        manifest = json.loads(members["blobs/sha256/" + descriptor["digest"][7:]])
        if manifest["artifactType"] != RECORD:
            continue
        record = json.loads(members["blobs/sha256/" + manifest["layers"][0]["digest"][7:]])
        if record["tag"] != "original":
            continue
        record = copy.deepcopy(record)
        record = change(record) or record
        data = record if isinstance(record, bytes) else json.dumps(record).encode()
        manifest["layers"][0] |= {"digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}
        members["blobs/sha256/" + hashlib.sha256(data).hexdigest()] = data
        text = json.dumps(manifest).encode()
        descriptor |= {"digest": f"sha256:{hashlib.sha256(text).hexdigest()}", "size": len(text)}
        members["blobs/sha256/" + hashlib.sha256(text).hexdigest()] = text
    members["index.json"] = json.dumps(index).encode()
    return _pack(path, members)


def _deep(record: dict[str, Any]) -> None:
    for _ in range(100):
        record["origin"] = {"x": record["origin"]}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda r: r.update(tag="../x"), 4),
        (lambda r: r.update(name="a/b"), 4),
        (lambda r: r.update(name=None), 3),
        (lambda r: r.update(licence="\x1b]0;owned\x07"), 4),
        (lambda r: r["origin"].update(note="\x9b31m"), 4),
        (lambda r: r["files"][0].update(path="../../x"), 3),
        (lambda r: r["files"][0].update(size=1), 3),
        (lambda r: r["files"][0].update(sha256="0" * 64), 3),
        (lambda r: r["files"].append(dict(r["files"][0])), 3),
        (lambda r: r.update(digest="0" * 64), 3),
        (lambda r: r.update(alias_of="../x"), 4),
        (lambda r: r.update(parent=7), 3),
        (lambda r: r.update(container=["gguf"]), 3),
        (lambda r: r.update(container="safetensors"), 3),
        (lambda r: r.update(evaluations=[1]), 3),
        (lambda r: r.update(recipe={"target": "gguf:Q4_0"}), 3),
        (lambda r: r["origin"].update(repo="meta-llama/Famous"), 3),
        (lambda r: r.update(surprise=1), 3),
        (lambda r: b"{", 3),
        (lambda r: json.dumps(r).replace('"main"', "NaN").encode(), 3),
        (lambda r: b"[" * 100_000, 3),
        (_deep, 4),
    ],
)
def test_records_that_lie(
    change: Callable[[dict[str, Any]], Any], code: int, bundle: Path, told: Told, elsewhere: Any, tmp_path: Path
) -> None:
    second = elsewhere()
    told("import", _remade(bundle, tmp_path / "lie.tar", change), code=code)
    _nothing(second)


def test_a_record_that_is_left_as_it_is_passes(bundle: Path, told: Told, elsewhere: Any, tmp_path: Path) -> None:
    elsewhere()
    told("import", _remade(bundle, tmp_path / "same.tar", lambda r: None))


def test_what_no_reader_can_open_does_not_appear(first: Catalog, told: Told, elsewhere: Any, tmp_path: Path) -> None:
    """A hash over hostile bytes is as right as any: the container's reader has its say, as after a pull."""
    entry = first.get("m:q8_0")
    bad = entry.path.read_bytes()[:20]
    entry.path.unlink()
    entry.path.write_bytes(bad)
    record = json.loads((entry.folder / "weightsmith.json").read_text())
    record["files"][0] |= {"size": len(bad), "sha256": hashlib.sha256(bad).hexdigest()}
    line = f"{record['files'][0]['sha256']} {len(bad)} {record['files'][0]['path']}\n"
    record["digest"] = hashlib.sha256(line.encode()).hexdigest()
    (entry.folder / "weightsmith.json").write_text(json.dumps(record))
    told("export", "m:q8_0", "-o", tmp_path / "bad.tar")
    second = elsewhere()
    told("import", tmp_path / "bad.tar", code=3)
    _nothing(second)


def test_what_is_no_bundle(told: Told, elsewhere: Any, tmp_path: Path, bundle: Path) -> None:
    second = elsewhere()
    data = bundle.read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"hello" * 300,
        "zeros": bytes(2048),
        "gz": b"\x1f\x8b" + bytes(600),
        "cut": data[: len(data) // 2],
        "huge size": data[:124] + b"\x80" + b"\xff" * 11 + data[136:],
    }.items():
        (tmp_path / name).write_bytes(content)
        assert told("import", tmp_path / name, code=3)["error"]["kind"] == "IntegrityError", name
    _pack(tmp_path / "other", {"README": b"x"})
    told("import", tmp_path / "other", code=3)
    told("import", tmp_path / "missing", code=7)
    told("import", tmp_path, code=2)
    os.mkfifo(tmp_path / "fifo")
    told("import", tmp_path / "fifo", code=2)
    members = _members(bundle)
    twice = _plain("index.json")
    told("import", _pack(tmp_path / "twice", members, twice), code=3)
    gone = {name: body for name, body in members.items() if body != model("full")}
    told("import", _pack(tmp_path / "gone", gone), code=3)
    _nothing(second)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 4000), st.binary(min_size=1, max_size=12))
def test_any_change_of_the_archive_is_an_error_of_ours(tmp_path: Path, where: int, data: bytes) -> None:
    whole = b"".join(
        tar.header(name, len(body)) + body.ljust(tar.padded(len(body)), b"\0")
        for name, body in {"oci-layout": b"{}", "blobs/sha256/" + "a" * 64: b"x" * 600, "b": b""}.items()
    ) + bytes(1024)
    changed = whole[:where] + data + whole[where + len(data) :]
    found: dict[str, tar.Member] = {}
    with contextlib.suppress(IntegrityError, UnsafeInputError):
        found = tar.members(io.BytesIO(changed), len(changed), "it")
    assert all(one.offset + one.size <= len(changed) for one in found.values())


@pytest.mark.parametrize("size", [0, 1, 8**11 - 1, 8**11, 1 << 40])
def test_headers_are_those_of_tarfile(size: int) -> None:
    """Python's tarfile reads them, and writes the same for what octal digits can hold."""
    block = tar.header("blobs/sha256/" + "f" * 64, size)
    read = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    assert (read.name, read.size, read.mode) == ("blobs/sha256/" + "f" * 64, size, 0o644)
    info = tarfile.TarInfo(read.name)
    info.size = size
    theirs = info.tobuf(tarfile.GNU_FORMAT if size >= 8**11 else tarfile.USTAR_FORMAT)
    assert block[:148] == theirs[:148]
    assert block[156:257] == theirs[156:257]
    assert size >= 8**11 or block[257:329] == theirs[257:329]


KILLED = """
import os, signal, sys
from pathlib import Path
from weightsmith.bundle import read
from weightsmith.catalog import Catalog, Reservation
left = [int(sys.argv[2])]
def dying(function):
    def call(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call
for name in ("_fill", "sha256_file"):
    setattr(read, name, dying(getattr(read, name)))
for name in ("examine", "restore"):
    setattr(Reservation, name, dying(getattr(Reservation, name)))
read.take(Catalog(), Path(sys.argv[1]))
"""


def test_a_killed_import_leaves_nothing_half(bundle: Path, told: Told, elsewhere: Any) -> None:
    """SIGKILL before each step in turn; the next import makes it whole."""
    second = elsewhere()
    steps = 0
    while True:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", KILLED, bundle, str(steps)], env=env, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        for entry in second.entries():  # what appeared is whole
            for file in entry.files:
                data = (entry.folder / file.path).read_bytes()
                assert hashlib.sha256(data).hexdigest() == file.sha256
        steps += 2
    assert steps > 4
    assert len(second.entries()) == 3
    assert [one["new"] for one in told("import", bundle)["models"]] == [False] * 3
    told("gc")
    check_settled(second.home)

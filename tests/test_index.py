"""The index of the catalog: always what the records say, whatever happened to it or to them."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsmith import catalog as catalogs
from weightsmith import index, store
from weightsmith.catalog import Catalog
from weightsmith.store import Entry, File

OLD = 1_600_000_000


def _entry(home: Path, name: str, tag: str = "original", **changes: object) -> Entry:
    """Write a record by hand, as another version of the program might have."""
    files = (File("model.gguf", 7, "a" * 64), File("config.json", 3, "b" * 64))
    entry = Entry(
        name=name,
        tag=tag,
        folder=home / "models" / name / tag,
        container="gguf",
        type="Q8_0",
        files=files,
        digest=store.digest_of(files),
        created="2026-01-01T00:00:00+00:00",
        origin={"kind": "hf", "repo": "org/x", "commit": "c" * 40, "asked": ["hf://org/x", ""]},
    )
    entry = dataclasses.replace(entry, **changes)  # type: ignore[arg-type]
    entry.folder.mkdir(parents=True, exist_ok=True)
    (entry.folder / store.RECORD).write_text(store.record_text(entry))
    return entry


@pytest.fixture(autouse=True)
def _settled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records count as still at once, but for the test that is about that."""
    monkeypatch.setattr(index, "SETTLED", -(10**9))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The records that are read."""
    seen: list[str] = []

    def read(folder: Path) -> Entry:
        seen.append(f"{folder.parent.name}:{folder.name}")
        return store.read_record(folder)

    monkeypatch.setattr(catalogs, "read_record", read)
    return seen


def _same(catalog: Catalog) -> None:
    assert catalog.summaries() == [index.summary_of(entry) for entry in catalog.entries()]


def test_a_summary_is_what_the_record_says(tmp_path: Path, reads: list[str]) -> None:
    catalog = Catalog(tmp_path)
    assert catalog.summaries() == []
    _entry(tmp_path, "b", "q8_0", parent="d" * 64, parent_ref="b:original", licence="mit", alias_of="x")
    entry = _entry(tmp_path, "a", container="safetensors")
    _entry(tmp_path, "b")
    assert [one.ref for one in catalog.summaries()] == ["a:original", "b:original", "b:q8_0"]
    _same(catalog)
    reads.clear()
    short = catalog.summaries()
    assert reads == [], "nothing is read that did not change"
    assert (short[0].path, short[0].folder, short[0].nbytes) == (entry.path, entry.folder, entry.nbytes)
    assert short[1].path == catalog.get("b:original").path
    assert short[2].parent_ref == "b:original"


def test_changes_are_seen(tmp_path: Path, reads: list[str]) -> None:
    catalog = Catalog(tmp_path)
    for name in "abc":
        _entry(tmp_path, name)
    catalog.summaries()
    reads.clear()
    _entry(tmp_path, "b", licence="mit")
    assert [one.licence for one in catalog.summaries()] == [None, "mit", None]
    assert reads == ["b:original"]
    store.shutil.rmtree(tmp_path / "models" / "a")
    (tmp_path / "models" / "c" / "original").rename(tmp_path / "models" / "c" / "other")
    assert [one.ref for one in catalog.summaries()] == ["b:original"], "c:other's record says another name: damaged"


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_an_edit_in_place_of_the_same_length_is_seen(keep_mtime: bool, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    record = _entry(tmp_path, "a", licence="mit").folder / store.RECORD
    os.utime(record, (OLD, OLD))
    assert catalog.summaries()[0].licence == "mit"
    with open(record, "r+") as file:
        text = file.read()
        file.seek(0)
        file.write(text.replace('"mit"', '"gpl"'))
    os.utime(record, (OLD, OLD) if keep_mtime else None)
    assert catalog.summaries()[0].licence == "gpl"


def test_a_record_that_was_just_written_is_not_kept(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "SETTLED", 60 * 10**9)
    catalog = Catalog(tmp_path)
    _entry(tmp_path, "a")
    catalog.summaries()
    catalog.summaries()
    assert reads == ["a:original"] * 2


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: data.replace(b"Q8_0", b"Q4_0"),
        lambda data: b"00000000\n" + data.partition(b"\n")[2],
        lambda data: b"\xff" * 100,
    ],
)
def test_a_damaged_index_is_none(harm, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    catalog = Catalog(tmp_path)
    _entry(tmp_path, "a")
    _same(catalog)
    path = tmp_path / "models" / index.NAME
    path.write_bytes(harm(path.read_bytes()))
    _same(catalog)
    assert catalog.summaries()[0].type == "Q8_0"


@given(st.binary(max_size=200))
def test_any_bytes_in_its_place(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / index.NAME).write_bytes(data)
        assert index.load(Path(folder)) == {}


def test_the_index_of_another_version_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _entry(tmp_path, "a")
    Catalog(tmp_path).summaries()
    assert index.load(tmp_path / "models")
    monkeypatch.setattr(index, "_FORMAT", [1, "9.9"])
    assert index.load(tmp_path / "models") == {}
    _same(Catalog(tmp_path))


def test_a_home_that_cannot_be_written_lists_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _entry(tmp_path, "a")

    def refuse(*args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(index, "AtomicFile", refuse)
    _same(Catalog(tmp_path))
    assert not (tmp_path / "models" / index.NAME).exists()


def test_damaged_records_are_told_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    catalog = Catalog(tmp_path)
    _entry(tmp_path, "a")
    (_entry(tmp_path, "b").folder / store.RECORD).write_text("{")
    for _ in range(2):
        caplog.clear()
        assert [one.ref for one in catalog.summaries()] == ["a:original"]
        assert "damaged" in caplog.text


def test_links_are_no_entries(tmp_path: Path) -> None:
    """A planted link at a model, a tag or a record leads nowhere."""
    catalog = Catalog(tmp_path / "home")
    outside = _entry(tmp_path / "other", "a")
    _entry(tmp_path / "home", "b")
    models = tmp_path / "home" / "models"
    (models / "a").symlink_to(outside.folder.parent)
    (models / "b" / "original2").symlink_to(outside.folder)
    (models / "b" / "q8_0").mkdir()
    (models / "b" / "q8_0" / store.RECORD).symlink_to(outside.folder / store.RECORD)
    assert [one.ref for one in catalog.summaries()] == ["b:original"] == [one.ref for one in catalog.entries()]
    assert catalog.tags("a") == []


def test_readers_and_writers_at_once(tmp_path: Path) -> None:
    """Whoever lists while entries come and go sees only what its records said at some time."""
    catalog, wrong = Catalog(tmp_path), []
    for number in range(20):
        _entry(tmp_path, f"m{number}", licence="0")

    def write() -> None:
        for turn in range(1, 15):
            for number in range(0, 20, 3):
                text = store.record_text(_read(tmp_path, number, str(turn)))
                part = tmp_path / f"part{number}"
                part.write_text(text)
                os.replace(part, tmp_path / "models" / f"m{number}" / "original" / store.RECORD)

    def read() -> None:
        last: dict[str, int] = {}
        for _ in range(30):
            for one in catalog.summaries():
                if int(one.licence or 0) < last.get(one.ref, 0):
                    wrong.append((one.ref, one.licence))
                last[one.ref] = int(one.licence or 0)

    threads = [threading.Thread(target=target) for target in (write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    _same(catalog)


def _read(home: Path, number: int, licence: str) -> Entry:
    entry = store.read_record(home / "models" / f"m{number}" / "original")
    return dataclasses.replace(entry, licence=licence)


def test_the_index_holds_no_more_than_a_list_needs(tmp_path: Path) -> None:
    _entry(tmp_path, "a", evaluations=({"kind": "secret"},))
    Catalog(tmp_path).summaries()
    body = (tmp_path / "models" / index.NAME).read_bytes().partition(b"\n")[2]
    ((_, row),) = json.loads(body)["rows"]
    assert len(row) == len(index.Summary._fields) - 1
    assert b"asked" not in body
    assert b"secret" not in body

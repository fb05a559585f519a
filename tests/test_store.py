"""Home, locks, staging folders, hashing, taking files in, records."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsmith import store
from weightsmith.errors import IntegrityError, UnsafeInputError, WeightsmithError
from weightsmith.store import Entry, File, Staging, digest_of, freed_bytes, read_record, record_text, sweep, take_in


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(tmp_path))
    assert store.home() == tmp_path
    monkeypatch.delenv("WEIGHTSMITH_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert store.home() == Path("/data/weightsmith")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # the XDG rules say to ignore it
    monkeypatch.setenv("HOME", "/home/me")
    assert store.home() == Path("/home/me/.local/share/weightsmith")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert store.home() == Path("/home/me/Library/Application Support/weightsmith")


def test_sha256_file(tmp_path: Path) -> None:
    data = os.urandom(store.CHUNK * 2 + 17)
    (tmp_path / "f").write_bytes(data)
    assert store.sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    with pytest.raises(WeightsmithError):
        store.sha256_file(tmp_path / "absent")


def test_take_in_links_and_keeps_the_source(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"weights")
    way = take_in(tmp_path / "f", tmp_path / "deep" / "g")
    assert way in ("reflink", "hardlink", "copy")
    assert (tmp_path / "deep" / "g").read_bytes() == (tmp_path / "f").read_bytes() == b"weights"
    assert (tmp_path / "deep" / "g").samefile(tmp_path / "f") == (way == "hardlink")


def test_take_in_copies_where_linking_is_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(store, "reflink", lambda source, target: False)
    monkeypatch.setattr(os, "link", no_link)
    (tmp_path / "f").write_bytes(b"weights")
    assert take_in(tmp_path / "f", tmp_path / "g") == "copy"
    assert (tmp_path / "g").read_bytes() == b"weights"


def test_take_in_refuses(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeInputError):
        take_in(tmp_path / "pipe", tmp_path / "x")
    (tmp_path / "f").write_bytes(b"1")
    (tmp_path / "g").write_bytes(b"2")
    with pytest.raises(WeightsmithError):
        take_in(tmp_path / "f", tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == b"2"


def test_freed_bytes_counts_what_nobody_else_holds(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "own").write_bytes(b"12345")
    (tmp_path / "shared").write_bytes(b"1234567")
    os.link(tmp_path / "shared", tmp_path / "d" / "shared")
    names = [tmp_path / "d" / "own", tmp_path / "d" / "shared", tmp_path / "d" / "gone"]
    assert freed_bytes(names) == 5
    assert freed_bytes([*names, tmp_path / "shared"]) == 12


def test_lock_is_exclusive_between_processes(tmp_path: Path) -> None:
    with store.locked(tmp_path / "l"):
        handle = os.open(tmp_path / "l", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)


def test_a_planted_link_at_a_lock_is_refused(tmp_path: Path) -> None:
    """R15: nothing is opened through a link that somebody put there."""
    (tmp_path / "victim").write_bytes(b"x")
    (tmp_path / "l").symlink_to(tmp_path / "victim")
    with pytest.raises(WeightsmithError), store.locked(tmp_path / "l"):
        pass


HOLD = """
import sys, time
from pathlib import Path
from weightsmith.store import Staging
staging = Staging(Path(sys.argv[1]))
(staging.folder / "half").write_bytes(b"half")
print(staging.base, flush=True)
time.sleep(60)
"""


def test_a_killed_run_leaves_a_folder_that_the_next_one_sweeps(tmp_path: Path) -> None:
    maker = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    base = Path(maker.stdout.readline().strip())
    other = Staging(tmp_path)
    assert (base / "files" / "half").exists(), "a living maker's folder stays"
    assert sweep(tmp_path) == 0
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    maker.stdout.close()
    for _ in range(50):
        if not base.exists() or sweep(tmp_path):
            break
        time.sleep(0.05)
    assert not base.exists()
    assert other.folder.is_dir()
    other.release()
    other.release()
    assert not list((tmp_path / "staging").glob("[!.]*"))


def entry(folder: Path) -> Entry:
    files = (File("a.gguf", 3, "a" * 64), File("b/c.json", 4, "b" * 64))
    return Entry(folder.parent.name, folder.name, folder, "gguf", "Q4_0", files, digest_of(files), "2026-01-01")


def test_digest_is_of_the_sorted_files() -> None:
    files = [File("b", 1, "0" * 64), File("a", 2, "1" * 64)]
    expected = hashlib.sha256(f"{'1' * 64} 2 a\n{'0' * 64} 1 b\n".encode()).hexdigest()
    assert digest_of(files) == digest_of(reversed(files)) == expected


def test_record_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "name" / "tag"
    folder.mkdir(parents=True)
    made = entry(folder)
    (folder / store.RECORD).write_text(record_text(made))
    assert read_record(folder) == made
    assert str(tmp_path) not in record_text(made)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "0" * 64},
        {"name": "other"},
        {"tag": "other"},
        {"format": 2},
        {"files": []},
        {"files": [{"path": "../x", "size": 1, "sha256": "a"}]},
        {"files": [{"path": "x", "size": 1, "sha256": "../../x"}], "digest": digest_of([File("x", 1, "../../x")])},
        {"files": 5},
        {"extra": 1},
        {"origin": []},
    ],
)
def test_records_that_contradict_themselves(tmp_path: Path, change: dict[str, object]) -> None:
    folder = tmp_path / "name" / "tag"
    folder.mkdir(parents=True)
    record = json.loads(record_text(entry(folder)))
    (folder / store.RECORD).write_text(json.dumps({**record, **change}))
    with pytest.raises(IntegrityError) as caught:
        read_record(folder)
    assert store.RECORD in str(caught.value)


@given(cut=st.integers(0, 400), junk=st.binary(max_size=30))
def test_damaged_records_raise_only_integrity_errors(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes
) -> None:
    folder = tmp_path_factory.mktemp("r") / "name" / "tag"
    folder.mkdir(parents=True)
    text = record_text(entry(folder)).encode()
    (folder / store.RECORD).write_bytes(text[:cut] + junk + text[cut + len(junk) :])
    with contextlib.suppress(IntegrityError):
        assert read_record(folder).ref == "name:tag"


def test_who_only_looks_does_not_disturb_a_new_staging_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gc` asks whether a folder is free by taking its lock for a moment, and that may be the folder's first moment."""
    opened = store._open_lock

    def looked_at(path: Path) -> int:
        handle = opened(path)
        if path.parent.parent == tmp_path / "staging":
            looker = os.open(path, os.O_RDONLY)
            fcntl.flock(looker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            threading.Timer(0.05, os.close, [looker]).start()
        return handle

    monkeypatch.setattr(store, "_open_lock", looked_at)
    staging = Staging(tmp_path)
    assert not store.is_free(staging.base / ".lock")
    staging.release()

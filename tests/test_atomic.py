"""Outputs by rename: whole or absent, one writer at a time, and nothing lost when the disk is full."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from weightsmith import atomic
from weightsmith.atomic import AtomicFile, AtomicFolder, need_space, part_path, write_text
from weightsmith.errors import OutputExistsError, ResourceError, WeightsmithError

Begin = Callable[..., Any]


def file_writer(path: Path, **options: Any) -> AtomicFile:
    writer = AtomicFile(path, 4, **options)
    writer.write(0, b"1234")
    return writer


def folder_writer(path: Path, **options: Any) -> AtomicFolder:
    writer = AtomicFolder(path, **options)
    writer.create("a", 4)
    writer.write("a", 0, b"1234")
    return writer


both = pytest.mark.parametrize("begin", [file_writer, folder_writer])


def content(path: Path) -> bytes:
    return (path / "a" if path.is_dir() else path).read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, call: str, code: int = errno.ENOSPC) -> Iterator[None]:
    """Let os.`call` fail as a full disk (or another error) would."""

    def fail(*_: Any, **__: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        yield


@both
def test_appears_only_when_committed(tmp_path: Path, begin: Begin) -> None:
    before = open_files()
    path = tmp_path / "deep" / "out"
    writer = begin(path)
    assert names(tmp_path / "deep") == ["out.part"]
    assert writer.commit() == path
    assert names(tmp_path / "deep") == ["out"]
    assert content(path) == b"1234"
    writer.abort()  # too late, and harmless
    assert content(path) == b"1234"
    assert open_files() == before


@both
def test_abort_leaves_nothing(tmp_path: Path, begin: Begin) -> None:
    before = open_files()
    writer = begin(tmp_path / "out")
    writer.abort()
    writer.abort()
    assert names(tmp_path) == []
    assert open_files() == before


@both
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_what_exists_is_not_replaced_unasked(tmp_path: Path, begin: Begin, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("old")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(OutputExistsError, match="already exists"):
        begin(path)
    assert names(tmp_path) == ["out"]


@both
def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path, begin: Begin) -> None:
    writer = begin(tmp_path / "out")
    (tmp_path / "out").write_text("somebody else's")
    with pytest.raises(OutputExistsError, match="already exists"):
        writer.commit()
    writer.abort()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "somebody else's"


@both
def test_overwrite(tmp_path: Path, begin: Begin) -> None:
    path = tmp_path / "out"
    if begin is file_writer:
        path.write_text("old")
    else:
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "old").write_text("old")
    writer = begin(path, overwrite=True)
    assert path.exists()
    writer.commit()
    assert names(tmp_path) == ["out"]
    assert content(path) == b"1234"
    assert not (path / "sub").exists()


def test_overwriting_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / "out").symlink_to("precious")
    folder_writer(tmp_path / "out", overwrite=True).commit()
    assert names(tmp_path) == ["out", "precious"]
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "precious" / "file").read_text() == "x"


@both
def test_second_writer_is_refused(tmp_path: Path, begin: Begin) -> None:
    first = begin(tmp_path / "out")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="another process is writing"):
            begin(tmp_path / "out", overwrite=overwrite)
    first.commit()
    assert content(tmp_path / "out") == b"1234"


@both
def test_a_writer_that_waited_does_not_touch_the_finished_output(
    tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writer opens the part, the first then renames it, and only then does the second get the lock."""
    path = tmp_path / "out"
    first = begin(path)
    real, late = atomic.fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not late:
            late.append(first.commit())
        real(handle, how)

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    with pytest.raises(OutputExistsError, match="already exists"):
        begin(path)
    assert content(path) == b"1234"
    assert names(tmp_path) == ["out"]


@both
def test_the_part_of_a_dead_run_is_taken_over(tmp_path: Path, begin: Begin) -> None:
    part = part_path(tmp_path / "out")
    if begin is file_writer:
        part.write_bytes(b"x" * 1000)
    else:
        (part / "sub").mkdir(parents=True)
        (part / "sub" / "x").write_text("x")
        (part / "a").write_bytes(b"x" * 1000)
        (part / "link").symlink_to("/")
    begin(tmp_path / "out").commit()
    assert content(tmp_path / "out") == b"1234"
    assert names(tmp_path) == ["out"]
    assert not (tmp_path / "out").is_dir() or names(tmp_path / "out") == ["a"]


KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from weightsmith.atomic import AtomicFile, AtomicFolder
    path = Path(sys.argv[2])
    if sys.argv[1] == "file":
        AtomicFile(path, 100).write(0, b"half")
    else:
        writer = AtomicFolder(path)
        writer.create("a", 100)
        writer.write("a", 0, b"half")
    os.kill(os.getpid(), signal.SIGKILL)
""")


@pytest.mark.parametrize(("kind", "begin"), [("file", file_writer), ("folder", folder_writer)])
def test_killed_run(tmp_path: Path, kind: str, begin: Begin) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, kind, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == ["out.part"]
    begin(tmp_path / "out").commit()
    assert content(tmp_path / "out") == b"1234"
    assert names(tmp_path) == ["out"]


@both
def test_a_planted_link_is_not_followed(tmp_path: Path, begin: Begin) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "y").write_text("y")
    for target in ("precious", "folder"):
        part_path(tmp_path / "out").symlink_to(target)
        with pytest.raises(OutputExistsError, match="another kind"):
            begin(tmp_path / "out")
        part_path(tmp_path / "out").unlink()
    assert (tmp_path / "precious").read_text() == "x"
    assert (tmp_path / "folder" / "y").read_text() == "y"


def test_a_part_of_another_kind(tmp_path: Path) -> None:
    part_path(tmp_path / "a").mkdir()
    part_path(tmp_path / "b").write_text("x")
    for begin, name in ((file_writer, "a"), (folder_writer, "b")):
        with pytest.raises(OutputExistsError, match="another kind") as caught:
            begin(tmp_path / name)
        assert caught.value.path == part_path(tmp_path / name)
        assert "Remove it" in str(caught.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_at_the_start(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    folder = AtomicFolder(tmp_path / "folder")
    with failing(monkeypatch, "ftruncate", code):
        with pytest.raises(ResourceError, match="disk is full") as caught:
            AtomicFile(tmp_path / "file", 4)
        assert caught.value.exit_code == 6
        with pytest.raises(ResourceError, match="disk is full"):
            folder.create("a", 4)
    folder.abort()
    assert names(tmp_path) == []
    assert open_files() == before


@both
def test_disk_full_while_writing(tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = begin(tmp_path / "out")
    with failing(monkeypatch, "pwrite"), pytest.raises(ResourceError, match="disk is full") as caught:
        writer.write(0, b"x") if begin is file_writer else writer.write("a", 0, b"x")
    assert str(tmp_path / "out") in str(caught.value)
    writer.abort()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("begin", "call"),
    [(file_writer, "fsync"), (file_writer, "replace"), (folder_writer, "fsync"), (folder_writer, "rename")],
)
def test_failed_commit_keeps_the_old(tmp_path: Path, begin: Begin, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    begin(path).commit()
    writer = begin(path, overwrite=True)
    writer.write(0, b"new!") if begin is file_writer else writer.write("a", 0, b"new!")
    with failing(monkeypatch, call, errno.EIO), pytest.raises(WeightsmithError, match="cannot write"):
        writer.commit()
    writer.abort()
    assert content(path) == b"1234"
    assert names(tmp_path) == ["out"]


def test_failed_second_rename_brings_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    folder_writer(path).commit()
    writer = folder_writer(path, overwrite=True)
    writer.write("a", 0, b"new!")
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if Path(source) == writer.part:
            raise OSError(errno.EIO, "I/O error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(WeightsmithError, match="cannot write"):
        writer.commit()
    writer.abort()
    assert content(path) == b"1234"
    assert names(tmp_path) == ["out"]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """The old one stands aside and nothing is in its place: the next run brings it back before anything else."""
    path = tmp_path / "out"
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part.old").mkdir()
    (tmp_path / "out.part.old" / "a").write_text("old")
    with pytest.raises(OutputExistsError, match="already exists"):
        folder_writer(path)
    assert content(path) == b"old"
    assert names(tmp_path) == ["out"]


def test_killed_after_the_two_renames(tmp_path: Path) -> None:
    path = tmp_path / "out"
    folder_writer(path).commit()
    (tmp_path / "out.part.old").mkdir()
    writer = folder_writer(path, overwrite=True)
    assert names(tmp_path) == ["out", "out.part"]
    writer.abort()
    assert content(path) == b"1234"


@both
def test_too_little_space(tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3))
    with pytest.raises(ResourceError, match="are free"):
        need_space(tmp_path / "out", 4)
    need_space(tmp_path, 3)
    if begin is file_writer:
        with pytest.raises(ResourceError, match="are free"):
            begin(tmp_path / "out")
        assert names(tmp_path) == []


@both
def test_a_place_that_cannot_be_written(tmp_path: Path, begin: Begin) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(WeightsmithError):
            begin(path)
    assert names(tmp_path) == ["file"]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, bytes(data[:3]), offset))
    writer = AtomicFile(tmp_path / "out", 10)
    writer.write(0, b"0123456789")
    writer.commit()
    assert content(tmp_path / "out") == b"0123456789"


def test_many_threads(tmp_path: Path) -> None:
    writer = AtomicFolder(tmp_path / "out")
    for name in ("a", "b"):
        writer.create(name, 2000)
    jobs = [(name, row) for name in ("a", "b") for row in range(1000)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: writer.write(job[0], 2 * job[1], job[1].to_bytes(2, "big")), jobs))
    writer.commit()
    expected = b"".join(row.to_bytes(2, "big") for row in range(1000))
    assert (tmp_path / "out" / "a").read_bytes() == (tmp_path / "out" / "b").read_bytes() == expected


@pytest.mark.parametrize("name", ["", "..", "../x", "/x", "a/b", "x\0"])
def test_folder_names_are_checked(tmp_path: Path, name: str) -> None:
    writer = AtomicFolder(tmp_path / "out")
    with pytest.raises(WeightsmithError):
        writer.create(name, 1)
    writer.abort()
    assert names(tmp_path) == []


def test_the_same_file_twice(tmp_path: Path) -> None:
    writer = folder_writer(tmp_path / "out")
    with pytest.raises(WeightsmithError, match="File exists"):
        writer.create("a", 4)
    writer.commit()
    assert content(tmp_path / "out") == b"1234"


def test_write_text(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_text(path, "é" * 10)
    write_text(path, "short")
    assert path.read_text() == "short"
    assert names(tmp_path) == ["x.json"]


def test_who_only_looks_does_not_disturb_a_writer(tmp_path: Path) -> None:
    """`gc` asks whether a part is free by taking its lock for a moment."""
    part = tmp_path / "x.part"
    part.touch()
    looker = os.open(part, os.O_RDONLY)
    fcntl.flock(looker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    threading.Timer(0.03, os.close, [looker]).start()
    file = AtomicFile(tmp_path / "x", 1)
    file.write(0, b"x")
    assert file.commit().read_bytes() == b"x"

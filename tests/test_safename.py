"""Names from outside: what passes is a plain relative path, everything else is refused."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weightsmith.errors import UnsafeInputError
from weightsmith.safename import MAX_BYTES, MAX_PART_BYTES, check_name, resolve_inside

GOOD = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "a/b/c.json",
    ".gitattributes",
    "..a",
    "a..b",
    "a b",
    "名前.json",
    "é.json",
    "console.txt",
    "com10",
    "lpt",
    "x" * MAX_PART_BYTES,
    "/".join(["x" * 255] * 4),
    "-rf",
    "~",
    "$HOME",
    "%2e%2e",
]
BAD: list[Any] = [
    "", ".", "..", "/", "//", "./a", "../a", "a/..", "a/../b", "a/./b", "a//b", "a/", "/a", "/etc/passwd",
    "a/../../b", "....//", "~/../a", "\\", "..\\a", "a\\b", "\\\\server\\share", "//server/share", "C:", "C:a", "C:\\a",
    "c:/a", "file:///a", "http://a/b", "a:b", "a::$DATA", "a*", "a?", 'a"', "<a", "a>", "a|b", "a\0", "\0", "a\n",
    "a\r", "a\tb", "a\x1b[31m", "a\x7f", "a\x85", "a\u200bb", "a\u202eb", "\ufeffa", "a\u2028", "a\u2029", "a\ud800",
    "e\u0301", "\u212b", "con", "CON", "con.txt", "aux", "AUX.tar.gz", "nul", "NUL.safetensors", "prn", "com1",
    "COM9.x", "lpt1", "a/con/b", "a ", " a", "a/ b", "a /b", "a.", "a./b", "a...", "x" * (MAX_BYTES + 1),
    "x" * (MAX_PART_BYTES + 1), "com\u00b9", "CONIN$",
    "é" * MAX_BYTES, None, 3, True, b"a", ["a"], {"a": 1}, Path("a"),
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_plain_names_pass(name: str, tmp_path: Path) -> None:
    assert check_name(name) == PurePosixPath(name)
    assert resolve_inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", BAD, ids=lambda name: ascii(name)[:30])
def test_others_are_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError) as caught:
        check_name(name, path="index.json")
    assert caught.value.path == "index.json"
    assert caught.value.exit_code == 4
    str(caught.value).encode()  # can be shown on any terminal
    with pytest.raises(UnsafeInputError):
        resolve_inside(tmp_path, name)


def test_enough_bad_names() -> None:
    assert len(BAD) >= 60


PIECES = st.sampled_from(["..", ".", "/", "\\", "a", "b", ":", " ", "con", "\0", "é", "~"])


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=8) | st.lists(PIECES, max_size=6).map("".join))
@example("a/../../b")
def test_what_passes_stays_inside(name: str) -> None:
    import ntpath
    import posixpath

    try:
        check_name(name)
    except UnsafeInputError:
        return
    for system, root in ((posixpath, "/root/folder"), (ntpath, "C:\\root\\folder")):
        joined = system.normpath(system.join(root, name))
        assert joined.startswith(root + system.sep)
        assert not system.isabs(name)
        assert system.splitdrive(name)[0] == ""


def test_links_inside_pass_and_links_outside_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("x")
    (folder / "file").write_text("x")
    (folder / "inside").symlink_to("file")
    (folder / "out").symlink_to(tmp_path / "outside" / "file")
    (folder / "out_relative").symlink_to("../outside/file")
    (folder / "out_folder").symlink_to(tmp_path / "outside")
    (folder / "twice").symlink_to("out")
    assert resolve_inside(folder, "inside") == folder / "inside"
    for name in ("out", "out_relative", "out_folder", "out_folder/file", "twice"):
        with pytest.raises(UnsafeInputError, match="link that leaves") as caught:
            resolve_inside(folder, name, source=folder / "index.json")
        assert caught.value.path == folder / "index.json"


def test_a_folder_that_is_itself_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert resolve_inside(tmp_path / "link", "file") == tmp_path / "link" / "file"


def test_a_neighbour_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder2").mkdir()
    (tmp_path / "folder" / "x").symlink_to("../folder2")
    with pytest.raises(UnsafeInputError, match="link that leaves"):
        resolve_inside(tmp_path / "folder", "x")


def test_a_hub_snapshot_may_link_to_its_blobs_only(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir()
    (blobs / "0").write_text("x")
    (tmp_path / "token").write_text("secret")
    (snapshot / "file").symlink_to("../../blobs/0")
    (snapshot / "stolen").symlink_to(tmp_path / "token")
    assert resolve_inside(snapshot, "file") == snapshot / "file"
    with pytest.raises(UnsafeInputError, match="link that leaves"):
        resolve_inside(snapshot, "stolen")

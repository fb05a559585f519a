"""verify --integrity finds what rotted, offline; --repair believes nobody and takes only the right bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loopback.hub import Hub
from tests.loopback.pull import ROOT
from tests.tiny import write_llama
from weightsmith.catalog import Catalog
from weightsmith.cli.app import run

Told = Callable[..., dict[str, Any]]
REPO = "org/Tiny-Llama"


@pytest.fixture
def tiny(tmp_path: Path, tiny_models: Path) -> Path:
    """tiny:original and tiny:q8_0, whose source is gone; returns the catalog's home."""
    shutil.rmtree(tmp_path / "tiny")
    return tiny_models


def flip(path: Path) -> bytes:
    """Change one byte in place, time and size as before; returns what was there."""
    before, status = path.read_bytes(), path.stat()
    with open(path, "r+b") as file:
        file.seek(len(before) // 2)
        file.write(bytes([before[len(before) // 2] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return before


def test_a_sound_catalog(tiny: Path, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    found = told("verify", "--integrity")
    files = [file for entry in Catalog(tiny).entries() for file in entry.files]
    assert (found["entries"], found["files"], found["passed"]) == (2, len(files), True)
    assert found["bytes"] == sum({file.sha256: file.size for file in files}.values())
    assert found["damaged"] == []
    assert told("verify", "tiny:q8_0", "--integrity")["files"] == 1
    assert run(["verify", "--integrity"]) == 0
    assert "all as recorded" in capsys.readouterr().out


def test_a_flipped_byte_is_found_and_left(tiny: Path, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(told("path", "tiny:q8_0")["path"])
    flip(path)
    damaged = path.read_bytes()
    found = told("verify", "--integrity", code=3)
    assert [(one["ref"], one["path"], one["repaired"]) for one in found["damaged"]] == [("tiny:q8_0", str(path), None)]
    assert "sha256" in found["damaged"][0]["wrong"]
    assert path.read_bytes() == damaged
    told("verify", "tiny:original", "--integrity")
    assert run(["verify", "--integrity", "-q"]) == 3
    assert "--repair makes again what it can (tiny:q8_0)" in capsys.readouterr().err


def test_what_lies_nowhere_else_is_made_again(tiny: Path, told: Told) -> None:
    told("convert", "tiny", "--to", "gguf:F16")
    told("tag", "tiny:q8_0", "prod")
    catalog, parent = Catalog(tiny), Catalog(tiny).get("tiny:original")
    paths = [catalog.path("tiny:q8_0"), catalog.path("tiny:f16")]
    kept = [flip(path) for path in paths]
    found = told("verify", "--integrity", "--repair")
    assert {(one["ref"], one["repaired"]) for one in found["damaged"]} == {
        (f"tiny:{tag}", "made again from tiny:original") for tag in ("q8_0", "prod", "f16")
    }
    assert [path.read_bytes() for path in paths] == kept
    assert catalog.path("tiny:prod").samefile(paths[0])
    assert told("verify", "--integrity")["passed"]
    # A damaged parent proves nothing: nothing is made of it.
    for path in (*paths, parent.folder / "model.safetensors"):
        flip(path)
    assert {one["repaired"] for one in told("verify", "--integrity", "--repair", code=3)["damaged"]} == {None}
    told("rm", "tiny:original", "--force")
    assert {one["repaired"] for one in told("verify", "--integrity", "--repair", code=3)["damaged"]} == {None}


def test_what_comes_out_with_other_bytes_is_not_taken(tiny: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = Catalog(tiny).path("tiny:q8_0"), []

    def make(catalog: Catalog, entry: Any, brought: Any, into: Path) -> Path:
        made.append(entry.ref)
        (into / path.name).write_bytes(b"x" * entry.nbytes)
        return into

    monkeypatch.setattr("weightsmith.rebuild.make", make)
    flip(path)
    damaged = path.read_bytes()
    assert told("verify", "--integrity", "--repair", code=3)["damaged"][0]["repaired"] is None
    assert (path.read_bytes(), made) == (damaged, ["tiny:q8_0"])


@pytest.mark.parametrize("harm", ["gone", "short", "link", "folder"])
def test_other_damage(harm: str, tiny: Path, told: Told, tmp_path: Path) -> None:
    path = Path(told("path", "tiny")["path"]) / "config.json"
    kept = path.read_bytes()
    path.unlink()
    if harm == "short":
        path.write_bytes(kept[:-1])
    elif harm == "link":
        (tmp_path / "other").write_bytes(kept)
        path.symlink_to(tmp_path / "other")
    elif harm == "folder":
        path.mkdir()
    assert told("verify", "--integrity", code=3)["damaged"][0]["path"] == str(path)
    if harm != "folder":  # the blob still has the bytes
        assert told("verify", "--integrity", "--repair")["damaged"][0]["repaired"].endswith("config.json") is False
        assert not path.is_symlink()
        assert path.read_bytes() == kept
        told("verify", "--integrity")


def test_repair_from_what_the_user_names(tiny: Path, told: Told, tmp_path: Path) -> None:
    path = Path(told("path", "tiny:q8_0")["path"])
    told("tag", "tiny:q8_0", "prod")
    kept = flip(path)
    backup = tmp_path / "backup" / "deep"
    backup.mkdir(parents=True)
    (backup / "a.bin").write_bytes(b"\0" * len(kept))  # the right size, the wrong bytes
    told("rm", "tiny:original", "--force")  # else it would be made again
    assert told("verify", "--integrity", "--repair", "--from", str(backup), code=3)["damaged"][0]["repaired"] is None
    (backup / "b.bin").write_bytes(kept)
    found = told("verify", "--integrity", "--repair", "--from", str(tmp_path / "backup"))
    assert {(one["ref"], one["repaired"]) for one in found["damaged"]} == {
        ("tiny:prod", str(backup / "b.bin")),
        ("tiny:q8_0", str(backup / "b.bin")),
    }
    assert path.read_bytes() == kept == Path(told("path", "tiny:prod")["path"]).read_bytes()
    assert told("verify", "--integrity")["passed"]
    assert told("du")["bytes"] < 2 * told("list")["models"][0]["bytes"]


def test_repair_from_another_entry(tiny: Path, told: Told) -> None:
    """Another entry with these bytes as a file of its own (a copy, as after a move of the home)."""
    told("tag", "tiny:q8_0", "prod")
    other = Path(told("path", "tiny:prod")["path"])
    kept = other.read_bytes()
    other.unlink()
    other.write_bytes(kept)
    flip(Path(told("path", "tiny:q8_0")["path"]))
    found = told("verify", "--integrity", "--repair")
    assert found["damaged"][0]["repaired"] == str(other)
    assert Path(told("path", "tiny:q8_0")["path"]).read_bytes() == kept
    assert told("verify", "--integrity")["passed"]


def test_a_rotten_blob_beside_a_sound_file(tiny: Path, told: Told) -> None:
    path = Path(told("path", "tiny:q8_0")["path"])
    kept = path.read_bytes()
    (blob,) = [one for one in (tiny / "blobs" / "sha256").iterdir() if one.samefile(path)]
    blob.unlink()
    blob.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "its blob" in told("verify", "--integrity", code=3)["damaged"][0]["wrong"]
    assert told("verify", "--integrity", "--repair")["passed"]
    assert blob.read_bytes() == kept
    assert blob.samefile(path)


def test_repair_from_the_folder_it_was_taken_from(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    told("pull", "tiny")
    ours, theirs = Path(told("path", "tiny")["path"]) / "model.safetensors", tmp_path / "tiny" / "model.safetensors"
    kept = theirs.read_bytes()
    theirs.unlink()  # a file of its own, so that only ours rots
    theirs.write_bytes(kept)
    flip(ours)
    monkeypatch.chdir("/")
    found = told("verify", "--integrity", "--repair")
    assert found["damaged"][0]["repaired"] == str(theirs)
    assert ours.read_bytes() == kept


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


def _cli(hub: Hub, home: Path, *args: str) -> tuple[int, dict[str, Any]]:
    """One command in a process of its own, since huggingface_hub reads its environment once."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PYTHONPATH": str(ROOT)}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"HF_HOME": str(home / "hf"), "WEIGHTSMITH_HOME": str(home)}
    command = [sys.executable, "-m", "weightsmith", *args, "--json", "-q"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout or "{}")


def test_repair_from_the_pinned_commit(hub: Hub, tmp_path: Path) -> None:
    home, made = tmp_path / "home", write_llama(tmp_path / "made")
    hub.add(REPO, {path.name: path.read_bytes() for path in made.iterdir()})
    assert _cli(hub, home, "pull", f"hf://{REPO}")[0] == 0
    hub.add(REPO, {"config.json": b"{}"})  # main moves on
    path = home / "models" / "tiny-llama" / "original" / "model.safetensors"
    kept = flip(path)
    hub.log.clear()
    code, found = _cli(hub, home, "verify", "--integrity")
    assert (code, hub.log) == (3, []), "checking asks nobody"
    assert _cli(hub, home, "verify", "--integrity", "--repair", "--offline")[0] == 3
    assert hub.log == []
    code, found = _cli(hub, home, "verify", "--integrity", "--repair")
    assert (code, found["passed"]) == (0, True)
    assert found["damaged"][0]["repaired"].startswith(f"hf://{REPO}@")
    assert path.read_bytes() == kept
    fetched = {one.path.rpartition("/")[2] for one in hub.log if one.method == "GET" and "/resolve/" in one.path}
    assert fetched == {"model.safetensors"}, "what is sound is not fetched"
    assert _cli(hub, home, "verify", "--integrity")[0] == 0


def test_an_origin_with_other_bytes_repairs_nothing(hub: Hub, tmp_path: Path) -> None:
    home, made = tmp_path / "home", write_llama(tmp_path / "made")
    hub.add(REPO, {path.name: path.read_bytes() for path in made.iterdir()})
    assert _cli(hub, home, "pull", f"hf://{REPO}")[0] == 0
    path = home / "models" / "tiny-llama" / "original" / "model.safetensors"
    flip(path)
    damaged = path.read_bytes()
    hub.faults.corrupt["model.safetensors"] = b"\0" * len(damaged)
    code, found = _cli(hub, home, "verify", "--integrity", "--repair")
    assert (code, found["damaged"][0]["repaired"]) == (3, None)
    assert path.read_bytes() == damaged


def test_options_that_need_one_another(tiny: Path, told: Told) -> None:
    for args in (
        ["verify"],
        ["verify", "tiny:q8_0", "--repair"],
        ["verify", "--integrity", "--from", str(tiny)],
        ["verify", "--integrity", "--offline"],
    ):
        told(*args, code=2)
    (tiny / "models" / "tiny" / "q8_0" / "weightsmith.json").write_text("{")
    found = told("verify", "--integrity", code=3)
    assert found["records"] == [str(tiny / "models" / "tiny" / "q8_0" / "weightsmith.json")]

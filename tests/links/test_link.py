"""`link`: other programs find what the catalog holds, by the same bytes; what is theirs stays theirs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.loopback.hub import Hub
from tests.loopback.pull import run_pull
from tests.tiny import write_llama
from weightsmith.errors import UsageError
from weightsmith.links import place
from weightsmith.store import File

Told = Callable[..., dict[str, Any]]
REPO = "org/Tiny-Llama"


@pytest.fixture
def tiny(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny:original and tiny:q8_0; the user's home lies below the folder that is returned."""
    write_llama(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for word in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(word, raising=False)
    told("pull", "tiny")
    told("quantize", "tiny", "--to", "gguf:Q8_0")
    return tmp_path


@pytest.fixture
def pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model pulled from a hub on this machine; the catalog of this process is the one it is in."""
    made = write_llama(tmp_path / "made")
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    hub = Hub()
    hub.add(REPO, {**files, "README.md": b"---\nlicense: mit\n---\n"})
    answer = run_pull(tmp_path / "home", f"hf://{REPO}", env={"HF_ENDPOINT": hub.endpoint})
    hub.close()
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(tmp_path / "home" / "weightsmith"))
    return answer


def _plain_read(cache: Path, code: str) -> Any:
    """What huggingface_hub itself says in a process that has no network."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    code = f"import json, huggingface_hub as hf\nprint(json.dumps({code}))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_huggingface_hub_reads_its_cache_offline(pulled: dict[str, Any], tmp_path: Path, told: Told) -> None:
    cache, commit = tmp_path / "cache", pulled["origin"]["commit"]
    found = told("link", "tiny-llama", "--into", "hf", "--root", str(cache))
    assert {one["how"] for one in found["files"]} <= {"reflink", "hardlink", "symlink", "written"}
    path = Path(_plain_read(cache, f"hf.snapshot_download({REPO!r})"))
    assert path.name == commit
    for name, sha256 in pulled["files"].items():
        read = Path(_plain_read(cache, f"hf.try_to_load_from_cache({REPO!r}, {name!r})"))
        assert hashlib.sha256(read.read_bytes()).hexdigest() == sha256
        assert read.is_symlink()
        assert not os.path.isabs(os.readlink(read))
    sizes = "[(r.repo_id, r.size_on_disk, r.nb_files) for r in hf.scan_cache_dir().repos]"
    total = sum(file["size"] for file in _record("tiny-llama", "original")["files"])
    assert _plain_read(cache, sizes) == [[REPO, total, len(pulled["files"])]]
    assert _plain_read(cache, "[str(w) for w in hf.scan_cache_dir().warnings]") == []
    again = told("link", "tiny-llama", "--into", "hf", "--root", str(cache))
    assert {one["how"] for one in again["files"]} == {"there"}
    # What the other program removes is gone there and stays here.
    removed = f"hf.scan_cache_dir().delete_revisions({commit!r}).execute()"
    assert _plain_read(cache, removed) is None
    assert told("list")["models"][0]["bytes"] == total
    assert Path(told("path", "tiny-llama")["path"], "model.safetensors").is_file()


def test_a_branch_that_the_cache_knows_stays(pulled: dict[str, Any], tmp_path: Path, told: Told) -> None:
    cache = tmp_path / "cache"
    ref = cache / "models--org--Tiny-Llama" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("f" * 40)
    found = told("link", "tiny-llama", "--into", "hf", "--root", str(cache))
    assert ref.read_text() == "f" * 40
    assert "another commit" in found["notes"][0]
    commit = pulled["origin"]["commit"]
    assert _plain_read(cache, f"hf.snapshot_download({REPO!r}, revision={commit!r})")


def test_the_shared_blob_store_is_left_alone(pulled: dict[str, Any], tmp_path: Path, told: Told) -> None:
    cache = tmp_path / "cache"
    shared = cache / "blobs" / "ab" / ("c" * 64)
    shared.parent.mkdir(parents=True)
    shared.write_bytes(b"theirs")
    told("link", "tiny-llama", "--into", "hf", "--root", str(cache))
    assert [path for path in (cache / "blobs").rglob("*") if path.is_file()] == [shared]
    assert shared.read_bytes() == b"theirs"


def test_only_what_the_hub_listed_gets_its_name(pulled: dict[str, Any], tmp_path: Path, told: Told) -> None:
    """A record may have been made by anybody; the listing was seen by this machine."""
    record = Path(told("path", "tiny-llama")["path"]) / "weightsmith.json"
    kept = record.read_text()
    record.write_text(kept.replace(REPO, "meta-llama/Famous"))
    error = told("link", "tiny-llama", "--into", "hf", "--root", str(tmp_path / "cache"), code=7)["error"]
    assert "never saw the hub's listing" in error["message"]
    record.write_text(kept)
    told("quantize", "tiny-llama", "--to", "gguf:Q8_0")
    message = told("link", "tiny-llama:q8_0", "--into", "hf", code=2)["error"]["message"]
    assert message == "tiny-llama:q8_0 did not come from a hub commit"
    told("link", "tiny-llama", "--into", "hf", "--symlink", code=2)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "user/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/huggingface/hub"),
        ({"HF_HOME": "{}/hf", "XDG_CACHE_HOME": "{}/xdg"}, "hf/hub"),
        ({"HF_HUB_CACHE": "{}/here", "HF_HOME": "{}/hf"}, "here"),
    ],
)
def test_the_cache_is_where_huggingface_hub_says(
    env: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightsmith.links import hf

    for word in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(word, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for word, value in env.items():
        monkeypatch.setenv(word, value.format(tmp_path))
    code = "import huggingface_hub.constants as c; print(c.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert theirs == str(hf.cache().expanduser()) == str(tmp_path / expected)


def _ollama_model(models: Path, name: str, tag: str) -> tuple[Path, dict[str, Any]]:
    """What Ollama would load, by the rules of its server/images.go and server/modelpath.go: the path and the config."""
    manifest = json.loads((models / "manifests" / "registry.ollama.ai" / "library" / name / tag).read_text())
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert manifest["config"]["mediaType"] == "application/vnd.docker.container.image.v1+json"
    blobs = {}
    for layer in (manifest["config"], *manifest["layers"]):
        blob = models / "blobs" / layer["digest"].replace(":", "-")
        assert blob.stat().st_size == layer["size"]
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == layer["digest"].removeprefix("sha256:")
        blobs[layer["mediaType"]] = blob
    config = json.loads(blobs["application/vnd.docker.container.image.v1+json"].read_text())
    assert config["rootfs"] == {"type": "layers", "diff_ids": [one["digest"] for one in manifest["layers"]]}
    return blobs["application/vnd.ollama.image.model"], config


def test_ollama_finds_blob_config_and_manifest(tiny: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tiny / "ollama"))
    assert told("link", "tiny:q8_0", "--into", "ollama")["name"] == "tiny:q8_0"
    blob, config = _ollama_model(tiny / "ollama", "tiny", "q8_0")
    ours = Path(told("path", "tiny:q8_0")["path"])
    assert blob.read_bytes() == ours.read_bytes()
    assert os.path.samefile(blob, ours) or not blob.is_symlink()
    assert (config["model_format"], config["model_family"], config["file_type"]) == ("gguf", "llama", "Q8_0")
    told("link", "tiny:q8_0", "--into", "ollama", "--as", "other")
    assert _ollama_model(tiny / "ollama", "other", "latest")[0] == blob
    error = told("link", "tiny", "--into", "ollama", code=2)["error"]
    assert "tiny:original is safetensors" in error["message"]
    told("link", "tiny:q8_0", "--into", "ollama", "--as", "../x", code=2)
    # A manifest of the same name that says something else is another's.
    manifest = tiny / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "q8_0"
    manifest.write_text("{}")
    told("link", "tiny:q8_0", "--into", "ollama", code=2)
    assert manifest.read_text() == "{}"


def test_lm_studio_has_a_folder_for_each_publisher(tiny: Path, told: Told) -> None:
    found = told("link", "tiny:q8_0", "--into", "lmstudio")
    assert found["files"][0]["path"] == str(tiny / "user/.lmstudio/models/weightsmith/tiny/tiny-q8_0.gguf")
    (tiny / "elsewhere").mkdir()
    (tiny / "user" / ".lmstudio-home-pointer").write_text(f"{tiny}/elsewhere\n")
    found = told("link", "tiny:q8_0", "--into", "lmstudio", "--as", "me/small")
    assert found["files"][0]["path"] == str(tiny / "elsewhere/models/me/small/tiny-q8_0.gguf")
    told("link", "tiny:q8_0", "--into", "lmstudio", "--as", "../me/small", code=4)
    told("link", "tiny", "--into", "lmstudio", code=2)


def test_a_folder_holds_the_files_by_their_names(tiny: Path, told: Told) -> None:
    found = told("link", "tiny", "--into", "out")
    assert {path.name for path in (tiny / "out").iterdir()} == {path.name for path in (tiny / "tiny").iterdir()}
    for path in (tiny / "out").iterdir():
        assert path.read_bytes() == (tiny / "tiny" / path.name).read_bytes()
        assert not path.is_symlink()
    subprocess.run(found["undo"], shell=True, check=True)
    assert list((tiny / "out").iterdir()) == []
    told("link", "tiny:q8_0", "--into", "sym", "--symlink")
    assert (tiny / "sym" / "tiny-q8_0.gguf").is_symlink()
    told("link", "tiny:q8_0", "--into", "copied", "--copy")
    assert (tiny / "copied" / "tiny-q8_0.gguf").stat().st_nlink == 1
    told("rm", "tiny:q8_0")
    assert (tiny / "copied" / "tiny-q8_0.gguf").is_file()


def test_all_or_nothing_and_never_over_another(tiny: Path, told: Told) -> None:
    (tiny / "out").mkdir()
    (tiny / "out" / "tokenizer.json").write_text("mine")
    error = told("link", "tiny", "--into", "out", code=2)["error"]
    assert "something else stands there" in error["message"]
    assert [path.name for path in (tiny / "out").iterdir()] == ["tokenizer.json"]
    (tiny / "out" / "tokenizer.json").unlink()
    os.symlink(tiny / "nowhere", tiny / "out" / "tokenizer.json")
    told("link", "tiny", "--into", "out", code=2)
    assert not (tiny / "nowhere").exists()


def test_a_failure_takes_back_what_was_made(tiny: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = os.link, [0]

    def fail(*args: Any, **options: Any) -> None:
        count[0] += 1
        if count[0] > 2:
            raise OSError(18, "Invalid cross-device link")
        real(*args, **options)

    monkeypatch.setattr(place.os, "link", fail)
    error = told("link", "tiny", "--into", "a/b", code=2)["error"]
    assert "--symlink" in error["hint"]
    assert not (tiny / "a").exists()


def test_what_comes_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"ours")
    # Somebody writes the file between our look and our link.
    monkeypatch.setattr(place, "_stands", lambda wish: not target.write_bytes(b"theirs"))
    for way in ("link", "symlink", "copy"):
        target.unlink(missing_ok=True)
        with pytest.raises(UsageError, match="meanwhile"):
            place.fulfil([place.Wish(target, source, File("source", 4, "0" * 64))], way)  # type: ignore[arg-type]
        assert target.read_bytes() == b"theirs"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source", "target"]


def test_what_a_killed_link_left_goes_with_the_next(tiny: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL while the bytes are being copied; a copy that is under way elsewhere, and a stranger's file, stay."""
    code = "import os, shutil, sys\nfrom weightsmith.cli.app import run\n"
    code += "def copy(source, target):\n open(target, 'wb').write(b'half')\n os.kill(os.getpid(), 9)\n"
    code += "shutil.copyfile = copy\nrun(['link', 'tiny:q8_0', '--into', './there', '--copy', '-q'])\n"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    there = tiny / "there"
    (left,) = there.iterdir()
    assert (left.name.startswith(".weightsmith-"), left.read_bytes()) == (True, b"half")
    busy, theirs = there / f".weightsmith-{'a' * 32}", there / ".weightsmith-notes"
    busy.write_bytes(b"busy")
    theirs.write_bytes(b"theirs")
    told("link", "tiny:q8_0", "--into", "./there", "--copy")
    assert left.exists(), "too young to be sure"
    monkeypatch.setattr(place, "_FRESH", 0.0)
    with open(busy, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert told("link", "tiny:q8_0", "--into", "./there", "--copy")["files"][0]["how"] == "there"
    assert sorted(path.name for path in there.iterdir()) == sorted([busy.name, theirs.name, "tiny-q8_0.gguf"])


def _record(name: str, tag: str) -> dict[str, Any]:
    path = Path(os.environ["WEIGHTSMITH_HOME"]) / "models" / name / tag / "weightsmith.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found

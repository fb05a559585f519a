"""Pulling from a hub, with the real huggingface_hub against a hub on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.formats.grok.grok1 import write_grok1
from tests.formats.pickles.crafted import Runs, archive
from tests.formats.pytorch.bins import write_pickled
from tests.loopback.hub import Hub, Request
from tests.loopback.pull import run_pull, start_pull
from tests.native import write_meta, write_mistral

REPO = "org/Tiny-Llama"
TOKEN = "hf_secretSECRETsecret0123456789"


def env(hub: Hub, **more: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.endpoint, **more}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def asked(hub: Hub, method: str = "GET") -> list[str]:
    return [r.path.rpartition("/")[2] for r in hub.log if r.method == method and "/resolve/" in r.path]


def test_pull_takes_the_checkpoint_and_nothing_else(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    extra = {"pytorch_model.bin": b"pickle" * 30, "modeling_evil.py": b"open('/tmp/x')", "README.md": b"hello"}
    extra |= {"original/consolidated.00.pth": b"p" * 99, "consolidated.safetensors": b"x" * 99, "LICENSE": b"MIT"}
    extra |= {"tiny-Q8_0.gguf": b"GGUF" * 40}
    commit = hub.add(REPO, {**llama_files, **extra}, licence="llama3.1")
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert got["ok"] == "tiny-llama:original"
    assert got["files"] == {name: sha256(data) for name, data in {**llama_files, "LICENSE": b"MIT"}.items()}
    assert got["origin"]["commit"] == commit
    assert got["origin"]["source"] == f"hf://{REPO}@{commit}"
    assert got["licence"] == "llama3.1"
    assert sorted(path.name for path in Path(got["path"]).iterdir()) == sorted([*got["files"], "weightsmith.json"])
    assert not {"transformers", "torch"} & set(got["modules"])
    # R13: nothing but this repository was asked for, and always at one commit
    assert all(r.path.startswith((f"/api/models/{REPO}/", f"/{REPO}/resolve/{commit}/")) for r in hub.log)


@pytest.mark.parametrize("name", ["%2e%2e%2fetc", "a b&c=d", "x#y", "é+z", "%00"])
def test_names_are_one_segment_of_a_request(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes], name: str) -> None:
    """R13: what a name would mean in a URL it does not mean; the request stays below the repository."""
    files = {f"{name}.safetensors" if key == "model.safetensors" else key: data for key, data in llama_files.items()}
    commit = hub.add(REPO, files)
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert got["files"] == {key: sha256(data) for key, data in files.items()}
    lines = [r.path for r in hub.log if "/resolve/" in r.path]
    assert all(line.startswith(f"/{REPO}/resolve/{commit}/") for line in lines)
    asked_for = [line.removeprefix(f"/{REPO}/resolve/{commit}/") for line in lines]
    assert not any(set("/?#") & set(line) or ".." in line for line in asked_for)
    assert f"{name}.safetensors" in {unquote(line) for line in asked_for}


@pytest.mark.slow
def test_second_pull_fetches_no_file_again(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    commit = hub.add(REPO, llama_files)
    run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    hub.log.clear()
    again = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert again["ok"] == "tiny-llama:original"
    assert asked(hub) == []
    assert run_pull(tmp_path, f"hf://{REPO}@{commit}", env=env(hub))["ok"] == "tiny-llama:original"


@pytest.mark.slow
def test_moved_main_is_another_checkpoint(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    hub.add(REPO, llama_files)
    run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    hub.add(REPO, {**llama_files, "LICENSE": b"other"})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("OutputExistsError", 2)
    assert run_pull(tmp_path, f"hf://{REPO}", env=env(hub), tag="new")["ok"] == "tiny-llama:new"


@pytest.mark.slow
def test_a_name_that_was_taken_anew_is_told(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    """R20: names are given up and taken by others; the hub says when a repository was made, and who answers."""
    hub.created = "2025-01-01T00:00:00.000Z"
    hub.add(REPO, llama_files)
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert got["origin"]["created"].startswith("2025-01-01")
    hub.add(REPO, {**llama_files, "LICENSE": b"other"})
    assert "taken anew" not in run_pull(tmp_path, f"hf://{REPO}", env=env(hub), tag="b")["said"]
    hub.created = "2026-02-02T00:00:00.000Z"
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub), tag="c")
    assert "made on 2026-02-02" in got["said"]
    assert "taken anew" in got["said"]
    hub.renamed[REPO] = "other/Name"
    assert "now answers as other/Name" in run_pull(tmp_path, f"hf://{REPO}", env=env(hub), tag="d")["said"]


def test_main_moving_during_the_pull_changes_nothing(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    first = hub.add(REPO, llama_files)

    def move(request: Request) -> None:
        if "/tree/" in request.path:
            hub.add(REPO, {name: data[::-1] for name, data in llama_files.items()})

    hub.faults.on_request = move
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert got["origin"]["commit"] == first
    assert got["files"] == {name: sha256(data) for name, data in llama_files.items()}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_bytes_of_the_right_size_are_refused(
    hub: Hub, tmp_path: Path, llama_files: dict[str, bytes], name: str
) -> None:
    hub.add(REPO, llama_files)
    bad = bytearray(llama_files[name])
    bad[-1] ^= 1
    hub.faults.corrupt[name] = bytes(bad)
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("IntegrityError", 3)
    assert name in got["text"]
    assert not (tmp_path / "weightsmith" / "models").exists()
    assert not list((tmp_path / "weightsmith" / "staging").glob("[!.]*"))
    hub.faults.corrupt.clear()
    healed = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert healed["files"][name] == sha256(llama_files[name]), "the bad copy in the cache must not stick"


@pytest.mark.parametrize(
    ("setup", "token", "error", "words"),
    [
        ({"gated": True}, None, "AccessError", "no token was found"),
        ({"gated": True}, TOKEN, "AccessError", "licence was not accepted"),
        ({"private": True}, None, "NotFoundError", "or it is private"),
        ({"private": True}, TOKEN, "NotFoundError", "for this token's account"),
        ({}, "hf_wrong", "AccessError", "token is refused"),
    ],
)
def test_refusals_are_told_apart(
    hub: Hub,
    tmp_path: Path,
    llama_files: dict[str, bytes],
    setup: dict[str, Any],
    token: str | None,
    error: str,
    words: str,
) -> None:
    hub.add(REPO, llama_files, **setup)
    hub.tokens.add(TOKEN)
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub, **({"HF_TOKEN": token} if token else {})))
    assert (got["error"], got["exit"]) == (error, 7)
    assert words in got["text"]
    assert "\n  " in got["text"], "a refusal says what to do"


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("hf://org/absent", {}, "no such repository"),
        (f"hf://{REPO}@v9", {}, "no revision 'v9'"),
        (f"hf://{REPO}", {"revision": "0" * 40}, "no revision"),
        (f"hf://{REPO}", {"include": ["*.Q4.gguf"]}, "no weights match"),
        (f"hf://{REPO}", {"offline": True}, "offline"),
    ],
)
def test_what_does_not_exist(
    hub: Hub, tmp_path: Path, llama_files: dict[str, bytes], source: str, options: dict[str, Any], words: str
) -> None:
    hub.add(REPO, llama_files)
    got = run_pull(tmp_path, source, env=env(hub), **options)
    assert (got["error"], got["exit"]) == ("NotFoundError", 7)
    assert words in got["text"]


def test_accepted_licence_lets_in_and_the_token_stays_here(
    hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]
) -> None:
    """R22: the token goes to the hub alone, not along a redirect to another host, and is written nowhere."""
    hub.add(REPO, llama_files, gated=True, accepted={TOKEN})
    hub.tokens.add(TOKEN)
    cdn = Hub()
    cdn.plain = {sha256(data): data for data in llama_files.values()}
    small = {name: data for name, data in llama_files.items() if len(data) < 64}
    assert not small, "the test serves everything through the redirect"
    hub.faults.redirect = cdn.endpoint
    try:
        got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub, HF_TOKEN=TOKEN))
    finally:
        cdn.close()
    assert got["ok"]
    assert got["origin"]["gated"] is True
    assert any(r.headers.get("authorization") == f"Bearer {TOKEN}" for r in hub.log)
    assert cdn.log
    assert not any("authorization" in r.headers for r in cdn.log)
    assert TOKEN not in got["said"]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_offline_after_a_pull_needs_no_hub(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    hub.add(REPO, llama_files)
    run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    hub.log.clear()
    for options, more in (({"offline": True, "tag": "a"}, {}), ({"tag": "b"}, {"HF_HUB_OFFLINE": "1"})):
        got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub, **more), **options)
        assert got["files"] == {name: sha256(data) for name, data in llama_files.items()}
    assert hub.log == []
    for tag in ("original", "a", "b"):
        kept = tmp_path / "weightsmith" / "models" / "tiny-llama" / tag / "model.safetensors"
        data = bytearray(llama_files["model.safetensors"])
        data[-1] ^= 1
        kept.write_bytes(data)
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub), offline=True, tag="c")
    assert (got["error"], got["exit"]) == ("IntegrityError", 3)


def test_what_the_hugging_face_cache_holds_is_not_fetched(
    hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]
) -> None:
    hub.add(REPO, llama_files)
    code = f"from huggingface_hub import snapshot_download; snapshot_download({REPO!r})"
    cache = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **cache, **env(hub)}, check=True)
    hub.log.clear()
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert got["files"] == {name: sha256(data) for name, data in llama_files.items()}
    assert asked(hub) == []
    damaged = next((tmp_path / "hf").rglob("snapshots/*/config.json")).resolve()
    damaged.chmod(0o644)
    damaged.unlink()
    damaged.write_bytes(bytes(len(llama_files["config.json"])))
    (tmp_path / "weightsmith").rename(tmp_path / "aside")
    healed = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert healed["files"] == got["files"]
    assert asked(hub) == ["config.json"], "only the file that the cache has wrong"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_tried_again(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes], status: int) -> None:
    hub.add(REPO, llama_files)
    hub.faults.status, hub.faults.times, hub.faults.match = status, 1, "/revision/"
    assert run_pull(tmp_path, f"hf://{REPO}", env=env(hub))["ok"]


@pytest.mark.slow
def test_a_lasting_failure_says_what_is_kept(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    hub.add(REPO, llama_files)
    hub.faults.status, hub.faults.times, hub.faults.match = 500, 99, "model.safetensors"
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("WeightsmithError", 1)
    assert "Run the same command again" in got["text"]
    assert "HTTP 500" in got["text"]
    hub.faults.times = 0
    hub.log.clear()
    assert run_pull(tmp_path, f"hf://{REPO}", env=env(hub))["ok"]
    assert "config.json" not in asked(hub), "what was finished is not fetched twice"


def test_no_server_at_all(hub: Hub, tmp_path: Path) -> None:
    hub.close()
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("WeightsmithError", 1)
    assert "connection failed" in got["text"]


def test_a_cut_body_is_resumed_or_fetched_again(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    hub.add(REPO, llama_files)
    hub.faults.cut, hub.faults.cuts = 1000, 2
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert got["files"] == {name: sha256(data) for name, data in llama_files.items()}


@pytest.mark.parametrize("endpoint", ["http://hub.example.org", "ftp://127.0.0.1", "https://user:pw@hub.example.org"])
def test_endpoints_that_would_leak_a_token_are_refused(tmp_path: Path, endpoint: str) -> None:
    got = run_pull(tmp_path, f"hf://{REPO}", env={"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN})
    assert (got["error"], got["exit"]) == ("UsageError", 2)
    assert "pw" not in got["text"]


def test_only_pickles(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, {"pytorch_model.bin": b"p" * 99, "config.json": b"{}"})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("UnsafeInputError", 4)
    forced = run_pull(tmp_path, f"hf://{REPO}", env=env(hub), include=["*.bin"])
    assert (forced["error"], forced["exit"]) == ("UnsafeInputError", 4)
    assert "--allow-pickle" in got["text"]
    assert asked(hub) == []


def pickled_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in write_pickled(folder, shards=2).iterdir()}


@pytest.mark.slow
def test_pickles_in_hugging_face_form(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    files = pickled_files(tmp_path / "tiny")
    extra = {
        "training_args.bin": b"p" * 99,
        "pytorch_model-00003-of-00002.bin": b"p" * 99,
        "consolidated.00.pth": b"p" * 99,
    }
    hub.add(REPO, {**files, **extra, "modeling.py": b"x", "LICENSE": b"MIT"})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("UnsafeInputError", 4)
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub), allow_pickle=True)
    assert got["files"] == {name: sha256(data) for name, data in {**files, "LICENSE": b"MIT"}.items()}
    assert got["container"] == "pytorch"
    assert "torch" not in got["modules"]
    hub.add(REPO, {**files, **llama_files})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub), allow_pickle=True, tag="both")
    assert got["container"] == "safetensors"
    assert set(got["files"]) == set(llama_files), "never both forms"


@pytest.mark.parametrize("shard", ["../x.bin", "/etc/x.bin", "sub/x.bin", "x.safetensors", "x.bin\u202e", "..\\x.bin"])
def test_an_index_of_pickles_cannot_reach_elsewhere(hub: Hub, tmp_path: Path, shard: str) -> None:
    index = json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": shard}}).encode()
    hub.add(REPO, {"pytorch_model.bin.index.json": index, "pytorch_model-00001-of-00002.bin": b"x" * 99})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub), allow_pickle=True)
    assert (got["error"], got["exit"]) == ("UnsafeInputError", 4)
    assert asked(hub) == ["pytorch_model.bin.index.json"]


def test_a_hostile_pickle_never_becomes_an_entry(hub: Hub, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    data = archive(pickle.dumps({"w": Runs(os.mkdir, str(mark))}, 2))
    hub.add(REPO, {**pickled_files(tmp_path / "tiny"), "pytorch_model-00002-of-00002.bin": data})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub), allow_pickle=True)
    assert (got["error"], got["exit"]) == ("UnsafeInputError", 4)
    assert not mark.exists()
    assert not list((tmp_path / "weightsmith" / "models").rglob("weightsmith.json"))


@pytest.mark.slow
def test_the_original_of_grok_1(hub: Hub, tmp_path: Path) -> None:
    write_grok1(tmp_path / "grok")
    files = {f"ckpt-0/{path.name}": path.read_bytes() for path in (tmp_path / "grok" / "ckpt-0").iterdir()}
    files["tokenizer.model"] = b"no real one" * 9
    hub.add("org/Grok-1", {**files, "README.md": b"hello", "run.py": b"x", "ckpt-0/.gitattributes": b"x"})
    got = run_pull(tmp_path, "hf://org/Grok-1", env=env(hub))
    assert (got["error"], got["exit"]) == ("UnsafeInputError", 4)
    got = run_pull(tmp_path, "hf://org/Grok-1", env=env(hub), allow_pickle=True)
    assert got["files"] == {name: sha256(data) for name, data in files.items()}
    assert got["container"] == "grok1"
    locally = run_pull(tmp_path, got["path"], name="local", allow_pickle=True)
    assert locally["files"] == got["files"], "what was pulled is taken from a path as it is"


@pytest.mark.parametrize("name", ["..\\x.safetensors", "C:x.safetensors", "nul.safetensors", "e\u0301.safetensors"])
def test_hostile_names_in_the_listing(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes], name: str) -> None:
    """R10 through the listing: a chosen name that is no plain file name stops the pull before any file is asked for."""
    files = {key: data for key, data in llama_files.items() if key != "model.safetensors"}
    hub.add(REPO, {**files, name: llama_files["model.safetensors"]})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("UnsafeInputError", 4)
    assert asked(hub) == []


@pytest.mark.parametrize(
    "change",
    [{"oid": "../../../../etc"}, {"oid": "zz"}, {"size": -1}, {"lfs": {"oid": "../x", "size": 5, "pointerSize": 1}}],
)
def test_hostile_hashes_in_the_listing(hub: Hub, tmp_path: Path, change: dict[str, Any]) -> None:
    """R11: a hash is checked before anything is named after it."""
    hub.add(REPO, {"model.safetensors": b"x" * 9})
    hub.faults.tree = [{"type": "file", "path": "model.safetensors", "size": 9, "oid": "0" * 40, **change}]
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("IntegrityError", 3)
    assert asked(hub) == []


def test_a_disk_that_is_too_small_is_told_before_anything_comes(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, {"model.safetensors": b"x" * 99})
    lfs = {"oid": "0" * 64, "size": 1 << 47, "pointerSize": 130}
    hub.faults.tree = [{"type": "file", "path": "model.safetensors", "size": 1 << 47, "oid": "0" * 40, "lfs": lfs}]
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("ResourceError", 6)
    assert asked(hub) == []


def test_names_that_differ_in_case_only(hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, {"a-Model.safetensors": b"x", "A-model.safetensors": b"y"})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("UnsafeInputError", 4)


@pytest.mark.parametrize("shard", ["../../other/repo/x.safetensors", "/etc/passwd", "x.bin", "sub/x.safetensors"])
def test_index_cannot_reach_elsewhere(hub: Hub, tmp_path: Path, shard: str) -> None:
    """R12: shard names of an index."""
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": shard}}).encode()
    hub.add(REPO, {"model.safetensors.index.json": index, "model-00001-of-00002.safetensors": b"x" * 99})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("UnsafeInputError", 4)
    assert asked(hub) == ["model.safetensors.index.json"]


def test_index_with_a_missing_shard(hub: Hub, tmp_path: Path) -> None:
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    hub.add(REPO, {"model.safetensors.index.json": index.encode(), "model-00001-of-00002.safetensors": b"x" * 99})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("IntegrityError", 3)


def test_a_damaged_checkpoint_never_becomes_an_entry(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    hub.add(REPO, {**llama_files, "model.safetensors": b"\xff" * 400})
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("IntegrityError", 3)
    assert not list((tmp_path / "weightsmith" / "models").rglob("weightsmith.json"))


@pytest.mark.slow
def test_a_killed_pull_goes_on_where_it_was(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    """Finished files are not fetched again, and of the one under way at most a chunk for each connection."""
    hub.add(REPO, llama_files)
    total, chunk, kills = sum(map(len, llama_files.values())), 20_000, 4
    hub.faults.pace = 0.05
    for number in range(kills):
        child = start_pull(tmp_path, f"hf://{REPO}", env=env(hub), chunk=chunk)
        while child.poll() is None and hub.served < (number + 1) * total // (kills + 1):
            time.sleep(0.002)
        child.kill()
        child.wait()
    assert not (tmp_path / "weightsmith" / "models").exists()
    hub.faults.pace = 0
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub), chunk=chunk)
    assert got["files"] == {name: sha256(data) for name, data in llama_files.items()}
    assert hub.served <= total + kills * 4 * chunk
    assert not list((tmp_path / "weightsmith" / "downloads").iterdir()), "nothing is kept twice"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_length_is_refused(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes], name: str) -> None:
    hub.add(REPO, llama_files)
    hub.faults.corrupt[name] = llama_files[name] + b"x"
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("IntegrityError", 3)
    assert name in got["text"]
    assert f"{len(llama_files[name])} are listed" in got["text"]
    assert not (tmp_path / "weightsmith" / "models").exists()


def test_access_that_ends_under_way(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    """The files themselves are refused, not the listing: gated and gone are still told apart."""
    hub.add(REPO, llama_files)
    hub.faults.on_request = lambda request: setattr(hub.repos[REPO], "gated", "/resolve/" in request.path)
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub))
    assert (got["error"], got["exit"]) == ("AccessError", 7)
    assert "gated and no token" in got["text"]


@pytest.mark.slow
def test_the_originals_of_meta_and_mistral(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    write_meta(tmp_path / "meta")
    meta = {f"original/{path.name}": path.read_bytes() for path in (tmp_path / "meta").iterdir()}
    hub.add(REPO, {**llama_files, **meta})
    refused = run_pull(tmp_path, f"hf://{REPO}", env=env(hub), include=["original/*"])
    assert (refused["error"], refused["exit"]) == ("UnsafeInputError", 4)
    got = run_pull(tmp_path, f"hf://{REPO}", env=env(hub), include=["original/*"], allow_pickle=True)
    assert got["files"] == {name.removeprefix("original/"): sha256(data) for name, data in meta.items()}
    assert got["container"] == "meta"
    write_mistral(tmp_path / "mistral", form="sharded")
    hub.add("org/Native", {path.name: path.read_bytes() for path in (tmp_path / "mistral").iterdir()})
    got = run_pull(tmp_path, "hf://org/Native", env=env(hub))
    assert got["container"] == "mistral"
    assert len(got["files"]) == 4


@pytest.mark.slow
def test_two_pulls_at_once(hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    hub.add(REPO, llama_files)
    hub.faults.on_request = lambda request: time.sleep(0.02)
    results: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda: results.append(run_pull(tmp_path, f"hf://{REPO}", env=env(hub))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.get("ok") for result in results] == ["tiny-llama:original"] * 2
    assert hub.served == sum(map(len, llama_files.values())), "each file is fetched by one of them"

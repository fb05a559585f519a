"""`push`, and pulling what others pushed: the real huggingface_hub on the other side of a hub on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loopback.hub import Hub, Request
from tests.loopback.verb import ROOT, environment, run_client, run_verb
from tests.tiny import write_llama
from weightsmith.catalog import Catalog

Told = Callable[..., dict[str, Any]]
TOKEN = "hf_writeWRITEwrite0123456789abcd"
READER = "hf_readREADread0123456789abcdefg"
REPO = "org/Tiny-Llama-GGUF"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    server.tokens |= {TOKEN, READER}
    server.uploads.may_write.add(TOKEN)
    yield server
    server.close()


@pytest.fixture
def tiny(tmp_path: Path, tiny_models: Path) -> Path:
    """A catalog with tiny:original (from a path) and tiny:q8_0."""
    return tmp_path


def push(home: Path, hub: Hub, *args: str, token: str = TOKEN, **more: str) -> dict[str, Any]:
    return run_verb(home, hub, "push", *args, **({"HF_TOKEN": token} if token else {}), **more)


def main(hub: Hub, repo: str = REPO) -> dict[str, bytes]:
    """The files of the repository's main branch."""
    known = hub.repos[repo]
    return known.commits[known.refs["main"]].files


def put(hub: Hub) -> list[str]:
    return [request.path for request in hub.log if request.method == "PUT"]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, links followed."""
    found = {}
    for base, _, names in os.walk(folder):
        for name in names:
            path = Path(base, name)
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.slow
def test_what_is_pushed_is_what_both_clients_download(tiny: Path, hub: Hub) -> None:
    entry = Catalog().get("tiny:q8_0")
    dry = push(tiny, hub, "tiny:q8_0", f"hf://{REPO}", "--dry-run", token="")
    assert (dry["code"], dry["new_repository"], [one["state"] for one in dry["files"]]) == (0, True, ["new"])
    assert hub.repos == {}
    done = push(tiny, hub, "tiny:q8_0", f"hf://{REPO}", "--private", "--check", "--message", "first")
    assert (done["code"], done["changed"], done["readme"]) == (0, True, "written"), done["said"]
    assert done["commit"] == hub.repos[REPO].refs["main"]
    assert hub.uploads.messages == ["first"]
    assert hub.repos[REPO].private
    (file,) = entry.files
    assert main(hub).keys() == {".gitattributes", "README.md", file.path}, "no record, nothing else"
    assert main(hub)[file.path] == entry.path.read_bytes()
    assert main(hub)["README.md"].decode() == done["card"]
    # the real client
    folder = Path(run_client(tiny, hub, f"hf.snapshot_download({REPO!r})", HF_TOKEN=TOKEN))
    theirs = hashes(folder)
    assert theirs[file.path] == file.sha256
    alone = run_client(tiny, hub, f"hf.hf_hub_download({REPO!r}, {file.path!r})", HF_TOKEN=TOKEN)
    assert hashlib.sha256(Path(alone).read_bytes()).hexdigest() == file.sha256
    # ours, in another catalog
    got = run_verb(
        tiny, hub, "pull", f"hf://{REPO}", HF_TOKEN=TOKEN, HF_HOME=str(tiny / "hf2"), WEIGHTSMITH_HOME=str(tiny / "b")
    )
    assert got["code"] == 0, got["said"]
    assert {one["path"]: one["sha256"] for one in got["files"]} == {file.path: theirs[file.path]}
    # The token went to the hub alone: never along with bytes to a signed address, and into no output.
    assert all("authorization" not in request.headers for request in hub.log if request.method == "PUT")
    assert TOKEN not in dry["said"] + done["said"] + got["said"]
    assert all(request.headers["host"] == f"127.0.0.1:{hub.port}" for request in hub.log)


def test_what_the_client_uploads_is_what_is_pulled(tiny: Path, hub: Hub) -> None:
    write_llama(tiny / "shards", shards=2, seed=3)
    made = hashes(tiny / "shards")
    whole = (
        f"api.create_repo({REPO!r}) and api.upload_folder(repo_id={REPO!r}, folder_path={str(tiny / 'shards')!r}).oid"
    )
    run_client(tiny, hub, whole, HF_TOKEN=TOKEN)
    licence = f"api.upload_file(path_or_fileobj=b'MIT', path_in_repo='LICENSE', repo_id={REPO!r}).oid"
    commit = run_client(tiny, hub, licence, HF_TOKEN=TOKEN)
    got = run_verb(tiny, hub, "pull", f"hf://{REPO}", "--name", "back")
    assert got["code"] == 0, got["said"]
    assert got["origin"]["commit"] == commit
    ours = {one["path"]: one["sha256"] for one in got["files"]}
    assert ours == made | {"LICENSE": hashlib.sha256(b"MIT").hexdigest()}
    folder = Path(run_client(tiny, hub, f"hf.snapshot_download({REPO!r})"))
    theirs = hashes(folder)
    assert {name: theirs[name] for name in ours} == ours
    assert theirs.keys() - ours.keys() == {".gitattributes"}


@pytest.mark.slow
def test_what_is_there_is_not_sent_again(tiny: Path, hub: Hub) -> None:
    target = f"hf://{REPO}"
    first = push(tiny, hub, "tiny:original", target)
    assert first["code"] == 0, first["said"]
    sent = len(put(hub))
    again = push(tiny, hub, "tiny:original", target)
    assert (again["code"], again["changed"], again["commit"]) == (0, False, first["commit"])
    assert {one["state"] for one in again["files"]} == {"there"}
    assert (again["bytes"], again["readme"], again["card"]) == (0, "kept", None)
    assert len(put(hub)) == sent
    # another entry beside it: the card stays the first one's unless asked for
    beside = push(tiny, hub, "tiny:q8_0", target, "--card")
    assert (beside["code"], beside["readme"]) == (0, "replaced")
    assert main(hub).keys() > {"config.json", "model.safetensors", "README.md", "tiny-q8_0.gguf"}
    assert "`tiny-q8_0.gguf`" in main(hub)["README.md"].decode()
    # other bytes by the same name, and the same bytes by another name
    hub.add(REPO, {**main(hub), "config.json": b"{}" * 40, "other.gguf": main(hub)["tiny-q8_0.gguf"]})
    states = {one["path"]: one["state"] for one in push(tiny, hub, "tiny:original", target, "--dry-run")["files"]}
    assert states.pop("config.json") == "replaced"
    assert set(states.values()) == {"there"}
    hub.add(REPO, {name: data for name, data in main(hub).items() if name != "tiny-q8_0.gguf"})
    assert push(tiny, hub, "tiny:q8_0", target, "--dry-run")["files"][0]["state"] == "elsewhere"


def test_a_hub_without_xet_gets_lfs(tiny: Path, hub: Hub) -> None:
    """With hf_xet installed and nothing said about it, the library would ask this hub for Xet for minutes."""
    done = push(tiny, hub, "tiny:q8_0", f"hf://{REPO}", HF_HUB_DISABLE_XET="")
    assert done["code"] == 0, done["said"]
    assert len(put(hub)) == 2, "the model and its card"
    assert not [request.path for request in hub.log if "xet" in request.path]


def test_a_branch_and_a_stopped_push(tiny: Path, hub: Hub) -> None:
    """The commit fails when the objects are there: nothing shows, and the next run sends none of them again."""
    hub.add(REPO, {"README.md": b"the owner's own words, which nobody replaces " * 3})
    hub.faults.status, hub.faults.times, hub.faults.match = 507, 9, "/commit/"
    stopped = push(tiny, hub, "tiny:original", f"hf://{REPO}@next")
    assert stopped["code"] == 1
    assert "Run the same command again" in stopped["error"]["hint"]
    assert hub.repos[REPO].refs["next"] == hub.repos[REPO].refs["main"]
    sent = sorted(put(hub))
    assert len(sent) == len(set(sent)) >= 3
    hub.faults.times = 0
    done = push(tiny, hub, "tiny:original", f"hf://{REPO}@next")
    assert (done["code"], done["branch"], done["readme"]) == (0, "next", "kept"), done["said"]
    assert sorted(put(hub)) == sent
    assert main(hub).keys() == {"README.md"}
    files = hub.repos[REPO].commits[hub.repos[REPO].refs["next"]].files
    assert files["README.md"] == main(hub)["README.md"]
    assert "signature" not in stopped["said"] + done["said"], "signed addresses are nobody's to read"


def test_a_killed_push_goes_on_with_what_has_arrived(tiny: Path, hub: Hub) -> None:
    """SIGKILL when one of the large files is stored and another one begins."""
    command = [sys.executable, "-m", "weightsmith", "push", "tiny:original", f"hf://{REPO}", "-q"]
    child = subprocess.Popen(command, cwd=ROOT, env=environment(tiny, hub, HF_TOKEN=TOKEN))

    def kill(request: Request) -> None:
        if request.method != "PUT" or first_to_come.acquire(blocking=False):
            return
        while not hub.uploads.objects and child.poll() is None:
            time.sleep(0.01)
        child.kill()

    first_to_come = threading.Semaphore(1)
    hub.faults.on_request = kill
    assert child.wait(timeout=60) == -9
    assert main(hub).keys() == {".gitattributes"}
    hub.faults.on_request = None
    hub.log.clear()
    arrived = set(hub.uploads.objects)
    assert arrived
    done = push(tiny, hub, "tiny:original", f"hf://{REPO}", "--check")
    assert done["code"] == 0, done["said"]
    assert not [path for path in put(hub) if any(name in path for name in arrived)]


@pytest.mark.parametrize(
    ("token", "words"), [("", "needs a token and none"), (READER, "does not let this token write"), ("hf_x", "token")]
)
def test_who_may_not_write_is_told(tiny: Path, hub: Hub, token: str, words: str) -> None:
    hub.add(REPO, {".gitattributes": b"x"})
    refused = push(tiny, hub, "tiny:q8_0", f"hf://{REPO}", token=token)
    assert (refused["code"], refused["error"]["kind"]) == (7, "AccessError")
    assert words in refused["error"]["message"]
    assert "HF_TOKEN" in refused["error"]["hint"]
    assert main(hub).keys() == {".gitattributes"}
    assert not token or token not in refused["said"]


def test_damage_is_found_before_anything_shows(tiny: Path, hub: Hub) -> None:
    entry = Catalog().get("tiny:q8_0")
    damaged = bytearray(entry.path.read_bytes())
    damaged[-1] ^= 1
    entry.path.write_bytes(damaged)
    for more in (["--check"], []):  # hashed here first, or by the library on its way
        refused = push(tiny, hub, "tiny:q8_0", f"hf://{REPO}", *more)
        assert (refused["code"], refused["error"]["kind"]) == (3, "IntegrityError")
        assert entry.files[0].sha256 in refused["error"]["message"]
        assert hub.uploads.messages == []
        assert ("--check" in more) == (hub.repos == {}), "with --check nothing was even made"
    entry.path.write_bytes(damaged[:-1])
    refused = push(tiny, hub, "tiny:q8_0", f"hf://{REPO}", "--dry-run")
    assert (refused["code"], str(entry.path)) == (3, refused["error"]["path"])


def test_a_hub_that_lists_other_bytes_is_told(tiny: Path, hub: Hub) -> None:
    hub.uploads.lost["tiny-q8_0.gguf"] = b"something else" * 20
    refused = push(tiny, hub, "tiny:q8_0", f"hf://{REPO}")
    assert (refused["code"], refused["error"]["kind"]) == (3, "IntegrityError")
    assert "tiny-q8_0.gguf" in refused["error"]["path"]


def test_a_moving_branch_and_a_public_repository_are_refused(tiny: Path, hub: Hub) -> None:
    hub.add(REPO, {"a": b"x"})
    refused = push(tiny, hub, "tiny:q8_0", f"hf://{REPO}", "--private")
    assert (refused["code"], refused["error"]["kind"]) == (2, "UsageError")

    def move(request: Request) -> None:
        if "/preupload/" in request.path:
            hub.add(REPO, {"b": b"y"})

    hub.faults.on_request = move
    refused = push(tiny, hub, "tiny:q8_0", f"hf://{REPO}")
    assert refused["code"] == 1
    assert "moved" in refused["error"]["message"]
    assert main(hub).keys() == {"b"}


def test_what_is_no_target_is_refused(tiny: Path, told: Told) -> None:
    for target in ("tiny", "https://host/a.gguf", f"hf://{REPO}@{'0' * 40}"):
        assert told("push", "tiny:q8_0", target, code=2)["error"]["kind"] == "UsageError"
    assert told("push", "absent", f"hf://{REPO}", code=7)["error"]["kind"] == "NotFoundError"


def test_only_the_entry_goes(tiny: Path, hub: Hub) -> None:
    """A file that somebody put beside it, and one that is a link by now, stay here."""
    folder = Catalog().get("tiny:original").folder
    (folder / "notes.txt").write_text("mine")
    assert push(tiny, hub, "tiny:original", f"hf://{REPO}")["code"] == 0
    assert not {"notes.txt", "weightsmith.json"} & main(hub).keys()
    secret = tiny / "secret"
    secret.write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(secret)
    refused = push(tiny, hub, "tiny:original", "hf://org/other")
    assert refused["code"] in (3, 4)
    assert "org/other" not in hub.repos


def test_the_record_of_what_was_pushed_is_untouched(tiny: Path, hub: Hub) -> None:
    record = Catalog().get("tiny:q8_0").folder / "weightsmith.json"
    before = record.read_bytes()
    assert json.loads(before)["name"] == "tiny"
    push(tiny, hub, "tiny:q8_0", f"hf://{REPO}")
    assert record.read_bytes() == before

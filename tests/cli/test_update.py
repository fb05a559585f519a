"""R20: `update` follows a branch, and stops where the name no longer stands for the repository that it stood for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loopback.hub import Hub, Repo
from tests.loopback.verbs import Verbs
from tests.tiny import write_llama
from weightsmith import lock
from weightsmith.catalog import Catalog
from weightsmith.cli.app import EPILOG
from weightsmith.errors import OwnerChangedError

REPO, SMALL = "org/Tiny", "generation_config.json"  # SMALL is listed by git's hash, as the hub does it
REF = "tiny:original"
BORN, LATER = "2025-01-01T00:00:00.000Z", "2026-02-02T00:00:00.000Z"
Call = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def verbs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verbs]:
    process = Verbs(tmp_path_factory.mktemp("hf"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_llama(tmp_path_factory.mktemp("update") / "tiny")
    (folder / SMALL).write_text('{"a": 1}')
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    server = Hub()
    server.add(REPO, {**files, "LICENSE": b"MIT"}, created=BORN, author="org", number="n1")
    yield server
    server.close()


@pytest.fixture
def call(hub: Hub, verbs: Verbs, tmp_path: Path) -> Call:
    """Run a verb in tmp_path; the model is pulled already, into the catalog and weights.lock."""

    def run(*args: str, **env: str) -> tuple[int, dict[str, Any], str]:
        env = {"HF_ENDPOINT": hub.endpoint, "WEIGHTSMITH_HOME": str(tmp_path / "weightsmith-home"), **env}
        return verbs.run(*args, cwd=tmp_path, **env)

    assert run("pull", f"hf://{REPO}", "--lock")[0] == 0
    return run


def locked(tmp_path: Path) -> lock.Locked:
    (one,) = lock.read(tmp_path / "weights.lock")
    return one


def entry(tmp_path: Path) -> Any:
    return Catalog(tmp_path / "weightsmith-home").get("tiny")


def fetched(hub: Hub) -> list[str]:
    return [request.path for request in hub.log if "/resolve/" in request.path]


def reborn(hub: Hub, files: dict[str, bytes], **changes: Any) -> str:
    """The name is given up and taken anew, with other contents unless they are the same; returns its commit."""
    old = hub.repos.pop(REPO)
    options: dict[str, Any] = {"created": old.created, "author": old.author, "number": old.number, **changes}
    return hub.add(REPO, files, **options)


def test_the_lock_says_whose_it_was(call: Call, tmp_path: Path) -> None:
    told = "2025-01-01T00:00:00+00:00"
    pins = locked(tmp_path).pins
    assert [pins[word] for word in ("created", "author", "repository", "revision")] == [told, "org", "n1", "main"]
    assert [entry(tmp_path).origin[word] for word in ("created", "author", "repository")] == [told, "org", "n1"]
    assert "answers" not in pins


def test_nothing_to_do(call: Call, hub: Hub, tmp_path: Path) -> None:
    before = (tmp_path / "weights.lock").read_bytes(), entry(tmp_path)
    hub.log.clear()
    code, told, _ = call("update")
    assert (code, told["models"][0]["status"], fetched(hub)) == (0, "same", [])
    assert ((tmp_path / "weights.lock").read_bytes(), entry(tmp_path)) == before


def test_moved_main(call: Call, hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    call("convert", "tiny", "--to", "gguf")
    before = (tmp_path / "weights.lock").read_bytes(), entry(tmp_path)
    old = before[1].origin["commit"]
    changed = {**files, "config.json": files["config.json"] + b" ", "merges.txt": b"a b\n", SMALL: b'{"a": 2}'}
    new = hub.add(REPO, changed)
    hub.log.clear()
    code, told, _ = call("update", "--dry-run")
    (one,) = told["models"]
    expected = {
        "added": [{"path": "merges.txt", "size": 4}],
        "removed": [{"path": "LICENSE", "size": 3}],
        "changed": [
            {"path": "config.json", "old_size": len(files["config.json"]), "size": len(files["config.json"]) + 1},
            {"path": SMALL, "old_size": 8, "size": 8},
        ],
        "old_commit": old,
        "new_commit": new,
        "made_from_the_old": ["tiny:f16"],
        "reasons": [],
        "error": None,
    }
    assert {key: one[key] for key in expected} == expected
    assert (code, one["status"], fetched(hub)) == (0, "moved", [])
    assert ((tmp_path / "weights.lock").read_bytes(), entry(tmp_path)) == before, "only told"
    assert call("pull", f"hf://{REPO}", "--tag", "old", "--offline")[1]["origin"]["commit"] == old

    code, told, _ = call("update", "tiny")
    (one,) = told["models"]
    assert (code, one["status"]) == (0, "updated")
    assert {key: one[key] for key in expected} == expected, "what was foreseen is what happened"
    assert {path.rpartition("/")[2] for path in fetched(hub)} == {"config.json", "merges.txt", SMALL}
    assert entry(tmp_path).origin == {**before[1].origin, "commit": new, "source": f"hf://{REPO}@{new}"}
    assert locked(tmp_path).pins["commit"] == new
    assert {file.path: file.sha256 for file in locked(tmp_path).files} == {
        file.path: file.sha256 for file in entry(tmp_path).files
    }
    assert call("pull", "--locked")[0] == call("pull", f"hf://{REPO}")[0] == 0, "the same words still mean it"
    assert call("pull", f"hf://{REPO}", "--tag", "new", "--offline")[1]["origin"]["commit"] == new
    assert call("update")[1]["models"][0]["status"] == "same"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"created": LATER}, "the repository was made on 2026-02-02T00:00:00+00:00"),
        ({"author": "squatter"}, "its author is squatter, it was org"),
        ({"number": "n2"}, "its number on the hub is n2, it was n1"),
    ],
)
@pytest.mark.parametrize("same", [True, False])
def test_a_name_that_was_taken_anew(
    call: Call, hub: Hub, files: dict[str, bytes], tmp_path: Path, changes: dict[str, str], reason: str, same: bool
) -> None:
    before = (tmp_path / "weights.lock").read_bytes(), entry(tmp_path)
    contents = {**files, "LICENSE": b"MIT"} if same else {**files, "LICENSE": b"evil"}
    new = reborn(hub, contents, **changes)
    assert (new == before[1].origin["commit"]) is same
    hub.log.clear()
    for words in ((), ("--dry-run",), ("tiny",)):
        code, told, said = call("update", *words)
        (one,) = told["models"]
        assert (code, one["status"], one["error"]["exit_code"]) == (8, "refused", 8)
        assert len(one["reasons"]) == 1
        assert one["reasons"][0].startswith(reason)
        assert reason in said
        assert "--accept-owner" in said
    assert fetched(hub) == []
    assert ((tmp_path / "weights.lock").read_bytes(), entry(tmp_path)) == before
    if same:
        assert call("pull", "--locked", "--force")[0] == 0, "a lock asks for a commit, whatever the name means"
        assert (tmp_path / "weights.lock").read_bytes() == before[0]
        assert entry(tmp_path).origin == before[1].origin
    code, told, _ = call("update", "tiny", "--accept-owner")
    assert (code, told["models"][0]["status"], told["models"][0]["new_commit"]) == (0, "updated", new)
    assert locked(tmp_path).pins["commit"] == new
    assert call("update")[1]["models"][0]["status"] == "same", "it is who was accepted from now on"


def test_a_redirect(call: Call, hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """The hub sends on whoever asks for the old name, until somebody registers it."""
    before = (tmp_path / "weights.lock").read_bytes(), entry(tmp_path)
    hub.repos["other/Name"] = hub.repos.pop(REPO)
    new = hub.add("other/Name", {**files, "LICENSE": b"other"})
    hub.moved[REPO] = "other/Name"
    hub.log.clear()
    code, told, said = call("update")
    assert (code, told["models"][0]["reasons"]) == (
        8,
        [f"{REPO} leads to other/Name: it was renamed, or handed to somebody else"],
    )
    assert "--accept-owner" in said
    assert fetched(hub) == []
    assert ((tmp_path / "weights.lock").read_bytes(), entry(tmp_path)) == before
    code, told, _ = call("update", "tiny", "--accept-owner")
    assert (code, told["models"][0]["source"], told["models"][0]["new_commit"]) == (0, "hf://other/Name", new)
    assert locked(tmp_path).source == "hf://other/Name"
    assert entry(tmp_path).origin["repo"] == "other/Name"
    del hub.moved[REPO]
    hub.add(REPO, files, author="squatter", created=LATER, number="n9")
    assert call("update")[1]["models"][0]["status"] == "same", "the old name is not asked any more"


def test_a_name_that_led_elsewhere_from_the_start(
    hub: Hub, verbs: Verbs, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.moved["old/Name"] = REPO
    env = {"HF_ENDPOINT": hub.endpoint, "WEIGHTSMITH_HOME": str(tmp_path / "weightsmith-home")}
    code, _, said = verbs.run("pull", "hf://old/Name", "--lock", cwd=tmp_path, **env)
    assert code == 0
    assert f"now answers as {REPO}" in said
    assert locked(tmp_path).pins["answers"] == REPO
    hub.add(REPO, {**files, "LICENSE": b"new"})
    code, told, _ = verbs.run("update", cwd=tmp_path, **env)
    assert (code, told["models"][0]["status"]) == (0, "updated"), "as it was told when it was pulled"
    assert told["models"][0]["source"] == f"hf://{REPO}"


def test_offline_and_gone(call: Call, hub: Hub, tmp_path: Path) -> None:
    hub.log.clear()
    code, told, said = call("update", HF_HUB_OFFLINE="1")
    assert (code, told["models"][0]["status"]) == (7, "failed")
    assert "offline" in said
    assert hub.log == []
    hub.repos.clear()
    code, told, _ = call("update")
    assert (code, told["models"][0]["error"]["kind"]) == (7, "NotFoundError")
    assert call("pull", "--locked")[0] == 0
    code, told, said = call("update", HF_ENDPOINT="http://127.0.0.1:9")
    assert (code, told["models"][0]["error"]["kind"]) == (1, "WeightsmithError")
    assert "connection failed" in said


def test_which_models(call: Call, hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """Several, one of them refused, one by commit, one made, one an alias; a lock before the catalog."""
    commit = hub.add("org/Second", files, author="org")
    hub.add("org/Third", files)
    assert (
        call("pull", "hf://org/Second")[0] == call("pull", f"hf://org/Third@{hub.repos['org/Third'].refs['main']}")[0]
    )
    call("convert", "tiny", "--to", "gguf")
    call("tag", "tiny:original", "prod")
    write_llama(tmp_path / "mine")
    call("pull", "./mine")
    assert [one["ref"] for one in call("update")[1]["models"]] == [REF], "what the lock has"
    assert [one["ref"] for one in call("update", "second", "hf://org/Tiny")[1]["models"]] == ["second:original", REF]
    (tmp_path / "weights.lock").rename(tmp_path / "my.lock")
    reborn(hub, files, author="squatter")
    hub.add("org/Second", {**files, "LICENSE": b"new"})
    code, told, _ = call("update")
    statuses = {one["ref"]: one["status"] for one in told["models"]}
    assert (code, statuses) == (8, {REF: "refused", "second:original": "updated", "third:original": "pinned"})
    assert entry(tmp_path).origin["author"] == "org"
    assert told["models"][0]["old_commit"] == commit
    assert call("update", "--lock", "my.lock")[0] == 8
    for words, code in (
        (("tiny:f16",), 2),  # made, not pulled
        (("tiny:prod",), 2),  # an alias
        (("mine",), 2),  # of no hub
        (("nothing",), 7),
        (("--accept-owner",), 2),  # for whom?
        (("--lock", "absent.lock"), 2),
    ):
        assert call("update", *words)[0] == code, words


def test_a_lock_from_before_owners_were_noted(call: Call, hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "weights.lock"
    kept = [line for line in path.read_text().splitlines() if line.split(" ")[0] not in lock.IDENTITY]
    path.write_text("\n".join(kept) + "\n")
    assert not set(lock.IDENTITY) & set(locked(tmp_path).pins)
    assert call("pull", "--locked")[0] == 0
    hub.add(REPO, {**files, "LICENSE": b"new"})
    assert call("update")[1]["models"][0]["status"] == "updated"
    assert locked(tmp_path).pins["author"] == "org", "from now on it is known"


def test_a_hub_that_says_odd_things(call: Call, hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """What it says stands in a lock and on a terminal: short, printable, a text."""
    repo: Repo = hub.repos[REPO]
    repo.author, repo.number = "\x1b[31mevil", "x" * 10_000
    hub.renamed[REPO] = "../../etc"
    code, told, said = call("update")
    assert code == 8
    assert told["models"][0]["reasons"] == [f"{REPO} leads to ../../etc: it was renamed, or handed to somebody else"], (
        "an author or number that is none is as if it was not said"
    )
    assert "\x1b" not in said + json.dumps(told)
    code, told, _ = call("update", "tiny", "--accept-owner")
    assert (code, told["models"][0]["error"]["kind"]) == (2, "UsageError")
    assert not any("etc" in request.path for request in hub.log)


def test_the_token_is_in_nothing_that_is_written_or_said(
    hub: Hub, verbs: Verbs, files: dict[str, bytes], tmp_path: Path
) -> None:
    """R22, of every verb that asks a hub or passes on what came from there; and not along a redirect of the API."""
    secret = "hf_secretSECRETsecret0123456789"
    hub.tokens.add(secret)
    hub.repos[REPO].gated, hub.repos[REPO].accepted = True, {secret}
    env = {"HF_ENDPOINT": hub.endpoint, "WEIGHTSMITH_HOME": str(tmp_path / "home"), "HF_TOKEN": secret}
    said = []

    def run(*args: str, code: int = 0) -> None:
        got, told, err = verbs.run(*args, cwd=tmp_path, **env)
        assert got == code, err
        said.append(json.dumps(told) + err)

    run("pull", f"hf://{REPO}", "--lock")
    hub.add(REPO, {**files, "LICENSE": b"new"})
    run("update", "--dry-run")
    run("update")
    run("pull", "--locked")
    run("convert", "tiny", "--to", "gguf")
    for words in (
        ("list",),
        ("show", "tiny"),
        ("lineage", "tiny"),
        ("provenance", "tiny:f16"),
        ("verify", "--integrity"),
    ):
        run(*words)
    run("export", "tiny", "tiny:f16", "-o", "tiny.tar")
    other = Hub()
    try:
        hub.moved[REPO] = other.endpoint
        hub.log.clear()
        run("update", code=7)
        assert [r.headers["authorization"] for r in hub.log] == [f"Bearer {secret}"] * len(hub.log)
        assert other.log
        assert not any("authorization" in request.headers for request in other.log)
    finally:
        other.close()
    assert not [text for text in said if secret in text]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_the_exit_code_is_told() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert OwnerChangedError.exit_code == 8
    assert "8 a name stands for another repository or owner" in EPILOG
    assert "| 8 |" in readme

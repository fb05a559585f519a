"""weights.lock: the same bytes for the same models, and no drift goes unnoticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.craft import STRING, gguf, kv
from tests.loopback.hub import Hub
from tests.tiny import write_llama
from weightsmith import lock
from weightsmith.catalog import Catalog
from weightsmith.errors import IntegrityError, NotFoundError, UsageError
from weightsmith.lock import Locked
from weightsmith.pull import pull, pull_locked
from weightsmith.store import File

ROOT = Path(__file__).resolve().parents[1]
REPO = "org/Tiny-Llama"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("lock") / "tiny"
    write_llama(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def weightsmith(hub: Hub, where: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON result and stderr of `weightsmith pull`; each folder `where` has a catalog and a cache."""
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(where / "hf"), "PYTHONPATH": str(ROOT)}
    env |= {"WEIGHTSMITH_HOME": str(where / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    where.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "weightsmith", "pull", *words, "--json"]
    done = subprocess.run(command, cwd=where.parent, env=env, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def url_lock(hub: Hub, tmp_path: Path) -> tuple[Catalog, Path]:
    """A catalog with a single file pulled from a URL, and the lock of it."""
    hub.plain["m.gguf"] = gguf([kv("general.architecture", STRING, "llama"), kv("general.name", STRING, "x")], [], b"")
    catalog = Catalog(tmp_path / "home")
    entry = pull(catalog, f"{hub.endpoint}/plain/m.gguf?signature=SECRET")
    lock.write(tmp_path / "weights.lock", [entry])
    return catalog, tmp_path / "weights.lock"


@pytest.mark.slow
def test_a_lock_pulls_the_same_elsewhere_after_main_moved(
    hub: Hub, tmp_path: Path, llama_files: dict[str, bytes]
) -> None:
    commit = hub.add(REPO, {**llama_files, "LICENSE": b"MIT"})
    code, first, _ = weightsmith(hub, tmp_path / "a", f"hf://{REPO}", "--lock")
    assert code == 0
    text = (tmp_path / "weights.lock").read_bytes()
    (model,) = tomllib.loads(text.decode())["model"]
    assert (model["commit"], model["source"], model["revision"]) == (commit, f"hf://{REPO}", "main")
    assert {file["path"]: file["sha256"] for file in model["files"]} == {f["path"]: f["sha256"] for f in first["files"]}
    hub.add(REPO, {name: data[::-1] for name, data in llama_files.items()})
    code, again, _ = weightsmith(hub, tmp_path / "b", "--locked")
    assert code == 0
    assert again["locked"][0]["files"] == first["files"]
    assert again["locked"][0]["origin"] == first["origin"], "written anew, the lock would be the same bytes"
    lock.write(tmp_path / "again.lock", [Catalog(tmp_path / "b" / "home").get("tiny-llama")])
    assert (tmp_path / "again.lock").read_bytes() == text
    assert weightsmith(hub, tmp_path / "b", "--locked", "--offline")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"drop": "LICENSE"}, "LICENSE: found 3 bytes"),
        ({"add": "merges.txt"}, "merges.txt: found missing, the lock says 7 bytes"),
        ({"hash": "model.safetensors"}, "model.safetensors: found"),
        ({"hash": "LICENSE"}, "LICENSE: found 3 bytes with sha256"),
        ({"commit": "0" * 40}, "no revision"),
    ],
)
def test_any_drift_is_refused(
    hub: Hub, tmp_path: Path, llama_files: dict[str, bytes], change: dict[str, str], told: str
) -> None:
    hub.add(REPO, {**llama_files, "LICENSE": b"MIT"})
    assert weightsmith(hub, tmp_path / "a", f"hf://{REPO}", "--lock")[0] == 0
    (one,) = lock.read(tmp_path / "weights.lock")
    files = {file.path: file for file in one.files}
    if "drop" in change:
        del files[change["drop"]]
    if "add" in change:
        files[change["add"]] = File(change["add"], 7, "0" * 64)
    if "hash" in change:
        files[change["hash"]] = File(change["hash"], files[change["hash"]].size, "0" * 64)
    pins = {**one.pins, **{word: value for word, value in change.items() if word == "commit"}}
    other = Locked(one.name, one.tag, one.asked, one.source, pins, tuple(files.values()))
    (tmp_path / "weights.lock").write_text(lock.text([other]))
    for where in ("a", "b"):  # what is in a catalog already, and what has to come
        code, _, said = weightsmith(hub, tmp_path / where, "--locked")
        if "commit" in change:
            assert (code, "commit is" in said or told in said) == (3 if where == "a" else 7, True)
        else:
            assert code == 3
            assert told in said
    assert not list((tmp_path / "b").rglob("weightsmith.json"))


def test_a_url_is_pinned_by_its_hash(hub: Hub, tmp_path: Path) -> None:
    catalog, path = url_lock(hub, tmp_path)
    assert "SECRET" not in path.read_text()
    models = lock.read(path)
    assert [entry.ref for entry in pull_locked(catalog, models)] == ["m:original"]
    fresh = Catalog(tmp_path / "fresh")
    assert pull_locked(fresh, models)[0].digest == catalog.get("m").digest
    data = bytearray(hub.plain["m.gguf"])
    data[-1] ^= 1
    hub.plain["m.gguf"] = bytes(data)
    third = Catalog(tmp_path / "third")
    with pytest.raises(IntegrityError, match="is pinned"):
        pull_locked(third, models)
    assert third.entries() == []


def test_several_models_in_one_lock(hub: Hub, tmp_path: Path) -> None:
    catalog, path = url_lock(hub, tmp_path)
    hub.plain["a.gguf"] = hub.plain["m.gguf"]
    first = path.read_bytes()
    other = pull(catalog, f"{hub.endpoint}/plain/a.gguf")
    lock.write(path, [other])
    assert [one.ref for one in lock.read(path)] == ["a:original", "m:original"]
    lock.write(path, [catalog.get("m")])
    assert [one.ref for one in lock.read(path)] == ["a:original", "m:original"]
    assert set(first.splitlines()) < set(path.read_bytes().splitlines()), "a model is a block of its own"
    assert [one.ref for one in lock.choose(lock.read(path), "m", path)] == ["m:original"]
    with pytest.raises(NotFoundError):
        lock.choose(lock.read(path), "x", path)
    assert sorted(file.name for file in tmp_path.glob("*.lock*")) == ["weights.lock"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "format = 2",
        "format = 1\nmodel = 3",
        "format = 1\n[[model]]\nname = 'a'",
        "not toml",
        "format = 1\n[[model]]\nname='../x'\ntag='t'\nasked=['hf://a/b','']\nsource='hf://a/b'\ncommit='"
        + "0" * 40
        + "'\n"
        "files=[{path='a',size=1,sha256='" + "0" * 64 + "'}]",
        "format = 1\n[[model]]\nname='x'\ntag='t'\nasked=['hf://a/b','']\nsource='hf://a/b'\ncommit='main'\n"
        "files=[{path='a',size=1,sha256='" + "0" * 64 + "'}]",
        "format = 1\n[[model]]\nname='x'\ntag='t'\nasked=['hf://a/b','']\nsource='hf://a/b'\ncommit='"
        + "0" * 40
        + "'\n"
        "files=[{path='../a',size=1,sha256='" + "0" * 64 + "'}]",
        "format = 1\n[[model]]\nname='x'\ntag='t'\nasked=['hf://a/b','']\nsource='hf://a/b'\ncommit='"
        + "0" * 40
        + "'\n"
        "files=[{path='a',size=-1,sha256='" + "0" * 64 + "'}]",
        "format = 1\n[[model]]\nname='x'\ntag='t'\nasked=['hf://a/b','']\nsource='ftp://a/b'\ncommit='"
        + "0" * 40
        + "'\n"
        "files=[{path='a',size=1,sha256='" + "0" * 64 + "'}]",
    ],
)
def test_what_is_no_lock(tmp_path: Path, text: str) -> None:
    (tmp_path / "weights.lock").write_text(text)
    with pytest.raises(IntegrityError):
        lock.read(tmp_path / "weights.lock")


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(st.lists(st.tuples(words, words), max_size=4), st.randoms())
def test_text_is_toml_and_does_not_depend_on_order(asked: list[tuple[str, str]], random: Any) -> None:
    models = [
        Locked(f"m{n}", "t", pair, "hf://a/b", {"commit": "0" * 40}, (File("b", 1, "1" * 64), File("a", 0, "2" * 64)))
        for n, pair in enumerate(asked)
    ]
    text = lock.text(models)
    random.shuffle(models)
    assert lock.text(models) == text
    read = tomllib.loads(text).get("model", [])
    assert [tuple(one["asked"]) for one in read] == asked


def test_what_was_made_cannot_be_locked(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "home")
    write_llama(tmp_path / "one")
    original = pull(catalog, str(tmp_path / "one"), name="x")
    with catalog.reserve("x", "made") as reservation:
        write_llama(reservation.folder / "in")
        made = reservation.commit(parent=original)
    with pytest.raises(UsageError, match="was not pulled"):
        lock.locked_form(made)
    assert lock.locked_form(original).source == str(tmp_path / "one")

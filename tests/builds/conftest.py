"""A registry of three tiny models and six targets, as a user keeps it beside them, and the command line to run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import write_llama
from weightsmith.cli.app import run

REGISTRY = """\
models:
  a: {source: ./a, licence: MIT}
  b: {source: ./b, licence: Apache-2.0}
  c: {source: ./c, licence: llama3}
recipes:
  q8: {target: "gguf:Q8_0"}
  q4: {target: "gguf:Q4_0", effort: fast}
  f16: {target: gguf}
gates:
  close: {max_kld: 0.5, text: eval.txt, ctx: 64, windows: 2}
  small: {max_bytes: 200kB, licences: [MIT, apache-2.0]}
builds:
  laptop: {model: [a, b], recipe: [q8, q4], gate: small}
  plain: {model: c, recipe: f16}
  prod: {from: plain, recipe: q4, gate: close, alias: prod}
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        write_llama(folder / name, seed=seed)
    return folder


@pytest.fixture
def here(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the registry, the models and the text of its gate; the working directory of the test."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name in "abc":
        (folder / name).mkdir()
        for file in (models / name).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "eval.txt").write_text("The smith counted 12 nails and 7 hooks; the forge was cold.\n" * 80)
    (folder / "registry.yaml").write_text(REGISTRY)
    monkeypatch.chdir(folder)
    return folder


Build = Callable[..., dict[str, str]]


@pytest.fixture
def build(capsys: pytest.CaptureFixture[str]) -> Build:
    """Run `weightsmith build` and return what became of each job, by reference."""

    def call(*args: str, code: int = 0) -> dict[str, str]:
        assert run(["build", *args, "--json", "-q"]) == code
        parsed = json.loads(capsys.readouterr().out)
        return {job["ref"]: job["status"] for job in parsed["jobs"]}

    return call


def change(folder: Path, before: str, after: str) -> None:
    """Edit the registry in `folder`."""
    text = (folder / "registry.yaml").read_text()
    assert before in text
    (folder / "registry.yaml").write_text(text.replace(before, after))

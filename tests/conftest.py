"""Fixtures that every test may use, and where fetched material lies (see tests/assets.py)."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# In CI the same examples every time, so that a red run is a change's doing; elsewhere new ones each time.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

# A suite in the background runs with SIGINT ignored, and programs that tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "build" / "assets"

for _name, _path in (
    ("WEIGHTSMITH_DEMO_GGUF", ASSETS / "demo.gguf"),
    ("WEIGHTSMITH_LLAMA3_TOKENIZER", ASSETS / "llama3-tokenizer.model"),
    ("WEIGHTSMITH_LLAMA_CPP", ASSETS / "llama.cpp"),
    ("WEIGHTSMITH_WHEELS", ASSETS),
):
    if _path.exists():
        os.environ.setdefault(_name, str(_path))


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own catalog and never sees the user's."""
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(tmp_path / "weightsmith-home"))


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a verb, expect its exit code, and return its JSON."""

    def call(*args: str, code: int = 0) -> dict[str, Any]:
        from weightsmith.cli.app import run

        capsys.readouterr()
        assert run([*args, "--json", "-q"]) == code
        parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
        return parsed

    return call


@pytest.fixture
def tiny_models(tmp_path: Path, told: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny:original, pulled from the folder `tiny` in tmp_path, and tiny:q8_0 made from that; returns the home."""
    from tests.tiny import write_llama

    write_llama(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    told("pull", "tiny")
    told("quantize", "tiny", "--to", "gguf:Q8_0")
    return tmp_path / "weightsmith-home"


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """SmolLM2-135M-Instruct as Q4_1 GGUF."""
    path = os.environ.get("WEIGHTSMITH_DEMO_GGUF")
    if not path:
        pytest.skip("the demo model is absent; `make test` fetches it (tests/assets.py)")
    return Path(path)


@pytest.fixture(scope="session")
def llama_cpp_tree() -> Path:
    """llama.cpp's source tree, for its converter and vocabularies."""
    path = os.environ.get("WEIGHTSMITH_LLAMA_CPP")
    if not path:
        pytest.skip("llama.cpp's sources are absent; `make test` fetches them (tests/assets.py)")
    return Path(path)

"""A loopback hub per test, and a tiny checkpoint to put on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loopback.hub import Hub
from tests.tiny import write_llama


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in safetensors, two shards if the writer makes them."""
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    write_llama(folder)
    return folder


@pytest.fixture
def llama_files(llama_folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(llama_folder.iterdir())}

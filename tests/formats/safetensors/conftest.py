"""Builders that these tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightsmith.formats import safetensors
from weightsmith.types import Reader, Recipe


@pytest.fixture
def make_file() -> Callable[..., bytes]:
    """Bytes of a safetensors file: a header (object, or JSON text as it is) and data."""

    def build(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    return build


@pytest.fixture
def copy_checkpoint() -> Callable[..., Path]:
    """Write what a reader holds with this container's writer, in slabs that do not divide the tensors."""

    def copy(reader: Reader, path: Path, *, slab: int = 7, source: Reader | None = None, **options: Any) -> Path:
        planned = safetensors.plan(reader, Recipe()).tensors
        with safetensors.create(path, reader.config, planned, None, source=source, **options) as writer:
            for info in writer.order:
                for start in range(0, info.n_rows, slab):
                    stop = min(start + slab, info.n_rows)
                    writer.write(info, start, reader.rows(info.name, start, stop))
        return path

    return copy

"""Records of a data file: each a text or a chat. JSON lines are read as they are, parquet through pyarrow.

A chat is a list of messages with `role` and `content`; the older form with `from` and `value` (human, gpt) is put into
these words. Which key of a record counts: --field, else the first of `KEYS` that all records have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import UnsupportedError, UsageError

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
KEYS = ("messages", "conversations", "text", "content")
_ROLES = {"human": "user", "gpt": "assistant"}

Chat = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Records:
    """What a file holds: texts or chats, and the SHA-256 of the bytes that were read and of the field's name."""

    values: list[str | Chat]
    sha256: str


def read(path: Path, *, field: str | None, limit: int) -> Records:
    """Records of `path` up to `limit` bytes; UsageError names the first that is neither text nor chat."""
    digest = hashlib.sha256((field or "").encode())
    rows = _parquet(path, limit, digest) if path.suffix.lower() == ".parquet" else _lines(path, limit, digest)
    values: list[str | Chat] = []
    key = field
    for where, row in rows:
        key = key or next((name for name in KEYS if name in row), None)
        if key is None or key not in row:
            known = ", ".join(list(map(str, row))[:12])
            what = f"no {key!r}" if key else f"none of {', '.join(KEYS)}"
            raise UsageError(f"{where} has {what}; it has {known}", path=path, hint="Name a field with --field.")
        values.append(_value(row[key], path, f"{where}, {key!r}"))
    return Records(values, digest.hexdigest())


def _lines(path: Path, limit: int, digest: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    left = limit
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            left -= len(line)
            if left < 0:
                return
            digest.update(line)
            if line.strip():
                yield f"line {number}", _record(line, path, number)


def _record(line: bytes, path: Path, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"line {number} is not JSON: {str(error)[:100]}", path=path) from error
    if not isinstance(row, dict):
        raise UsageError(f"line {number} is a {type(row).__name__}, expected an object", path=path)
    return row


def _parquet(path: Path, limit: int, digest: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # noqa: PLC0415  (an extra)
    except ImportError as error:
        hint = "pip install 'weightsmith[datasets]', or give a .jsonl file."
        raise UnsupportedError("pyarrow, which reads parquet, is not installed", path=path, hint=hint) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                limit -= batch.nbytes
                if limit < 0:
                    return
                for row in batch.to_pylist():
                    number += 1
                    digest.update(json.dumps(row, sort_keys=True, default=str).encode())
                    yield f"row {number}", row
    except (ArrowException, OSError) as error:
        raise UsageError(f"not readable as parquet: {str(error)[:200]}", path=path) from error


def _value(value: object, path: Path, where: str) -> str | Chat:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return [_message(message, path, where) for message in value]
    raise UsageError(f"{where} is a {type(value).__name__}, expected text or a list of messages", path=path)


def _message(message: Mapping[str, Any], path: Path, where: str) -> Mapping[str, Any]:
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise UsageError(f"{where} holds a message without a role or without text", path=path)
    return {"role": _ROLES.get(role, role), "content": content}

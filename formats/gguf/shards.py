"""A checkpoint in several files: NAME-00001-of-000NN.gguf, counted from 1.

Every file says which part it is (split.no, u16, counted from 0), of how many (split.count, u16), and how many tensors
all parts have together (split.tensors.count, i32). All other metadata is in the first file. Opening any part opens
all of them, from the same folder.

Ref: llama_model_loader in llama.cpp src/llama-model-loader.cpp; gguf-py gguf_writer.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from weightsmith.errors import IntegrityError, NotFoundError
from weightsmith.formats.gguf.metadata import Metadata
from weightsmith.formats.gguf.parse import Header, read_header
from weightsmith.safename import resolve_inside

NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
MAX_PARTS = 65535  # split.count is a u16

_PART = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_name(stem: str, index: int, count: int) -> str:
    """The file name of part `index` (from 0) of `count`."""
    return f"{stem}-{index + 1:05d}-of-{count:05d}.gguf"


def stem_of(path: Path) -> str:
    """The file name without `.gguf` and without a part's number."""
    found = _PART.fullmatch(path.name)
    return found["stem"] if found else path.name.removesuffix(".gguf")


def read_headers(path: Path) -> list[Header]:
    """The headers of all parts of the checkpoint that `path` is a part of, in order.

    Raises NotFoundError (a part is missing) and IntegrityError (parts that do not belong together, or what
    `parse.read_header` raises).
    """
    header = read_header(path)
    metadata = Metadata(header)
    found = _PART.fullmatch(path.name)
    count = metadata.integer(COUNT, 0) or 0
    if count < 2:
        if found and int(found["count"]) > 1:
            text = f"its name says part {int(found['no'])} of {int(found['count'])}, but key {COUNT!r} does not"
            raise IntegrityError(text, path=path, hint="Give it back the name that it was written with.")
        return [header]
    index = metadata.integer(NO, 0) or 0
    name = part_name(found["stem"], index, count) if found else None
    if name is None or path.name != name or index >= count:
        raise IntegrityError(
            f"keys {NO!r} and {COUNT!r} say part {index} (from 0) of {count}, the file name does not",
            path=path,
            hint=f"Parts are called NAME-00001-of-{count:05d}.gguf; give it back its name.",
        )
    stem = stem_of(path)
    headers = []
    for part in range(count):
        headers.append(header if part == index else _read_part(path, stem, part, count))
    _check_together(headers)
    return headers


def _read_part(path: Path, stem: str, part: int, count: int) -> Header:
    name = part_name(stem, part, count)
    target = resolve_inside(path.parent, name, source=path)
    if not target.exists():
        raise NotFoundError(
            f"part {part + 1} of {count} is missing: {name}",
            path=path,
            hint="All parts of a split checkpoint must lie in one folder.",
        )
    header = read_header(target)
    metadata = Metadata(header)
    for key, expected in ((NO, part), (COUNT, count)):
        value = metadata.integer(key)
        if value != expected:
            raise metadata.damaged(key, f"is {value}, expected {expected} by the file's name")
    return header


def _check_together(headers: list[Header]) -> None:
    seen: dict[str, Path] = {}
    for header in headers:
        for name in header.tensors:
            if name in seen:
                raise IntegrityError(f"is in {seen[name].name} as well", path=header.path, tensor=name)
            seen[name] = header.path
    for header in headers:
        metadata = Metadata(header)
        total = metadata.integer(TENSORS)
        if total != len(seen):
            raise metadata.damaged(TENSORS, f"is {total}, but all parts together have {len(seen)} tensors")

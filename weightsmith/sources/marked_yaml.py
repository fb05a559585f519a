"""YAML that a stranger may have written, read into plain values with the line of every key.

Only what `yaml.safe_load` makes, and less of it: no tags, no aliases (so a few bytes never become gigabytes), at most
MAX_DEPTH deep and MAX_BYTES long. Keys are strings, and a key that stands twice is an error, where YAML would keep
the last one without a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from weightsmith.errors import NotFoundError, UsageError

MAX_BYTES = 1 << 20
MAX_DEPTH = 8
_NO_NUMBER = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """data: plain values. lines: from 1, of every key and list item, by its path of keys and positions."""

    file: Path
    data: Any
    lines: dict[Path_, int]

    def place(self, path: Path_) -> str:
        """`file:line` of what stands at `path`, or of the nearest thing around it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return f"{self.file}:1"


class _Loader(yaml.SafeLoader):
    """Refuses aliases and depth while composing, before anything is built."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As the parent's, within limits."""
        problem = f"nested more than {MAX_DEPTH} deep" if self.depth >= MAX_DEPTH else None
        if self.check_event(yaml.AliasEvent):
            problem = "aliases (*name) are not read; write the values out"
        if problem is not None:
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read(file: Path) -> Document:
    """Read the one YAML document in `file`; raises UsageError naming file and line, NotFoundError."""
    try:
        with open(file, "rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFoundError("no such registry", path=file) from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", path=file) from error
    if len(raw) > MAX_BYTES:
        raise UsageError(f"larger than {MAX_BYTES >> 20} MiB", path=file, hint="This is no registry.")
    try:
        loader = _Loader(raw.decode("utf-8"))
        try:
            node = loader.get_single_node()
            lines = _lines(node, file)
            return Document(file, loader.construct_document(node) if node is not None else None, lines)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UsageError(f"not YAML: {error.problem}", path=f"{file}:{mark.line + 1}" if mark else file) from error
    except yaml.reader.ReaderError as error:
        line = raw.decode("utf-8").count("\n", 0, error.position) + 1
        raise UsageError(f"not YAML: {error.reason}", path=f"{file}:{line}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError("not YAML: no UTF-8", path=f"{file}:{line}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError("not YAML", path=file) from error


def _lines(root: Any, file: Path) -> dict[Path_, int]:
    found: dict[Path_, int] = {}

    def fault(node: Any, message: str) -> NoReturn:
        raise UsageError(message, path=f"{file}:{node.start_mark.line + 1}")

    def walk(node: Any, path: Path_) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                    shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                    fault(key, f"{shown} is a key, but keys are words; put it in quotes if it is meant so")
                here = (*path, key.value)
                if here in found:
                    fault(key, f"key {key.value!r} stands twice")
                found[here] = key.start_mark.line + 1
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for position, value in enumerate(node.value):
                found[*path, position] = value.start_mark.line + 1
                walk(value, (*path, position))
        elif node is not None and node.tag == "tag:yaml.org,2002:float" and _NO_NUMBER.fullmatch(node.value):
            fault(node, f"{node.value} is no limit and no size")

    walk(root, ())
    return found

"""Keys by which other programs would fetch or run code, and programs that lie beside the weights.

| key | who obeys it |
|---|---|
| `auto_map` | transformers with trust_remote_code: imports what it names, also out of another repository |
| `custom_pipelines` | the same, for `pipeline()` |
| `trust_remote_code` | scripts that hand a configuration on as arguments |
| `_attn_implementation*` | transformers: a value with a slash is a repository whose kernel is fetched and loaded |
| `_experts_implementation*` | the same; both also without the first underscore |
| `kernel_config` | transformers: the same, for single layers |
| `model_file` | mlx-lm: imports that file |

(`_attn_implementation_internal` did so unasked before transformers 5.3: CVE-2026-4372.)

Nothing here obeys any of them. They are listed, since the same folder is opened by other programs. A key counts
wherever it stands in the JSON files beside the weights, and as the last part of a GGUF key. What is listed is what was
looked for; that nothing is listed says no more than that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from weightsmith.errors import WeightsmithError
from weightsmith.formats.tokenizer.settings import MAX_SMALL, read_json
from weightsmith.safename import resolve_inside
from weightsmith.types import Reader

KEYS = re.compile(
    r"auto_map|custom_pipelines|trust_remote_code|_?(?:attn|experts)_implementation\w*|kernel_config|model_file"
)
PROGRAMS = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".ipynb")
_NO_SETTINGS = re.compile(r"(?:tokenizer|vocab|tekken|tokenizer\.tok|weightsmith|.*\.index)\.json")
MAX_FILES = 200
MAX_FOUND = 100
_MAX_VALUE = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """One of them. file: its name. key: dotted path inside, "" for a program. value: as JSON, cut short."""

    file: str
    key: str
    value: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key} = {self.value}" if self.key else f"{self.file}: {self.value}"


def findings(reader: Reader) -> list[Finding]:
    """What is found in the files of an open checkpoint and beside them, at most MAX_FOUND."""
    if reader.container != "gguf":
        return in_folders({path.parent for path in reader.files()})
    metadata = reader.metadata()
    keys = [key for key in metadata if KEYS.fullmatch(key.rpartition(".")[2])]
    return [Finding(reader.path.name, key, _short(metadata[key])) for key in keys[:MAX_FOUND]]


def in_folders(folders: Iterable[Path]) -> list[Finding]:
    """What is found in folders of a checkpoint whose weights need not be opened, at most MAX_FOUND."""
    found = (one for folder in sorted(set(folders)) for one in _beside(folder))
    return list(islice(found, MAX_FOUND))


def _beside(folder: Path) -> Iterator[Finding]:
    for path in sorted(path for path in folder.iterdir() if path.is_file())[:MAX_FILES]:
        if path.suffix in PROGRAMS:
            yield Finding(path.name, "", "a program")
        elif path.suffix == ".json" and not _NO_SETTINGS.fullmatch(path.name):
            try:
                raw = read_json(resolve_inside(path.parent, path.name), limit=MAX_SMALL)
            except WeightsmithError as error:
                yield Finding(path.name, "", f"cannot be looked through: {error.message}")
                continue
            yield from (Finding(path.name, key, _short(value)) for key, value in _walk(raw))


def _walk(root: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every such key at any depth, with its path; what stands below one is part of its value."""
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        lead, here = todo.pop()
        pairs = here.items() if isinstance(here, Mapping) else enumerate(here)
        for key, value in pairs:
            path = f"{lead}.{key}" if lead else str(key)
            if isinstance(key, str) and KEYS.fullmatch(key):
                yield path, value
            elif isinstance(value, (Mapping, list)):
                todo.append((path, value))


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."

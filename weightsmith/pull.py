"""Pulling: from what the user wrote, or what a lock says, to a verified entry of the catalog."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.catalog import ORIGINAL, Catalog
from weightsmith.errors import OutputExistsError
from weightsmith.lock import IDENTITY, Locked, compare
from weightsmith.sources import Source, catalog_name, fetch, parse, settle
from weightsmith.sources.source import bare_url
from weightsmith.store import Entry
from weightsmith.suggest import lookalike

if TYPE_CHECKING:
    from weightsmith.formats.findings import Finding

log = logging.getLogger(__name__)

_SHOWN = 5  # findings in a warning; `show` lists all


def pull(  # noqa: PLR0913  (the options of one verb)
    catalog: Catalog,
    text: str,
    *,
    name: str | None = None,
    tag: str = ORIGINAL,
    revision: str | None = None,
    include: Sequence[str] = (),
    offline: bool = False,
    overwrite: bool = False,
    registry: Path | None = None,
    allow_pickle: bool = False,
) -> Entry:
    """Fetch the SOURCE `text` into `catalog` as `name:tag`, every file verified before it is visible.

    What is there already from the same source is the result, and nothing is fetched. Raises OutputExistsError if the
    name is taken by another source, and what `sources.fetch` and `Reservation.commit` raise.
    """
    source = parse(text)
    if source.kind == "hf":
        _warn_of_lookalikes(catalog, source.target)
    name = name or catalog_name(source)
    if catalog.has(name, tag) and not overwrite:
        there = catalog.get(f"{name}:{tag}")
        if there.origin.get("asked") != _asked(source, revision, include):
            hint = "Choose another --name or --tag, or pass --force to replace it."
            raise OutputExistsError(
                f"{there.ref} is already in the catalog, from {there.origin.get('source')}", hint=hint
            )
        log.info("%s is already in the catalog; --force fetches it again", there.ref)
        return there
    options: dict[str, Any] = {"revision": revision, "include": include, "registry": registry}
    options |= {"offline": offline, "allow_pickle": allow_pickle}
    asked = _asked(source, revision, include)
    return _take(catalog, source, (name, tag), asked=asked, overwrite=overwrite, options=options)


def pull_locked(
    catalog: Catalog,
    models: Iterable[Locked],
    *,
    offline: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> list[Entry]:
    """Fetch exactly what a lock says: those commits, those files, those hashes, under those names.

    What the catalog holds already is held against the lock. Raises IntegrityError on any difference, naming path, what
    was found and what was expected, and what `pull` raises.
    """
    entries = []
    for one in models:
        if catalog.has(one.name, one.tag) and not overwrite:
            there = catalog.get(one.ref)
            compare(one, there)
            log.info("%s is in the catalog as the lock says", one.ref)
            entries.append(there)
            continue
        options = {"include": one.include, "offline": offline, "allow_pickle": allow_pickle}
        where = one.name, one.tag
        pins: dict[str, str] = {word: one.pins[word] for word in ("revision", "licence", *IDENTITY) if word in one.pins}
        entry = _take(
            catalog, one.to_source(), where, asked=list(one.asked), overwrite=overwrite, options=options, more=pins
        )
        compare(one, entry)
        entries.append(entry)
    return entries


def pull_commit(
    catalog: Catalog, one: Locked, repo: str, commit: str, *, licence: str | None, allow_pickle: bool = False
) -> Entry:
    """Replace the hub model `one` by another commit, of `repo`; what was asked for and the revision stay.

    licence: where the hub says none. Raises OutputExistsError if the name holds a model from elsewhere, and what `pull`
    raises.
    """
    old = catalog.get(one.ref) if catalog.has(one.name, one.tag) else None
    known = (parse(one.source).target, repo)
    if old is not None and old.origin.get("repo") not in known:
        hint = "The lock and the catalog disagree. Remove one of them."
        raise OutputExistsError(f"{one.ref} in the catalog is from {old.origin.get('source')}", hint=hint)
    more: dict[str, Any] = {"revision": one.pins.get("revision", "main")}
    if old is not None and "registry" in old.origin:
        more["registry"] = old.origin["registry"]
    if licence is not None:
        more["licence"] = licence
    asked = list(old.origin.get("asked") or one.asked) if old is not None else list(one.asked)
    options = {"include": one.include, "offline": False, "allow_pickle": allow_pickle}
    source = Source("hf", f"hf://{repo}", repo, commit)
    entry = _take(catalog, source, (one.name, one.tag), asked=asked, overwrite=True, options=options, more=more)
    if old is not None and old.digest == entry.digest:
        for evaluation in old.evaluations:  # the same bytes: what was measured still holds
            entry = catalog.evaluated(entry.ref, evaluation)
    return entry


def _take(
    catalog: Catalog,
    source: Source,
    place: tuple[str, str],
    *,
    asked: list[str],
    overwrite: bool,
    options: dict[str, Any],
    more: Mapping[str, str] | None = None,
) -> Entry:
    """Fetch `source` and commit it as name and tag `place`. more: for the origin."""
    with catalog.reserve(*place) as reservation:
        fetched = fetch(source, reservation.folder, home=catalog.home, **options)
        hashes = {file.path: file.sha256 for file in fetched.files}
        origin = {**fetched.origin, "asked": asked, **(more or {})}
        allow_pickle = bool(options.get("allow_pickle"))
        entry = reservation.commit(origin=origin, hashes=hashes, overwrite=overwrite, allow_pickle=allow_pickle)
        settle(fetched)
        _warn_of_findings(entry)
        return entry


def found_in(entry: Entry) -> list[Finding]:
    """Keys in the files of `entry` by which other programs would fetch or run code; no weights are opened for it."""
    from weightsmith.formats import open_reader  # noqa: PLC0415  (what is in the catalog needs no container)
    from weightsmith.formats.findings import findings, in_folders  # noqa: PLC0415

    if entry.container != "gguf":
        return in_folders((entry.folder / file.path).parent for file in entry.files)
    reader = open_reader(entry.path)
    try:
        return findings(reader)
    finally:
        reader.close()


def _warn_of_findings(entry: Entry) -> None:
    found = found_in(entry)
    if found:
        told = "; ".join(map(str, found[:_SHOWN])) + ("; ..." if len(found) > _SHOWN else "")
        log.warning("%s: other programs may run or fetch code by these, weightsmith does not: %s", entry.ref, told)


def _warn_of_lookalikes(catalog: Catalog, repo: str) -> None:
    """Owners are imitated: a repository that looks like one that was pulled before, and is none, is worth a word."""
    known = {str(entry.origin["repo"]) for entry in catalog.summaries() if "repo" in entry.origin}
    other = lookalike(repo, known) if repo not in known else None
    if other is not None:
        log.warning("%s is not %s, from which the catalog has a model: see that it is the owner you mean", repo, other)


def _asked(source: Source, revision: str | None, include: Sequence[str]) -> list[str]:
    """What was asked for, so that the same question is answered by what is there; never the query of a URL."""
    text = bare_url(source.text) if source.kind == "url" else source.text
    return [text, revision or "", *include]

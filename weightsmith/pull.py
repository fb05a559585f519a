"""Pulling: from what the user wrote to a verified entry of the catalog."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from weightsmith.catalog import ORIGINAL, Catalog
from weightsmith.errors import OutputExistsError
from weightsmith.sources import Source, catalog_name, fetch, parse
from weightsmith.sources.source import bare_url
from weightsmith.store import Entry

log = logging.getLogger(__name__)


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
) -> Entry:
    """Fetch the SOURCE `text` into `catalog` as `name:tag`, every file verified before it is visible.

    What is there already from the same source is the result, and nothing is fetched. Raises OutputExistsError if the
    name is taken by another source, and what `sources.fetch` and `Reservation.commit` raise.
    """
    source = parse(text)
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
    with catalog.reserve(name, tag) as reservation:
        fetched = fetch(
            source,
            reservation.folder,
            revision=revision,
            include=include,
            offline=offline,
            home=catalog.home,
            registry=registry,
        )
        hashes = {file.path: file.sha256 for file in fetched.files}
        origin = {**fetched.origin, "asked": _asked(source, revision, include)}
        return reservation.commit(origin=origin, hashes=hashes, overwrite=overwrite)


def _asked(source: Source, revision: str | None, include: Sequence[str]) -> list[str]:
    """What was asked for, so that the same question is answered by what is there; never the query of a URL."""
    text = bare_url(source.text) if source.kind == "url" else source.text
    return [text, revision or "", *include]

"""Aliases: a second name for an entry, such as `llama:prod`, that moves when a better one is there.

An alias is an entry whose files are links to the bytes of the tag it stands for, so everything that takes `name:tag`
takes an alias, and the bytes it stands for stay when that tag is made anew. Moving it is one rename.

    llama:q4_k_m      the latest build
    llama:prod        an alias; still the former bytes, if the latest build failed its gate

What failed its latest gate is refused. Why an alias did not move is read from the gates' verdicts, which are kept with
the entry that failed them.
"""

from __future__ import annotations

from typing import Any

from weightsmith.catalog import Catalog
from weightsmith.errors import OutputExistsError, QualityGateError, UsageError
from weightsmith.store import Entry


def aliases(catalog: Catalog) -> list[Entry]:
    """Every alias, by name."""
    return [catalog.get(entry.ref) for entry in catalog.summaries() if entry.alias_of is not None]


def point(catalog: Catalog, alias: str, entry: Entry, *, force: bool = False) -> tuple[Entry, bool]:
    """Make `entry.name:alias` stand for `entry`; returns it, and whether it moved.

    Raises OutputExistsError if the name is taken by what is no alias, UsageError if `entry` is an alias itself, and
    QualityGateError if `entry` failed a gate (unless `force`).
    """
    if entry.alias_of is not None:
        raise UsageError(f"{entry.ref} is an alias itself", hint=f"Name what it stands for: {entry.name}:TAG.")
    if catalog.has(entry.name, alias):
        there = catalog.get(f"{entry.name}:{alias}")
        if there.alias_of is None:
            raise OutputExistsError(f"{there.ref} is an entry, not an alias", hint="Choose another name.")
        if there.alias_of == entry.tag and there.digest == entry.digest and there.evaluations == entry.evaluations:
            return there, False
    failed = failures(entry)
    if failed and not force:
        raise QualityGateError(
            f"{entry.ref} failed {_named(failed)}, so {entry.name}:{alias} does not move",
            hint="--force moves it all the same.",
        )
    before = catalog.get(f"{entry.name}:{alias}").digest if catalog.has(entry.name, alias) else None
    with catalog.reserve(entry.name, alias) as reservation:
        return reservation.link(entry), before != entry.digest


def verdicts(entry: Entry) -> list[dict[str, Any]]:
    """The latest verdict of each gate that `entry` was held against."""
    found = [item for item in entry.evaluations if item.get("kind") == "gate" and isinstance(item.get("gate"), str)]
    return list({item["gate"]: item for item in found}.values())


def failures(entry: Entry) -> list[dict[str, Any]]:
    """The verdicts that say no."""
    return [item for item in verdicts(entry) if not item.get("passed")]


def evidence(entry: Entry) -> list[tuple[str, str]]:
    """The verdicts for people: (gate, "passed, DATE" or what was missed)."""
    found = []
    for item in verdicts(entry):
        missed = "; ".join(map(str, item.get("missed", ())))
        said = "passed" if item.get("passed") else f"failed: {missed}"
        found.append((item["gate"], f"{said} ({str(item.get('when', '?'))[:10]})"))
    return found


def held_back(catalog: Catalog, alias: Entry) -> list[str]:
    """Why `alias` does not stand for something newer: one sentence for each entry that asked for it and failed."""
    found = []
    for entry in catalog.entries(alias.name):
        if entry.alias_of is not None or entry.digest == alias.digest:
            continue
        for verdict in failures(entry):
            if alias.tag in verdict.get("aliases", ()):
                missed = "; ".join(map(str, verdict.get("missed", ())))
                when = str(verdict.get("when", "?"))[:10]
                found.append(f"{entry.ref} failed {verdict['gate']} on {when}: {missed}")
    return found


def _named(verdicts: list[dict[str, Any]]) -> str:
    return ", ".join(f"{item['gate']} ({'; '.join(map(str, item.get('missed', ())))})" for item in verdicts)

"""Entries that need not be kept, because they can be made again bit for bit: what `gc --rebuildable` takes.

An entry may go if its parent is in the catalog and intact, its record says all that is needed to make it again, and
this arithmetic version made it. It stays if an alias stands for it, if another entry was made from it, or if something
was measured of it: that is in its record alone, and no rebuild brings it back. What needs a text or an imatrix stays
too, since nobody knows whether these are still there.

Before it goes it is made again and compared (`rebuild.check`), so what is dropped is only what just came out again.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith import rebuild, usage
from weightsmith.catalog import Catalog
from weightsmith.errors import WeightsmithError
from weightsmith.store import Entry


@dataclass(frozen=True, slots=True)
class Candidate:
    """An entry that may go, what it was made from, and the bytes that would become free."""

    entry: Entry
    parent: str
    freed: int


def candidates(catalog: Catalog) -> list[Candidate]:
    """Every entry that may go, by its record; no file is read. What another was made from stays."""
    entries = catalog.entries()
    freed = {one.entry.ref: one.freed for one in usage.by_entry(catalog)[0]}
    aliased = {(entry.name, entry.alias_of) for entry in entries if entry.alias_of is not None}
    parents = {entry.parent for entry in entries}
    digests = {entry.digest: entry for entry in entries}
    found = []
    for entry in entries:
        parent = digests.get(entry.parent or "")
        kept = entry.alias_of is not None or (entry.name, entry.tag) in aliased or entry.digest in parents
        if kept or entry.evaluations or parent is None or not rebuild.is_repeatable(entry):
            continue
        found.append(Candidate(entry, parent.ref, freed.get(entry.ref, 0)))
    return found


def fault_of(catalog: Catalog, entry: Entry, *, threads: int | None = None) -> str | None:
    """Why `entry` must not go: what happens when it is made again. None if the same bytes come out."""
    try:
        compared = rebuild.check(catalog, entry, rebuild.Brought(threads=threads))
    except WeightsmithError as error:
        return str(error)
    return next((f"{one.path}: {one.where}" for one in compared if not one.equal), None)


def drop(catalog: Catalog, candidate: Candidate) -> int:
    """Remove it, if it is still what was looked at and may still go; returns the bytes that became free."""
    still = {one.entry.ref: one.entry for one in candidates(catalog)}
    there = still.get(candidate.entry.ref)
    if there is None or there.digest != candidate.entry.digest:
        return 0
    return catalog.remove(candidate.entry.ref).freed

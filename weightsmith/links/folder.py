"""A plain folder: the files of the entry under their own names, for programs that take a path."""

from __future__ import annotations

import shlex
from pathlib import Path

from weightsmith.catalog import Catalog
from weightsmith.links.place import Plan, Way, Wish
from weightsmith.store import Entry


def plan(catalog: Catalog, entry: Entry, root: Path | None, *, name: str | None, way: Way) -> Plan:
    """The files of `entry` in the folder `root`, which may hold others."""
    del catalog, name, way
    folder = (root or Path()).expanduser().absolute()
    wishes = [Wish(folder / file.path, entry.folder / file.path, file) for file in entry.files]
    names = " ".join(shlex.quote(file.path) for file in entry.files)
    return Plan(folder, str(folder), wishes, f"cd {shlex.quote(str(folder))} && rm {names}")

"""`weightsmith du`: what the catalog takes on disk, and what removing something would free."""

from __future__ import annotations

import click

from weightsmith.cli.options import common
from weightsmith.cli.output import emit, size_text, table


@click.command("du")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@common
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Show the bytes of every entry (or of the models NAMES), shared bytes counted once.

    FREED is what `rm` of that entry alone gives back: bytes that an alias, another tag or a file outside the catalog
    still holds stay.
    """
    from weightsmith import usage
    from weightsmith.catalog import Catalog

    catalog = Catalog()
    found, models = usage.by_entry(catalog, names)
    total = usage.total(found)
    others = {
        what: usage.on_disk([catalog.home / folder])
        for what, folder in (("unfinished work", "work"), ("unfinished downloads", "downloads"), ("staging", "staging"))
    }
    result = {
        "home": str(catalog.home),
        "bytes": total,
        "entries": [
            {"ref": u.entry.ref, "bytes": u.nbytes, "shared": u.shared, "freed": u.freed, "alias_of": u.entry.alias_of}
            for u in found
        ],
        "models": models,
        "other": others,
    }
    rows = [(u.entry.ref, size_text(u.nbytes), size_text(u.shared), size_text(u.freed)) for u in found]
    rows += [(f"{name} (all)", "", "", size_text(freed)) for name, freed in models.items()]
    text = table(rows, ["model", "size", "shared", "freed by rm"]) if rows else "The catalog is empty."
    lines = [f"{size_text(total)} on disk in {catalog.models}"]
    lines += [f"{size_text(nbytes)} of {what}, see `weightsmith gc`" for what, nbytes in others.items() if nbytes]
    emit(result, "\n".join([text, "", *lines]), as_json=as_json)

"""`weightsmith list`: what the catalog holds."""

from __future__ import annotations

import click

from weightsmith.cli.options import common
from weightsmith.cli.output import emit, size_text, table


@click.command("list")
@common
def command(as_json: bool) -> None:
    """List the catalog."""
    from weightsmith.catalog import Catalog

    entries = Catalog().entries()
    result = [
        {
            "ref": entry.ref,
            "container": entry.container,
            "type": entry.type,
            "bytes": entry.nbytes,
            "parent": entry.parent_ref,
            "digest": entry.digest,
            "path": str(entry.path),
        }
        for entry in entries
    ]
    rows = [(e.ref, e.container, e.type or "", size_text(e.nbytes), e.parent_ref or "") for e in entries]
    empty = "The catalog is empty. Try: weightsmith pull smollm2-135m"
    text = table(rows, ["model", "container", "type", "size", "made from"]) if rows else empty
    emit({"models": result}, text, as_json=as_json)

"""`weightsmith rm`: remove an entry of the catalog."""

from __future__ import annotations

import click

from weightsmith.cli.options import common, source_argument
from weightsmith.cli.output import emit, size_text


@click.command("rm")
@source_argument("model")
@click.option("--force", is_flag=True, help="Even where other entries were made from it.")
@common
def command(model: str, force: bool, as_json: bool) -> None:
    """Remove MODEL (name:tag) from the catalog and from the disk."""
    from weightsmith.catalog import Catalog

    removed = Catalog().remove(model, force=force)
    emit(
        {"removed": removed.ref, "freed": removed.freed},
        f"removed {removed.ref}, freed {size_text(removed.freed)}",
        as_json=as_json,
    )

"""`weightsmith gc`: remove what nothing refers to."""

from __future__ import annotations

import click

from weightsmith.cli.options import common
from weightsmith.cli.output import emit, size_text, table


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="Say what would go, remove nothing.")
@click.option(
    "--older-than",
    "days",
    type=click.FloatRange(min=0),
    default=7,
    show_default=True,
    help="Days since unfinished work or a download was last touched; until then it can be resumed.",
)
@common
def command(dry_run: bool, days: float, as_json: bool) -> None:
    """Remove abandoned work and what interrupted runs left behind; never an entry of the catalog, nor what is in use.

    Entries go with `rm`, which frees their bytes at once, so there is nothing else to collect.
    """
    from weightsmith import usage
    from weightsmith.catalog import Catalog

    catalog = Catalog()
    found = usage.garbage(catalog, older_than=days * usage.DAY)
    freed = sum(item.nbytes for item in found) if dry_run else usage.collect(catalog, found)
    result = {
        "dry_run": dry_run,
        "freed": freed,
        "garbage": [
            {"path": str(g.path), "what": g.what, "bytes": g.nbytes, "age_seconds": round(g.age)} for g in found
        ],
    }
    rows = [
        (str(g.path.relative_to(catalog.home)), g.what, size_text(g.nbytes), f"{g.age / usage.DAY:.1f}") for g in found
    ]
    done = f"{size_text(freed)} would become free." if dry_run else f"freed {size_text(freed)}"
    text = "\n\n".join([table(rows, ["path", "what", "size", "days old"]), done]) if rows else "Nothing to remove."
    emit(result, text, as_json=as_json)

"""`weightsmith gc`: remove what nothing refers to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.options import common
from weightsmith.cli.output import emit, size_text, table

if TYPE_CHECKING:
    from weightsmith.catalog import Catalog


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
@click.option("--rebuildable", is_flag=True, help="Drop entries, instead, that can be made again bit for bit.")
@click.option("--unproved", is_flag=True, help="With --rebuildable: do not make each of them again first to prove it.")
@common
def command(dry_run: bool, days: float, rebuildable: bool, unproved: bool, as_json: bool) -> None:
    """Remove abandoned work and what interrupted runs left behind; never an entry of the catalog, nor what is in use.

    Entries go with `rm`, which frees their bytes at once, so there is nothing else to collect. But --rebuildable drops
    those whose parent is there and whose recipe is known, if no alias stands for them, nothing was made from them, and
    nothing was measured of them.
    """
    from weightsmith import usage
    from weightsmith.catalog import Catalog
    from weightsmith.errors import UsageError

    catalog = Catalog()
    if rebuildable:
        _rebuildable(catalog, dry_run=dry_run, unproved=unproved, as_json=as_json)
        return
    if unproved:
        raise UsageError("--unproved is for --rebuildable")
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


def _rebuildable(catalog: Catalog, *, dry_run: bool, unproved: bool, as_json: bool) -> None:
    """Say which entries can be made again, or prove and drop them one by one."""
    from weightsmith import droppable

    results, rows, total = [], [], 0
    for one in droppable.candidates(catalog):
        entry = one.entry
        fault = None if dry_run or unproved else droppable.fault_of(catalog, entry)
        freed = one.freed if dry_run else 0 if fault else droppable.drop(catalog, one)
        total += freed
        made: dict[str, Any] = {"ref": entry.ref, "digest": entry.digest, "from": one.parent, "recipe": entry.recipe}
        results.append(made | {"freed": freed, "kept_because": fault})
        target = str((entry.recipe or {}).get("target"))
        rows.append((entry.ref, one.parent, target, size_text(freed), f"kept: {fault}" if fault else ""))
    text = "Nothing that can be made again and is not needed."
    if rows:
        done = f"{size_text(total)} would become free." if dry_run else f"freed {size_text(total)}"
        text = "\n\n".join([table(rows, ["entry", "made from", "recipe", "size", ""]), done])
    emit({"dry_run": dry_run, "freed": total, "rebuildable": results}, text, as_json=as_json)

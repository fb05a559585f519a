"""`weightsmith import`: take in what `export` wrote on another machine."""

from __future__ import annotations

from pathlib import Path

import click

from weightsmith.cli.options import common, pickle_option
from weightsmith.cli.output import emit, size_text, table


@click.command("import")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace entries of the same name that have other bytes.")
@click.option("--dry-run", is_flag=True, help="Check the bundle and say what it holds; import nothing.")
@pickle_option
@common
def command(bundle: Path, force: bool, dry_run: bool, allow_pickle: bool, as_json: bool) -> None:
    """Take the entries of BUNDLE into the catalog, all of them or none, every hash checked.

    What a bundle says of an origin is its maker's word; hold it against a lock with `pull --locked`.
    """
    from weightsmith.bundle import take
    from weightsmith.catalog import Catalog

    found = take(Catalog(), bundle, overwrite=force, allow_pickle=allow_pickle, dry_run=dry_run)
    made = "would be imported" if dry_run else "imported"
    result = {
        "dry_run": dry_run,
        "models": [
            {
                "ref": one.entry.ref,
                "digest": one.entry.digest,
                "bytes": one.entry.nbytes,
                "new": one.new,
                "statements": one.statements,
            }
            for one in found
        ],
    }
    rows = [
        (one.entry.ref, made if one.new else "already there", size_text(one.entry.nbytes), one.entry.digest[:12])
        for one in found
    ]
    emit(result, table(rows, ["model", "", "size", "digest"]), as_json=as_json)

"""`weightsmith export`: entries of the catalog in one file, for a machine without a network."""

from __future__ import annotations

from pathlib import Path

import click

from weightsmith.cli.options import common, source_argument
from weightsmith.cli.output import emit, fields, size_text


@click.command("export")
@source_argument("models", many=True)
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write."
)
@click.option("--with-parents", is_flag=True, help="Also what the MODELS were made from, with its bytes.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@common
def command(models: tuple[str, ...], output: Path, with_parents: bool, force: bool, as_json: bool) -> None:
    """Write MODELS with their lineage and evidence into one file that `import` takes in elsewhere.

    The file is a tar of an OCI image layout. The same entries give the same bytes.
    """
    from weightsmith.bundle import export
    from weightsmith.catalog import Catalog

    catalog = Catalog()
    entries = [catalog.get(ref) for ref in models]
    if with_parents:
        entries = [one for entry in entries for one in catalog.lineage(entry.ref)]
    done = export(catalog, entries, output, overwrite=force)
    refs = [entry.ref for entry in done.entries]
    result = {"path": str(output), "bytes": done.nbytes, "blobs": done.blobs, "models": refs}
    text = fields({"exported": ", ".join(refs), "path": output, "size": size_text(done.nbytes)})
    emit(result, text, as_json=as_json)

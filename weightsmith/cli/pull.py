"""`weightsmith pull`: fetch a checkpoint, verified and pinned, into the catalog."""

from __future__ import annotations

from pathlib import Path

import click

from weightsmith.cli.options import common, source_argument
from weightsmith.cli.output import emit, fields, size_text


@click.command("pull")
@source_argument()
@click.option("--revision", help="Branch, tag or commit of a hub repository; its commit is recorded.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only weights that match; repeatable.")
@click.option("--name", help="Name in the catalog; from the source by default.")
@click.option("--tag", default="original", show_default=True, help="Tag in the catalog.")
@click.option("--offline", is_flag=True, help="Use only what is already on this machine.")
@click.option("--force", is_flag=True, help="Replace an entry of the same name and tag.")
@click.option(
    "--registry",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A registry.yaml whose names come before all others.",
)
@common
def command(
    source: str,
    revision: str | None,
    include: tuple[str, ...],
    name: str | None,
    tag: str,
    offline: bool,
    force: bool,
    registry: Path | None,
    as_json: bool,
) -> None:
    """Fetch SOURCE into the catalog.

    Weights come in one format (safetensors if there are any, else GGUF); pickles and scripts are never taken. Every
    hash that the source publishes is checked before the files become visible.
    """
    from weightsmith.catalog import Catalog
    from weightsmith.pull import pull

    entry = pull(
        Catalog(),
        source,
        name=name,
        tag=tag,
        revision=revision,
        include=include,
        offline=offline,
        overwrite=force,
        registry=registry,
    )
    result = {"ref": entry.ref, "path": str(entry.path), "bytes": entry.nbytes, "origin": entry.origin}
    result["files"] = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in entry.files]
    text = fields({"pulled": entry.ref, "path": entry.path, "size": size_text(entry.nbytes)})
    emit(result, text, as_json=as_json)

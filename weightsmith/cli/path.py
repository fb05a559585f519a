"""`weightsmith path`: where an entry of the catalog lies, for other tools."""

from __future__ import annotations

import click

from weightsmith.cli.options import common, source_argument
from weightsmith.cli.output import emit


@click.command("path")
@source_argument("model")
@common
def command(model: str, as_json: bool) -> None:
    """Print the path of MODEL: the GGUF file, or the folder of a safetensors checkpoint."""
    from weightsmith.catalog import Catalog
    from weightsmith.locate import locate

    path = locate(model, Catalog()).path
    emit({"path": str(path)}, str(path), as_json=as_json)

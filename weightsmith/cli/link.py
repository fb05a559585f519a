"""`weightsmith link`: make a model usable by another program without copying its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightsmith.cli.options import common, source_argument
from weightsmith.cli.output import emit, fields

if TYPE_CHECKING:
    from weightsmith.links.place import Way


@click.command("link")
@source_argument("model")
@click.option("--into", required=True, metavar="hf|ollama|lmstudio|DIR", help="A program, or a folder (./hf is one).")
@click.option("--as", "name", metavar="NAME", help="What the program shall call it: NAME:TAG, for LM Studio ORG/NAME.")
@click.option("--root", type=click.Path(file_okay=False, path_type=Path), help="The program's folder of models.")
@click.option("--symlink", is_flag=True, help="Symbolic links, for another disk; they break when MODEL is removed.")
@click.option("--copy", is_flag=True, help="Copy the bytes.")
@common
def command(
    model: str, into: str, name: str | None, root: Path | None, symlink: bool, copy: bool, as_json: bool
) -> None:
    """Make MODEL appear in another program's store, or in a folder, by reflink or hard link.

    What stands there already is never replaced. How to take it away again is told.
    """
    from weightsmith.catalog import Catalog
    from weightsmith.errors import UsageError
    from weightsmith.links import link
    from weightsmith.locate import locate

    if symlink and copy:
        raise UsageError("--symlink and --copy exclude each other")
    catalog = Catalog()
    entry = locate(model, catalog).entry
    if entry is None:
        raise UsageError(f"{model!r} is not in the catalog", hint=f"Take it in first: weightsmith pull {model}")
    way: Way = "symlink" if symlink else "copy" if copy else "link"
    linked = link(catalog, entry, into, way=way, name=name, root=root)
    hows = [placed.how for placed in linked.placed]
    result = {
        "ref": entry.ref,
        "into": str(linked.root),
        "name": linked.ref,
        "files": [{"path": str(placed.path), "how": placed.how} for placed in linked.placed],
        "undo": linked.undo,
        "notes": list(linked.notes),
    }
    said = ", ".join(f"{hows.count(how)} {how}" for how in dict.fromkeys(hows))
    text = fields({"linked": entry.ref, "into": linked.root, "as": linked.ref, "files": said, "undo": linked.undo})
    emit(result, "\n".join([text, *linked.notes]), as_json=as_json)

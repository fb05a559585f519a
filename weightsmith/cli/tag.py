"""`weightsmith tag`: aliases such as prod, that stand for a tag and move."""

from __future__ import annotations

import click

from weightsmith.cli.options import common
from weightsmith.cli.output import emit, table


@click.command("tag")
@click.argument("model", required=False)
@click.argument("alias", required=False)
@click.option("--force", is_flag=True, help="Even if the model failed a gate.")
@common
def command(model: str | None, alias: str | None, force: bool, as_json: bool) -> None:
    """List aliases, or make ALIAS (such as prod) stand for MODEL (name:tag); `rm name:alias` removes it.

    An alias is a link to the bytes: they stay when the tag is made anew. What failed a gate is refused (exit 5).
    """
    from weightsmith import aliases
    from weightsmith.catalog import Catalog
    from weightsmith.errors import UsageError

    catalog = Catalog()
    if model is not None and alias is not None:
        name, _, word = alias.rpartition(":")
        entry = catalog.get(model)
        if name not in ("", entry.name):
            raise UsageError(f"an alias stays within its model: {alias!r}", hint=f"Write {entry.name}:{word}.")
        there, moved = aliases.point(catalog, word, entry, force=force)
        result = {"alias": there.ref, "ref": entry.ref, "digest": entry.digest, "moved": moved}
        emit(result, f"{there.ref} is {entry.ref}" + ("" if moved else ", as before"), as_json=as_json)
        return
    found, rows = [], []
    for item in aliases.aliases(catalog):
        if model in (None, item.name, item.ref):
            why = aliases.held_back(catalog, item)
            found.append({"alias": item.ref, "tag": item.alias_of, "digest": item.digest, "held_back": why})
            rows.append((item.ref, item.alias_of, item.digest[:12], "; ".join(why)))
    none = "No aliases. Try: weightsmith tag MODEL prod"
    text = table(rows, ["alias", "tag", "digest", "held back by"]) if rows else none
    emit({"aliases": found}, text, as_json=as_json)

"""`weightsmith list`: what the catalog holds."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.options import Size, common
from weightsmith.cli.output import emit, size_text, table

if TYPE_CHECKING:
    from weightsmith.index import Summary

_ORDERS: dict[str, Any] = {
    "name": lambda entry: (entry.name, entry.tag),
    "size": lambda entry: -entry.nbytes,
    "created": lambda entry: entry.created,
    "type": lambda entry: (entry.container, entry.type, entry.ref),
}


@click.command("list")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--container", help="Only this container, for instance gguf.")
@click.option("--type", "kind", help="Only this type of weights, for instance Q4_K.")
@click.option("--licence", help="Only this licence.")
@click.option("--larger", type=Size(), help="Only entries above this size.")
@click.option("--smaller", type=Size(), help="Only entries up to this size.")
@click.option("--sort", "order", type=click.Choice(list(_ORDERS)), default="name", show_default=True, help="Order.")
@click.option("--tree", is_flag=True, help="Indent what was made under what it was made from.")
@common
def command(
    patterns: tuple[str, ...],
    container: str | None,
    kind: str | None,
    licence: str | None,
    larger: int | None,
    smaller: int | None,
    order: str,
    tree: bool,
    as_json: bool,
) -> None:
    """List the catalog, or what matches the PATTERNS (llama*, *:q4*)."""
    from weightsmith.catalog import Catalog

    def wanted(entry: Summary) -> bool:
        named = not patterns or any(fnmatchcase(entry.ref, p) or fnmatchcase(entry.name, p) for p in patterns)
        pairs = ((container, entry.container), (kind, entry.type), (licence, entry.licence or ""))
        same = all(given is None or given.casefold() == found.casefold() for given, found in pairs)
        return (
            named and same and (larger or 0) < entry.nbytes + (not larger) and entry.nbytes <= (smaller or entry.nbytes)
        )

    everything = Catalog().summaries()
    entries = sorted(filter(wanted, everything), key=_ORDERS[order])
    if as_json:
        emit({"models": [_plain(entry) for entry in entries]}, "", as_json=True)
        return
    if not everything:
        text = "The catalog is empty. Try: weightsmith pull smollm2-135m"
    elif not entries:
        text = "Nothing in the catalog matches."
    else:
        text = _tree(entries) if tree else _table([(entry.ref, entry) for entry in entries])
    emit({}, text, as_json=False)


def _plain(entry: Summary) -> dict[str, Any]:
    return {
        "ref": entry.ref,
        "container": entry.container,
        "type": entry.type,
        "bytes": entry.nbytes,
        "parent": entry.parent_ref,
        "digest": entry.digest,
        "licence": entry.licence,
        "alias_of": entry.alias_of,
        "created": entry.created,
        "path": str(entry.path),
    }


def _tree(entries: list[Summary]) -> str:
    from weightsmith.family import forest, tree_lines

    rows = []
    for lead, node in tree_lines(forest(entries)):
        alias = f" = {', '.join(node.aliases)}" if node.aliases else ""
        rows.append((f"{lead}{node.entry.ref}{alias}", node.entry))
    return _table(rows)


def _table(rows: list[tuple[str, Summary]]) -> str:
    cells = [
        (
            shown,
            e.container,
            e.type or "",
            size_text(e.nbytes),
            f"alias of {e.alias_of}" if e.alias_of else e.parent_ref or "",
        )
        for shown, e in rows
    ]
    return table(cells, ["model", "container", "type", "size", "made from"])

"""`weightsmith lineage`: what an entry was made from, and what was made from it."""

from __future__ import annotations

from typing import Any

import click

from weightsmith.cli.options import common, source_argument
from weightsmith.cli.output import emit, size_text
from weightsmith.family import Node, dot, family_of, forest, tree_lines
from weightsmith.store import Entry


@click.command("lineage")
@source_argument()
@click.option("--dot", "as_dot", is_flag=True, help="Print a Graphviz graph.")
@common
def command(source: str, as_dot: bool, as_json: bool) -> None:
    """Show the family of SOURCE: the original, everything made from it, and by which recipe."""
    from weightsmith.catalog import Catalog
    from weightsmith.errors import UsageError
    from weightsmith.locate import locate

    catalog = Catalog()
    entry = locate(source, catalog).entry
    if entry is None:
        raise UsageError(f"{source!r} is not in the catalog, so nothing is known of it", hint="`show` reads the file.")
    root = family_of(forest(catalog.entries()), entry)
    assert root is not None  # every entry stands in a tree
    chain = catalog.lineage(entry.ref)
    if as_dot:
        emit({"dot": dot([root], _label)}, dot([root], _label), as_json=as_json)
        return
    lines = [f"{lead}{_line(node, entry)}" for lead, node in tree_lines([root])]
    if chain[-1].parent is not None:
        lines.append(f"{chain[-1].ref} was made from {chain[-1].parent_ref}, which is not in the catalog any more.")
    result = {"source": entry.ref, "lineage": [item.ref for item in chain], "family": _plain(root)}
    emit(result, "\n".join(lines), as_json=as_json)


def _line(node: Node, entry: Entry) -> str:
    mark = "  <- this" if entry.ref == node.entry.ref or entry.ref in node.aliases else ""
    alias = f" = {', '.join(node.aliases)}" if node.aliases else ""
    return f"{node.entry.ref}{alias}  {_how(node.entry)}  {node.entry.digest[:12]}{mark}"


def _how(entry: Entry) -> str:
    recipe = entry.recipe or {}
    made = str(recipe.get("target") or entry.origin.get("source") or entry.container)
    extra = [f"{key} {recipe[key]}" for key in ("effort",) if key in recipe]
    extra += ["calibrated"] if "calibration" in recipe else []
    extra += ["imatrix"] if "imatrix" in recipe and "calibration" not in recipe else []
    return ", ".join([made, *extra, size_text(entry.nbytes)])


def _label(entry: Entry) -> str:
    return f"{entry.ref}\n{_how(entry)}\n{entry.digest[:12]}"


def _plain(node: Node) -> dict[str, Any]:
    entry = node.entry
    found = {"ref": entry.ref, "digest": entry.digest, "parent": entry.parent, "recipe": entry.recipe}
    return {**found, "aliases": node.aliases, "made": [_plain(child) for child in node.children]}

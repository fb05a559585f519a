"""`weightsmith lineage`: what an entry was made from, and what was made from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.options import common, source_argument
from weightsmith.cli.output import emit, size_text
from weightsmith.family import Node, dot, family_of, forest, template_change, tree_lines
from weightsmith.store import Entry

if TYPE_CHECKING:
    from weightsmith.catalog import Catalog


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
    root = _family(catalog, entry)
    chain = catalog.lineage(entry.ref)
    if as_dot:
        emit({"dot": dot([root], _label)}, dot([root], _label), as_json=as_json)
        return
    above = {child.entry.ref: node.entry for _, node in tree_lines([root]) for child in node.children}
    lines = [f"{lead}{_line(node, entry)}" for lead, node in tree_lines([root])]
    for _, node in tree_lines([root]):
        if (change := template_change(node.entry, above.get(node.entry.ref))) is not None:
            lines.append(f"{node.entry.ref}: {change}")
    if chain[-1].parent is not None:
        lines.append(f"{chain[-1].ref} was made from {chain[-1].parent_ref}, which is not in the catalog any more.")
    result = {"source": entry.ref, "lineage": [item.ref for item in chain], "family": _plain(root, None)}
    emit(result, "\n".join(lines), as_json=as_json)


def _family(catalog: Catalog, entry: Entry) -> Node[Entry]:
    """The tree that `entry` stands in; only that tree's records are read in full."""
    short = family_of(forest(catalog.summaries()), entry.ref)
    refs = [ref for _, node in tree_lines([short] if short else []) for ref in (node.entry.ref, *node.aliases)]
    members = [entry if ref == entry.ref else catalog.get(ref) for ref in refs or [entry.ref]]
    whole = family_of(forest(members), entry.ref)
    assert whole is not None  # every entry stands in a tree
    return whole


def _line(node: Node[Entry], entry: Entry) -> str:
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


def _plain(node: Node[Entry], parent: Entry | None) -> dict[str, Any]:
    entry = node.entry
    found = {"ref": entry.ref, "digest": entry.digest, "parent": entry.parent, "recipe": entry.recipe}
    found |= {"chat_template": entry.chat_template, "chat_template_change": template_change(entry, parent)}
    return {**found, "aliases": node.aliases, "made": [_plain(child, entry) for child in node.children]}

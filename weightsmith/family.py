"""Families of entries: which was made from which, drawn as a tree or as a Graphviz graph.

An entry names its parent by digest. Entries whose parent is not in the catalog (any more) are roots. An alias is no
branch of its own: it is noted beside what it stands for, or drawn as a leaf where that has been made anew since.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from weightsmith.index import Summary
from weightsmith.store import Entry

E = TypeVar("E", Entry, Summary)


@dataclass(slots=True)
class Node(Generic[E]):
    """An entry, what was made from it, and the aliases that stand for its bytes."""

    entry: E
    children: list[Node[E]] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)


def forest(entries: Sequence[E]) -> list[Node[E]]:
    """All entries as trees, roots and children in the order given."""
    nodes: dict[str, Node[E]] = {}
    real = {(entry.name, entry.digest) for entry in entries if entry.alias_of is None}
    for entry in entries:
        if entry.alias_of is None or (entry.name, entry.digest) not in real:
            nodes[entry.ref] = Node(entry)
    by_digest: dict[str, Node[E]] = {}
    twins: defaultdict[str, list[Node[E]]] = defaultdict(list)
    for node in sorted(nodes.values(), key=lambda node: node.entry.alias_of is not None):
        by_digest.setdefault(node.entry.digest, node)
    for node in nodes.values():
        twins[node.entry.digest].append(node)
    for entry in entries:
        if entry.ref not in nodes:
            near = [(node.entry.name != entry.name, node.entry.tag != entry.alias_of) for node in twins[entry.digest]]
            twins[entry.digest][near.index(min(near))].aliases.append(entry.ref)
    roots = []
    for node in nodes.values():
        parent = by_digest.get(node.entry.parent or "")
        if parent is None or parent is node or _above(parent, node, by_digest):
            roots.append(node)
        else:
            parent.children.append(node)
    return roots


def family_of(roots: Sequence[Node[E]], ref: str) -> Node[E] | None:
    """The tree that the entry `ref`, or what it is an alias of, stands in."""

    def holds(node: Node[E]) -> bool:
        return node.entry.ref == ref or ref in node.aliases or any(holds(child) for child in node.children)

    return next((root for root in roots if holds(root)), None)


def tree_lines(roots: Sequence[Node[E]]) -> list[tuple[str, Node[E]]]:
    """One line for each node: the branches that lead to it, and the node."""

    def draw(node: Node[E], lead: str, mark: str, deeper: str) -> Iterator[tuple[str, Node[E]]]:
        yield lead + mark, node
        for position, child in enumerate(node.children):
            last = position == len(node.children) - 1
            yield from draw(child, lead + deeper, "`- " if last else "|- ", "   " if last else "|  ")

    return [line for root in roots for line in draw(root, "", "", "")]


def dot(roots: Sequence[Node[E]], label: Callable[[E], str]) -> str:
    """The trees as a Graphviz graph, read with `dot -Tsvg`."""
    lines: list[str] = ["digraph weightsmith {", "  rankdir=LR; node [shape=box, fontname=monospace];"]
    for _, node in tree_lines(roots):
        name = json.dumps(node.entry.ref)
        lines.append(f"  {name} [label={json.dumps(label(node.entry))}];")
        lines += [f"  {name} -> {json.dumps(child.entry.ref)};" for child in node.children]
        for alias in node.aliases:
            lines.append(f"  {json.dumps(alias)} [shape=ellipse]; {json.dumps(alias)} -> {name} [style=dashed];")
    return "\n".join([*lines, "}"])


def _above(node: Node[E], below: Node[E], by_digest: dict[str, Node[E]]) -> bool:
    """Whether `node` descends from `below` already: records can be made by hand, and must not send us in circles."""
    seen: set[str] = set()
    here: Node[E] | None = node
    while here is not None and here.entry.ref not in seen:
        if here is below:
            return True
        seen.add(here.entry.ref)
        here = by_digest.get(here.entry.parent or "")
    return here is not None


def template_change(entry: Entry, parent: Entry | None) -> str | None:
    """How the chat template of `entry` differs from that of what it was made from, for people; None where it does not.

    None too where either record is from before templates were noted.
    """
    if parent is None or entry.parent != parent.digest:
        return None
    mine, theirs = entry.chat_template, parent.chat_template
    if mine is None or theirs is None or mine == theirs:
        return None
    if not mine:
        return f"the chat template of {parent.ref} (sha256 {theirs[:12]}) is missing"
    was = f"sha256 {theirs[:12]}" if theirs else "which has none"
    return f"the chat template (sha256 {mine[:12]}) is not that of {parent.ref}, {was}"

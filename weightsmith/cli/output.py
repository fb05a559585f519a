"""Results on stdout: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click


def emit(result: Mapping[str, Any] | Sequence[Mapping[str, Any]], text: str, *, as_json: bool) -> None:
    """Print `result` as JSON or `text` as it is."""
    click.echo(json.dumps(result, indent=2, default=str) if as_json else text)


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """Aligned columns under a dashed line; numbers to the right. Ten thousand rows are a catalog's and cost little."""
    columns = [["" if row[i] is None else str(row[i]) for row in rows] for i in range(len(headers))]
    shown = []
    for title, cells in zip(headers, columns, strict=True):
        width = max(len(title) + 2, *map(len, cells), 0)
        rule = ">" if _numeric(cells) else "<"
        shown.append([f"{cell:{rule}{width}}" for cell in (title, *cells)])
        shown[-1].insert(1, "-" * width)
    return "\n".join("  ".join(line).rstrip() for line in zip(*shown, strict=True))


def _numeric(cells: Sequence[str]) -> bool:
    return any(cells) and all(cell[:1].isdigit() or cell[:1] in "-+" for cell in cells if cell)


def fields(pairs: Mapping[str, object]) -> str:
    """One `name  value` line each, aligned, empty values left out."""
    width = max((len(name) for name in pairs), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in pairs.items() if value not in (None, ""))


def size_text(nbytes: float) -> str:
    """Bytes for people, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def count_text(n: float) -> str:
    """A count of weights for people."""
    for unit in ("", "K", "M", "B"):
        if n < 1000:
            return f"{n:.0f}{unit}" if not unit else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f}T"

"""Near misses: what a mistyped name may have meant, and whose name another one may be made to look like."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with up to three of the names `known` that look like `name`, or ""."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else ""


def lookalike(repo: str, known: Iterable[str]) -> str | None:
    """The repository ORG/NAME among `known` that `repo` could be mistaken for: nearly its name, of nearly its owner."""
    org, _, name = repo.casefold().partition("/")
    for other in sorted(known):
        other_org, _, other_name = other.casefold().partition("/")
        if org != other_org and _close(org, other_org, 0.75) and _close(name, other_name, 0.9):
            return other
    return None


def _close(a: str, b: str, ratio: float) -> bool:
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() >= ratio

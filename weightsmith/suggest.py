"""Near misses: what a mistyped name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with up to three of the names `known` that look like `name`, or ""."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else ""

"""Loading without the search for garbage: numba makes a quarter of a million objects that stay, and none to throw away.

Python would look through them a hundred times, for a tenth of a second in all.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile. Of several threads the first to leave ends it; one that is off stays off."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

"""Progress on stderr: a tqdm bar on a terminal, plain lines in a log, nothing when quiet.

Results belong to stdout and never pass through here.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger(__name__)

LINE_EVERY = 10.0  # seconds between the lines of a log that is no terminal

_settings = {"quiet": False}


class Ticker(Protocol):
    """Something that counts finished units."""

    def update(self, n: int) -> object:
        """Count `n` more units."""


def set_quiet(quiet: bool) -> None:
    """Silence all progress for this process (`--quiet`)."""
    _settings["quiet"] = quiet


def bars() -> bool:
    """Whether a library may draw its own bars on stderr: on a terminal, and not when quiet."""
    return not _settings["quiet"] and sys.stderr.isatty()


class _Lines:
    """Counts silently and writes a plain line now and then."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.begun = self.told = time.monotonic()

    def update(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.told >= LINE_EVERY:
            self.told = now
            self.tell(now)

    def tell(self, now: float) -> None:
        share = f"{100 * self.done / self.total:.0f} %" if self.total else f"{self.done} {self.unit}"
        rate = self.done / max(now - self.begun, 1e-9)
        speed = f"{rate / 1e6:.1f} MB/s" if self.unit == "B" else f"{rate:.1f} {self.unit}/s"
        log.info("%s: %s, %s", self.title, share, speed)


class _Silent:
    def update(self, n: int) -> None:
        """Count nothing."""


@contextmanager
def progress(title: str, total: int, unit: str = "B") -> Iterator[Ticker]:
    """Show how far `title` has come; `total` and updates are in `unit` ("B" is bytes and scales to MB)."""
    if _settings["quiet"]:
        yield _Silent()
    elif sys.stderr.isatty():
        from tqdm import tqdm  # noqa: PLC0415  (a terminal bar is not worth its import elsewhere)

        scale = unit == "B"
        with tqdm(total=total, desc=title, unit=unit, unit_scale=scale, unit_divisor=1000, leave=False) as bar:
            yield bar
    else:
        lines = _Lines(title, total, unit)
        yield lines
        lines.tell(time.monotonic())

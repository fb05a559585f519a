"""What a run has finished, so that the next one need not do it again.

A journal lies beside an unfinished output as `NAME.journal`. Its first line is the fingerprint of the work: source,
target and every option that decides the bytes; a journal of other work is dropped. Each further line names a slab of
rows, a checksum of what was written for it (`quant.checksum`, which reading back goes by as well) and what it lost
(`quant.loss`). A resumed run reads the slab back and believes it only if the checksum agrees, so neither a torn last
line nor pages that never reached the disk can do harm, and nothing has to be flushed on the way.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from weightsmith.atomic import disk_errors
from weightsmith.quant.loss import Loss

log = logging.getLogger(__name__)

Key = tuple[str, int, int]  # tensor, first row, row after the last


@dataclass(frozen=True, slots=True)
class Done:
    """A finished slab: the checksum of its packed rows, and what they lost."""

    sum: int
    loss: Loss


def journal_path(output: Path) -> Path:
    """Where the journal of an unfinished `output` lies."""
    return output.with_name(output.name + ".journal")


class Journal:
    """The finished slabs of one output. Safe from several threads."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = journal_path(output)
        head = json.dumps(fingerprint, sort_keys=True)
        self._is_empty = not os.path.lexists(self.path)
        self.known = _read(self.path, head)
        self._lock = threading.Lock()
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Written anew, so that a torn last line cannot swallow the next one.
            self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115  (closed by remove and close)
            lines = [head, *(_line(key, done) for key, done in self.known.items())]
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()

    def add(self, key: Key, total: int, loss: Loss) -> None:
        """Note that packed rows of the checksum `total` were written for the slab `key`, and what they lost."""
        line = _line(key, Done(total, loss))
        with self._lock, disk_errors(self.path):
            self._is_empty = False
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Keep the journal for the next run; one that was begun here and notes nothing is no use to it."""
        self._file.close()
        if self._is_empty:
            self.path.unlink(missing_ok=True)

    def remove(self) -> None:
        """The output is finished: forget the journal."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def _line(key: Key, done: Done) -> str:
    return json.dumps([*key, done.sum, *astuple(done.loss)])


def _read(path: Path, head: str) -> dict[Key, Done]:
    if os.path.islink(path) or not path.is_file():
        return {}
    known: dict[Key, Done] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        if file.readline().rstrip("\n") != head:
            log.info("%s belongs to other work (another source or other options) and is dropped", path)
            return {}
        for line in file:
            try:
                name, start, stop, total, error, energy = json.loads(line)
                known[str(name), int(start), int(stop)] = Done(int(total), Loss(float(error), float(energy)))
            except (ValueError, TypeError):
                continue  # a line torn by a kill; its slab is simply done again
    return known

"""Files that the catalog already holds, found by their content: what was pulled once need not come again.

The catalog is read when somebody first asks, and again when a model came or went: another process may have finished the
very model that this one waits for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from weightsmith.catalog import Catalog
from weightsmith.sources.listing import Listed, prove

_TICK = 1_000_000_000  # ns: a folder that changed so lately may change again without another time (2 s on FAT aside)


class Shelf:
    """The files of the catalog at `home`; of none without."""

    def __init__(self, home: Path | None = None) -> None:
        self._catalog = Catalog(home) if home is not None else None
        self._state: list[tuple[str, int]] | None = None
        self._files: list[tuple[int, str, Path]] = []  # bytes, SHA-256 as recorded, path

    def holding(self, listed: Listed, name: str) -> Iterator[Path]:
        """Files that should be what is `listed`, by their record; `name` narrows where only git's hash is known.

        They are yet to be proved: a disk may have gone bad since.
        """
        self._refresh()
        for size, sha256, path in self._files:
            if size != listed.size or not path.is_file():
                continue
            if listed.sha256 is not None:
                if sha256 == listed.sha256:
                    yield path
            elif path.name == name and not prove(path, listed)[1]:
                yield path

    def _refresh(self) -> None:
        if self._catalog is None or not self._catalog.models.is_dir():
            return
        state = []
        for folder in sorted(self._catalog.models.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                state.append((folder.name, folder.stat().st_mtime_ns))
        if state != self._state:
            newest = max((changed for _, changed in state), default=0)
            self._state = state if newest < time.time_ns() - _TICK else None
            self._files = [
                (file.size, file.sha256, entry.folder / file.path)
                for entry in self._catalog.entries()
                for file in entry.files
            ]

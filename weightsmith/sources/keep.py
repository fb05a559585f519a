"""HOME/downloads/KEY/: a download from its first byte until its checkpoint is safe in the catalog.

    .lock                        held by whoever downloads, takes or drops
    data.part, .journal          unfinished (see download.py and chunks.py)
    data                         complete; its hash was right

KEY is the hash of the content where one is known, so the same file of another repository or mirror is the same
download, and two processes that want it share one: the second waits and finds it done. Else it is the URL's hash.

A finished file is linked into the staging folder and stays here until the whole checkpoint is committed: a run that is
killed at its last file has the others. `drop` takes them away then; what is left over, `weightsmith gc` removes.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weightsmith.atomic import disk_errors
from weightsmith.progress import Ticker
from weightsmith.sources import chunks
from weightsmith.sources.download import Arrived, Remote, download
from weightsmith.store import is_free, locked

log = logging.getLogger(__name__)


def folder_of(home: Path, key: str) -> Path:
    """Where the download `key` (a plain file name) lies, or will."""
    return home / "downloads" / key


@contextmanager
def held(home: Path, key: str) -> Iterator[Path]:
    """The folder of the download `key`, locked; waits for whoever else has it."""
    folder = folder_of(home, key)
    if not is_free(folder / ".lock"):
        log.info("another process is fetching this file; waiting for it")
    with locked(folder / ".lock"):
        yield folder


def finished(folder: Path) -> Path:
    """Where the complete file lies, or will."""
    return folder / "data"


def kept_bytes(folder: Path) -> int:
    """Bytes on disk that an unfinished download holds already."""
    try:
        return 512 * (folder / "data.part").stat().st_blocks
    except OSError:
        return 0


def bring(folder: Path, remote: Remote, fault: Callable[[Arrived], str], ticker: Ticker | None) -> tuple[Arrived, str]:
    """Download into a `held` folder; the file is at `finished(folder)` if `fault`, which is returned, is empty.

    What is wrong is dropped: nothing of it is to be resumed. Raises what `download` raises.
    """
    part = folder / "data.part"
    arrived = download(remote, part, ticker)
    wrong = fault(arrived)
    if wrong:
        chunks.drop(part)
        return arrived, wrong
    with disk_errors(part):
        os.replace(part, finished(folder))
    chunks.drop(part)
    return arrived, ""


def drop(folders: Iterable[Path]) -> None:
    """Forget downloads whose files are safe elsewhere."""
    for folder in folders:
        with locked(folder / ".lock"):
            shutil.rmtree(folder, ignore_errors=True)

"""Every record below HOME/models, and what a process that died between two renames left there.

The catalog reads it to list and find, the image layout (see oci/) to know what is to be in it. Reading takes no lock:
entries appear and vanish by rename. `recover` is for whoever holds HOME/models/.lock.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from weightsmith.errors import IntegrityError
from weightsmith.store import RECORD, Entry, read_record

WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
_STAGES = (".old", ".gone")  # `.TAG.old` waits for its replacement, `.TAG.gone` for removal


def records(models: Path, name: str | None = None) -> Iterator[tuple[str, str, os.stat_result]]:
    """Name, tag and status of every record below `models` (of `name`), sorted; nothing is found through a link."""
    if name is not None and (models / name).is_symlink():
        return
    for model in [name] if name is not None else _words(models):
        folder = models / model
        for tag in _words(folder):
            try:
                status = os.lstat(f"{folder}/{tag}/{RECORD}")
            except OSError:
                continue  # no entry, or one that went meanwhile
            if stat.S_ISREG(status.st_mode):
                yield model, tag, status


def _words(folder: Path) -> list[str]:
    """Folders in `folder` that can be names, sorted; none if that is gone."""
    try:
        with os.scandir(folder) as found:
            return sorted(one.name for one in found if WORD.fullmatch(one.name) and one.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def folders(models: Path, name: str | None = None) -> list[Path]:
    """Folders below `models` (of model `name`, or all) that hold a record, sorted."""
    return [models / model / tag for model, tag, _ in records(models, name)]


def read_all(models: Path, name: str | None = None) -> tuple[list[Entry], list[IntegrityError]]:
    """Every entry below `models` (of `name`), by name and tag, and the faults of records that cannot be read."""
    entries, faults = [], []
    for folder in folders(models, name):
        try:
            entries.append(read_record(folder))
        except IntegrityError as error:
            if (folder / RECORD).is_file():  # else it was removed since we saw it
                faults.append(error)
    return entries, faults


def recover(model: Path) -> None:
    """Finish what a process that died between two renames left of a model: bring an old entry back, or drop it."""
    for left in list(model.glob(".*")):
        target = model / left.stem[1:]
        if left.suffix not in _STAGES or left.is_symlink():
            continue
        if left.suffix == ".old" and not target.exists():
            os.replace(left, target)
        else:
            shutil.rmtree(left, ignore_errors=True)

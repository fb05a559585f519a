"""Every record below HOME/models, and what a process that died between two renames left there.

The catalog reads it to list and find, the image layout (see oci/) to know what is to be in it. Reading takes no lock:
entries appear and vanish by rename. `recover` is for whoever holds HOME/models/.lock.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from weightsmith.errors import IntegrityError
from weightsmith.store import RECORD, Entry, read_record

WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
_STAGES = (".old", ".gone")  # `.TAG.old` waits for its replacement, `.TAG.gone` for removal


def folders(models: Path, name: str | None = None) -> list[Path]:
    """Folders below `models` (of model `name`, or all) that hold a record, sorted; never through a symbolic link."""
    found = []
    for folder in [models / name] if name is not None else _inside(models):
        if WORD.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            found += [tag for tag in _inside(folder) if WORD.fullmatch(tag.name) and not tag.is_symlink()]
    return [tag for tag in found if (tag / RECORD).is_file()]


def _inside(folder: Path) -> list[Path]:
    """What lies in `folder`, sorted; nothing if that is gone."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


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

"""xAI's original form of Grok-1: ckpt-0/ with tensor00000_000 to tensor00769_000, one pickled array each.

The files are pickles, so the reader is opened only with permission, and nothing in them is run (`formats.pickles`).
Read only: nothing is written in this form. A folder that also holds safetensors is left to those.

| module | what it knows |
|---|---|
| pickled | one file: where its arrays lie |
| layout | which file is which tensor |
| checkpoint | all files, and the model they make |
| columns, turn | matrices as [in, out] to rows of [out, in], in constant memory |
| reader | the protocol of `weightsmith.types` |
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.formats.grok1.checkpoint import FILE, file_names
from weightsmith.formats.grok1.reader import Grok1Reader
from weightsmith.formats.pickles import demand_permission

__all__ = ["NAME", "PICKLED", "Grok1Reader", "open_reader", "sniff"]

NAME = "grok1"
PICKLED = True  # open_reader takes allow_pickle
_BELOW = "ckpt-0"


def sniff(path: Path) -> bool:
    """True for a folder of tensorNNNNN_000 files or one that has them in ckpt-0, and for one of the files."""
    if path.is_file():
        return FILE.fullmatch(path.name) is not None and sniff(path.parent)
    return path.is_dir() and _folder(path) is not None and not any(path.glob("*.safetensors"))


def open_reader(path: Path, *, allow_pickle: bool = False) -> Grok1Reader:
    """Open the folder of a checkpoint, the one above it, or that of one of its files.

    Raises UnsafeInputError unless `allow_pickle`, and what `checkpoint.read_files` raises.
    """
    folder = path.parent if path.is_file() else _folder(path) or path
    demand_permission(folder / (file_names(folder) or [""])[0], allowed=allow_pickle)
    return Grok1Reader(folder, above=path if path.is_dir() and folder != path else None)


def _folder(path: Path) -> Path | None:
    """Where the files lie: `path` itself or its ckpt-0."""
    for folder in (path, path / _BELOW):
        if folder.is_dir() and file_names(folder):
            return folder
    return None

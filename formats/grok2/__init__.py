"""xAI's form of Grok-2: config.json beside safetensors that hold tensor-parallel slices, and tokenizer.tok.json.

Slices of one tensor have the same name in eight files (`parts`), so no reader of ordinary safetensors can have them.
They are joined row by row as they are read. Read only: written is ordinary safetensors.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.formats.grok2.parts import FILE, file_names
from weightsmith.formats.grok2.reader import Grok2Reader

__all__ = ["NAME", "Grok2Reader", "open_reader", "sniff"]

NAME = "grok2"


def sniff(path: Path) -> bool:
    """True for a folder of config.json and tensor-parallel files, or one of those files."""
    if path.is_file():
        return FILE.fullmatch(path.name) is not None and sniff(path.parent)
    return path.is_dir() and (path / "config.json").is_file() and bool(file_names(path))


def open_reader(path: Path) -> Grok2Reader:
    """Open a folder, or that of one of its files; reads and checks headers only. See `parts.open_parts`."""
    return Grok2Reader(path.parent if path.is_file() else path)

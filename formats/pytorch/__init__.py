"""Hugging Face's form from before safetensors: config.json, a tokenizer, and weights as torch.save wrote them.

    pytorch_model.bin, or pytorch_model-0000k-of-0000n.bin beside pytorch_model.bin.index.json

Names, shapes, configuration, index and tokenizer are those of the safetensors form, and so is the reader; only where a
tensor lies in its file is found by `formats.pickles` instead of a header. What a file is, its first bytes say and not
its name: pickles need permission, safetensors under another name are read as such, and any file of torch.save's can be
named by itself. Read only. A folder that also holds safetensors is left to those.
"""

from __future__ import annotations

import os
from pathlib import Path

from weightsmith.errors import UnsupportedError
from weightsmith.formats.packed.settings import OLD_NAME
from weightsmith.formats.pickles import demand_permission, is_pickled, is_saved, read_tensors
from weightsmith.formats.safetensors.header import Header, is_safetensors, read_header
from weightsmith.formats.safetensors.index import TORCH, find_weights, is_checkpoint
from weightsmith.formats.safetensors.reader import SafetensorsReader

__all__ = ["NAME", "PICKLED", "open_reader", "sniff"]

NAME = "pytorch"
PICKLED = True  # open_reader takes allow_pickle
_START = 512  # bytes that tell what a file is


def sniff(path: Path) -> bool:
    """True for a folder of config.json and pytorch_model*.bin without safetensors, and for a file of torch.save's."""
    if path.is_dir():
        return is_checkpoint(path, TORCH) and not is_checkpoint(path)
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return is_saved(file.read(_START))
    except OSError:
        return False


def open_reader(path: Path, *, allow_pickle: bool = False) -> SafetensorsReader:
    """Open a folder or a single file; reads headers and pickles only, and runs nothing in them.

    Raises UnsafeInputError for pickled weights unless `allow_pickle`, UnsupportedError for packed ones, and what
    `SafetensorsReader` and `pickles.read_tensors` raise.
    """

    def read(handle: int, size: int, *, path: Path) -> Header:
        start = os.pread(handle, _START, 0)
        if is_safetensors(start):
            return read_header(handle, size, path=path)
        if is_pickled(start):
            demand_permission(path, allowed=allow_pickle)
        return Header(read_tensors(handle, size, path=path), {})

    path = Path(os.path.abspath(path))
    if path.is_dir() and (path / OLD_NAME).exists():
        raise UnsupportedError(
            f"packed weights ({OLD_NAME}) in pickles; only those in safetensors are read",
            path=path,
            hint="Start from the original checkpoint in full precision.",
        )
    return SafetensorsReader(path, container=NAME, weights=find_weights(path, TORCH), read=read)

"""PyTorch's pickled checkpoints (.bin, .pth), read without running them.

A pickle is a program: its opcodes import names and call them, so unpickling a downloaded file runs whatever its author
wrote. Here no name is ever imported and nothing is called. `archive` finds the members of the zip file, `machine` steps
through the few opcodes that a state dict needs and treats the few names that one uses as inert marks, and `tensors`
turns the result into positions in the file. Everything else is refused with UnsafeInputError. What was read is known
to have had no other opcodes and names; that is all it says about a file.

Still, a pickled checkpoint is read only when the user asked for that (`demand_permission`).

Ref: pickletools of CPython; torch/serialization.py and torch/_utils.py (_rebuild_tensor_v2); CVE-2025-32434 for what
happened to the loader that ran an allow-list of names.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.errors import UnsafeInputError
from weightsmith.formats.pickles.archive import is_pickled, is_saved
from weightsmith.formats.pickles.tensors import read_tensors

__all__ = ["demand_permission", "is_pickled", "is_saved", "read_tensors"]


def demand_permission(path: Path, *, allowed: bool) -> None:
    """Raise UnsafeInputError unless the user `allowed` pickled weights such as `path`."""
    if not allowed:
        raise UnsafeInputError(
            "pickled weights, and a pickle can run code when it is loaded the usual way",
            path=path,
            hint="Use a safetensors form of the model, or pass --allow-pickle: then the file is read without running "
            "anything in it, and refused if it holds more than tensors.",
        )

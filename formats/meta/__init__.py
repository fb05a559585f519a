"""Meta's original form of Llama 1 to 3.3: consolidated.00.pth to NN.pth, params.json, tokenizer.model.

Each .pth is what one model-parallel rank held (`formats.consolidated.names` says how a tensor is cut). They are
pickles, so the reader is opened only with permission (`formats.pickles`). Read only: nothing is written in this form.
A folder that also holds Hugging Face's form is left to that one.
"""

from __future__ import annotations

import re
from pathlib import Path

from weightsmith.errors import NotFoundError
from weightsmith.formats.consolidated.reader import ConsolidatedReader
from weightsmith.formats.consolidated.shards import open_pickled
from weightsmith.formats.meta.config import configure
from weightsmith.formats.mistral.files import has_other_form, is_native
from weightsmith.formats.pickles import demand_permission
from weightsmith.safename import resolve_inside

__all__ = ["NAME", "PICKLED", "ConsolidatedReader", "open_reader", "sniff"]

NAME = "meta"
PICKLED = True  # open_reader takes allow_pickle
_PART = re.compile(r"consolidated\.(\d\d)\.pth")


def sniff(path: Path) -> bool:
    """True for a folder of consolidated.NN.pth without another form of the weights, or one of its files."""
    if path.is_file():
        return _PART.fullmatch(path.name) is not None and sniff(path.parent)
    return path.is_dir() and bool(_parts(path)) and not has_other_form(path) and not is_native(path)


def open_reader(path: Path, *, allow_pickle: bool = False) -> ConsolidatedReader:
    """Open a folder, or the folder of a file; reads and checks headers only.

    Raises UnsafeInputError unless `allow_pickle`, NotFoundError for a missing rank, and what `open_pickled` raises.
    """
    folder = path.parent if path.is_file() else path
    parts = _parts(folder)
    demand_permission(folder / parts[0], allowed=allow_pickle)
    for rank, name in enumerate(parts):
        if name != f"consolidated.{rank:02d}.pth":
            raise NotFoundError(
                f"consolidated.{rank:02d}.pth is missing, {parts[-1]} is there", path=folder, hint="Pull it again."
            )
    return ConsolidatedReader(NAME, folder, open_pickled([resolve_inside(folder, name) for name in parts]), configure)


def _parts(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("consolidated.*.pth") if _PART.fullmatch(file.name))

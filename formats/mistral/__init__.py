"""Mistral's original form: params.json, consolidated weights, tekken.json or a SentencePiece tokenizer.model.vN.

Text models are read: 7B v0.1 to v0.3, Nemo, Small 3, Mixtral 8x7B and 8x22B (`experts` knows their layouts). Tensors
have Meta's names and Meta's rotation of neighbouring pairs, and are never cut into ranks. Linears may be stored in 8
bits (`eights`). Other mixtures of experts, YaRN and position-dependent attention scales are recognised and refused by
name; an image encoder is left out. Read only: nothing is written in this form.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.errors import NotFoundError, UnsupportedError
from weightsmith.formats.consolidated.params import read_params
from weightsmith.formats.consolidated.reader import ConsolidatedReader
from weightsmith.formats.consolidated.shards import open_disjoint, open_pickled, open_safetensors
from weightsmith.formats.mistral.config import configure, refuse_unknown
from weightsmith.formats.mistral.experts import STACKED
from weightsmith.formats.mistral.files import find, has_other_form, is_native, is_weight_file, pickled
from weightsmith.formats.pickles import demand_permission
from weightsmith.safename import resolve_inside

__all__ = ["NAME", "PICKLED", "ConsolidatedReader", "open_reader", "sniff"]

NAME = "mistral"
PICKLED = True  # open_reader takes allow_pickle


def sniff(path: Path) -> bool:
    """True for a folder in Mistral's form that has no other form of the weights, or one of its weight files."""
    if path.is_file():
        return is_weight_file(path.name) and sniff(path.parent)
    return path.is_dir() and is_native(path) and not has_other_form(path)


def open_reader(path: Path, *, allow_pickle: bool = False) -> ConsolidatedReader:
    """Open a folder, or the folder of a file; reads and checks headers only.

    Raises UnsafeInputError for pickled weights unless `allow_pickle`, UnsupportedError for several of them, and what
    opening weights raises.
    """
    folder = path.parent if path.is_file() else path
    weights = find(folder)
    if weights is not None:
        return ConsolidatedReader(NAME, folder, open_safetensors(weights), configure)
    parts = pickled(folder)
    refuse_unknown(read_params(folder))
    demand_permission(folder / parts[0], allowed=allow_pickle)
    files = [resolve_inside(folder, name) for name in parts]
    if len(parts) == 1:
        return ConsolidatedReader(NAME, folder, open_pickled(files), configure)
    if STACKED not in read_params(folder).raw:
        raise UnsupportedError(
            f"{len(parts)} pickled files; only consolidated.00.pth by itself is read, and Mixtral 8x7B's eight",
            path=folder,
            hint="Use a safetensors form of the model.",
        )
    for number, name in enumerate(parts):
        if not name.startswith(f"consolidated.{number:02d}."):
            raise NotFoundError(
                f"consolidated.{number:02d}.pt is missing, {parts[-1]} is there", path=folder, hint="Pull it again."
            )
    return ConsolidatedReader(NAME, folder, open_disjoint(files), configure)

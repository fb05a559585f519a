"""Grok-2's files: which tensors are cut over tensor-parallel ranks, and how.

    pytorch_model-000GG-TP-common.safetensors      whole tensors
    pytorch_model-000GG-TP-00R.safetensors         rank R's part, under the name of the whole

One number G is one kind of tensor of all 64 layers. As published (15 common files, 3 kinds in 8 ranks) only the experts
are cut: w1 and w3 by rows, w2 by columns. There is no index; what is in the ranks' files must be in all of them. Kinds
that are whole as published are joined in the usual way if they are cut: what comes after a norm by rows, what
leads to one by columns.

Ref: load_weights in sglang models/grok.py (its presharded weights); the file list of xai-org/grok-2.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from weightsmith.errors import IntegrityError, NotFoundError, UnsupportedError
from weightsmith.formats.consolidated.shards import Joined, Shards, concatenated, fitting
from weightsmith.formats.safetensors.header import read_header
from weightsmith.formats.safetensors.strictjson import open_regular
from weightsmith.safename import resolve_inside
from weightsmith.types import TensorInfo

FILE = re.compile(r"pytorch_model-(\d{5})-TP-(common|\d{3})\.safetensors")
_ROWS = re.compile(r"lm_head|embed_tokens|(q|k|v|gate|up)_proj|w1|w3")
_COLUMNS = re.compile(r"(o|down)_proj|w2")
AGAIN = "Pull the checkpoint again; files that are whole are not downloaded twice."


@dataclass(frozen=True, slots=True)
class _Part:
    """One file: its kind, and its rank (-1: common)."""

    path: Path
    kind: str
    rank: int


def file_names(folder: Path) -> list[str]:
    """Names of the weight files in `folder`, in order; none of a folder that cannot be listed."""
    try:
        return sorted(name for name in os.listdir(folder) if FILE.fullmatch(name))
    except OSError:
        return []


def open_parts(folder: Path) -> Shards:
    """Open every file of `folder`; its tensors are whole ones.

    Raises NotFoundError (a rank's file is missing), IntegrityError (damaged, or parts that do not fit together),
    UnsupportedError (a tensor that is cut and not known to be).
    """
    parts = []
    for name in file_names(folder):
        found = FILE.fullmatch(name)
        assert found is not None
        rank = -1 if found[2] == "common" else int(found[2])
        parts.append(_Part(resolve_inside(folder, name), found[1], rank))
    ranks = _ranks(parts, folder)
    shards = Shards([part.path for part in parts])
    try:
        headers: dict[_Part, dict[str, TensorInfo]] = {}
        for part in parts:
            handle, size = open_regular(part.path)
            shards.handles[part.path] = handle
            headers[part] = read_header(handle, size, path=part.path).tensors
        _join(headers, ranks, shards)
    except BaseException:
        shards.close()
        raise
    return shards


def _ranks(parts: list[_Part], folder: Path) -> int:
    """How many ranks there are; every kind that is cut has a file of each, and no kind is whole and cut."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for part in parts:
        kinds[part.kind].append(part.rank)
    count = 1 + max(part.rank for part in parts)
    for kind, ranks in kinds.items():
        missing = [rank for rank in range(count) if rank not in ranks]
        if ranks != [-1] and missing:
            name = f"pytorch_model-{kind}-TP-{missing[0]:03d}.safetensors"
            raise NotFoundError(f"{name} is missing", path=folder, hint=AGAIN)
    return count


def _join(headers: dict[_Part, dict[str, TensorInfo]], ranks: int, shards: Shards) -> None:
    pieces: dict[str, list[TensorInfo]] = defaultdict(list)
    for part, tensors in headers.items():
        for name, info in tensors.items():
            if part.rank < 0:
                if name in shards.tensors:
                    other = shards.tensors[name].info.path
                    raise IntegrityError(f"stored twice, here and in {other}", path=info.path, tensor=name)
                shards.tensors[name] = Joined(info, (info,))
            elif len(pieces[name]) != part.rank:
                text = f"rank {part.rank} has it, {len(pieces[name])} ranks before it do"
                raise IntegrityError(text, path=info.path, tensor=name, hint=AGAIN)
            else:
                pieces[name].append(info)
    for name, cut in pieces.items():
        if name in shards.tensors or len(cut) != ranks:
            text = "stored whole and in parts" if name in shards.tensors else f"in {len(cut)} of {ranks} ranks"
            raise IntegrityError(text, path=cut[0].path, tensor=name, hint=AGAIN)
        same = [fitting(name, cut[0], {name: piece}) for piece in cut]
        shards.tensors[name] = _joined(cut[0], same, ranks)


def _joined(first: TensorInfo, parts: list[TensorInfo], ranks: int) -> Joined:
    if ranks == 1 or len(first.shape) < 2:
        return Joined(first, (first,))  # every rank holds all of a norm
    kind = first.name.removesuffix(".weight").rpartition(".")[2]
    if kind == "gate":  # and of the router
        return Joined(first, (first,))
    if len(first.shape) == 2 and _ROWS.fullmatch(kind):
        return concatenated(first, parts, 0)
    if len(first.shape) == 2 and _COLUMNS.fullmatch(kind):
        return concatenated(first, parts, 1)
    raise UnsupportedError(
        f"a tensor of shape {list(first.shape)}, cut over {ranks} ranks", path=first.path, tensor=first.name
    )

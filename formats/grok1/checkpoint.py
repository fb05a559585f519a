"""Grok-1's files as a set: all there, each an array of the kind that its number calls for; and the model they make.

The checkpoint has no configuration. Sizes follow from the shapes; the rest is what xAI's run.py says:

| | |
|---|---|
| size of a head | 128 |
| experts for a token | 2 |
| embeddings, scores, logits times | sqrt(hidden), 1 / sqrt(128), 1 / sqrt(3) |
| scores capped at | 30 |
| rotary base, epsilon, context | 10000, 1e-5, 8192 |
| padding, beginning, end | 0, 1, 2 |

Ref: run.py and model.py of xai-org/grok-1.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from weightsmith.errors import IntegrityError, NotFoundError, UnsupportedError
from weightsmith.formats.grok1 import layout
from weightsmith.formats.grok1.pickled import read_arrays
from weightsmith.formats.safetensors.strictjson import open_regular
from weightsmith.safename import resolve_inside
from weightsmith.types import Grok, ModelConfig, TensorInfo

HEAD_DIM, EXPERTS_USED, CONTEXT = 128, 2, 8192
LOGIT_SCALE, ATTENTION_CAP = 0.5773502691896257, 30.0
FILE = re.compile(r"tensor(\d{5})_(\d{3})")
MAX_LAYERS = 4096
_MATRIX_SLOTS = (*layout.EXPERTS.values(), *layout.MATRICES.values())


@dataclass(frozen=True, slots=True)
class File:
    """One file: its arrays by field ("" or "weight" and "scales"), and its size in bytes."""

    path: Path
    size: int
    arrays: dict[str, TensorInfo]


def file_names(folder: Path) -> list[str]:
    """Names of the weight files in `folder`, in order; none of a folder that cannot be listed."""
    try:
        return sorted(name for name in os.listdir(folder) if FILE.fullmatch(name))
    except OSError:
        return []


def read_files(folder: Path) -> list[File]:
    """Open, check and close every file of `folder`.

    Raises NotFoundError (one is missing), UnsupportedError (written by several hosts), and what `read_arrays` does.
    """
    names = file_names(folder)
    other = next((name for name in names if not name.endswith("_000")), None)
    if other is not None:
        raise UnsupportedError("tensors that were cut over several hosts are not read", path=folder / other)
    files = []
    for index, name in enumerate(names):
        if name != layout.file_name(index):
            text = f"{layout.file_name(index)} is missing, {name} is there"
            raise NotFoundError(text, path=folder, hint="Pull it again.")
        path = resolve_inside(folder, name)
        handle, size = open_regular(path)
        try:
            files.append(File(path, size, read_arrays(handle, size, path=path)))
        finally:
            os.close(handle)
    return files


def n_layers(files: list[File], folder: Path) -> int:
    """Layers that so many files are."""
    layers, rest = divmod(len(files) - 2, layout.PER_LAYER)
    if layers < 1 or rest or layers > MAX_LAYERS:
        text = f"{len(files)} tensor files; a checkpoint has 2, and {layout.PER_LAYER} for every layer"
        raise NotFoundError(text, path=folder, hint="Pull it again.")
    return layers


def configure(files: list[File], folder: Path) -> ModelConfig:
    """The model. Raises IntegrityError naming the first file that does not fit the others, NotFoundError."""
    layers = n_layers(files, folder)
    vocab_size, hidden = _shape(files[0], 2)
    experts, width, ffn = _shape(files[2], 3)
    _, q_rows = _shape(files[2 + layout.MATRICES["self_attn.q_proj"]], 2)
    _, kv_rows = _shape(files[2 + layout.MATRICES["self_attn.k_proj"]], 2)
    heads, kv_heads = q_rows // HEAD_DIM, kv_rows // HEAD_DIM
    if width != hidden or q_rows % HEAD_DIM or kv_rows % HEAD_DIM or not kv_heads or heads % kv_heads:
        text = f"{q_rows} query and {kv_rows} key columns are no heads of {HEAD_DIM}, or {width} is not {hidden}"
        raise IntegrityError(text, path=files[2].path)
    _check_layers(files, layers)
    return ModelConfig(
        family="grok",
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=ffn,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        dtype="BF16",
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
        name=_name(folder.absolute()),
        n_experts=experts,
        n_experts_used=EXPERTS_USED,
        grok=Grok(math.sqrt(hidden), LOGIT_SCALE, HEAD_DIM**-0.5, attention_cap=ATTENTION_CAP),
    )


def _name(folder: Path) -> str:
    """The folder's name, without the ckpt-0 and checkpoints that xAI puts files into."""
    while folder.name in ("ckpt-0", "checkpoints"):
        folder = folder.parent
    return folder.name[:200]


def _shape(file: File, rank: int) -> tuple[int, ...]:
    array = file.arrays.get("weight") or file.arrays[""]
    if len(array.shape) != rank or 0 in array.shape:
        raise IntegrityError(f"shape {list(array.shape)}, expected {rank} axes", path=file.path)
    return array.shape


def _check_layers(files: list[File], layers: int) -> None:
    """Every layer has the kinds and shapes of the first, and the first is as `layout` says."""
    for index, file in enumerate(files):
        slot = (index - 2) % layout.PER_LAYER if index > 1 else -1
        wanted = {"weight": "I8", "scales": "BF16"} if slot in _MATRIX_SLOTS else {"": "F32"}
        found = {field: array.codec for field, array in file.arrays.items()}
        if found != wanted:
            raise IntegrityError(f"holds {_said(found)}, expected {_said(wanted)}", path=file.path)
        first = files[2 + slot] if slot >= 0 else file
        if [array.shape for array in file.arrays.values()] != [array.shape for array in first.arrays.values()]:
            raise IntegrityError("not the shape of the same tensor in the first layer", path=file.path)
        if slot in _MATRIX_SLOTS:
            _check_scales(file)
    assert len(files) == 2 + layout.PER_LAYER * layers


def _said(fields: dict[str, str]) -> str:
    return " and ".join(f"{codec} {field}".strip() for field, codec in fields.items())


def _check_scales(file: File) -> None:
    """Scales are [..., groups, out] for a weight [..., in, out] of whole groups."""
    weight, scales = file.arrays["weight"].shape, file.arrays["scales"].shape
    fits = len(weight) == len(scales) >= 2 and weight[:-2] == scales[:-2] and weight[-1] == scales[-1]
    if not fits or not scales[-2] or weight[-2] % scales[-2]:
        raise IntegrityError(f"scales {list(scales)} do not fit the weight {list(weight)}", path=file.path)

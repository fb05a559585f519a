"""Tiny checkpoints as torch.save writes them, each the same model as a safetensors folder beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import write_llama

INDEX = "pytorch_model.bin.index.json"


def shard_name(number: int, of: int) -> str:
    return f"pytorch_model-{number:05d}-of-{of:05d}.bin"


def save(folder: Path, tensors: dict[str, Any], *, shards: int = 1) -> None:
    """Write `tensors` into `folder` as pytorch_model.bin, or as shards with their index."""
    import torch

    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        torch.save(part, folder / shard_name(number + 1, shards))
        weight_map |= dict.fromkeys(part, shard_name(number + 1, shards))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def load(folder: Path) -> dict[str, Any]:
    """The tensors of a safetensors folder."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def pickled(
    plain: Path, folder: Path, *, shards: int = 1, change: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Path:
    """Write the checkpoint of the safetensors folder `plain` into `folder` as pickles of its tensors, changed."""
    folder.mkdir(parents=True)
    for file in plain.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, folder / file.name)
    tensors = load(plain)
    save(folder, change(tensors) if change else tensors, shards=shards)
    return folder


def write_pickled(folder: Path, *, shards: int = 1, **options: Any) -> Path:
    """A tiny Llama as pickles in `folder`; `options` are those of `write_llama`."""
    plain = write_llama(folder.with_name(f"{folder.name}-plain"), **options)
    return pickled(plain, folder, shards=shards)

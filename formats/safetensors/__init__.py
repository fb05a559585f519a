"""Hugging Face's safetensors: a folder of config.json, weights in one file or in shards with an index, and a tokenizer.

A bare `.safetensors` file beside a config.json is read too. Canonical names and layouts are this container's own, so
nothing is renamed or permuted here.

| module | what it knows |
|---|---|
| strictjson | JSON from outside: size, nesting and duplicate keys |
| header | one file: its header, every claim checked against the file |
| index | which files belong together, and the shard index |
| config, grok_config, keys | config.json to ModelConfig and back |
| stacked | experts that lie in one tensor |
| reader, writer | the protocols of `weightsmith.types` |
"""

from __future__ import annotations

import os
from pathlib import Path

from weightsmith.errors import UnsupportedError, UsageError
from weightsmith.formats.safetensors.header import is_pointer, is_safetensors
from weightsmith.formats.safetensors.index import is_checkpoint
from weightsmith.formats.safetensors.reader import SafetensorsReader
from weightsmith.formats.safetensors.writer import TYPES, SafetensorsWriter, create
from weightsmith.quant.blocks import BLOCKS, row_nbytes
from weightsmith.types import Plan, Reader, Recipe, TensorInfo

__all__ = ["NAME", "TYPES", "SafetensorsReader", "SafetensorsWriter", "create", "open_reader", "plan", "sniff"]

NAME = "safetensors"
_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


def sniff(path: Path) -> bool:
    """True for a folder of config.json and safetensors weights, and for a file that begins like such weights."""
    if path.is_dir():
        return is_checkpoint(path)
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return False
    if is_pointer(start):
        return path.suffix == ".safetensors"
    return is_safetensors(start)


def open_reader(path: Path) -> SafetensorsReader:
    """Open a folder or a single file; reads and checks headers only. See `SafetensorsReader` for what it raises."""
    return SafetensorsReader(Path(os.path.abspath(path)))


def plan(reader: Reader, recipe: Recipe) -> Plan:
    """Say in which type every canonical tensor of `reader` is written.

    No type: float tensors keep theirs and block-quantized ones become F16 (Grok-1's original ones BF16, as which xAI's
    code multiplies them out). A given type is for all tensors, except that the F32 vectors of a GGUF stay F32: that is
    how GGUF holds norms and biases, it costs nothing, and so a way there and back leaves every byte as it was.
    Raises UnsupportedError for a type that is no weight by itself, and UsageError for patterns, which only a
    block-quantized container has a use for.
    """
    if recipe.type is not None and recipe.type not in TYPES:
        raise UnsupportedError(f"safetensors is not written as {recipe.type}", hint=f"Known types: {', '.join(TYPES)}.")
    if recipe.overrides:
        raise UsageError("safetensors has one type for all tensors", hint="Leave --tensor-type out.")
    planned = []
    multiplied = "BF16" if reader.container == "grok1" else "F16"
    for info in reader.infos().values():
        target = _target(info, recipe.type, multiplied, keep_vectors=reader.container == "gguf")
        nbytes = info.n_rows * row_nbytes(target, info.row_len)
        planned.append(TensorInfo(info.name, info.shape, target, nbytes))
    return Plan(planned)


def _target(info: TensorInfo, codec: str | None, multiplied: str, *, keep_vectors: bool) -> str:
    if info.codec in _INTEGERS:
        raise UnsupportedError(f"holds {info.codec} integers, not weights", path=info.path, tensor=info.name)
    if codec is not None and not (keep_vectors and len(info.shape) == 1 and info.codec == "F32"):
        return codec
    if info.codec in TYPES:
        return info.codec
    if BLOCKS[info.codec].weights > 1:
        return multiplied
    raise UnsupportedError(
        f"{info.codec} cannot be kept as it is; written are {', '.join(TYPES)}",
        path=info.path,
        tensor=info.name,
        hint="Ask for one of them by name, such as --to safetensors:BF16.",
    )

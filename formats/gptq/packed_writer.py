"""Writing a safetensors folder of packed linears. It appears by rename; every byte's place is known beforehand.

Tensors that are not packed keep the type they are planned with. config.json says how the rest is packed, and
quantize_config.json repeats it for older loaders.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, OutputExistsError
from weightsmith.formats import archs
from weightsmith.formats.gptq.columns import Layout
from weightsmith.formats.packed.reader import PackedReader
from weightsmith.formats.packed.settings import KEY, OLD_NAME
from weightsmith.formats.safetensors.config import CONFIG_NAME, dump
from weightsmith.formats.safetensors.index import is_checkpoint
from weightsmith.formats.safetensors.reader import SafetensorsReader
from weightsmith.formats.safetensors.writer import SPLIT_BYTES, SafetensorsWriter
from weightsmith.quant.blocks import row_nbytes
from weightsmith.safename import check_name
from weightsmith.types import NOTES, ModelConfig, Packed, Reader, TensorInfo, Vocab


class PackedWriter:
    """A folder in the making: `put` packed linears, `write` rows of the others, then `close`; or `abort`."""

    def __init__(self, files: SafetensorsWriter, stored: Mapping[str, TensorInfo], linears: Collection[str]) -> None:
        self._files, self._stored, self._linears = files, stored, linears

    @property
    def plain(self) -> list[TensorInfo]:
        """Tensors that are not packed, in the order of writing."""
        packed = {name.removesuffix(".weight") for name in self._linears}
        found = ((name, *name.rpartition(".")[::2]) for name in self._stored)
        return [self._stored[name] for name, stem, kind in found if stem not in packed or kind == "bias"]

    def put(self, name: str, parts: Mapping[str, NDArray[Any]]) -> None:
        """Store the parts (by suffix) of packed linear `name`, its canonical weight name."""
        stem = name.removesuffix(".weight")
        for suffix, value in parts.items():
            info = self._stored[f"{stem}.{suffix}"]
            if value.shape != info.shape:
                raise IntegrityError(f"shape {list(value.shape)}, planned {list(info.shape)}", tensor=info.name)
            self._files.write(info, 0, np.ascontiguousarray(value).view(np.uint8).reshape(info.n_rows, info.row_bytes))

    def write(self, info: TensorInfo, start: int, rows: Packed) -> None:
        """Store rows of a tensor that is not packed, in the codec that was planned."""
        self._files.write(info, start, rows)

    def close(self) -> Path:
        """Check that everything arrived, rename into place, return the final path."""
        return self._files.close()

    def abort(self) -> None:
        """Remove what was written."""
        self._files.abort()


@dataclass(frozen=True, slots=True)
class Packing:
    """How a checkpoint is packed: the layout, what config.json says of it, and which linears it is for.

    linears: canonical weight names. codec: of everything else.
    """

    layout: Layout
    quantization: Mapping[str, Any]
    linears: Collection[str]
    codec: str = "F16"


def planned(config: ModelConfig, packing: Packing) -> dict[str, TensorInfo]:
    """Every stored tensor by name, in the order of writing; UnsupportedError for a linear that cannot be packed."""
    stored: dict[str, TensorInfo] = {}
    for name, shape in archs.by_name(config.family).tensors(config).items():
        stem = name.removesuffix(".weight")
        if name in packing.linears:
            parts = packing.layout.parts((shape[0], shape[1]))
            wanted = {f"{stem}.{suffix}": (part.shape, part.codecs[0]) for suffix, part in parts.items()}
        else:
            wanted = {name: (shape, packing.codec)}
        for key, (dims, kind) in wanted.items():
            rows = int(np.prod(dims[:-1], dtype=np.int64))
            stored[key] = TensorInfo(key, dims, kind, rows * row_nbytes(kind, dims[-1]))
    return stored


def create(
    path: Path,
    config: ModelConfig,
    packing: Packing,
    *,
    vocab: Vocab | None = None,
    source: Reader | None = None,
    overwrite: bool = False,
    split_bytes: int | None = None,
    notes: Mapping[str, str] | None = None,
) -> PackedWriter:
    """Begin to write folder `path`.

    Tokenizer files are those of `source` if it is a folder of its kind, else made from `vocab`; notes go into every
    shard's `__metadata__`. Raises OutputExistsError, ResourceError (disk), UnsupportedError (a linear that cannot be
    packed).
    """
    if path.is_dir() and any(path.iterdir()) and not is_checkpoint(path):
        raise OutputExistsError("the folder is no checkpoint and is not replaced", path=path, hint="Remove it first.")
    stored, codec = planned(config, packing), packing.codec
    extras = _companions(config, vocab, source)
    raw = json.loads(dump(config, dtype=codec))
    extras[CONFIG_NAME] = _json({**raw, KEY: dict(packing.quantization)})
    extras[OLD_NAME] = _json(packing.quantization)
    files = SafetensorsWriter(
        path,
        list(stored.values()),
        extras,
        overwrite=overwrite,
        split_bytes=split_bytes or SPLIT_BYTES,
        notes={NOTES + name: value for name, value in (notes or {}).items()},
    )
    return PackedWriter(files, stored, packing.linears)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(value), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _companions(config: ModelConfig, vocab: Vocab | None, source: Reader | None) -> dict[str, bytes | Path]:
    if isinstance(source, SafetensorsReader | PackedReader):
        return {file.name: file for file in source.companions()}
    if vocab is None:
        return {}
    from weightsmith.formats.tokenizer import to_files  # noqa: PLC0415  (loads the tokenizer libraries)

    return {str(check_name(name)): content for name, content in to_files(vocab, config).items()}

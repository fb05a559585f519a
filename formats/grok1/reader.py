"""Grok-1's original checkpoint behind the `Reader` protocol.

int8 codes with a scale for each column are GGUF's Q8_0, whose scale is the same for all blocks of a row: if the scales
are exact in half precision and groups are whole blocks, a matrix is handed out as Q8_0, code for code. Otherwise it is
BF16, the product rounded as xAI's own code computes it. Which of the two holds is found by reading the scales, 0.3 % of
the checkpoint, when tensors are first asked for.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, NotFoundError, WeightsmithError
from weightsmith.formats import archs
from weightsmith.formats.grok1 import layout
from weightsmith.formats.grok1.checkpoint import File, configure, read_files
from weightsmith.formats.grok1.columns import Matrix, Stripes, opened, read_at
from weightsmith.quant.blocks import BLOCKS, row_nbytes
from weightsmith.safename import resolve_inside
from weightsmith.types import ModelConfig, Packed, TensorInfo, Vocab

TOKENIZER = "tokenizer.model"
_LICENCE = re.compile(r"(LICENSE|LICENCE|NOTICE)(\.txt|\.md)?")
_BLOCK = BLOCKS["Q8_0"].weights


class Grok1Reader:
    """A folder of tensorNNNNN_000 files; opening reads everything but the arrays (see `checkpoint.read_files`).

    above: the folder around it that was named instead.
    """

    container = "grok1"

    def __init__(self, folder: Path, *, above: Path | None = None) -> None:
        self.path, self._above = folder, above
        self._files = read_files(folder)
        self._stripes = Stripes()
        self._config: ModelConfig | None = None
        self._infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[int, int]] = {}

    def files(self) -> list[Path]:
        """Tokenizer and licence of the folder that was named and of the weights' own, and the weights."""
        found = []
        for folder in (self._above, self.path) if self._above else (self.path,):
            names = sorted(name for name in os.listdir(folder) if name == TOKENIZER or _LICENCE.fullmatch(name))
            found += [resolve_inside(folder, name) for name in names]
        return [*found, *(file.path for file in self._files)]

    def metadata(self) -> Mapping[str, Any]:
        """Nothing: the checkpoint has no configuration."""
        return {}

    def native_infos(self) -> Mapping[str, TensorInfo]:
        """Arrays as stored, by file: tensor00002_000.weight and .scales of a quantized one."""
        return {array.name: array for file in self._files for array in file.arrays.values()}

    @property
    def config(self) -> ModelConfig:
        """The model; see `checkpoint.configure` for what it raises."""
        if self._config is None:
            self._config = configure(self._files, self.path)
        return self._config

    def infos(self) -> Mapping[str, TensorInfo]:
        """Canonical tensors in the family's order; IntegrityError for one of another shape. Reads all scales."""
        if not self._infos:
            config = self.config
            self._places = layout.places(config.n_layers, config.n_experts)
            codecs = [self._codec(file) for file in self._files]
            self._infos = {
                name: self._info(name, shape, codecs[self._places[name][0]])
                for name, shape in archs.by_name(config.family).tensors(config).items()
            }
        return self._infos

    def _codec(self, file: File) -> str:
        """The layout that holds what `file` stores."""
        if "" in file.arrays:
            return "F32"
        weight, scales = file.arrays["weight"], file.arrays["scales"]
        if weight.shape[-2] // scales.shape[-2] % _BLOCK:
            return "BF16"
        halves, exact = _halves(self._bytes(file, scales.offset, scales.nbytes))
        return "Q8_0" if exact and not np.isinf(halves).any() else "BF16"

    def _info(self, name: str, shape: tuple[int, ...], codec: str) -> TensorInfo:
        number, place = self._places[name]
        file = self._files[number]
        array = file.arrays.get("weight") or file.arrays[""]
        stored = array.shape[1:] if place >= 0 else array.shape
        stored = stored if len(stored) < 2 or number == 0 else stored[::-1]
        if stored != shape:
            text = f"shape {list(array.shape)}, the other tensors call for {list(shape)}, turned"
            raise IntegrityError(text, path=file.path, tensor=name)
        nbytes = math.prod(shape[:-1]) * row_nbytes(codec, shape[-1])
        return TensorInfo(name, shape, codec, nbytes, file.path, array.offset + max(0, place) * math.prod(shape))

    def rows(self, name: str, start: int, stop: int) -> Packed:
        """Rows [start, stop): uint8 [stop - start, row_bytes], fresh; any thread. For matrices a few columns cost a
        whole stripe, which is kept for the next ones.
        """
        info = self._one(name)
        if not 0 <= start <= stop <= info.n_rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {info.n_rows}")
        number, place = self._places[name]
        file = self._files[number]
        try:
            if "weight" in file.arrays:
                return self._quantized(file, place, info, start, stop)
            if len(info.shape) == 2 and number:  # the router: small, and [in, out]
                whole = self._bytes(file, info.offset, info.nbytes).view("<f4").reshape(info.shape[::-1])
                return np.ascontiguousarray(whole.T[start:stop]).view(np.uint8)
            size = info.row_bytes
            return self._bytes(file, info.offset + start * size, (stop - start) * size).reshape(-1, size)
        except WeightsmithError as error:
            error.tensor = error.tensor or name
            raise

    def _quantized(self, file: File, place: int, info: TensorInfo, start: int, stop: int) -> Packed:
        inputs, outputs = info.shape[1], info.shape[0]
        codes = self._stripes.columns(Matrix(file.path, file.size, info.offset, inputs, outputs), start, stop)
        scales = self._scales(file, max(0, place), start, stop)
        if info.codec == "Q8_0":
            halves, _ = _halves(scales.T)
            blocks = np.empty((stop - start, inputs // _BLOCK, 2 + _BLOCK), np.uint8)
            per_group = inputs // _BLOCK // halves.shape[1]
            blocks[:, :, :2] = np.repeat(halves, per_group, axis=1)[:, :, None].view(np.uint8)
            blocks[:, :, 2:] = codes.reshape(blocks.shape[0], inputs // _BLOCK, _BLOCK)
            return blocks.reshape(stop - start, info.row_bytes)
        from weightsmith.quant import codecs  # noqa: PLC0415  (numba is imported by what computes)

        wide = np.repeat(_floats(scales.T), inputs // scales.shape[0], axis=1)
        return codecs.encode("BF16", codes.view(np.int8).astype(np.float32) * wide)

    def _scales(self, file: File, place: int, start: int, stop: int) -> NDArray[np.uint16]:
        """Scales of columns [start, stop) as bits of BF16 [groups, stop - start]."""
        info = file.arrays["scales"]
        groups, width = info.shape[-2:]
        found = np.empty((groups, stop - start), "<u2")
        handle = opened(file.path, file.size)
        try:
            for group in range(groups):
                at = info.offset + 2 * ((place * groups + group) * width + start)
                read_at(handle, found[group].data.cast("B"), at, path=file.path)
        finally:
            os.close(handle)
        return found

    def _bytes(self, file: File, at: int, nbytes: int) -> Packed:
        data = np.empty(nbytes, np.uint8)
        handle = opened(file.path, file.size)
        try:
            read_at(handle, data.data, at, path=file.path)
        finally:
            os.close(handle)
        return data

    def row_unit(self, name: str) -> int:
        """Any number of rows: a stripe is kept for the next ones."""
        self._one(name)
        return 1

    def vocab(self, pre: str | None = None) -> Vocab | None:
        """tokenizer.model of the folder, or of one of the two above it: xAI keeps it beside checkpoints/ckpt-0."""
        from weightsmith.formats.tokenizer import from_folder  # noqa: PLC0415  (loads the tokenizer libraries)

        here = self.path.absolute()
        for folder in (here, here.parent, here.parent.parent):
            if (folder / TOKENIZER).is_file():
                vocab = from_folder(folder, self.config, pre=pre)
                if vocab is not None:
                    vocab.add_bos = False  # as xAI's own code encodes a prompt
                return vocab
        return None

    def close(self) -> None:
        """Forget what was kept; no file stays open between reads."""
        self._stripes.clear()

    def _one(self, name: str) -> TensorInfo:
        info = self.infos().get(name)
        if info is None:
            raise NotFoundError("no such tensor", path=self.path, tensor=name)
        return info


def _floats(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """BF16 bits as float32."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def _halves(scales: NDArray[Any]) -> tuple[NDArray[np.float16], bool]:
    """BF16 (bits, or their bytes) as half precision, and whether every one is exact in it."""
    wide = _floats(scales.view("<u2") if scales.dtype == np.uint8 else np.ascontiguousarray(scales))
    with np.errstate(over="ignore", invalid="ignore"):
        halves = wide.astype("<f2")
    return halves, bool((halves.astype(np.float32) == wide).all())

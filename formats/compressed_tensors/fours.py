"""nvfp4- and mxfp4-pack-quantized: 4-bit floats (E2M1), two a byte, the first in the low nibble.

    X.weight_packed        U8 [out, in / 2]
    X.weight_scale         NVFP4: F8_E4M3 [out, in / 16];  MXFP4: U8 [out, in / 32], 2^(s - 127)
    X.weight_global_scale  F32 [1], NVFP4 only

    weight = level * (scale / global scale)      levels 0 1/2 1 3/2 2 3 4 6, then minus

Ref: compressed-tensors compressors/nvfp4, mxfp4, version 0.20; OCP Microscaling Formats (MX) specification 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from weightsmith.errors import IntegrityError
from weightsmith.formats.packed.parts import Part, Source
from weightsmith.formats.packed.scaled import exponents
from weightsmith.quant.units import Units
from weightsmith.types import Rows, TensorInfo

PACKED, SCALE, WHOLE = "weight_packed", "weight_scale", "weight_global_scale"
_SIZES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LEVELS = np.concatenate([_SIZES, -_SIZES])


@dataclass(frozen=True, slots=True)
class Fours:
    """Such a linear (see `formats.packed.parts.Linear`). group: columns per scale."""

    shape: tuple[int, int]
    parts: Mapping[str, Part]
    group: int
    codec: str = "F32"
    blocks: tuple[str, ...] = ()

    def rows(self, source: Source, start: int, stop: int) -> Rows:
        """Weights float32 [stop - start, in]."""
        found = self.units(source, start, stop)
        weights: Rows = found.numbers * found.scales
        return weights

    def units(self, source: Source, start: int, stop: int) -> Units:
        """Levels of rows [start, stop) and their scales."""
        pairs = source.rows(PACKED, start, stop)
        values = np.empty((*pairs.shape, 2), np.float32)
        values[:, :, 0] = LEVELS[pairs & np.uint8(15)]
        values[:, :, 1] = LEVELS[pairs >> np.uint8(4)]
        scales = source.rows(SCALE, start, stop)
        if scales.dtype == np.uint8:
            scales = exponents(scales)
        else:
            whole = np.float32(source.whole(WHOLE).reshape(-1)[0])
            if not np.isfinite(whole) or whole == 0:
                raise IntegrityError(f"weight_global_scale is {whole:g}")
            scales = scales / whole
        spread: Rows = scales.astype(np.float32).repeat(self.group, axis=1)
        return Units(values.reshape(stop - start, self.shape[1]), spread, table=np.unique(LEVELS))

    def as_blocks(self, codec: str, source: Source, start: int, stop: int) -> None:
        """None: no layout that is written has these levels."""
        del codec, source, start, stop


def linear(shape: tuple[int, int], stem: str, stored: Mapping[str, TensorInfo]) -> Fours:
    """The linear `stem` (out, in); IntegrityError for scales that are neither kind's, or do not fit."""
    out, columns = shape
    scale = stored.get(f"{stem}.{SCALE}")
    if scale is None:
        raise IntegrityError("missing", path=stored[f"{stem}.{PACKED}"].path, tensor=f"{stem}.{SCALE}")
    group = {"U8": 32, "F8_E4M3": 16}.get(scale.codec)
    if group is None or columns % group:
        raise IntegrityError(
            f"scales stored as {scale.codec} do not fit 4-bit floats in rows of {columns}: expected U8 for 32 columns"
            " (MXFP4) or F8_E4M3 for 16 (NVFP4)",
            path=scale.path,
            tensor=scale.name,
        )
    parts = {PACKED: Part((out, columns // 2), ("U8",)), SCALE: Part((out, columns // group), (scale.codec,))}
    if group == 16:
        parts[WHOLE] = Part((1,), ("F32",))
    return Fours(shape, parts, group)

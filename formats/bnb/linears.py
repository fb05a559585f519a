"""One linear of a bitsandbytes checkpoint, [out, in] in the model, and the weights it stands for.

4 bits, n = out * in weights in their flat order, blocks of B (64 as a rule) that may go on into the next row:

    X.weight                              U8 [n / 2, 1]      two nibbles a byte, the first weight in the high one
    X.weight.absmax                       F32 [n / B], or U8 if doubled
    X.weight.quant_map                    F32 [16]           the levels of NF4 or FP4
    X.weight.nested_absmax                F32 [n / B / 256]  and nested_quant_map F32 [256], if doubled
    X.weight.quant_state.bitsandbytes__nf4  U8               see `formats.bnb.state`

    weight = level[nibble] * absmax[block], in float32, then rounded to the state's dtype

The nibbles' bytes may also be stored as a wider type (bnb_4bit_quant_storage). LLM.int8:

    X.weight I8 [out, in]   X.SCB F32 [out]   X.weight_format U8 [], 0 for rows
    weight = code * SCB[row] * (1 / 127), in float32

Ref: bitsandbytes functional.py (QuantState, dequantize_4bit), backends/default/ops.py, nn/modules.py (Linear8bitLt).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.bnb.state import KEY, MAX_SIZE, State, parse
from weightsmith.formats.packed.parts import Part, Source
from weightsmith.quant import doubled, float4
from weightsmith.quant.blocks import BLOCKS
from weightsmith.quant.steps import Lattice, as_blocks, candidates
from weightsmith.quant.units import Units
from weightsmith.types import Packed, Rows, TensorInfo

_STORAGE = ("U8", "I8", "F16", "BF16", "F32")
_INVERSE = np.float32(7.874015718698502e-3)  # 1 / 127, as bitsandbytes has it


@dataclass(frozen=True, slots=True)
class FourBit:
    """A 4-bit linear (see `formats.packed.parts.Linear`)."""

    state: State
    parts: Mapping[str, Part]

    @property
    def codec(self) -> str:
        """What bitsandbytes dequantizes to."""
        return self.state.codec

    @property
    def blocks(self) -> tuple[str, ...]:
        """Its own kind, where blocks end with rows and absmax is stored as it is."""
        whole = self.state.blocksize == float4.BLOCK and self.state.shape[1] % float4.BLOCK == 0
        return (self.state.kind,) if whole and not self.state.nested else ()

    def as_blocks(self, codec: str, source: Source, start: int, stop: int) -> tuple[Packed, float]:
        """Nibbles and absmax joined, nothing changed."""
        columns = self.state.shape[1]
        first, last = start * columns // float4.BLOCK, stop * columns // float4.BLOCK
        joined = np.empty((last - first, BLOCKS[codec].nbytes), np.uint8)
        joined[:, :4] = self._absmax(source, first, last).astype("<f4").view(np.uint8).reshape(-1, 4)
        joined[:, 4:] = source.raw("weight", start * columns // 2, stop * columns // 2).reshape(last - first, -1)
        return joined.reshape(stop - start, -1), 0.0

    def rows(self, source: Source, start: int, stop: int) -> Rows:
        """Weights float32 [stop - start, in], before they are rounded to the state's dtype."""
        found = self.units(source, start, stop)
        weights: Rows = found.numbers * found.scales
        return weights

    def units(self, source: Source, start: int, stop: int) -> Units:
        """Levels of rows [start, stop) and the absmax of each."""
        columns, size = self.state.shape[1], self.state.blocksize
        begin, end = start * columns, stop * columns
        first, last = begin // size, -(-end // size)
        pairs = source.raw("weight", begin // 2, -(-end // 2))
        nibbles = np.empty((len(pairs), 2), np.uint8)
        np.right_shift(pairs, 4, out=nibbles[:, 0])
        np.bitwise_and(pairs, 15, out=nibbles[:, 1])
        odd = begin % 2
        values: Rows = self._levels(source)[nibbles.reshape(-1)[odd : odd + end - begin]]
        absmax = self._absmax(source, first, last).repeat(size)[begin - first * size : end - first * size]
        table = np.unique(float4.LEVELS[self.state.kind])
        slack = (
            np.abs(values) * self._doubling(source, first, last).repeat(size)[begin - first * size : end - first * size]
        )
        shape = stop - start, columns
        return Units(values.reshape(shape), absmax.reshape(shape), table=table, slack=slack.reshape(shape))

    def _absmax(self, source: Source, first: int, last: int) -> NDArray[np.float32]:
        stored = source.run("weight.absmax", first, last)
        if not self.state.nested:
            absmax: NDArray[np.float32] = stored.astype(np.float32)
            return absmax
        nested = self._nested(source, first, last)
        return doubled.undouble(stored, source.whole("weight.nested_quant_map"), nested, self.state.offset)

    def _nested(self, source: Source, first: int, last: int) -> NDArray[np.float32]:
        inner = self.state.nested
        low, high = first // inner, -(-last // inner)
        found: NDArray[np.float32] = source.run("weight.nested_absmax", low, high).astype(np.float32).repeat(inner)
        return found[first - low * inner : last - low * inner]

    def _doubling(self, source: Source, first: int, last: int) -> NDArray[np.float32]:
        """What rounding absmax to 8 bits may have moved each of them by: half the widest step of the 256 levels."""
        if not self.state.nested:
            return np.zeros(last - first, np.float32)
        widest = np.float32(np.diff(doubled.levels()).max() / 2)
        return self._nested(source, first, last) * widest

    def _levels(self, source: Source) -> NDArray[np.float32]:
        """The known levels; bitsandbytes goes by the type's name, so a map of others would be read as these."""
        known, found = float4.LEVELS[self.state.kind], source.whole("weight.quant_map")
        if not np.allclose(found, known, rtol=0, atol=1e-6):
            raise IntegrityError(f"quant_map does not hold {self.state.kind}'s levels")
        return known


@dataclass(frozen=True, slots=True)
class EightBit:
    """An LLM.int8 linear (see `formats.packed.parts.Linear`)."""

    shape: tuple[int, int]
    parts: Mapping[str, Part]
    codec: str = "F32"

    @property
    def blocks(self) -> tuple[str, ...]:
        """Q8_0, with the scale rounded to a half."""
        return candidates(8, self.shape[1], self.shape[1])

    def rows(self, source: Source, start: int, stop: int) -> Rows:
        """Weights float32 [stop - start, in]."""
        self._check_format(source)
        values: Rows = source.rows("weight", start, stop).astype(np.float32)
        values *= source.run("SCB", start, stop)[:, None]
        values *= _INVERSE
        return values

    def as_blocks(self, codec: str, source: Source, start: int, stop: int) -> tuple[Packed, float] | None:
        """The codes as blocks, without rounding a weight again."""
        return as_blocks(codec, self.lattice(source, start, stop))

    def units(self, source: Source, start: int, stop: int) -> Units:
        """Codes of rows [start, stop) and the scale of each row."""
        return Units.of(self.lattice(source, start, stop), 8)

    def lattice(self, source: Source, start: int, stop: int) -> Lattice:
        """Codes of rows [start, stop), 128 in the middle."""
        self._check_format(source)
        codes = source.rows("weight", start, stop).view(np.uint8) ^ np.uint8(128)
        scales = source.run("SCB", start, stop)[:, None] * _INVERSE
        return Lattice(codes, scales, np.full(scales.shape, 128, np.int16), self.shape[1])

    def _check_format(self, source: Source) -> None:
        if "weight_format" in source and (found := int(source.whole("weight_format").reshape(-1)[0])):
            raise UnsupportedError(
                f"8-bit weights in the order of a GPU's tiles (weight_format {found}) are not known, only rows",
                hint="Save the model again with a current bitsandbytes.",
            )


@dataclass(frozen=True, slots=True)
class Bitsandbytes:
    """The scheme of a checkpoint: every linear says itself how it is packed."""

    settings: Mapping[str, Any]

    def linear(
        self, name: str, shape: tuple[int, int], stored: Mapping[str, TensorInfo], source: Source
    ) -> FourBit | EightBit | None:
        """The linear that stands for weight `name`, None for a plain one."""
        stem, weight = name.removesuffix(".weight"), stored.get(name)
        for kind in float4.LEVELS:
            state = stored.get(f"{stem}.{KEY}{kind.lower()}")
            if state is not None:
                return _four_bit(kind, shape, stem, stored, source)
        if weight is not None and weight.codec in ("I8", "U8"):
            if weight.codec == "U8" or f"{stem}.SCB" not in stored:
                what = "a quant_state" if weight.codec == "U8" else "SCB"
                raise IntegrityError(f"stored as {weight.codec} without {what}", hint="Save the model again.")
            parts = {"weight": Part(shape, ("I8",)), "SCB": Part(shape[:1], ("F32",))}
            return EightBit(shape, parts | {"weight_format": Part((), ("U8",), optional=True)})
        return None

    def is_dropped(self, name: str) -> bool:
        """Every part belongs to a weight."""
        del name
        return False


def _four_bit(
    kind: str, shape: tuple[int, int], stem: str, stored: Mapping[str, TensorInfo], source: Source
) -> FourBit:
    key = f"{KEY}{kind.lower()}"
    info = stored[f"{stem}.{key}"]
    if info.codec != "U8" or len(info.shape) != 1 or info.nbytes > MAX_SIZE or info.path is None:
        raise IntegrityError(f"{info.codec} {list(info.shape)} is no quant_state", path=info.path, tensor=info.name)
    nested = f"{stem}.weight.nested_absmax" in stored
    state = parse(source.whole(info.name).tobytes(), kind, shape, nested=nested, path=info.path)
    nbytes = -(-shape[0] * shape[1] // 2)
    weight = stored.get(f"{stem}.weight")
    width = BLOCKS[weight.codec].nbytes if weight is not None else 1
    parts = {
        "weight": Part((-(-nbytes // width), 1), _STORAGE),
        "weight.absmax": Part((state.n_blocks,), ("U8",) if nested else ("F32", "F16", "BF16")),
        "weight.quant_map": Part((16,), ("F32",)),
        key: Part(info.shape, ("U8",)),
    }
    if nested:
        parts["weight.nested_absmax"] = Part((-(-state.n_blocks // state.nested),), ("F32",))
        parts["weight.nested_quant_map"] = Part((256,), ("F32",))
    return FourBit(state, parts)

"""pack-quantized: integers of 1 to 8 bits in 32-bit words, along the columns of a row, low bits first, without gaps.

    X.weight_packed      I32 [out, ceil(in * bits / 32)]      code + 2^(bits - 1), so never negative
    X.weight_scale       [out, groups]                        groups: in / group_size, 1 for whole rows; or [1]
    X.weight_zero_point  I32 [ceil(out * bits / 32), groups]  packed along out, shifted alike; absent if symmetric
    X.weight_shape       I64 [2]
    X.weight_g_idx       I32 [in]                             group of every column, where they were reordered

    weight = (code - zero) * scale

The width is read off weight_packed, if the settings name it. Older versions stored zero points as plain I8, and left
gaps where a width does not divide 32; the latter are refused.

Ref: compressed-tensors compressors/pack_quantized (base.py, helpers.py), version 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.gptq import words
from weightsmith.formats.packed.parts import FLOATS, Part, Source
from weightsmith.formats.packed.scaled import block_of
from weightsmith.quant.steps import Lattice, as_blocks, candidates
from weightsmith.quant.units import Units
from weightsmith.types import Packed, Rows, TensorInfo

PACKED, SCALE, ZERO, SHAPE, INDEX = (f"weight_{part}" for part in ("packed", "scale", "zero_point", "shape", "g_idx"))


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """Such a linear (see `formats.packed.parts.Linear`). group: columns per scale; per_row: or one scale in all."""

    shape: tuple[int, int]
    parts: Mapping[str, Part]
    bits: int
    group: int
    per_row: bool
    codec: str = "F32"

    @property
    def blocks(self) -> tuple[str, ...]:
        """Block layouts that may take the codes over."""
        return candidates(self.bits, self.group, self.shape[1])

    def rows(self, source: Source, start: int, stop: int) -> Rows:
        """Weights float32 [stop - start, in]."""
        found = self._codes(source, start, stop)
        index = self._index(source)
        if index is None:
            return found.weights()
        steps = found.codes.astype(np.float32)
        steps -= found.zeros.astype(np.float32)[:, index]
        steps *= found.scales[:, index]
        return steps

    def as_blocks(self, codec: str, source: Source, start: int, stop: int) -> tuple[Packed, float] | None:
        """The codes as blocks, without rounding a weight again."""
        return as_blocks(codec, self.lattice(source, start, stop))

    def lattice(self, source: Source, start: int, stop: int) -> Lattice | None:
        """Codes of rows [start, stop), None for columns out of order."""
        return self._codes(source, start, stop) if self._index(source) is None else None

    def units(self, source: Source, start: int, stop: int) -> Units:
        """Steps of rows [start, stop) before they are scaled."""
        found, index = self._codes(source, start, stop), self._index(source)
        if index is not None:
            found = Lattice(found.codes, found.scales[:, index], found.zeros[:, index], 1)
        return Units.of(found, self.bits)

    def _codes(self, source: Source, start: int, stop: int) -> Lattice:
        packed = source.rows(PACKED, start, stop).view(np.uint32)
        codes = np.ascontiguousarray(_unpacked(packed.T, self.bits, self.shape[1]).T)
        groups = -(-self.shape[1] // self.group)
        if self.per_row:
            scales = source.rows(SCALE, start, stop).astype(np.float32).reshape(stop - start, groups)
        else:
            scales = np.full((stop - start, 1), source.whole(SCALE).reshape(-1)[0], np.float32)
        zeros = np.full(scales.shape, 1 << (self.bits - 1), np.int16)
        if ZERO in source:
            zeros[:] = self._zeros(source, start, stop)
        return Lattice(codes, scales, zeros, self.group)

    def _zeros(self, source: Source, start: int, stop: int) -> NDArray[np.int16]:
        stored = source.whole(ZERO)
        if stored.dtype == np.int8:
            plain = stored.reshape(-1, stored.shape[-1] if stored.ndim == 2 else 1)
            plain = plain[start:stop] if len(plain) > 1 else plain
            return plain.astype(np.int16) + np.int16(1 << (self.bits - 1))
        return _unpacked(stored.view(np.uint32), self.bits, self.shape[0])[start:stop].astype(np.int16)

    def _index(self, source: Source) -> NDArray[np.int64] | None:
        """Group of every column, None where they lie in order."""
        if INDEX not in source:
            return None
        index = source.whole(INDEX).astype(np.int64)
        groups = -(-self.shape[1] // self.group)
        if (index == -1).all() or np.array_equal(index, np.arange(self.shape[1]) // self.group):
            return None  # -1: never filled in
        if index.min() < 0 or index.max() >= groups:
            raise IntegrityError(f"weight_g_idx goes from {index.min()} to {index.max()}, there are {groups} groups")
        return index


def _unpacked(packed: NDArray[np.uint32], bits: int, count: int) -> NDArray[np.uint8]:
    """Codes uint8 [count, k] of words [ceil(count * bits / 32), k]."""
    period = words.period(bits)[1]
    missing = -len(packed) % period
    if missing:
        packed = np.concatenate([packed, np.zeros((missing, packed.shape[1]), np.uint32)])
    return words.unpack(np.ascontiguousarray(packed), bits)[:count]


def linear(
    shape: tuple[int, int], stem: str, stored: Mapping[str, TensorInfo], source: Source, widths: tuple[int, ...]
) -> PackedIntegers:
    """The linear `stem` (out, in). widths: what the settings name.

    Raises UnsupportedError for a width they do not name, IntegrityError for parts that do not fit.
    """
    out, columns = shape
    packed, scale = stored[f"{stem}.{PACKED}"], stored.get(f"{stem}.{SCALE}")
    bits = next((n for n in widths if packed.shape == (out, -(-columns * n // 32))), None)
    if bits is None:
        named = " or ".join(str(n) for n in widths) or "no"
        raise UnsupportedError(
            f"words of shape {list(packed.shape)} do not hold {list(shape)} numbers of {named} bits without gaps",
            path=packed.path,
            tensor=packed.name,
            hint="Older versions left gaps in words of 3, 5, 6 or 7 bits: save it again with a current one.",
        )
    if scale is None:
        raise IntegrityError("missing", path=packed.path, tensor=f"{stem}.{SCALE}")
    block = block_of(shape, scale, None)
    groups = -(-columns // block[1])
    zero = stored.get(f"{stem}.{ZERO}")
    plain = zero is not None and zero.codec == "I8"
    zero_shape = scale.shape if plain else (-(-out * bits // 32), groups)
    parts = {
        PACKED: Part(packed.shape, ("I32",)),
        SCALE: Part(scale.shape, FLOATS),
        ZERO: Part(zero_shape, ("I8",) if plain else ("I32",), optional=True),
        SHAPE: Part((2,), ("I64", "I32"), optional=True),
        INDEX: Part((columns,), ("I32", "I64"), optional=True),
    }
    told = stored.get(f"{stem}.{SHAPE}")
    if told is not None and told.shape == (2,) and told.codec in ("I64", "I32"):
        found = source.whole(told.name).tolist()
        if found != [out, columns]:
            raise IntegrityError(
                f"says {found}, the model calls for {[out, columns]}", path=told.path, tensor=told.name
            )
    return PackedIntegers(shape, parts, bits, block[1], per_row=block[0] == 1)

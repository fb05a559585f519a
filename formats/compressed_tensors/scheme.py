"""Which of the ways of packing a linear is in, by what is stored under its name.

| stored | |
|---|---|
| X.weight_packed I32 | integers in words (`integers`) |
| X.weight_packed U8 | two 4-bit floats a byte (`fours`) |
| X.weight I8 or F8, X.weight_scale | one by one (`formats.packed.scaled`) |
| X.weight F16, BF16, F32 | plain |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.errors import IntegrityError
from weightsmith.formats.compressed_tensors import fours, integers
from weightsmith.formats.compressed_tensors.settings import Weights
from weightsmith.formats.packed.parts import FLOATS, Linear, Part, Source
from weightsmith.formats.packed.scaled import FLOAT8, Scaled, block_of, float_parts
from weightsmith.types import TensorInfo

SCALE, ZERO = "weight_scale", "weight_zero_point"
_ACTIVATIONS = ("input", "output", "q", "k", "v", "kv_cache")
DROPPED = tuple(f".{what}_{part}" for what in _ACTIVATIONS for part in ("scale", "zero_point", "global_scale", "g_idx"))


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """The scheme of a checkpoint. ways: of packing that its settings name."""

    ways: tuple[Weights, ...]

    def linear(
        self, name: str, shape: tuple[int, int], stored: Mapping[str, TensorInfo], source: Source
    ) -> Linear | None:
        """The linear that stands for weight `name`, None for a plain one."""
        stem = name.removesuffix(".weight")
        packed, weight = stored.get(f"{stem}.weight_packed"), stored.get(name)
        if packed is not None and packed.codec == "U8":
            return fours.linear(shape, stem, stored)
        if packed is not None:
            return integers.linear(
                shape, stem, stored, source, tuple(way.bits for way in self.ways if not way.is_float)
            )
        if weight is None or weight.codec not in ("I8", *FLOAT8):
            return None
        scale = stored.get(f"{stem}.{SCALE}")
        if scale is None:
            raise IntegrityError(f"stored as {weight.codec} without {SCALE}", path=weight.path, tensor=name)
        is_float = weight.codec in FLOAT8
        tiles = [way.tile for way in self.ways if way.tile is not None and way.is_float == is_float]
        block = block_of(shape, scale, tiles[0] if tiles else None)
        if is_float:
            parts = float_parts(shape, scale, SCALE) | {ZERO: Part(scale.shape, weight_codecs(), optional=True)}
            return Scaled(shape, parts, SCALE, block)
        parts = {"weight": Part(shape, ("I8",)), SCALE: Part(scale.shape, FLOATS)}
        return Scaled(shape, parts | {ZERO: Part(scale.shape, ("I8",), optional=True)}, SCALE, block, zero=ZERO)

    def is_dropped(self, name: str) -> bool:
        """True for scales of activations."""
        return name.endswith(DROPPED)


def weight_codecs() -> tuple[str, ...]:
    """Types of a zero point that older writers left beside 8-bit floats; it is zero and not needed."""
    return ("I8", *FLOAT8, *FLOATS)

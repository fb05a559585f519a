"""Layouts opened and closed again: the same bytes, and the values that the codec itself decodes."""

from __future__ import annotations

import numpy as np
import pytest

from weightsmith.quant import codecs
from weightsmith.quant.blocks import BLOCKS
from weightsmith.quant.lattice import Lattice

OPEN = sorted(codecs.OPEN)


def slow_values(lattice: Lattice) -> np.ndarray:
    """The formula of the module, weight by weight in float32."""
    shape = lattice.shape
    found = np.empty(lattice.codes.shape, np.float32)
    for row, column in np.ndindex(found.shape):
        block, sub = column // shape.block, column // shape.sub
        code = int(lattice.codes[row, column])
        value = shape.table[code] if shape.table is not None else code
        scale = np.float32(lattice.d[row, block] * np.float32(lattice.scales[row, sub]))
        offset = np.float32(lattice.dmin[row, block] * np.float32(lattice.mins[row, sub]))
        found[row, column] = np.float32(scale * np.float32(value - shape.zero)) - offset
    return found


@pytest.mark.parametrize("codec", OPEN)
def test_any_bytes_come_back_and_mean_what_the_codec_says(codec: str) -> None:
    rng = np.random.default_rng(0)
    block = BLOCKS[codec]
    packed = rng.integers(0, 256, (3, 2 * block.nbytes), np.uint8)
    lattice = codecs.unpack(codec, packed)
    for halves in (lattice.d, lattice.dmin):
        halves[~np.isfinite(halves)] = 1.5
    packed = codecs.pack(codec, lattice)
    again = codecs.unpack(codec, packed)
    for name in ("codes", "d", "scales", "dmin", "mins"):
        np.testing.assert_array_equal(getattr(lattice, name), getattr(again, name))
    np.testing.assert_array_equal(codecs.pack(codec, again), packed)
    np.testing.assert_array_equal(slow_values(lattice), codecs.decode(codec, packed, 2 * block.weights))


@pytest.mark.parametrize("codec", OPEN)
def test_what_is_encoded_keeps_its_bytes(codec: str) -> None:
    rows = np.random.default_rng(1).standard_normal((4, 512)).astype(np.float32)
    rows[1, :256] = 0
    packed = codecs.encode(codec, rows)
    lattice = codecs.unpack(codec, packed)
    np.testing.assert_array_equal(codecs.pack(codec, lattice), packed)
    shape = lattice.shape
    assert lattice.codes.max() <= shape.top
    assert shape.scales[0] <= lattice.scales.min() <= lattice.scales.max() <= shape.scales[1]

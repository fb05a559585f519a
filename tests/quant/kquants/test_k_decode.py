"""Decoding is exact: the same bits as the gguf package's decoders, for any bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quant.kquants import ggml
from weightsmith.quant import codecs
from weightsmith.quant.blocks import BLOCKS

HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


@pytest.mark.parametrize("codec", ggml.CODECS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scales=st.lists(st.integers(0, 0xFFFF), min_size=2, max_size=2))
def test_decodes_any_block_as_gguf_does(codec: str, seed: int, scales: list[int]) -> None:
    block = BLOCKS[codec]
    packed = np.random.default_rng(seed).integers(0, 256, (3, 4 * block.nbytes), dtype=np.uint8)
    for offset, bits in zip(HALVES[codec], scales, strict=False):
        packed.reshape(-1, block.nbytes)[:6, offset : offset + 2] = bits & 0xFF, bits >> 8
    ours = codecs.decode(codec, packed, 4 * block.weights)
    theirs = ggml.dequantize(codec, packed)
    numbers = ~np.isnan(theirs)  # of a NaN only that it is one is defined
    assert np.array_equal(np.isnan(ours), ~numbers)
    assert np.array_equal(ours.view(np.uint32)[numbers], theirs.view(np.uint32)[numbers])


@pytest.mark.parametrize("codec", ggml.CODECS)
def test_decodes_what_ggml_writes(codec: str) -> None:
    packed = ggml.quantize(codec, ggml.rows("student", 8), ggml.importance())
    assert np.array_equal(codecs.decode(codec, packed, ggml.ROW), ggml.dequantize(codec, packed))


@pytest.mark.parametrize("codec", ggml.CODECS)
def test_packing_loses_nothing(codec: str) -> None:
    """Weights that lie on a lattice of the layout come back as they were."""
    packed = ggml.quantize(codec, ggml.rows("gauss", 8), None)
    lattice = codecs.decode(codec, packed, ggml.ROW)
    again = codecs.decode(codec, codecs.encode(codec, lattice), ggml.ROW)
    loss = ((again - lattice).astype(np.float64) ** 2).sum() / (lattice.astype(np.float64) ** 2).sum()
    first = ggml.block_errors(codec, ggml.rows("gauss", 8), packed, None).sum() / (lattice**2).sum()
    assert loss < 0.2 * first

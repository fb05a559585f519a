"""Packed words against bit strings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.formats.gptq.oracle import pack_bits
from weightsmith.formats.gptq import words


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_the_bit_string(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (96, 5)).astype(np.uint8)
    found = words.pack(codes, bits)
    assert found.shape == (96 * bits // 32, 5)
    for column in range(5):
        assert found[:, column].view(np.int32).tolist() == pack_bits(codes[:, column].tolist(), bits)
    np.testing.assert_array_equal(words.unpack(found, bits), codes)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_any_words_survive_the_way_there_and_back(bits: int, a: int, b: int, c: int) -> None:
    given_words = np.array([[a], [b], [c]], np.uint32)
    np.testing.assert_array_equal(words.pack(words.unpack(given_words, bits), bits), given_words)


def test_three_bits_straddle_words_at_ten_and_twenty_one() -> None:
    for place, touched in ((9, [0]), (10, [0, 1]), (20, [1]), (21, [1, 2]), (22, [2])):
        codes = np.zeros((32, 1), np.uint8)
        codes[place] = 7
        assert np.flatnonzero(words.pack(codes, 3)[:, 0]).tolist() == touched


def test_words_known_from_published_checkpoints() -> None:
    assert words.pack(np.full((8, 1), 7, np.uint8), 4)[0, 0] == 0x77777777
    assert words.pack(np.arange(8, dtype=np.uint8)[:, None], 4)[0, 0] == 0x76543210
    assert words.pack(np.array([[1], [2], [3], [4]], np.uint8), 8)[0, 0] == 0x04030201

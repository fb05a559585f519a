"""Small unsigned numbers in 32-bit words, along an axis: the lowest bits of the first word first, without gaps.

Where the width divides 32 a word holds 32 / bits numbers. Three bits make a stream of 32 numbers in 3 words, in which
numbers 10 and 21 lie across two words.

Ref: AutoGPTQ and GPTQModel, `pack` of the QuantLinear modules.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Codes = NDArray[np.uint8]


def period(bits: int) -> tuple[int, int]:
    """The smallest whole packing: (numbers, words)."""
    words = bits // math.gcd(bits, 32)
    return 32 * words // bits, words


def pack(codes: Codes, bits: int) -> Words:
    """Pack codes [n, k], each below 2^bits, along the first axis into [n * bits / 32, k]; n is whole periods."""
    count, words = period(bits)
    groups = codes.reshape(len(codes) // count, count, codes.shape[1])
    packed = np.zeros((len(groups), words, codes.shape[1]), np.uint32)
    for j in range(count):
        word, shift = divmod(j * bits, 32)
        value = groups[:, j].astype(np.uint32)
        packed[:, word] |= value << np.uint32(shift)
        if shift + bits > 32:
            packed[:, word + 1] |= value >> np.uint32(32 - shift)
    return packed.reshape(len(groups) * words, codes.shape[1])


def unpack(packed: Words, bits: int) -> Codes:
    """The codes uint8 [n, k] of words [n * bits / 32, k]."""
    count, words = period(bits)
    groups = packed.reshape(len(packed) // words, words, packed.shape[1])
    codes = np.empty((len(groups), count, packed.shape[1]), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for j in range(count):
        word, shift = divmod(j * bits, 32)
        value = groups[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            value |= groups[:, word + 1] << np.uint32(32 - shift)
        codes[:, j] = value & mask
    return codes.reshape(len(groups) * count, packed.shape[1])

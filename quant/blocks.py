"""Block layouts as data: how many weights share a block and how many bytes it takes.

The names and ids are ggml's (ggml.h, enum ggml_type; block structs in ggml-common.h), to which safetensors' plain
dtypes and bitsandbytes' two blocks are added with id -1. Everything that only needs sizes (`show`, plans, dry runs)
imports this file and nothing heavier.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Block:
    """One block layout. id: ggml type number (-1: not a ggml type). weights: per block. nbytes: per block."""

    name: str
    id: int
    weights: int
    nbytes: int

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights


# Sizes are written as sums that mirror the structs: scales and mins first, then codes.
_GGML = (
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 2 + 16),
    ("Q4_1", 3, 32, 2 + 2 + 16),
    ("Q5_0", 6, 32, 2 + 4 + 16),
    ("Q5_1", 7, 32, 2 + 2 + 4 + 16),
    ("Q8_0", 8, 32, 2 + 32),
    ("Q8_1", 9, 32, 2 + 2 + 32),
    ("Q2_K", 10, 256, 16 + 64 + 2 + 2),
    ("Q3_K", 11, 256, 32 + 64 + 12 + 2),
    ("Q4_K", 12, 256, 2 + 2 + 12 + 128),
    ("Q5_K", 13, 256, 2 + 2 + 12 + 32 + 128),
    ("Q6_K", 14, 256, 128 + 64 + 16 + 2),
    ("Q8_K", 15, 256, 4 + 256 + 32),
    ("IQ2_XXS", 16, 256, 2 + 64),
    ("IQ2_XS", 17, 256, 2 + 64 + 8),
    ("IQ3_XXS", 18, 256, 2 + 64 + 32),
    ("IQ1_S", 19, 256, 2 + 32 + 16),
    ("IQ4_NL", 20, 32, 2 + 16),
    ("IQ3_S", 21, 256, 2 + 64 + 8 + 32 + 4),
    ("IQ2_S", 22, 256, 2 + 32 + 32 + 8 + 8),
    ("IQ4_XS", 23, 256, 2 + 2 + 4 + 128),
    ("I8", 24, 1, 1),
    ("I16", 25, 1, 2),
    ("I32", 26, 1, 4),
    ("I64", 27, 1, 8),
    ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 32 + 16 + 8),
    ("BF16", 30, 1, 2),
    ("TQ1_0", 34, 256, 48 + 4 + 2),
    ("TQ2_0", 35, 256, 64 + 2),
    ("MXFP4", 39, 32, 1 + 16),
    ("NVFP4", 40, 64, 4 + 32),
    ("Q1_0", 41, 128, 2 + 16),
    ("Q2_0", 42, 64, 2 + 16),
)
# bitsandbytes' blocks of 64, with absmax beside the nibbles (`quant.float4`).
_FLOAT4 = (("NF4", 64, 4 + 32), ("FP4", 64, 4 + 32))
_PLAIN = (("BOOL", 1), ("U8", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("U16", 2), ("U32", 4), ("U64", 8))

BLOCKS = {name: Block(name, id_, weights, nbytes) for name, id_, weights, nbytes in _GGML} | {
    name: Block(name, -1, weights, nbytes)
    for name, weights, nbytes in (*_FLOAT4, *((name, 1, n) for name, n in _PLAIN))
}
BY_ID = {block.id: block for block in BLOCKS.values() if block.id >= 0}


def row_nbytes(codec: str, row_len: int) -> int:
    """Bytes of one row of `row_len` weights; UnsupportedError if the codec is unknown or does not divide the row."""
    block = BLOCKS.get(codec)
    if block is None:
        raise UnsupportedError(f"unknown codec {codec!r}", hint=f"Known: {', '.join(BLOCKS)}.")
    if row_len % block.weights:
        raise UnsupportedError(f"a row of {row_len} weights is no multiple of {codec}'s block of {block.weights}")
    return row_len // block.weights * block.nbytes

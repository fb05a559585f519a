"""Tiny checkpoints in Grok-1's original form: pickles put together opcode by opcode, as numpy and pickle write them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

HIDDEN, FFN, EXPERTS, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 8, 192, 2, 1, 128
MEMOIZE = b"\x94"
FRAME = 1 << 16


def number(value: int) -> bytes:
    if value < 0 or value >= 1 << 16:
        return b"J" + struct.pack("<i", value)
    return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)


class Pickle:
    """The opcodes of one pickle; memo numbers are counted as pickle counts them, so that later parts can recall."""

    def __init__(self, *, module: str = "numpy.core.multiarray") -> None:
        self.parts: list[bytes | tuple[bytes, bytes | int]] = []
        self.module = module
        self.memo: dict[str, int] = {}
        self.count = 0

    def put(self, data: bytes) -> None:
        self.parts.append(data)

    def memoize(self, name: str = "") -> None:
        self.put(MEMOIZE)
        if name:
            self.memo[name] = self.count
        self.count += 1

    def text(self, value: str) -> None:
        if value in self.memo:
            self.put(b"h" + bytes([self.memo[value]]))
            return
        data = value.encode()
        self.put(b"\x8c" + bytes([len(data)]) + data)
        self.memoize(value)

    def name(self, module: str, attribute: str) -> None:
        full = f"{module}:{attribute}"
        if full in self.memo:
            self.put(b"h" + bytes([self.memo[full]]))
            return
        self.text(module)
        self.text(attribute)
        self.put(b"\x93")
        self.memoize(full)

    def close_tuple(self, length: int) -> None:
        self.put({1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(length, b"t"))
        self.memoize()

    def dtype(self, kind: str) -> None:
        if f"dtype {kind}" in self.memo:
            self.put(b"h" + bytes([self.memo[f"dtype {kind}"]]))
            return
        self.name("numpy", "dtype")
        if kind == "bf16":
            self.name("ml_dtypes", "bfloat16")
        else:
            self.text(kind)
        self.put(b"\x89\x88")
        self.close_tuple(3)
        self.put(b"R")
        self.memoize(f"dtype {kind}")
        order, size = ("<", 2) if kind == "bf16" else ("|" if kind == "i1" else "<", -1)
        self.put(b"(K\x03")
        self.text(order)
        self.put(b"NNN" + (number(size) * 2) + b"K\x00t")
        self.memoize()
        self.put(b"b")

    def array(self, values: np.ndarray | tuple[str, tuple[int, ...], int], *, columns: bool = False) -> None:
        """An array; `values` may be (kind, shape, bytes) with the bytes to follow as a hole (see `write`)."""
        kind, dims, data = values if isinstance(values, tuple) else described(values)
        self.name(self.module, "_reconstruct")
        self.name("numpy", "ndarray")
        self.put(b"K\x00\x85")
        self.memoize()
        if "code" in self.memo:
            self.put(b"h" + bytes([self.memo["code"]]))
        else:
            self.put(b"C\x01b")
            self.memoize("code")
        self.put(b"\x87")
        self.memoize()
        self.put(b"R")
        self.memoize()
        self.put(b"(K\x01" + b"".join(number(value) for value in dims))
        self.close_tuple(len(dims))
        self.dtype(kind)
        self.put(b"\x88" if columns else b"\x89")
        length = data if isinstance(data, int) else len(data)
        head = b"C" + bytes([length]) if length < 256 else b"B" + struct.pack("<I", length)
        self.parts.append((head, data))
        self.memoize()
        self.put(b"t")
        self.memoize()
        self.put(b"b")

    def write(self, file: BinaryIO) -> None:
        """Small parts go in frames, which end before and after an array of 64 KiB or more."""
        file.write(b"\x80\x04")
        frame = b""
        for part in [*self.parts, b"."]:
            if isinstance(part, bytes):
                frame += part
                continue
            head, data = part
            if isinstance(data, bytes) and len(data) < FRAME:
                frame += head + data
                continue
            file.write(framed(frame) + head)
            frame = b""
            if isinstance(data, int):
                file.seek(data, 1)
            else:
                file.write(data)
        file.write(framed(frame))


def framed(data: bytes) -> bytes:
    return b"\x95" + struct.pack("<Q", len(data)) + data


def described(values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """uint16 stands for the bits of bfloat16."""
    kind = {"int8": "i1", "float32": "f4", "uint16": "bf16"}[str(values.dtype)]
    return kind, values.shape, values.tobytes()


def plain(values: np.ndarray | tuple[str, tuple[int, ...], int]) -> Pickle:
    made = Pickle()
    made.array(values)
    return made


def quantized(
    weight: np.ndarray | tuple[str, tuple[int, ...], int], scales: np.ndarray | tuple[str, tuple[int, ...], int]
) -> Pickle:
    made = Pickle()
    made.name("__main__", "QuantizedWeight8bit")
    made.put(b")\x81")
    made.memoize()
    made.put(b"}")
    made.memoize()
    made.put(b"(")
    made.text("weight")
    made.array(weight)
    made.text("scales")
    made.array(scales)
    made.put(b"ub")
    return made


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 cut to bits of bfloat16."""
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("<u4") << 16).view("<f4")


def arrays(layers: int, seed: int = 0) -> list[tuple[str, np.ndarray | tuple[np.ndarray, np.ndarray]]]:
    """Haiku's name and content of every file, in the order in which JAX's tree has them: sorted as texts."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, str], np.ndarray | tuple[np.ndarray, np.ndarray]] = {
        ("language_model/in_out_embed", "embeddings"): rng.standard_normal((VOCAB, HIDDEN), np.float32) / 16,
        ("language_model/rms_norm", "scale"): 1 + rng.standard_normal(HIDDEN, np.float32) / 10,
    }

    def matrix(*dims: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
        weight = rng.integers(-127, 128, dims, np.int8)
        steps = rng.uniform(0.5, 2.0, (*dims[:-2], groups, dims[-1])) / (64 * dims[-2] ** 0.5)
        return weight, bf16(steps)

    for layer in range(layers):
        prefix = f"language_model/transformer/decoder_layer_{layer}"
        queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        parts = {
            "moe/linear": matrix(EXPERTS, HIDDEN, FFN, groups=1),
            "moe/linear_v": matrix(EXPERTS, HIDDEN, FFN, groups=1),
            "moe/linear_1": matrix(EXPERTS, FFN, HIDDEN, groups=8),
            "multi_head_attention/key": matrix(HIDDEN, keys, groups=1),
            "multi_head_attention/value": matrix(HIDDEN, keys, groups=1),
            "multi_head_attention/query": matrix(HIDDEN, queries, groups=1),
            "multi_head_attention/linear": matrix(queries, HIDDEN, groups=8),
            "router": rng.standard_normal((HIDDEN, EXPERTS), np.float32) / 4,
        }
        parts |= {
            name: 1 + rng.standard_normal(HIDDEN, np.float32) / 10
            for name in ("rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3")
        }
        for part, value in parts.items():
            found[f"{prefix}/{part}", "w"] = value
    return [(module, found[module, key]) for module, key in sorted(found)]


def write_grok1(
    folder: Path, *, layers: int = 2, seed: int = 0
) -> dict[str, np.ndarray | tuple[np.ndarray, np.ndarray]]:
    """Write a checkpoint into `folder`/ckpt-0 and return what is in it, by Haiku's names."""
    below = folder / "ckpt-0"
    below.mkdir(parents=True)
    content = arrays(layers, seed)
    for index, (_, value) in enumerate(content):
        with (below / f"tensor{index:05d}_000").open("wb") as file:
            (quantized(*value) if isinstance(value, tuple) else plain(value)).write(file)
    return dict(content)

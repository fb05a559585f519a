"""R8: whatever is written holds to the limits of the strictest readers; checked by slow parsers of the test's own."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_llama

Told = Callable[..., dict[str, Any]]
SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# ggml's number of a type: weights and bytes of a block (ggml.h, ggml-common.h).
BLOCK = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)}
BLOCK |= {10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 20: (32, 18), 23: (256, 136)}
ST_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1}


class Bytes:
    """A file read front to back; every length is held against what is left."""

    def __init__(self, path: Path) -> None:
        self.data, self.at = path.read_bytes(), 0

    def take(self, count: int) -> bytes:
        assert 0 <= count <= len(self.data) - self.at
        self.at += count
        return self.data[self.at - count : self.at]

    def one(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        return self.take(self.one("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind != 9:
            return self.one(SCALAR[kind])
        item, count = self.one("I"), self.one("Q")
        assert item != 9, "arrays of arrays"
        assert count < 1 << 31
        return [self.value(item) for _ in range(count)]


def parse_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Keys and tensor shapes of a GGUF file that no reader has reason to refuse."""
    file = Bytes(path)
    assert (file.take(4), file.one("I")) == (b"GGUF", 3)
    n_tensors, n_keys = file.one("Q"), file.one("Q")
    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        name = file.text()
        assert re.fullmatch(r"[a-z0-9_.]{1,65535}", name)
        assert name not in keys
        keys[name] = file.value(file.one("I"))
    alignment = keys.get("general.alignment", 32)
    assert alignment in (32, 64)
    shapes: dict[str, tuple[int, ...]] = {}
    ranges = []
    for _ in range(n_tensors):
        name, n_dims = file.text(), file.one("I")
        assert 0 < len(name.encode()) <= 63
        assert "\0" not in name
        assert name not in shapes
        assert 1 <= n_dims <= 4
        dims = [file.one("Q") for _ in range(n_dims)]
        assert all(dim >= 1 for dim in dims)
        assert math.prod(dims) < 1 << 63
        weights, nbytes = BLOCK[file.one("I")]
        assert dims[0] % weights == 0
        offset = file.one("Q")
        assert offset % alignment == 0
        ranges.append((offset, offset + math.prod(dims) // weights * nbytes))
        shapes[name] = tuple(dims)
    start = -(-file.at // alignment) * alignment
    assert not any(file.data[file.at : start]), "padding is zero"
    padded = [(begin, -(-end // alignment) * alignment) for begin, end in ranges]
    assert not padded or padded[0][0] == 0
    assert all(left[1] == right[0] for left, right in pairwise(padded)), "in order, no gaps, no overlap"
    size = len(file.data) - start
    assert size in ({ranges[-1][1], padded[-1][1]} if ranges else {0}), "nothing behind the last tensor"
    return keys, shapes


def check_model(keys: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Hyper-parameters and tensors say the same."""
    hidden, heads = keys["llama.embedding_length"], keys["llama.attention.head_count"]
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blk.")}
    assert blocks == set(range(keys["llama.block_count"]))
    assert shapes["token_embd.weight"] == (hidden, len(keys["tokenizer.ggml.tokens"]))
    assert len(keys["tokenizer.ggml.token_type"]) == len(keys["tokenizer.ggml.tokens"])
    head_dim = keys.get("llama.attention.key_length", hidden // heads)
    for block in blocks:
        assert shapes[f"blk.{block}.attn_q.weight"] == (hidden, heads * head_dim)
        assert shapes[f"blk.{block}.attn_k.weight"] == (hidden, keys["llama.attention.head_count_kv"] * head_dim)
        assert shapes[f"blk.{block}.ffn_up.weight"] == (hidden, keys["llama.feed_forward_length"])


def parse_safetensors(path: Path) -> list[str]:
    """Names of the tensors of a file that no reader has reason to refuse."""
    file = Bytes(path)
    length = file.one("Q")
    assert length <= 25_000_000, "more is refused by clients of the hub"
    text = file.take(length)
    assert text[:1] == b"{"
    assert length % 8 == 0, "tensors are aligned"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    extra = header.pop("__metadata__", {})
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in extra.items())
    end = 0
    for name, one in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        assert name.isprintable()
        begin, stop = one["data_offsets"]
        assert begin == end, "no holes, no overlap"
        assert stop - begin == math.prod(one["shape"]) * ST_BYTES[one["dtype"]]
        end = stop
    assert end == len(file.data) - file.at
    return list(header)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_llama(tmp_path / "base", hidden_size=256, intermediate_size=256, num_attention_heads=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("convert", "gguf"),
        ("convert", "gguf:BF16", "--split", "300kB"),
        ("quantize", "gguf:Q4_K_M"),
        ("quantize", "gguf:IQ4_XS"),
        ("quantize", "gguf:Q5_1", "--split", "150kB"),
        ("quantize", "gguf:Q8_0"),
    ],
    ids=" ".join,
)
def test_gguf(base: Path, told: Told, words: tuple[str, ...]) -> None:
    verb, target, *more = words
    told(verb, "./base", "--to", target, *more, "-o", "out.gguf")
    paths = sorted(base.parent.glob("out*.gguf"))
    assert (len(paths) > 1) is bool(more)
    parts = [parse_gguf(path) for path in paths]
    shapes = {name: shape for part in parts for name, shape in part[1].items()}
    assert sum(len(part[1]) for part in parts) == len(shapes) == 21
    for number, (keys, _) in enumerate(parts):
        if more:
            assert (keys["split.no"], keys["split.count"], keys["split.tensors.count"]) == (number, len(parts), 21)
    check_model(parts[0][0], shapes)


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "safetensors:BF16"),
        ("convert", "safetensors:F32", "--split", "600kB"),
        ("quantize", "nf4"),
        ("quantize", "fp4_dq"),
    ],
    ids=" ".join,
)
def test_safetensors(base: Path, told: Told, words: tuple[str, ...]) -> None:
    verb, target, *more = words
    told(verb, "./base", "--to", target, *more, "-o", "out")
    paths = sorted((base.parent / "out").glob("*.safetensors"))
    assert (len(paths) > 1) is bool(more)
    names = [name for path in paths for name in parse_safetensors(path)]
    assert len(names) == len(set(names)) >= 21
    if more:
        index = json.loads((base.parent / "out" / "model.safetensors.index.json").read_text())
        assert sorted(index["weight_map"]) == sorted(names)
        assert set(index["weight_map"].values()) == {path.name for path in paths}


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_these_parsers_refuse(base: Path, told: Told, suffix: str) -> None:
    """They are no better than what they notice: one byte more, or fewer, or another length."""
    told("convert", "./base", "--to", suffix[1:], "-o", "out.gguf" if suffix == ".gguf" else "out")
    path = base.parent / "out.gguf" if suffix == ".gguf" else base.parent / "out" / "model.safetensors"
    parse: Callable[[Path], object] = parse_gguf if suffix == ".gguf" else parse_safetensors
    whole = path.read_bytes()
    for data in (whole + bytes(33), whole[:-40], whole[:8] + b"\xff" * 8 + whole[16:], b"\xff" * 8 + whole[8:]):
        path.write_bytes(data)
        with pytest.raises((AssertionError, KeyError, ValueError)):
            parse(path)

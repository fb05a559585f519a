"""The header parser: golden bytes, agreement with the safetensors package, and hostile files."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UnsupportedError, WeightsmithError
from weightsmith.formats.safetensors import open_reader, sniff
from weightsmith.formats.safetensors.header import DTYPES, MAX_HEADER, lay_out
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import TensorInfo


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """One tensor of a header, four bytes unless told otherwise."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def with_length(length: int, rest: bytes) -> bytes:
    return length.to_bytes(8, "little") + rest


def packed(header: Any, data: bytes = b"1234") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return with_length(len(text), text + data)


def twice(key: str) -> bytes:
    one = f'"{key}":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    return packed(f"{{{one},{one}}}".encode())


# what is wrong: the bytes, the error's class, and what its message must say
HOSTILE: dict[str, tuple[bytes, type[WeightsmithError], str]] = {
    "empty file": (b"", IntegrityError, "too short"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", IntegrityError, "too short"),
    "no header": (with_length(2, b""), IntegrityError, "too short"),
    "length zero": (with_length(0, b"{}"), IntegrityError, "not valid JSON"),
    "length past the end": (with_length(3, b"{}"), IntegrityError, "a header of 3 bytes"),
    "length of 2^64 - 1": (with_length(2**64 - 1, b"{}" * 50), IntegrityError, "what the file holds is 100"),
    "length above the limit": (with_length(MAX_HEADER + 1, b"{}"), IntegrityError, "a header of 100000001 bytes"),
    "no brace": (with_length(4, b"[{}]"), IntegrityError, "begins with b'['"),
    "space before the brace": (with_length(3, b" {}"), IntegrityError, "begins with b' '"),
    "not UTF-8": (packed(b'{"\xff":1}'), IntegrityError, "not valid JSON"),
    "raw control character": (packed(b'{"a\x01":1}'), IntegrityError, "control character"),
    "NUL padding": (packed(b"{}\0\0\0\0\0\0", b""), IntegrityError, "control character"),
    "cut JSON": (packed(b'{"a":{"dtype":"U8"'), IntegrityError, "not valid JSON"),
    "two objects": (packed(b"{}{}"), IntegrityError, "not valid JSON"),
    "deep nesting": (packed(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), IntegrityError, "nested too deeply"),
    "number of 5000 digits": (
        packed(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        IntegrityError,
        "not valid JSON",
    ),
    "duplicate tensor": (twice("w"), IntegrityError, "'w' occurs twice"),
    "duplicate field": (
        packed(b'{"w":{"dtype":"U8","dtype":"F32","shape":[4],"data_offsets":[0,4]}}'),
        IntegrityError,
        "'dtype' occurs twice",
    ),
    "duplicate metadata": (
        packed(b'{"__metadata__":{},"__metadata__":{"a":"b"}}', b""),
        IntegrityError,
        "'__metadata__' occurs twice",
    ),
    "metadata no object": (packed({"__metadata__": ["a"], "w": entry()}), IntegrityError, "__metadata__"),
    "metadata with a number": (packed({"__metadata__": {"a": 1}, "w": entry()}), IntegrityError, "__metadata__"),
    "metadata null": (packed({"__metadata__": None, "w": entry()}), IntegrityError, "__metadata__"),
    "entry no object": (packed({"w": [1, 2]}), IntegrityError, "tensor 'w'"),
    "no dtype": (packed({"w": {"shape": [4], "data_offsets": [0, 4]}}), IntegrityError, "tensor 'w': no dtype"),
    "dtype a number": (packed({"w": entry(3)}), IntegrityError, "tensor 'w': no dtype"),
    "unknown dtype": (packed({"w": entry("F4")}), UnsupportedError, "tensor 'w': unknown dtype 'F4'"),
    "a block layout as dtype": (packed({"w": entry("Q4_0", [32], [0, 18])}), UnsupportedError, "unknown dtype 'Q4_0'"),
    "no shape": (packed({"w": {"dtype": "U8", "data_offsets": [0, 4]}}), IntegrityError, "tensor 'w': shape"),
    "shape a number": (packed({"w": entry(shape=4)}), IntegrityError, "tensor 'w': shape"),
    "negative dimension": (packed({"w": entry(shape=[-2, -2])}), IntegrityError, "tensor 'w': shape"),
    "true as dimension": (packed({"w": entry(shape=[True, 4])}), IntegrityError, "tensor 'w': shape"),
    "float as dimension": (packed({"w": entry(shape=[4.0])}), IntegrityError, "tensor 'w': shape"),
    "dimension of 2^63": (packed({"w": entry(shape=[2**63, 0], offsets=[0, 0])}), IntegrityError, "tensor 'w': shape"),
    "hundred dimensions": (packed({"w": entry(shape=[1] * 99 + [4])}), IntegrityError, "tensor 'w': shape"),
    "no offsets": (packed({"w": {"dtype": "U8", "shape": [4]}}), IntegrityError, "tensor 'w': data_offsets"),
    "three offsets": (packed({"w": entry(offsets=[0, 2, 4])}), IntegrityError, "tensor 'w': data_offsets"),
    "negative offset": (packed({"w": entry(offsets=[-4, 0])}), IntegrityError, "tensor 'w': data_offsets"),
    "float offset": (packed({"w": entry(offsets=[0.0, 4.0])}), IntegrityError, "tensor 'w': data_offsets"),
    "false as offset": (packed({"w": entry(offsets=[False, 4])}), IntegrityError, "tensor 'w': data_offsets"),
    "offset of 2^63": (packed({"w": entry(offsets=[2**63, 2**63 + 4])}), IntegrityError, "tensor 'w': data_offsets"),
    "end before begin": (packed({"w": entry(offsets=[4, 0])}), IntegrityError, "tensor 'w': ends at 0, before"),
    "range too short": (packed({"w": entry("F32", [4], [0, 4])}), IntegrityError, "takes 16 bytes, its range has 4"),
    "product past 2^64": (packed({"w": entry("U8", [2**40, 2**40])}), IntegrityError, "takes"),
    "truncated": (packed({"w": entry()}, b"12"), IntegrityError, "tensor 'w': ends 2 bytes behind the end"),
    "trailing bytes": (packed({"w": entry()}, b"12345"), IntegrityError, "1 bytes after the last tensor"),
    "data without tensors": (packed({}, b"1"), IntegrityError, "1 bytes after the last tensor"),
    "hole at the start": (packed({"w": entry(shape=[3], offsets=[1, 4])}), IntegrityError, "hole"),
    "hole between": (
        packed({"a": entry(shape=[1], offsets=[0, 1]), "w": entry(shape=[2], offsets=[2, 4])}),
        IntegrityError,
        "tensor 'w': begins at 2 and leaves a hole",
    ),
    "overlap": (
        packed({"a": entry(shape=[3], offsets=[0, 3]), "w": entry(shape=[2], offsets=[2, 4])}),
        IntegrityError,
        "tensor 'w': begins at 2 and overlaps",
    ),
    "the same bytes twice": (packed({"a": entry(), "w": entry()}), IntegrityError, "overlaps"),
    "empty tensor inside another": (
        packed({"a": entry(), "w": entry(shape=[0], offsets=[2, 2])}),
        IntegrityError,
        "tensor 'w': begins at 2 and overlaps",
    ),
    "empty name": (packed({"": entry()}), IntegrityError, "the name is empty"),
    "newline in a name": (packed({"a\nb": entry()}), IntegrityError, "control characters"),
    "escape in a name": (packed({"a\x1b[31m": entry()}), IntegrityError, "control characters"),
    "lone surrogate in a name": (packed({"a\ud800": entry()}), IntegrityError, "control characters"),
    "name of 5000 characters": (packed({"a" * 5000: entry()}), IntegrityError, "too long"),
    "git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        IntegrityError,
        "git-LFS pointer",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(case: str, tmp_path: Path) -> None:
    data, kind, says = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(kind) as caught:
        open_reader(path)
    assert type(caught.value) is kind
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    str(caught.value).encode()  # can be shown on any terminal


def test_enough_hostile_files() -> None:
    assert len(HOSTILE) >= 25


ATTACK = textwrap.dedent("""
    import json, sys, time
    from pathlib import Path
    from weightsmith.errors import WeightsmithError
    from weightsmith.formats.safetensors import open_reader
    begun = time.perf_counter()
    try:
        open_reader(Path(sys.argv[1])).infos()
        refused = ""
    except WeightsmithError as error:
        refused = type(error).__name__
    # Not getrusage: its peak starts at that of the process which started this one.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps({"refused": refused, "seconds": time.perf_counter() - begun, "MB": peak}))
""")


def attack(path: Path) -> dict[str, Any]:
    """Open `path` in a process of its own; the error's name, seconds, and the process's peak memory in MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory of a process is read from /proc")
    done = subprocess.run([sys.executable, "-c", ATTACK, str(path)], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("case", ["length of 2^64 - 1", "deep nesting", "product past 2^64", "number of 5000 digits"])
def test_attack_is_cheap(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[case][0])
    result = attack(path)
    assert result["refused"] == "IntegrityError"
    assert result["seconds"] < 1
    assert result["MB"] < 100


def test_sparse_header_is_not_read_whole(tmp_path: Path) -> None:
    """A header of the greatest length, nearly all of it a hole in the file."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(with_length(MAX_HEADER, b'{"a":'))
        file.truncate(8 + MAX_HEADER)
    result = attack(path)
    assert result["refused"] == "IntegrityError"
    assert result["seconds"] < 1
    assert result["MB"] < 100


def test_shape_of_a_billion_layers_is_cheap(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(packed({"w": entry()}))
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 10**9} | dict.fromkeys(sizes, 8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = attack(tmp_path)
    assert result["refused"] == "IntegrityError"
    assert result["seconds"] < 1
    assert result["MB"] < 100


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    import os

    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    assert not sniff(path)
    with pytest.raises(UnsafeInputError, match="not a regular file"):
        open_reader(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_reader(tmp_path / "model.safetensors")


GOLDEN = (
    b"\x88\0\0\0\0\0\0\0"
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}'
)


def test_golden_header() -> None:
    tensors = [TensorInfo("a", (2, 2), "F16", 8), TensorInfo("b", (1,), "F32", 4)]
    start, offsets = lay_out(tensors)
    padded = GOLDEN + b" " * (-len(GOLDEN) % 8)
    assert start == (len(padded) - 8).to_bytes(8, "little") + padded[8:]
    assert len(start) % 8 == 0
    assert offsets == {"a": len(start), "b": len(start) + 8}


def test_widest_first_where_the_plan_would_misalign() -> None:
    tensors = [TensorInfo("a", (3,), "F16", 6), TensorInfo("b", (1,), "F32", 4), TensorInfo("c", (1,), "BF16", 2)]
    start, offsets = lay_out(tensors)
    assert offsets == {"b": len(start), "a": len(start) + 4, "c": len(start) + 10}
    assert list(json.loads(start[8:])) == ["__metadata__", "b", "a", "c"]


def test_reads_golden_file(tmp_path: Path) -> None:
    start, _ = lay_out([TensorInfo("a", (2, 2), "F16", 8), TensorInfo("b", (1,), "F32", 4)])
    path = tmp_path / "x.safetensors"
    path.write_bytes(start + bytes(range(12)))
    reader = open_reader(path)
    assert list(reader.native_infos().values()) == [
        TensorInfo("a", (2, 2), "F16", 8, path, len(start)),
        TensorInfo("b", (1,), "F32", 4, path, len(start) + 8),
    ]
    assert reader.metadata() == {"__metadata__": {"format": "pt"}}
    reader.close()


def test_every_dtype_is_a_codec_of_its_own_size() -> None:
    sizes = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
    sizes |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
    assert {name: BLOCKS[name].nbytes for name in DTYPES} == sizes
    assert all(BLOCKS[name].weights == 1 for name in DTYPES)


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "bool": torch.tensor([True, False, True]),
        "u8": torch.arange(5, dtype=torch.uint8),
        "i64": torch.arange(6).reshape(2, 3),
        "f8": torch.ones(3, dtype=torch.float8_e4m3fn),
        "f8b": torch.ones(3, dtype=torch.float8_e5m2),
        "bf16": torch.randn(2, 3, 4).bfloat16(),
        "f64": torch.randn(2, dtype=torch.float64),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "ünï.çødé": torch.zeros(1),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"a": "b"})
    reader = open_reader(path)
    infos = reader.native_infos()
    assert infos.keys() == tensors.keys()
    data = path.read_bytes()
    for name, tensor in tensors.items():
        stored = data[infos[name].offset : infos[name].offset + infos[name].nbytes]
        assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else stored == b""
        assert infos[name].shape == tuple(tensor.shape)
    assert infos["bf16"].codec == "BF16"
    assert infos["f8"].codec == "F8_E4M3"
    assert reader.metadata()["__metadata__"] == {"a": "b"}
    reader.close()


SOUND = packed(
    {
        "__metadata__": {"format": "pt"},
        "a": entry("F16", [2, 1]),
        "b": entry("U8", [0], [4, 4]),
        "c": entry("F32", [1], [4, 8]),
    },
    b"12345678",
)


def accepted(path: Path) -> dict[str, Any] | None:
    """What our parser makes of a file; only the project's own errors may surface."""
    try:
        reader = open_reader(path)
    except WeightsmithError as error:
        str(error)
        return None
    infos = {name: (info.codec, list(info.shape)) for name, info in reader.native_infos().items()}
    reader.close()
    return infos


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(SOUND)),
    st.binary(max_size=4),
)
@example([], len(SOUND), b"")
def test_mutated_files_never_crash(tmp_path: Path, edits: list[tuple[int, int]], cut: int, tail: bytes) -> None:
    """What we accept after any damage, the reference parser accepts too, and sees the same."""
    from safetensors import SafetensorError, safe_open

    data = bytearray(SOUND)
    for position, value in edits:
        data[position] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(data[:cut]) + tail)
    ours = accepted(path)
    if ours is None:
        return
    try:
        with safe_open(path, "np") as file:
            theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            assert {name: (item.get_dtype(), item.get_shape()) for name, item in theirs.items()} == ours
    except SafetensorError as error:
        raise AssertionError(f"accepted what the reference refuses: {error}") from error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
FIELDS = {
    "dtype": JSON | st.sampled_from(sorted(DTYPES)),
    "shape": JSON | st.lists(st.integers(0, 4)),
    "data_offsets": JSON,
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), JSON | st.fixed_dictionaries(FIELDS), max_size=3))
def test_any_json_never_crashes(tmp_path: Path, header: dict[str, Any]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(header, b""))
    accepted(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(["F32", "F16", "BF16"]), st.lists(st.integers(0, 5), max_size=3)), max_size=6)
)
def test_laid_out_files_read_back(tmp_path: Path, parts: list[tuple[str, list[int]]]) -> None:
    from safetensors import safe_open

    infos = []
    for number, (codec, shape) in enumerate(parts):
        nbytes = int(np.prod(shape, dtype=np.int64)) * BLOCKS[codec].nbytes
        infos.append(TensorInfo(f"t{number}", tuple(shape), codec, nbytes))
    start, offsets = lay_out(infos)
    path = tmp_path / "x.safetensors"
    path.write_bytes(start + bytes(sum(info.nbytes for info in infos)))
    ours = accepted(path)
    assert ours == {info.name: (info.codec, list(info.shape)) for info in infos}
    assert all(offsets[info.name] % BLOCKS[info.codec].nbytes == 0 for info in infos)
    with safe_open(path, "pt") as file:  # loads every tensor, so every one is aligned for torch
        assert all(list(file.get_tensor(info.name).shape) == list(info.shape) for info in infos)


def test_sniff_goes_by_content(tmp_path: Path, make_file: Callable[..., bytes]) -> None:
    named, other = tmp_path / "x.bin", tmp_path / "y.safetensors"
    named.write_bytes(make_file({"w": entry()}, b"1234"))
    other.write_bytes(b"GGUF\x03\0\0\0{}")
    assert sniff(named)
    assert not sniff(other)
    assert not sniff(tmp_path)
    other.write_bytes(HOSTILE["git-LFS pointer"][0])
    assert sniff(other)  # so that it is named and not called unknown
    assert not sniff(tmp_path / "absent")

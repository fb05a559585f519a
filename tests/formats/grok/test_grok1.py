"""Grok-1's original form: what went in comes out, in whatever container it is written."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.grok import grok1
from weightsmith import formats
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UnsupportedError
from weightsmith.formats.grok1 import columns, layout
from weightsmith.quant import codecs
from weightsmith.types import Reader

Content = dict[str, Any]
STORED_AS_FLOATS = {(8, 256), (192, 256)}  # router and embedding
SLOTS = {
    "block_sparse_moe.experts.E.w1": "moe/linear",
    "block_sparse_moe.experts.E.w2": "moe/linear_1",
    "block_sparse_moe.experts.E.w3": "moe/linear_v",
    "self_attn.k_proj": "multi_head_attention/key",
    "self_attn.o_proj": "multi_head_attention/linear",
    "self_attn.q_proj": "multi_head_attention/query",
    "self_attn.v_proj": "multi_head_attention/value",
    "pre_attn_norm": "rms_norm",
    "post_attn_norm": "rms_norm_1",
    "pre_moe_norm": "rms_norm_2",
    "post_moe_norm": "rms_norm_3",
    "block_sparse_moe.gate": "router",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    folder = tmp_path_factory.mktemp("grok") / "grok-1"
    return folder, grok1.write_grok1(folder)


def expected(name: str, content: Content) -> np.ndarray:
    """A canonical tensor as float32 by Haiku's names: the exact product of code and scale."""
    module = {"model.embed_tokens.weight": "in_out_embed", "model.norm.weight": "rms_norm"}.get(name)
    if module:
        return content[f"language_model/{module}"]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    assert found
    part = re.sub(r"experts\.(\d+)", "experts.E", found[2])
    value = content[f"language_model/transformer/decoder_layer_{found[1]}/{SLOTS[part]}"]
    if not isinstance(value, tuple):
        return value.T
    weight, scales = value
    if part != found[2]:
        expert = int(found[2].split(".")[2])
        weight, scales = weight[expert], scales[expert]
    wide = np.repeat(grok1.from_bf16(scales), len(weight) // len(scales), axis=0)
    return (weight.astype(np.float32) * wide).T


def decoded(reader: Reader, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    info = reader.infos()[name]
    rows = reader.rows(name, start, info.n_rows if stop is None else stop)
    return codecs.decode(info.codec, rows, info.row_len)


def as_bf16(values: np.ndarray) -> np.ndarray:
    return codecs.decode("BF16", codecs.encode("BF16", np.ascontiguousarray(values)), values.shape[1])


def check(reader: Reader, content: Content, rounded: Any = lambda values: values) -> None:
    for name, info in reader.infos().items():
        values = expected(name, content)
        assert info.shape == values.shape
        assert np.array_equal(
            decoded(reader, name).reshape(info.shape), rounded(values) if values.ndim > 1 else values
        ), name


class Counted(io.RawIOBase):
    """A file that only counts."""

    size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 1
        self.size += offset
        return self.size


def test_the_emitter_writes_what_pickle_and_numpy_write() -> None:
    """Opcode for opcode, on the part that needs no ml_dtypes; and to the byte the size of a published file."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    ours = io.BytesIO()
    made = grok1.Pickle(
        module="numpy._core.multiarray" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core.multiarray"
    )
    made.array(values)
    made.write(ours)
    assert ours.getvalue() == pickle.dumps(values, 4)
    shape = (8, 6144, 32768)
    counted = Counted()
    grok1.quantized(("i1", shape, 8 * 6144 * 32768), ("bf16", (8, 1, 32768), 2 * 8 * 32768)).write(counted)
    assert counted.size == 1_611_137_347


def test_files_are_in_the_order_of_texts() -> None:
    assert layout.order(13) == [0, 1, 10, 11, 12, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (layout.base(10, 64), layout.base(2, 64), layout.base(63, 64), layout.base(9, 64)) == (26, 146, 722, 758)
    places = layout.places(64, 8)
    assert places["model.layers.9.block_sparse_moe.gate.weight"] == (769, -1)
    assert {number for number, _ in places.values()} == set(range(770))


def test_thirteen_layers_lie_where_jax_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grok1, "FFN", 256)
    content = grok1.write_grok1(tmp_path, layers=13)
    reader = formats.open_reader(tmp_path, allow_pickle=True)
    assert reader.config.n_layers == 13
    for layer in range(13):
        for part in ("pre_attn_norm", "block_sparse_moe.gate", "self_attn.o_proj", "block_sparse_moe.experts.7.w2"):
            name = f"model.layers.{layer}.{part}.weight"
            assert np.array_equal(decoded(reader, name), np.atleast_2d(expected(name, content))), name


def test_reading_gives_what_went_in(two: tuple[Path, Content]) -> None:
    folder, content = two
    reader = formats.open_reader(folder, allow_pickle=True)
    assert reader.container == "grok1"
    check(reader, content)
    matrices = {info.codec for info in reader.infos().values() if "proj" in info.name or "experts" in info.name}
    assert matrices == {"Q8_0"}
    config = reader.config
    assert (config.hidden_size, config.n_heads, config.n_kv_heads, config.head_dim) == (256, 2, 1, 128)
    assert (config.n_experts, config.n_experts_used, config.intermediate_size, config.vocab_size) == (8, 2, 512, 192)
    assert config.name == "grok-1"


def test_native_infos_show_the_stored_form(two: tuple[Path, Content]) -> None:
    reader = formats.open_reader(two[0] / "ckpt-0", allow_pickle=True)
    native = reader.native_infos()
    assert (native["tensor00002_000.weight"].codec, native["tensor00002_000.weight"].shape) == ("I8", (8, 256, 512))
    assert (native["tensor00003_000.scales"].codec, native["tensor00003_000.scales"].shape) == ("BF16", (8, 8, 256))
    assert native["tensor00000_000"].codec == "F32"
    assert len(native) == 2 + 2 * (12 + 7)


def test_any_run_of_rows_is_the_same_whatever_is_kept(
    two: tuple[Path, Content], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "STRIPE", 512 * 64)  # 64 to 128 columns
    monkeypatch.setattr(columns, "KEPT", 1)
    reader = formats.open_reader(two[0], allow_pickle=True)
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    values = expected(name, two[1])
    for start, stop in ((0, 256), (63, 65), (100, 101), (250, 256), (7, 7), (1, 255)):
        assert np.array_equal(decoded(reader, name, start, stop), values[start:stop])
    with pytest.raises(IndexError):
        reader.rows(name, 0, 257)


@pytest.mark.parametrize("target", ["gguf", "gguf:F32", "gguf:Q8_0", "safetensors", "safetensors:F32"])
def test_conversions_keep_every_value(target: str, two: tuple[Path, Content], tmp_path: Path) -> None:
    folder, content = two
    out, verb = tmp_path / "out", "quantize" if target.endswith("Q8_0") else "convert"
    assert run([verb, str(folder), "--to", target, "-o", str(out), "--allow-pickle", "--quiet"]) == 0
    made = formats.open_reader(out)
    original = formats.open_reader(folder, allow_pickle=True)
    assert made.config.grok is not None
    assert original.config.grok is not None
    assert made.config.grok.embedding_scale == original.config.grok.embedding_scale
    assert made.config.n_experts_used == 2
    if target == "safetensors":  # multiplied out as xAI's own code does it
        check(
            made,
            content,
            lambda values: values if values.shape in STORED_AS_FLOATS else as_bf16(values),
        )
        assert json.loads((out / "config.json").read_text())["architectures"] == ["Grok1ForCausalLM"]
    elif target == "gguf:Q8_0":  # the embedding is quantized, the codes pass through
        for name in original.infos():
            if original.infos()[name].codec == "Q8_0":
                assert np.array_equal(made.rows(name, 0, 100), original.rows(name, 0, 100)), name
    else:
        check(made, content)


def test_there_and_back(two: tuple[Path, Content], tmp_path: Path) -> None:
    """Original to GGUF to safetensors to GGUF: the same file again."""
    folder, _ = two
    first, between, second = tmp_path / "a.gguf", tmp_path / "hf", tmp_path / "b.gguf"
    assert run(["convert", str(folder), "--to", "gguf:F32", "-o", str(first), "--allow-pickle"]) == 0
    assert run(["convert", str(first), "--to", "safetensors", "-o", str(between)]) == 0
    assert run(["convert", str(between), "--to", "gguf", "-o", str(second)]) == 0
    one, other = formats.open_reader(first), formats.open_reader(second)
    assert list(one.infos()) == list(other.infos())
    for name, info in one.infos().items():
        assert np.array_equal(one.rows(name, 0, info.n_rows), other.rows(name, 0, info.n_rows))
    assert one.config == other.config


def test_scales_beyond_half_precision_become_bf16(tmp_path: Path) -> None:
    content = grok1.write_grok1(tmp_path)
    prefix = "language_model/transformer/decoder_layer_0/multi_head_attention"
    weight, scales = content[f"{prefix}/query"]
    tiny = scales.copy()
    tiny[0, 3] = grok1.bf16(np.array([1e-9], np.float32))[0]
    with (tmp_path / "ckpt-0" / layout.file_name(2 + 5)).open("wb") as file:
        grok1.quantized(weight, tiny).write(file)
    reader = formats.open_reader(tmp_path, allow_pickle=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert reader.infos()[name].codec == "BF16"
    product = (weight.astype(np.float32) * grok1.from_bf16(tiny)).T
    assert np.array_equal(reader.rows(name, 0, 256), codecs.encode("BF16", np.ascontiguousarray(product)))
    assert reader.infos()["model.layers.0.self_attn.k_proj.weight"].codec == "Q8_0"


def test_permission_and_forms(two: tuple[Path, Content], tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError, match="pickle"):
        formats.open_reader(two[0])
    assert run(["show", str(two[0])]) == 4
    assert formats.open_reader(two[0] / "ckpt-0" / "tensor00005_000", allow_pickle=True).config.n_layers == 2


@pytest.fixture
def copy(two: tuple[Path, Content], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two[0] / "ckpt-0", tmp_path / "ckpt-0"))


def replaced(folder: Path, number: int, made: grok1.Pickle) -> None:
    with (folder / layout.file_name(number)).open("wb") as file:
        made.write(file)


def test_sets_that_do_not_fit_together(copy: Path) -> None:
    zeros = np.zeros
    last = copy / layout.file_name(25)
    kept = last.read_bytes()
    last.unlink()
    with pytest.raises(NotFoundError, match="25 tensor files"):
        assert formats.open_reader(copy, allow_pickle=True).config
    last.write_bytes(kept)
    (copy / layout.file_name(7)).rename(copy / "aside")
    with pytest.raises(NotFoundError, match="tensor00007_000 is missing"):
        formats.open_reader(copy, allow_pickle=True)
    (copy / "aside").rename(copy / layout.file_name(7))
    (copy / "tensor00000_001").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="several hosts"):
        formats.open_reader(copy, allow_pickle=True)
    (copy / "tensor00000_001").unlink()
    cases = {
        13: (grok1.plain(zeros((256, 9), np.float32)), "first layer"),
        9: (grok1.plain(zeros(256, np.int8)), "holds I8, expected F32"),
        5: (grok1.plain(zeros((256, 128), np.float32)), "expected I8 weight and BF16 scales"),
        17: (grok1.quantized(zeros((256, 128), np.int8), zeros((3, 128), np.uint16)), "first layer"),
        1: (grok1.plain(zeros(255, np.float32)), "shape"),
    }
    for number, (made, match) in cases.items():
        path = copy / layout.file_name(number)
        kept = path.read_bytes()
        replaced(copy, number, made)
        with pytest.raises(IntegrityError, match=match):
            assert formats.open_reader(copy, allow_pickle=True).infos()
        path.write_bytes(kept)
    assert formats.open_reader(copy, allow_pickle=True).infos()


def test_a_file_that_changes_after_it_was_checked(copy: Path) -> None:
    reader = formats.open_reader(copy, allow_pickle=True)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert reader.infos()
    path = copy / layout.file_name(5)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="there were"):
        reader.rows(name, 0, 1)

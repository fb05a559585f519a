"""NF4 and FP4 as they are written: the nearest levels, absmax in order, the same bytes whatever the threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.formats.bnb.oracle import LEVELS
from tests.tiny import write_llama
from weightsmith import formats
from weightsmith.errors import IntegrityError, UsageError
from weightsmith.jobs import Options, Target, convert, plan
from weightsmith.quant import codecs, doubled, float4
from weightsmith.quant.codecs import decode
from weightsmith.types import Recipe

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def values(reader: formats.Reader, name: str) -> np.ndarray:
    info = reader.infos()[name]
    return decode(info.codec, reader.rows(name, 0, info.n_rows), info.row_len).reshape(info.shape)


@pytest.mark.parametrize("kind", ["NF4", "FP4"])
def test_every_weight_has_the_nearest_level(kind: str) -> None:
    rows = np.random.default_rng(0).standard_normal((8, 192)).astype(np.float32)
    rows[3, 64:128] = 0
    rows[4, :64] *= np.float32(1e-30)
    packed = codecs.encode(kind, rows).reshape(-1, 36)
    for block, weights in zip(packed, rows.reshape(-1, 64), strict=True):
        absmax = np.float32(np.abs(weights).max())
        assert block[:4].view(np.float32)[0] == absmax
        for j, weight in enumerate(weights.tolist()):
            nibble = int(block[4 + j // 2]) >> 4 if j % 2 == 0 else int(block[4 + j // 2]) & 15
            errors = np.abs(LEVELS[kind.lower()].astype(np.float64) * float(absmax) - weight)
            assert errors[nibble] <= errors.min() * (1 + 1e-4) + 1e-44
    np.testing.assert_array_equal(
        codecs.decode(kind, packed.reshape(8, -1), 192).reshape(-1, 64),
        float4.LEVELS[kind][np.stack([packed[:, 4:] >> 4, packed[:, 4:] & 15], axis=2).reshape(-1, 64)]
        * np.ascontiguousarray(packed[:, :4]).view(np.float32),
    )


def test_golden_bytes() -> None:
    row = np.zeros((1, 64), np.float32)
    row[0, :6] = (-2, 2, 0.1, -0.1, 1.1254, 0.68)
    # absmax 2; -1 is level 0, 1 is 15, 0.05 is nearest 0.0796 (8), -0.05 nearest -0.091 (6), 0.5627 is 13, 0.34 is 11
    assert codecs.encode("NF4", row).tobytes() == bytes.fromhex("00000040 0f 86 db" + "77" * 29)
    assert codecs.encode("FP4", row).tobytes() == bytes.fromhex("00000040 b3 19 57".replace("57", "54") + "00" * 29)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["NF4", "FP4"])
def test_weights_that_are_no_numbers(kind: str, bad: float) -> None:
    row = np.zeros((1, 64), np.float32)
    row[0, 9] = bad
    with pytest.raises(IntegrityError, match="no finite"):
        codecs.encode(kind, row)


def test_double_quantization_goes_there_and_back() -> None:
    absmax = np.random.default_rng(1).uniform(0.01, 0.2, 1000).astype(np.float32)
    codes, nested, offset = doubled.double(absmax)
    assert (codes.shape, nested.shape) == ((1000,), (4,))
    back = doubled.undouble(codes, doubled.levels(), nested.repeat(256)[:1000], float(offset))
    assert np.abs(back - absmax).max() < 0.01 * nested.max()
    same, zeros, mean = doubled.double(np.full(3, 0.5, np.float32))
    assert (set(same.tolist()), zeros.tolist(), mean) == ({127}, [0.0], 0.5)


def test_the_levels_of_double_quantization() -> None:
    levels = doubled.levels()
    assert (levels.size, levels[127], levels[-1], np.unique(levels).size) == (256, 0.0, 1.0, 256)
    np.testing.assert_allclose(levels[[0, 126, 128, 254]], [-0.99296875, -5.5e-7, 5.5e-7, 0.99296875], rtol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "nf4_dq", "fp4", "fp4_dq"])
def test_what_is_written_is_read_back(tmp_path: Path, kind: str) -> None:
    source = write_llama(tmp_path / "m")
    report = convert(source, Target.parse(kind), tmp_path / "out", Options())
    original, reader = formats.open_reader(source), formats.open_reader(report.path)
    planned = plan(source, Target.parse(kind), Options())
    assert (planned.nbytes, planned.bpw) == (report.nbytes, report.bpw), "a dry run says the exact size"
    assert report.nbytes == sum(info.nbytes for info in reader.native_infos().values())
    assert (reader.container, report.target) == ("bnb", f"bnb:{kind.upper()}")
    for name, info in original.infos().items():
        expected, found = values(original, name), values(reader, name)
        if "_proj" not in name or info.row_len % 64:
            np.testing.assert_array_equal(found, expected, err_msg=name)
        else:
            assert 0 < np.abs(found - expected).max() < 0.3 * np.abs(expected).max()
    assert reader.vocab() is not None
    original.close()
    reader.close()
    stored = load_file(report.path / "model.safetensors")
    assert stored[WEIGHT].shape == (64 * 64 // 2, 1)
    state = json.loads(stored[f"{WEIGHT}.quant_state.bitsandbytes__{kind[:3]}"].tobytes())
    assert (state["shape"], state["dtype"], "nested_offset" in state) == ([64, 64], "float16", kind.endswith("dq"))
    settings = json.loads((report.path / "config.json").read_text())["quantization_config"]
    left_alone = ["lm_head", *(f"model.layers.{layer}.mlp.down_proj" for layer in range(2))]
    assert sorted(settings["llm_int8_skip_modules"]) == left_alone  # 96 columns are no multiple of 64


def test_threads_and_slabs_change_nothing(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "m")
    for name, options in (("a", Options(threads=1)), ("b", Options(threads=4, memory=65536))):
        convert(source, Target.parse("nf4_dq"), tmp_path / name, options)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_copy_keeps_every_block(tmp_path: Path, kind: str) -> None:
    source = write_llama(tmp_path / "m")
    first = convert(source, Target.parse(kind), tmp_path / "a", Options())
    second = convert(first.path, Target.parse(kind), tmp_path / "b", Options())
    assert (len(second.codes.taken), second.codes.error) == (12, 0.0)
    stored, again = load_file(tmp_path / "a/model.safetensors"), load_file(tmp_path / "b/model.safetensors")
    assert stored.keys() == again.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_a_fault_of_the_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightsmith.formats.bnb.writer import BnbWriter

    put = BnbWriter.write

    def flipped(self: BnbWriter, info: Any, start: int, rows: np.ndarray) -> None:
        rows = rows.copy()
        rows[-1, -1] ^= 1 if info.name == WEIGHT else 0
        put(self, info, start, rows)

    monkeypatch.setattr(BnbWriter, "write", flipped)
    with pytest.raises(IntegrityError, match="not what was written") as caught:
        convert(write_llama(tmp_path / "m"), Target.parse("nf4"), tmp_path / "out", Options())
    assert caught.value.tensor == WEIGHT


def test_choices_that_it_does_not_have(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "m")
    for recipe in (Recipe(overrides=(("q_proj", "Q8_0"),)), Recipe(output_type="Q8_0")):
        with pytest.raises(UsageError, match="one type for all linears"):
            plan(source, Target.parse("nf4"), Options(recipe=recipe))
    with pytest.raises(UsageError, match="NF4_DQ"):
        Target.parse("bnb:Q4_0")


def test_a_gguf_does_not_take_it(tmp_path: Path) -> None:
    from weightsmith.errors import UnsupportedError

    source = write_llama(tmp_path / "m")
    with pytest.raises(UnsupportedError, match="'NF4' cannot be written"):
        plan(source, Target.parse("gguf:Q4_0"), Options(recipe=Recipe(overrides=(("attn_q", "NF4"),))))

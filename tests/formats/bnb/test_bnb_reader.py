"""bitsandbytes checkpoints against weights computed one at a time, and every claim in them against the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.formats.bnb.oracle import write_folder
from weightsmith import formats
from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.jobs import Options, Target, convert
from weightsmith.quant.codecs import decode

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def values(reader: Any, name: str) -> np.ndarray:
    info = reader.infos()[name]
    return decode(info.codec, reader.rows(name, 0, info.n_rows), info.row_len).reshape(info.shape)


def change(folder: Path, **changes: np.ndarray | None) -> None:
    """Replace parts of q_proj by suffix; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for suffix, value in changes.items():
        name = f"{WEIGHT}.{suffix}" if suffix else WEIGHT
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


def change_state(folder: Path, **changes: Any) -> None:
    raw = json.loads(load_file(folder / "model.safetensors")[STATE].tobytes())
    text = json.dumps({key: value for key, value in (raw | changes).items() if value is not None})
    change(folder, **{"quant_state.bitsandbytes__nf4": np.frombuffer(text.encode(), np.uint8)})


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("kind", "blocksize"), [("nf4", 64), ("fp4", 64), ("nf4", 4096), ("nf4", 32)])
def test_weights_are_exact(tmp_path: Path, kind: str, blocksize: int, dtype: str, nested: bool) -> None:
    folder, expected = write_folder(tmp_path / "m", kind, blocksize=blocksize, dtype=dtype, nested=nested)
    reader = formats.open_reader(folder)
    assert reader.container == "bnb"
    assert list(reader.infos()) == list(expected)
    assert reader.infos()[WEIGHT].codec == {"float16": "F16", "float32": "F32"}[dtype]
    for name, value in expected.items():
        np.testing.assert_array_equal(values(reader, name), value, err_msg=name)
    reader.close()


def test_any_slab_of_rows(tmp_path: Path) -> None:
    folder, expected = write_folder(tmp_path / "m", nested=True, dtype="float32")
    name = "model.layers.1.mlp.down_proj.weight"  # 96 columns: blocks of 64 reach into the next row
    reader = formats.open_reader(folder)
    for start, stop in ((0, 64), (0, 1), (1, 2), (5, 6), (31, 33), (63, 64), (7, 7)):
        found = reader.rows(name, start, stop).view(np.float32).reshape(stop - start, 96)
        np.testing.assert_array_equal(found, expected[name][start:stop])
    reader.close()


def test_eight_bits(tmp_path: Path) -> None:
    folder, expected = write_folder(tmp_path / "m", "int8")
    reader = formats.open_reader(folder)
    for name, value in expected.items():
        np.testing.assert_array_equal(values(reader, name), value, err_msg=name)
    reader.close()
    made = convert(folder, Target.parse("gguf:Q8_0"), tmp_path / "out.gguf", Options(keep_rest=True))
    assert len(made.codes.taken) == 14
    reader = formats.open_reader(made.path)
    for name, value in expected.items():  # a scale is rounded to a half
        np.testing.assert_allclose(values(reader, name), value, rtol=2**-11, err_msg=name)
        assert np.abs(values(reader, name) - value).max() <= made.codes.error
    reader.close()


def test_nibbles_in_wider_numbers(tmp_path: Path) -> None:
    folder, expected = write_folder(tmp_path / "m")
    packed = load_file(folder / "model.safetensors")[WEIGHT]
    change(folder, **{"": packed.reshape(-1).view(np.float16).reshape(-1, 1)})
    reader = formats.open_reader(folder)
    np.testing.assert_array_equal(values(reader, WEIGHT), expected[WEIGHT])
    reader.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"": np.zeros((64 * 32, 1), np.uint8)[:-1]}, r"shape \[2047, 1\], the configuration calls for \[2048, 1\]"),
        ({"": np.zeros((1024, 1), np.int32)}, "calls for|stored as I32"),
        ({"": None}, "missing"),
        ({"absmax": np.zeros(63, np.float32)}, r"shape \[63\], the configuration calls for \[64\]"),
        ({"absmax": np.zeros(64, np.uint8)}, "stored as U8"),
        ({"absmax": None}, "missing"),
        ({"quant_map": np.zeros(15, np.float32)}, "calls for"),
        ({"quant_map": None}, "missing"),
        ({"nested_absmax": np.zeros(1, np.float32)}, "nested_blocksize is None"),
        ({"quant_state.bitsandbytes__nf4": None}, "stored as U8 without a quant_state"),
        ({"quant_state.bitsandbytes__nf4": np.frombuffer(b"[1]", np.uint8)}, "quant_state"),
        ({"quant_state.bitsandbytes__nf4": np.frombuffer(b'{"a": ' * 9999, np.uint8)}, "quant_state"),
        ({"quant_state.bitsandbytes__nf4": np.full(70000, 32, np.uint8)}, "is no quant_state"),
        ({"quant_state.bitsandbytes__nf4": np.zeros(4, np.float32)}, "is no quant_state"),
        ({"extra": np.zeros(4, np.float32)}, "not part of"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    folder, _ = write_folder(tmp_path / "m")
    change(folder, **changes)
    reader = formats.open_reader(folder)
    with pytest.raises(IntegrityError, match=message) as caught:
        reader.infos()
    assert caught.value.tensor
    assert str(folder) in str(caught.value)
    reader.close()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quant_type": "fp4"}, IntegrityError, "its name says nf4"),
        ({"shape": [64, 63]}, IntegrityError, r"expected \[64, 64\]"),
        ({"shape": None}, IntegrityError, "quant_state's shape is None"),
        ({"blocksize": 0}, IntegrityError, "blocksize is 0"),
        ({"blocksize": 48}, IntegrityError, "blocksize is 48"),
        ({"blocksize": True}, IntegrityError, "blocksize is True"),
        ({"dtype": "float8"}, UnsupportedError, "'float8'"),
        ({"nested_blocksize": 100}, IntegrityError, "nested_blocksize is 100"),
        ({"nested_offset": "1"}, IntegrityError, "nested_offset is 1"),
        ({"nested_offset": float("nan")}, IntegrityError, "NaN|nested_offset is nan"),
    ],
)
def test_a_state_that_contradicts_itself(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder, _ = write_folder(tmp_path / "m", nested=True)
    change_state(folder, **changes)
    reader = formats.open_reader(folder)
    with pytest.raises(error, match=message):
        reader.infos()
    reader.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"absmax": np.full(64, np.nan, np.float32)}, "no finite numbers"),
        ({"quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}, "does not hold NF4's levels"),
    ],
)
def test_numbers_that_are_none(tmp_path: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    folder, _ = write_folder(tmp_path / "m")
    change(folder, **changes)
    reader = formats.open_reader(folder)
    with pytest.raises(IntegrityError, match=message) as caught:
        reader.rows(WEIGHT, 0, 1)
    assert caught.value.tensor == WEIGHT
    reader.close()


def test_eight_bits_without_scales(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "m", "int8")
    tensors = load_file(folder / "model.safetensors")
    stem = WEIGHT.removesuffix(".weight")
    save_file({n: v for n, v in tensors.items() if n != f"{stem}.SCB"}, folder / "model.safetensors")
    reader = formats.open_reader(folder)
    with pytest.raises(IntegrityError, match="without SCB"):
        reader.infos()
    reader.close()
    save_file(tensors | {f"{stem}.weight_format": np.array(2, np.uint8)}, folder / "model.safetensors")
    reader = formats.open_reader(folder)
    with pytest.raises(UnsupportedError, match="weight_format 2"):
        reader.rows(WEIGHT, 0, 1)
    reader.close()


@pytest.mark.parametrize(
    ("changes", "message"), [({"load_in_4bit": 1}, "load_in_4bit is '1'"), ({"load_in_8bit": True}, "both true")]
)
def test_settings_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder, _ = write_folder(tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(IntegrityError, match=message):
        formats.open_reader(folder)

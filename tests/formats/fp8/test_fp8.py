"""FP8 folders against weights computed one at a time, and every claim in them against the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.compressed_tensors.oracle import one_by_one, write_folder
from weightsmith import formats
from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.jobs import Options, Target, convert
from weightsmith.quant.codecs import decode

STEM = "model.layers.0.self_attn.q_proj"
TILE = [32, 48]


def values(reader: Any, name: str) -> np.ndarray:
    info = reader.infos()[name]
    return decode(info.codec, reader.rows(name, 0, info.n_rows), info.row_len).reshape(info.shape)


def folder_of(path: Path, scale: str, suffix: str = "weight_scale_inv", **settings: Any) -> Any:
    raw = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": TILE if scale == "tile" else None,
    }
    return write_folder(path, raw | settings, one_by_one, scale=scale, suffix=suffix)


@pytest.mark.parametrize(
    ("scale", "suffix", "method"),
    [
        ("tile", "weight_scale_inv", "fp8"),
        ("scalar", "weight_scale_inv", "fp8"),
        ("scalar", "weight_scale", "fp8"),
        ("channel", "weight_scale", "fbgemm_fp8"),
    ],
)
def test_weights_are_exact(tmp_path: Path, scale: str, suffix: str, method: str) -> None:
    folder, expected = folder_of(tmp_path / "m", scale, suffix, quant_method=method)
    reader = formats.open_reader(folder)
    assert reader.container == "fp8"
    for name, value in expected.items():
        np.testing.assert_array_equal(values(reader, name), value, err_msg=name)
        found = decode("F32", reader.rows(f"{STEM}.weight", 17, 40), 64)
        np.testing.assert_array_equal(found, expected[f"{STEM}.weight"][17:40])
    reader.close()


def test_tiles_that_do_not_divide(tmp_path: Path) -> None:
    folder, expected = folder_of(tmp_path / "m", "tile")
    name = "model.layers.1.mlp.gate_proj.weight"  # 96 x 64 in tiles of 32 x 48: the last column is narrow
    reader = formats.open_reader(folder)
    for start, stop in ((0, 96), (31, 33), (95, 96), (40, 41), (7, 7)):
        np.testing.assert_array_equal(decode("F32", reader.rows(name, start, stop), 64), expected[name][start:stop])
    reader.close()


def test_it_converts(tmp_path: Path) -> None:
    folder, expected = folder_of(tmp_path / "m", "tile")
    path = convert(folder, Target.parse("safetensors:BF16"), tmp_path / "out", Options()).path
    reader = formats.open_reader(path)
    for name, value in expected.items():
        rounded = torch.from_numpy(value).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(values(reader, name), rounded, err_msg=name)
    reader.close()


def test_scales_of_activations_are_passed_over(tmp_path: Path) -> None:
    folder, expected = folder_of(tmp_path / "m", "scalar")
    tensors = load_file(folder / "model.safetensors")
    for suffix in ("activation_scale", "input_scale", "input_scale_ub", "k_scale"):
        tensors[f"{STEM}.{suffix}"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors")
    reader = formats.open_reader(folder)
    assert list(reader.infos()) == list(expected)
    reader.close()


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for suffix, value in changes.items():
        tensors.pop(f"{STEM}.{suffix}", None)
        if value is not None:
            tensors[f"{STEM}.{suffix}"] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale_inv": None}, "stored as F8_E4M3 without weight_scale_inv"),
        ({"weight_scale_inv": torch.ones(2, 3)}, r"shape \[2, 3\] do not fit"),
        ({"weight_scale_inv": torch.ones(2)}, r"shape \[2\] do not fit"),
        ({"weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, "stored as I32"),
        ({"weight": torch.zeros(64, 63).to(torch.float8_e4m3fn)}, "calls for"),
        ({"weight": torch.zeros(64, 64, dtype=torch.int8)}, "stored as I8"),
        ({"weight": None}, "missing"),
        ({"other": torch.zeros(1)}, "not part of"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    folder, _ = folder_of(tmp_path / "m", "tile")
    change(folder, changes)
    reader = formats.open_reader(folder)
    with pytest.raises(IntegrityError, match=message) as caught:
        reader.infos()
    assert STEM in str(caught.value)
    assert str(folder) in str(caught.value)
    reader.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_scale_inv": torch.full((2, 2), torch.nan)},
        {"weight_scale_inv": torch.full((2, 2), torch.inf)},
        {"weight": torch.full((64, 64), torch.nan).to(torch.float8_e4m3fn)},
    ],
)
def test_numbers_that_are_none(tmp_path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    folder, _ = folder_of(tmp_path / "m", "tile")
    change(folder, changes)
    reader = formats.open_reader(folder)
    with pytest.raises(IntegrityError, match="no finite") as caught:
        reader.rows(f"{STEM}.weight", 0, 1)
    assert caught.value.tensor == f"{STEM}.weight"
    reader.close()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight_block_size": [128]}, IntegrityError, "weight_block_size"),
        ({"weight_block_size": [0, 128]}, IntegrityError, "weight_block_size"),
        ({"weight_block_size": "128"}, IntegrityError, "weight_block_size"),
        ({"weight_block_size": [True, 1]}, IntegrityError, "weight_block_size"),
        ({"expert_dtype": "fp4"}, UnsupportedError, "'fp4'"),
    ],
)
def test_settings_that_make_no_sense(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder, _ = folder_of(tmp_path / "m", "tile")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(error, match=message):
        formats.open_reader(folder)


def test_transformers_dequantizes_to_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    del transformers
    folder, _ = write_folder(
        tmp_path / "m",
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        lambda shape, seed: (
            {
                "weight": torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(torch.float8_e4m3fn),
                "weight_scale_inv": torch.rand(shape[0] // 32, shape[1] // 32, generator=torch.manual_seed(seed)),
            },
            np.zeros(shape, np.float32),
        ),
    )
    tensors = load_file(folder / "model.safetensors")
    reader = formats.open_reader(folder)
    for name in reader.infos():
        if "_proj" in name:
            stem = name.removesuffix(".weight")
            scales = tensors[f"{stem}.weight_scale_inv"]
            found = _dequantize_fp8_weight(tensors[name], scales, [32, 32], torch.float32)
            np.testing.assert_array_equal(values(reader, name), found.numpy(), err_msg=name)
    reader.close()

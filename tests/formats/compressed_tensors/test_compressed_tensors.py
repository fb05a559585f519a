"""compressed-tensors checkpoints against weights computed one at a time, and every claim in them against the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.compressed_tensors import oracle
from tests.formats.compressed_tensors.oracle import settings_for, write_folder
from weightsmith import formats
from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.jobs import Options, Target, convert
from weightsmith.quant.codecs import decode

STEM = "model.layers.0.self_attn.q_proj"


def values(reader: Any, name: str) -> np.ndarray:
    info = reader.infos()[name]
    return decode(info.codec, reader.rows(name, 0, info.n_rows), info.row_len).reshape(info.shape)


def check(folder: Path, expected: dict[str, np.ndarray]) -> None:
    reader = formats.open_reader(folder)
    assert reader.container == "compressed-tensors"
    assert list(reader.infos()) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(values(reader, name), value, err_msg=name)
        for start, stop in ((0, 1), (5, 38)):
            info = reader.infos()[name]
            if stop <= info.n_rows:
                part = decode(info.codec, reader.rows(name, start, stop), info.row_len)
                np.testing.assert_array_equal(part, value.reshape(-1, info.row_len)[start:stop], err_msg=name)
    reader.close()


def integers(
    folder: Path, *, bits: int = 4, group: int | None = 32, **kinds: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    strategy = "channel" if group is None else "group"
    settings = settings_for("pack-quantized", num_bits=bits, type="int", strategy=strategy, group_size=group)
    return write_folder(folder, settings, oracle.integers, bits=bits, group=group, **kinds)


@pytest.mark.parametrize(
    "kinds",
    [
        {},
        {"symmetric": False},
        {"symmetric": False, "plain_zeros": True},
        {"group": None},
        {"group": None, "symmetric": False},
        {"bits": 8},
        {"bits": 3, "symmetric": False},
        {"bits": 6},
        {"scattered": True, "symmetric": False},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float32, "group": 16},
    ],
    ids=str,
)
def test_packed_integers_are_exact(tmp_path: Path, kinds: dict[str, Any]) -> None:
    check(*integers(tmp_path / "m", **kinds))


@pytest.mark.parametrize("kind", ["float", "int"])
@pytest.mark.parametrize("scale", ["tensor", "scalar", "channel", "vector", "tile"])
def test_numbers_stored_one_by_one(tmp_path: Path, kind: str, scale: str) -> None:
    tile = {"block_structure": [32, 48], "strategy": "block"} if scale == "tile" else {}
    settings = settings_for(f"{kind}-quantized", num_bits=8, type=kind, **tile)
    activations = {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    folder, expected = write_folder(
        tmp_path / "m",
        settings,
        oracle.one_by_one,
        kind=kind,
        scale=scale,
        extra=lambda stem: {f"{stem}.{suffix}": value.clone() for suffix, value in activations.items()},
    )
    check(folder, expected)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_fours(tmp_path: Path, kind: str) -> None:
    settings = settings_for(
        f"{kind}-pack-quantized", num_bits=4, type="float", group_size=16 if kind == "nvfp4" else 32
    )
    check(*write_folder(tmp_path / "m", settings, oracle.fours, kind=kind))


@pytest.mark.parametrize(
    ("type_", "kinds"),
    [("Q4_0", {}), ("Q8_0", {"bits": 8}), ("Q4_0", {"group": None, "dtype": torch.bfloat16}), ("Q8_0", {"bits": 6})],
)
def test_codes_are_kept_in_blocks(tmp_path: Path, type_: str, kinds: dict[str, Any]) -> None:
    folder, expected = integers(tmp_path / "m", **kinds)
    report = convert(folder, Target.parse(f"gguf:{type_}"), tmp_path / "out.gguf", Options(keep_rest=True))
    assert (len(report.codes.taken), report.codes.error) == (14, 0)
    reader = formats.open_reader(report.path)
    for name, value in expected.items():
        np.testing.assert_array_equal(values(reader, name), value, err_msg=name)
    reader.close()


def test_w8a8_in_blocks(tmp_path: Path) -> None:
    settings = settings_for("int-quantized", num_bits=8, type="int")
    folder, expected = write_folder(tmp_path / "m", settings, oracle.one_by_one, kind="int")
    report = convert(folder, Target.parse("gguf:Q8_0"), tmp_path / "out.gguf", Options(keep_rest=True))
    assert len(report.codes.taken) == 14
    reader = formats.open_reader(report.path)
    for name, value in expected.items():
        assert np.abs(values(reader, name) - value).max() <= report.codes.error < 128 * 0.02 * 2**-11
    reader.close()


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for suffix, value in changes.items():
        tensors.pop(f"{STEM}.{suffix}", None)
        if value is not None:
            tensors[f"{STEM}.{suffix}"] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight_packed": torch.zeros(64, 7, dtype=torch.int32)}, UnsupportedError, r"shape \[64, 7\] do not hold"),
        ({"weight_packed": torch.zeros(63, 8, dtype=torch.int32)}, UnsupportedError, r"shape \[63, 8\] do not hold"),
        ({"weight_packed": torch.zeros(64, 8)}, IntegrityError, "stored as F32, expected I32"),
        ({"weight_packed": None}, IntegrityError, "missing"),
        ({"weight_packed": torch.zeros(64, 32, dtype=torch.uint8)}, IntegrityError, "stored as F16 do not fit 4-bit"),
        ({"weight_scale": None}, IntegrityError, "missing"),
        ({"weight_scale": torch.ones(64, 3)}, IntegrityError, r"shape \[64, 3\] do not fit"),
        ({"weight_scale": torch.ones(63, 2)}, IntegrityError, r"shape \[63, 2\] do not fit"),
        ({"weight_scale": torch.ones(64, 2, dtype=torch.int32)}, IntegrityError, "stored as I32"),
        ({"weight_shape": torch.tensor([64, 63])}, IntegrityError, r"says \[64, 63\]"),
        ({"weight_shape": torch.tensor([64, 64, 1])}, IntegrityError, "calls for"),
        ({"weight_zero_point": torch.zeros(7, 2, dtype=torch.int32)}, IntegrityError, "calls for"),
        ({"weight_g_idx": torch.zeros(63, dtype=torch.int32)}, IntegrityError, "calls for"),
        ({"extra": torch.zeros(1)}, IntegrityError, "not part of"),
        ({"weight_packed": None, "weight": torch.zeros(64, 64, dtype=torch.int8)}, IntegrityError, "not part of"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], error: type[Exception], message: str
) -> None:
    folder, _ = integers(tmp_path / "m")
    change(folder, changes)
    reader = formats.open_reader(folder)
    with pytest.raises(error, match=message) as caught:
        reader.infos()
    assert STEM in str(caught.value)
    assert str(folder) in str(caught.value)
    reader.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": torch.full((64, 2), torch.nan)}, "no finite"),
        ({"weight_g_idx": torch.full((64,), 2, dtype=torch.int32)}, "there are 2 groups"),
        ({"weight_g_idx": torch.full((64,), -2, dtype=torch.int32)}, "there are 2 groups"),
    ],
)
def test_numbers_that_are_none(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    folder, _ = integers(tmp_path / "m")
    change(folder, changes)
    reader = formats.open_reader(folder)
    with pytest.raises(IntegrityError, match=message) as caught:
        reader.rows(f"{STEM}.weight", 0, 1)
    assert caught.value.tensor == f"{STEM}.weight"
    reader.close()


def test_a_global_scale_of_zero(tmp_path: Path) -> None:
    settings = settings_for("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16)
    folder, _ = write_folder(tmp_path / "m", settings, oracle.fours, kind="nvfp4")
    for scale in (0.0, torch.nan):
        change(folder, {"weight_global_scale": torch.tensor([scale])})
        reader = formats.open_reader(folder)
        with pytest.raises(IntegrityError, match="weight_global_scale is"):
            reader.rows(f"{STEM}.weight", 0, 1)
        reader.close()


def test_an_index_that_was_never_filled_in(tmp_path: Path) -> None:
    folder, expected = integers(tmp_path / "m")
    change(folder, {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)})
    check(folder, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "marlin-24"}, UnsupportedError, "'marlin-24'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedError, "sparse storage"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, UnsupportedError, "rotations"),
        ({"quantization_status": "calibration"}, UnsupportedError, "not a finished"),
        ({"config_groups": [1]}, IntegrityError, "config_groups"),
        ({"config_groups": {"a": 1}}, IntegrityError, "'a' is no object"),
        ({"config_groups": {"a": {"weights": []}}}, IntegrityError, "weights of 'a'"),
        ({"config_groups": {"a": {"format": "x", "weights": {}}}}, UnsupportedError, "'x'"),
        ({"config_groups": {"a": {"weights": {"num_bits": 9}}}}, IntegrityError, "num_bits is '9'"),
        ({"config_groups": {"a": {"weights": {"num_bits": True}}}}, IntegrityError, "num_bits is 'True'"),
        ({"config_groups": {"a": {"weights": {"type": "complex"}}}}, UnsupportedError, "'complex'"),
        ({"config_groups": {"a": {"weights": {"type": "float", "num_bits": 6}}}}, UnsupportedError, "6-bit floats"),
        ({"config_groups": {"a": {"weights": {"group_size": 0}}}}, IntegrityError, "group_size is '0'"),
        ({"config_groups": {"a": {"weights": {"block_structure": [0, 1]}}}}, IntegrityError, "block_structure"),
    ],
)
def test_unknown_settings_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder, _ = integers(tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(error, match=message) as caught:
        formats.open_reader(folder)
    assert str(folder) in str(caught.value)


PEERS = {
    "W4A16": ("pack-quantized", torch.bfloat16),
    "W8A16": ("pack-quantized", torch.float16),
    "W4A16_ASYM": ("pack-quantized", torch.bfloat16),
    "W8A8": ("int-quantized", torch.bfloat16),
    "FP8": ("float-quantized", torch.bfloat16),
    "FP8_DYNAMIC": ("float-quantized", torch.float32),
    "FP8_BLOCK": ("float-quantized", torch.float32),
    "NVFP4A16": ("nvfp4-pack-quantized", torch.float32),
    "MXFP4A16": ("mxfp4-pack-quantized", torch.bfloat16),
}


@pytest.mark.parametrize("preset", PEERS)
def test_what_the_library_packs_is_read_as_it_unpacks_it(tmp_path: Path, preset: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    form, dtype = PEERS[preset]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.weights.group_size = {128: 32}.get(scheme.weights.group_size, scheme.weights.group_size)
    compressor = BaseCompressor.get_value_from_registry(form)

    def make(shape: tuple[int, int], *, seed: int) -> tuple[oracle.Tensors, np.ndarray]:
        generator = torch.Generator().manual_seed(seed)
        args = scheme.weights
        group = args.group_size or shape[1]
        n_groups = shape[1] // group if args.group_size else 1
        scale_shape = (shape[0], n_groups)
        if args.strategy == "block":
            scale_shape = tuple(-(-size // step) for size, step in zip(shape, args.block_structure, strict=True))
        elif args.strategy == "tensor":
            scale_shape = (1,)
        scale = torch.rand(scale_shape, generator=generator) * 0.02 + 0.001
        scale = 2.0 ** scale.log2().floor() if form.startswith("mx") else scale
        state = {"weight": (torch.randn(shape, generator=generator) * 0.1).to(dtype), "weight_scale": scale.to(dtype)}
        if form.startswith("nvfp4"):
            state["weight_global_scale"] = torch.tensor([100.0])
            state["weight_scale"] = scale * 100
        if not args.symmetric:
            state["weight_zero_point"] = torch.randint(-8, 8, scale_shape, generator=generator).to(torch.int8)
        packed = compressor.compress(dict(state), scheme)
        packed = {name: value.contiguous() for name, value in packed.items()}
        return dict(packed), compressor.decompress(dict(packed), scheme)["weight"].float().numpy()

    weights = json.loads(scheme.weights.model_dump_json())
    folder, expected = write_folder(tmp_path / "m", settings_for(form, **weights), make)
    reader = formats.open_reader(folder)
    for name, value in expected.items():
        found = values(reader, name)
        if "_proj" in name:  # it multiplies in the scale's type
            found = torch.from_numpy(found).to(dtype).float().numpy()
        assert np.isfinite(value).all()
        # The library divides NVFP4's scales in bfloat16, runtimes do not.
        np.testing.assert_allclose(found, value, rtol=2**-8 if preset.startswith("NVFP4") else 0, atol=0, err_msg=name)
    reader.close()

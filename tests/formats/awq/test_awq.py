"""AWQ folders by the published description, one nibble at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.gptq.oracle import random_linear, weights
from tests.tiny import bpe_tokenizer, llama_config, llama_tensors, write_llama
from weightsmith import formats
from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.awq.layout import Layout, Settings, pack, unpack
from weightsmith.formats.gptq import packed_writer
from weightsmith.jobs import Options, Target, convert

LINEAR = "model.layers.0.self_attn.q_proj"
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds each of eight columns: the other way round than ORDER


def slow_pack(codes: np.ndarray) -> np.ndarray:
    """Words int32 [n, k / 8] of codes [n, k]."""
    out = np.zeros((len(codes), codes.shape[1] // 8), np.int64)
    for row in range(len(codes)):
        for column in range(codes.shape[1]):
            word, at = divmod(column, 8)
            out[row, word] |= int(codes[row, column]) << (4 * PLACES[at])
    return out.astype(np.uint32).view(np.int32)


def packed(linear: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "qweight": slow_pack(linear["codes"].T),
        "qzeros": slow_pack(linear["zeros"].T),
        "scales": linear["scales"].T.astype(np.float16).copy(),
    }


def write_folder(folder: Path, *, group: int = 32, **settings: Any) -> tuple[Path, dict[str, np.ndarray]]:
    from safetensors.numpy import save_file

    config = llama_config()
    stored, expected = {}, {}
    for seed, (name, value) in enumerate(llama_tensors(config).items()):
        if "_proj" in name:
            linear = random_linear(value.shape, 4, group, seed=seed)
            linear["zeros"][0] = 0
            expected[name] = weights(linear)
            stored |= {f"{name.removesuffix('.weight')}.{part}": found for part, found in packed(linear).items()}
        else:
            stored[name] = value.astype(np.float16)
            expected[name] = stored[name].astype(np.float32)
    folder.mkdir()
    raw = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    config["quantization_config"] = {key: value for key, value in (raw | settings).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    bpe_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    save_file(stored, folder / "model.safetensors")
    return folder, expected


def test_words() -> None:
    assert pack(np.arange(8, dtype=np.uint8)[None])[0, 0] == 0x75316420
    codes = np.random.default_rng(0).integers(0, 16, (5, 48)).astype(np.uint8)
    np.testing.assert_array_equal(pack(codes).view(np.int32), slow_pack(codes))
    np.testing.assert_array_equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize("group", [32, 16, -1])
def test_weights_are_exact(tmp_path: Path, group: int) -> None:
    folder, expected = write_folder(tmp_path / "m", group=group)
    reader = formats.open_reader(folder)
    assert reader.container == "awq"
    for name, value in expected.items():
        info = reader.infos()[name]
        found = reader.rows(name, 0, info.n_rows).view(np.float16 if info.codec == "F16" else np.float32)
        np.testing.assert_array_equal(found.reshape(value.shape).astype(np.float32), value, err_msg=name)
    for start, stop in ((0, 1), (7, 9), (3, 3), (13, 64)):
        found = reader.rows(f"{LINEAR}.weight", start, stop).view(np.float32).reshape(stop - start, 64)
        np.testing.assert_array_equal(found, expected[f"{LINEAR}.weight"][start:stop])
    reader.close()


def test_it_converts(tmp_path: Path) -> None:
    folder, expected = write_folder(tmp_path / "m")
    reader = formats.open_reader(convert(folder, Target.parse("gguf:F32"), tmp_path / "m.gguf", Options()).path)
    found = reader.rows(f"{LINEAR}.weight", 0, 64).view(np.float32)
    np.testing.assert_array_equal(found, expected[f"{LINEAR}.weight"])
    reader.close()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"version": "gemv"}, UnsupportedError, "'gemv'"),
        ({"version": "GEMM"}, None, ""),
        ({"version": None, "format": "gemv_fast"}, UnsupportedError, "'gemv_fast'"),
        ({"bits": 3}, UnsupportedError, "3-bit"),
        ({"bits": None, "w_bit": 4, "q_group_size": 32, "group_size": None}, None, ""),
        ({"bits": "four"}, IntegrityError, "bits is 'four'"),
        ({"group_size": 0}, IntegrityError, "group_size is '0'"),
        ({"zero_point": "yes"}, IntegrityError, "zero_point is 'yes'"),
    ],
)
def test_unknown_variants_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception] | None, message: str
) -> None:
    folder, _ = write_folder(tmp_path / "m", **settings)
    if error is None:
        reader = formats.open_reader(folder)
        assert reader.infos()
        reader.close()
        return
    with pytest.raises(error, match=message):
        formats.open_reader(folder)


def test_groups_must_be_whole(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"]["group_size"] = 40
    (folder / "config.json").write_text(json.dumps(raw))
    reader = formats.open_reader(folder)
    with pytest.raises(UnsupportedError, match="cannot be packed") as caught:
        reader.infos()
    assert caught.value.tensor == f"{LINEAR}.weight"
    reader.close()


def test_what_is_written_is_the_description(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    source = formats.open_reader(write_llama(tmp_path / "source"))
    layout = Layout(Settings(32))
    shapes = {name: info.shape for name, info in source.infos().items() if "_proj" in name}
    linears = {name: random_linear(shape, 4, 32, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    packing = packed_writer.Packing(layout, layout.settings.dump(), set(linears))
    writer = packed_writer.create(tmp_path / "out", source.config, packing, source=source)
    for info in writer.plain:
        writer.write(info, 0, source.rows(info.name, 0, info.n_rows))
    for name, linear in linears.items():
        writer.put(name, layout.store(linear))
    out = writer.close()
    source.close()
    stored = load_file(out / "model.safetensors")
    for name, linear in linears.items():
        for suffix, value in packed(linear).items():
            np.testing.assert_array_equal(stored[f"{name.removesuffix('.weight')}.{suffix}"], value)
    reader = formats.open_reader(out)
    assert reader.container == "awq"
    name = f"{LINEAR}.weight"
    np.testing.assert_array_equal(reader.rows(name, 0, 64).view(np.float32), weights(linears[name]))
    reader.close()


def test_what_cannot_be_stored_is_refused() -> None:
    layout = Layout(Settings(32))
    with pytest.raises(UnsupportedError, match="no neighbours"):
        layout.store(random_linear((32, 64), 4, 32, scattered=True))
    linear = random_linear((32, 64), 4, 32)
    linear["zeros"][0, 0] = 16
    with pytest.raises(IntegrityError, match="no 4-bit"):
        layout.store(linear)
    linear = random_linear((32, 64), 4, 32)
    linear["scales"][0, 0] = np.float32(0.1)
    with pytest.raises(IntegrityError, match="no half"):
        layout.store(linear)

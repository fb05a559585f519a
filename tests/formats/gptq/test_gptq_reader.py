"""Packed checkpoints against weights computed one at a time, and every claim in them against the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.gptq.oracle import random_linear, write_folder
from tests.tiny import write_llama
from weightsmith import formats
from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.gptq.settings import parse
from weightsmith.formats.packed.reader import PackedReader
from weightsmith.jobs import Options, Target, convert

LINEAR = "model.layers.0.self_attn.q_proj"


def values(reader: Any, name: str) -> np.ndarray:
    from weightsmith.quant.codecs import decode

    info = reader.infos()[name]
    return decode(info.codec, reader.rows(name, 0, info.n_rows), info.row_len).reshape(info.shape)


def change_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(raw))


def change_tensors(folder: Path, changes: dict[str, np.ndarray | None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, -1), (2, 32), (3, 32), (8, 32), (8, -1), (4, 40)])
def test_weights_are_exact(tmp_path: Path, bits: int, group: int, checkpoint_format: str | None) -> None:
    folder, expected = write_folder(tmp_path / "m", bits=bits, group=group, checkpoint_format=checkpoint_format)
    reader = formats.open_reader(folder)
    assert (type(reader), reader.container) == (PackedReader, "gptq")
    assert list(reader.infos()) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(values(reader, name), value, err_msg=name)
    assert reader.infos()[f"{LINEAR}.weight"].codec == "F32"
    reader.close()


@pytest.mark.parametrize("kinds", [{"sym": True}, {"scattered": True}])
def test_symmetric_and_scattered_groups(tmp_path: Path, kinds: dict[str, bool]) -> None:
    folder, expected = write_folder(tmp_path / "m", **kinds)
    reader = formats.open_reader(folder)
    for name, value in expected.items():
        np.testing.assert_array_equal(values(reader, name), value, err_msg=name)
    reader.close()


def test_old_folders(tmp_path: Path) -> None:
    folder, expected = write_folder(tmp_path / "m", old=True)
    reader = formats.open_reader(folder)
    np.testing.assert_array_equal(values(reader, f"{LINEAR}.weight"), expected[f"{LINEAR}.weight"])
    assert "quantize_config.json" in {file.name for file in reader.files()}
    reader.close()


@pytest.mark.parametrize("bits", [3, 4])
def test_any_slab_of_rows(tmp_path: Path, bits: int) -> None:
    folder, expected = write_folder(tmp_path / "m", bits=bits)
    reader = formats.open_reader(folder)
    name = "model.layers.1.mlp.gate_proj.weight"
    for start, stop in ((0, 96), (0, 1), (5, 6), (31, 33), (17, 80), (95, 96), (7, 7)):
        found = reader.rows(name, start, stop).view(np.float32).reshape(stop - start, 64)
        np.testing.assert_array_equal(found, expected[name][start:stop])
    with pytest.raises(IndexError):
        reader.rows(name, 0, 97)
    reader.close()


@pytest.mark.parametrize("target", ["safetensors", "gguf:F32", "gguf:Q8_0"])
def test_it_converts(tmp_path: Path, target: str) -> None:
    folder, expected = write_folder(tmp_path / "m")
    wanted = Target.parse(target)
    out = convert(folder, wanted, tmp_path / f"out{'.gguf' if wanted.container == 'gguf' else ''}", Options()).path
    reader = formats.open_reader(out)
    assert reader.vocab() is not None
    for name, value in expected.items():
        found = values(reader, name)
        if target.endswith("Q8_0") and value.ndim == 2:
            assert np.abs(found - value).max() < np.abs(value).max() / 100
        else:
            np.testing.assert_array_equal(found, value, err_msg=name)
    reader.close()


def test_an_index_of_zeros_was_never_filled_in(tmp_path: Path) -> None:
    folder, expected = write_folder(tmp_path / "m")
    change_tensors(folder, {f"{LINEAR}.g_idx": np.zeros(64, np.int32)})
    reader = formats.open_reader(folder)
    np.testing.assert_array_equal(values(reader, f"{LINEAR}.weight"), expected[f"{LINEAR}.weight"])
    reader.close()


def test_a_missing_index_is_the_plain_one(tmp_path: Path) -> None:
    folder, expected = write_folder(tmp_path / "m")
    change_tensors(folder, {f"{LINEAR}.g_idx": None})
    reader = formats.open_reader(folder)
    np.testing.assert_array_equal(values(reader, f"{LINEAR}.weight"), expected[f"{LINEAR}.weight"])
    reader.close()


def test_the_zero_below_one_goes_round(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "m")
    change_tensors(folder, {f"{LINEAR}.qzeros": np.full((2, 8), -1, np.int32)})
    reader = formats.open_reader(folder)
    assert values(reader, f"{LINEAR}.weight").min() == 0
    reader.close()


def test_biases_of_zeros_are_passed_over(tmp_path: Path) -> None:
    folder, expected = write_folder(tmp_path / "m")
    change_tensors(folder, {f"{LINEAR}.bias": np.zeros(64, np.float16)})
    reader = formats.open_reader(folder)
    assert list(reader.infos()) == list(expected)
    reader.close()
    change_tensors(folder, {f"{LINEAR}.bias": np.full(64, 0.5, np.float16)})
    reader = formats.open_reader(folder)
    with pytest.raises(IntegrityError, match="not part of a llama"):
        reader.infos()
    reader.close()


def test_a_linear_may_be_left_out(tmp_path: Path) -> None:
    folder, expected = write_folder(tmp_path / "m")
    plain = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    parts = dict.fromkeys(f"{LINEAR}.{suffix}" for suffix in ("qweight", "qzeros", "scales", "g_idx"))
    change_tensors(folder, {**parts, f"{LINEAR}.weight": plain})
    change_config(folder, dynamic={"-:.*q_proj": {}})
    reader = formats.open_reader(folder)
    assert reader.infos()[f"{LINEAR}.weight"].codec == "F16"
    np.testing.assert_array_equal(values(reader, f"{LINEAR}.weight"), plain)
    other = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(values(reader, other), expected[other])
    reader.close()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 5}, UnsupportedError, "5-bit"),
        ({"bits": "4"}, IntegrityError, "bits is '4'"),
        ({"bits": True}, IntegrityError, "bits is 'True'"),
        ({"group_size": 0}, IntegrityError, "group_size is 0"),
        ({"sym": 1}, IntegrityError, "sym is '1'"),
        ({"checkpoint_format": "marlin"}, UnsupportedError, "'marlin'"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, IntegrityError, "differ"),
        ({"is_marlin_format": True}, UnsupportedError, "marlin"),
        ({"pack_dtype": "int16"}, UnsupportedError, "'int16'"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, UnsupportedError, "settings of their own"),
        ({"dynamic": []}, None, ""),
        ({"dynamic": [1]}, IntegrityError, "dynamic is not"),
    ],
)
def test_unknown_variants_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception] | None, message: str
) -> None:
    folder, _ = write_folder(tmp_path / "m")
    change_config(folder, **changes)
    if error is None:
        formats.open_reader(folder).close()
        return
    with pytest.raises(error, match=message) as caught:
        formats.open_reader(folder)
    assert str(folder) in str(caught.value)


def test_synonyms_of_old_settings() -> None:
    found = parse({"w_bit": 4, "q_group_size": 128}, path=Path("x"))
    assert (found.bits, found.group_size, found.sym, found.zero_shift) == (4, 128, True, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{LINEAR}.qweight": np.zeros((8, 63), np.int32)}, r"shape \[8, 63\], the configuration calls for \[8, 64\]"),
        ({f"{LINEAR}.qweight": np.zeros((8, 64), np.float32)}, "stored as F32, expected I32"),
        ({f"{LINEAR}.qzeros": np.zeros((1, 8), np.int32)}, "calls for"),
        ({f"{LINEAR}.scales": np.zeros((2, 64), np.int16)}, "stored as I16"),
        ({f"{LINEAR}.g_idx": np.zeros(63, np.int32)}, "calls for"),
        ({f"{LINEAR}.scales": None}, "missing"),
        ({f"{LINEAR}.qweight": None}, "missing"),
        ({"model.layers.0.extra.qweight": np.zeros((8, 64), np.int32)}, "not part of"),
        ({"model.norm.weight": np.zeros(64, np.int32)}, "stored as I32"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder, _ = write_folder(tmp_path / "m")
    change_tensors(folder, changes)
    reader = formats.open_reader(folder)
    with pytest.raises(IntegrityError, match=message) as caught:
        reader.infos()
    assert caught.value.tensor
    reader.close()


def test_an_index_that_leads_nowhere(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "m")
    change_tensors(folder, {f"{LINEAR}.g_idx": np.full(64, 2, np.int32)})
    reader = formats.open_reader(folder)
    with pytest.raises(IntegrityError, match="there are 2 groups") as caught:
        reader.rows(f"{LINEAR}.weight", 0, 1)
    assert caught.value.tensor == f"{LINEAR}.weight"
    reader.close()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    plain = write_llama(tmp_path / "plain")
    reader = formats.open_reader(plain)
    assert reader.container == "safetensors"
    reader.close()
    folder, _ = write_folder(tmp_path / "m")
    change_config(folder, quant_method="hqq")
    with pytest.raises(UnsupportedError, match="hqq"):
        _ = formats.open_reader(folder).config


def test_the_oracle_would_notice_a_wrong_shift() -> None:
    linear = random_linear((32, 32), 4, 32)
    from tests.formats.gptq.oracle import packed

    assert (packed(linear, 4, 0)["qzeros"] != packed(linear, 4, 1)["qzeros"]).any()
    symmetric = random_linear((32, 32), 4, 32, sym=True)
    assert set(packed(symmetric, 4, 1)["qzeros"].ravel().tolist()) == {0x77777777}


def test_names_of_a_wrapper_are_refused_by_name(tmp_path: Path) -> None:
    """A text model beside an image encoder, packed: not a "missing" tensor, which would send people to pull again."""
    from safetensors.numpy import load_file, save_file

    folder, _ = write_folder(tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    save_file({f"language_model.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match="only") as caught:
        formats.open_reader(folder).infos()
    assert str(caught.value.tensor).startswith("language_model.")

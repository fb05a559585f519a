"""Mistral's form in 8 bits: weights computed one at a time, the same model in Hugging Face's form, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.native import gguf_tensors, mistral_config, native_tensors, paired, write_mistral
from tests.tiny import llama_tensors
from weightsmith import formats
from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.jobs import Options, Target, convert
from weightsmith.quant.codecs import decode

torch = pytest.importorskip("torch", reason="torch writes these files")
QUANTIZATION = {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
Tensors = dict[str, Any]


def eight_bits(*, scale: str) -> tuple[Tensors, Tensors, dict[str, np.ndarray]]:
    """One model: in Mistral's form, in Hugging Face's (without what only activations need), and its weights."""
    config = mistral_config()
    canonical = llama_tensors(config)
    stored: Tensors = {}
    expected: dict[str, np.ndarray] = {}
    native: Tensors = {}
    rng = np.random.default_rng(0)
    for name, value in canonical.items():
        ours = next(iter(native_tensors(config, "BF16", canonical={name: value})))
        if "_proj" not in name:
            native |= native_tensors(config, "BF16", canonical={name: value})
            stored[name] = torch.from_numpy(value).to(torch.bfloat16)
            expected[name] = stored[name].float().numpy()
            continue
        codes = torch.from_numpy(value / np.abs(value).max() * 440).to(torch.float8_e4m3fn)
        scales = rng.uniform(0.001, 0.02, (len(value), 1) if scale == "row" else (1, 1)).astype(np.float32)
        expected[name] = np.empty(value.shape, np.float32)
        numbers = codes.double().numpy()
        for row in range(len(value)):
            for column in range(value.shape[1]):
                expected[name][row, column] = numbers[row, column] * float(scales[row if len(scales) > 1 else 0, 0])
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        count = heads.get(name.split(".")[-2])
        # Numbers of a row stay together: the order of rows is that of the pairs, for codes and scales alike.
        order = paired(np.arange(len(value)), count) if count else np.arange(len(value))
        shape = {"scalar": (), "one": (1,), "row": (len(value),)}[scale]
        stem = ours.removesuffix("weight")
        turned = scales[order] if len(scales) > 1 else scales
        native[ours] = codes.view(torch.uint8)[torch.from_numpy(order)].view(torch.float8_e4m3fn)
        native[f"{stem}qscale_weight"] = torch.from_numpy(turned.reshape(shape).copy())
        native[f"{stem}qscale_act"] = torch.tensor(0.25)
        stored[name] = codes
        stored[f"{name}_scale_inv"] = torch.from_numpy(scales.reshape((-1, 1) if scale == "row" else shape))
    native["layers.0.attention.kv_fake_quantizer.qscale_act"] = torch.tensor(1.5)
    return native, stored, expected


def write(folder: Path, tensors: Tensors, params: dict[str, Any] | None = None) -> Path:
    from safetensors.torch import save_file

    write_mistral(folder, params=QUANTIZATION | (params or {}))
    save_file(tensors, folder / "consolidated.safetensors")
    return folder


def write_hf(folder: Path, tensors: Tensors) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    settings = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    (folder / "config.json").write_text(json.dumps(mistral_config() | {"quantization_config": settings}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def values(reader: Any, name: str) -> np.ndarray:
    info = reader.infos()[name]
    return decode(info.codec, reader.rows(name, 0, info.n_rows), info.row_len).reshape(info.shape)


@pytest.mark.parametrize("scale", ["scalar", "one", "row"])
def test_weights_are_exact_and_those_of_the_other_form(scale: str, tmp_path: Path) -> None:
    native, stored, expected = eight_bits(scale=scale)
    reader = formats.open_reader(write(tmp_path / "native", native))
    other = formats.open_reader(write_hf(tmp_path / "hf", stored))
    assert (reader.container, other.container) == ("mistral", "fp8")
    assert replace(reader.config, name="", dtype="") == replace(other.config, name="", dtype="")
    assert reader.config.dtype == "BF16"
    assert list(reader.infos()) == list(other.infos()) == list(expected)
    for name, value in expected.items():
        assert reader.infos()[name].codec == ("F32" if "_proj" in name else "BF16"), name
        np.testing.assert_array_equal(values(reader, name), value, err_msg=name)
        np.testing.assert_array_equal(values(other, name), value, err_msg=name)
    name = "model.layers.1.self_attn.q_proj.weight"
    part = decode("F32", reader.rows(name, 5, 31), reader.infos()[name].row_len)
    np.testing.assert_array_equal(part, expected[name][5:31])
    assert reader.native_infos()["layers.0.attention.wq.weight"].codec == "F8_E4M3"
    reader.close()
    other.close()


@pytest.mark.parametrize("target", ["gguf", "gguf:Q8_0"])
def test_both_forms_give_the_same_gguf(target: str, tmp_path: Path) -> None:
    native, stored, _ = eight_bits(scale="scalar")
    sources = [write(tmp_path / "native", native), write_hf(tmp_path / "hf", stored)]
    made = []
    for number, source in enumerate(sources):
        path = tmp_path / f"{number}.gguf"
        convert(source, Target.parse(target), path, Options())
        made.append(gguf_tensors(path))
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("changes", "message", "tensor"),
    [
        ({"layers.0.attention.wq.qscale_weight": None}, "without qscale_weight", "layers.0.attention.wq.weight"),
        ({"layers.0.attention.wq.weight": None}, "a scale without", "layers.0.attention.wq.qscale_weight"),
        ({"layers.0.attention.wq.qscale_weight": (7,)}, "do not fit", "layers.0.attention.wq.qscale_weight"),
        ({"layers.0.attention_norm.qscale_weight": ()}, "a scale without", "layers.0.attention_norm.qscale_weight"),
    ],
)
def test_scales_that_do_not_fit(changes: dict[str, Any], message: str, tensor: str, tmp_path: Path) -> None:
    native, _, _ = eight_bits(scale="scalar")
    for name, shape in changes.items():
        if shape is None:
            del native[name]
        else:
            native[name] = torch.ones(shape)
    reader = formats.open_reader(write(tmp_path / "native", native))
    assert reader.native_infos()
    with pytest.raises(IntegrityError, match=message) as caught:
        reader.infos()
    assert caught.value.tensor == tensor


def test_a_scale_that_is_no_float(tmp_path: Path) -> None:
    native, _, _ = eight_bits(scale="scalar")
    native["layers.0.attention.wq.qscale_weight"] = torch.tensor(3)
    with pytest.raises(IntegrityError, match="stored as I64"):
        formats.open_reader(write(tmp_path / "native", native)).infos()


@pytest.mark.parametrize(
    ("quantization", "error", "message"),
    [
        ({"qformat_weight": "int8"}, UnsupportedError, "'int8'"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, UnsupportedError, "'compressed-tensors'"),
        ({"bits": 4}, UnsupportedError, "'unnamed'"),
        ("fp8", IntegrityError, "an object"),
    ],
)
def test_other_quantization_is_refused(quantization: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    native, _, _ = eight_bits(scale="scalar")
    folder = write(tmp_path / "native", native, {"quantization": quantization})
    with pytest.raises(error, match=message):
        formats.open_reader(folder).infos()

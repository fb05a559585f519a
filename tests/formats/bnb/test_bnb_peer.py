"""bitsandbytes itself, on the CPU: what it makes is read as it dequantizes it, and what is written here it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import write_llama
from weightsmith import formats
from weightsmith.evals import forward
from weightsmith.jobs import Options, Target, convert
from weightsmith.quant import codecs, doubled
from weightsmith.quant.codecs import decode

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("accelerate", reason="transformers needs accelerate to load bitsandbytes checkpoints")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
TOKENS = [[3, 17, 200, 45, 9, 300, 101, 77]]


def values(reader: Any, name: str) -> np.ndarray:
    info = reader.infos()[name]
    return decode(info.codec, reader.rows(name, 0, info.n_rows), info.row_len).reshape(info.shape)


def dequantized(model: Any, name: str) -> np.ndarray:
    parameter = model.get_parameter(name)
    if isinstance(parameter, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state).float().numpy()
    if isinstance(parameter, bnb.nn.Int8Params):
        return bnb.functional.int8_vectorwise_dequant(parameter.data, parameter.SCB).numpy()
    return parameter.detach().float().numpy()


def write(folder: Path, dtype: str) -> Path:
    """A tiny Llama whose linears all divide into blocks of 64."""
    import json

    write_llama(folder, intermediate_size=128)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    return folder


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("nf4", "float16"),
        ("nf4", "float32"),
        ("nf4_dq", "bfloat16"),
        ("fp4", "bfloat16"),
        ("fp4_dq", "float16"),
        ("int8", "float16"),
    ],
)
def test_its_checkpoints_are_read_as_it_reads_them(tmp_path: Path, kind: str, dtype: str) -> None:
    source = write(tmp_path / "m", dtype)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": kind[:3]}
        settings["bnb_4bit_use_double_quant"] = kind.endswith("dq")
    quantization = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=getattr(torch, dtype), quantization_config=quantization, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "packed")
    reader = formats.open_reader(tmp_path / "packed")
    assert reader.container == "bnb"
    for name in reader.infos():
        np.testing.assert_array_equal(values(reader, name), dequantized(model, name), err_msg=name)
    reader.close()


@pytest.mark.parametrize("kind", ["nf4_dq", "fp4"])
def test_what_is_written_it_loads(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path / "m", "float32")
    path = convert(source, Target.parse(kind), tmp_path / "packed", Options()).path
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu").eval()
    reader = formats.open_reader(path)
    for name, info in reader.infos().items():
        np.testing.assert_array_equal(values(reader, name), dequantized(model, name), err_msg=name)
        packed = isinstance(model.get_parameter(name), bnb.nn.Params4bit)
        assert packed == ("_proj" in name), info
    tokens = torch.tensor(TOKENS)
    decoder = forward.load(reader)
    found = decoder.logits(decoder.hidden(tokens).flatten(0, 1)).unflatten(0, tokens.shape)
    reader.close()
    with torch.no_grad():
        expected = model.dequantize()(tokens).logits
        # Its own kernel multiplies in bfloat16 where the processor has instructions for it.
        again = transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu").eval()
        rough = again(tokens).logits.float()
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-4
    assert (found - rough).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("kind", ["NF4", "FP4"])
def test_the_codec_makes_its_bytes(kind: str) -> None:
    rows = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    packed, state = bnb.functional.quantize_4bit(torch.from_numpy(rows), blocksize=64, quant_type=kind.lower())
    blocks = codecs.encode(kind, rows).reshape(-1, 36)
    np.testing.assert_array_equal(np.ascontiguousarray(blocks[:, :4]).view(np.float32)[:, 0], state.absmax.numpy())
    if kind == "NF4":  # of FP4's two zeros it takes either
        np.testing.assert_array_equal(blocks[:, 4:].reshape(-1), packed.numpy()[:, 0])
    found = bnb.functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_array_equal(decode(kind, blocks.reshape(64, -1), 512), found)


def test_the_levels_of_double_quantization() -> None:
    known = bnb.functional.create_dynamic_map().numpy()
    np.testing.assert_allclose(doubled.levels(), known, rtol=0, atol=1.2e-7)

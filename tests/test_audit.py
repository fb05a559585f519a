"""audit: our own files and llama.cpp's are explained by their original; what was altered is found and named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.tiny import write_llama
from weightsmith.cli.app import run
from weightsmith.formats import open_reader

ROOT = Path(__file__).parent.parent
Told = Callable[..., dict[str, Any]]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    def call(*args: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert run([*args, "--json", "-q"]) == code, capsys.readouterr()
        parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
        return parsed

    return call


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama with a chat template, whose rows hold whole blocks of 256."""
    monkeypatch.chdir(tmp_path)
    folder = write_llama(tmp_path / "base", hidden_size=256, intermediate_size=256, num_attention_heads=4)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {one["tensor"]: one["verdict"] for one in found["tensors"]}


@pytest.mark.parametrize("target", ["gguf:Q4_K_M", "gguf:Q4_0", "gguf:Q3_K_S", "gguf:IQ4_XS", "nf4", "fp4_dq"])
def test_our_own_files_are_explained(base: Path, told: Told, target: str) -> None:
    out = "out.gguf" if target.startswith("gguf") else "out"
    told("quantize", "./base", "--to", target, "-o", out)
    found = told("audit", f"./{out}", "--against", "./base", "--threads", "2")
    assert found["explained"]
    assert found["changes"] == []
    assert found["verdicts"].keys() == {"exact", "within"}
    assert verdicts(found)["model.norm.weight"] == "exact"


@pytest.mark.parametrize("target", ["gguf", "gguf:Q8_0", "gguf:BF16", "safetensors:BF16"])
def test_what_has_one_way_is_exact(base: Path, told: Told, target: str) -> None:
    out = "out.gguf" if target.startswith("gguf") else "out"
    told("convert", "./base", "--to", target, "-o", out)
    assert told("audit", f"./{out}", "--against", "./base")["verdicts"] == {"exact": 21}


@pytest.mark.slow
def test_error_feedback_is_explained_only_where_it_is_allowed(base: Path, told: Told, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The forge was cold and the smith was late. " * 60)
    how = ("--calibrate", "text.txt", "--rows", "4", "--ctx", "64", "--group-size", "32", "--effort", "fast")
    told("quantize", "./base", "--to", "gptq:4", "-o", "gptq", *how)
    assert told("audit", "./gptq", "--against", "./base", code=5)["verdicts"].keys() == {"exact", "unexplained"}
    found = told("audit", "./gptq", "--against", "./base", "--moved", "16")
    assert found["verdicts"].keys() == {"exact", "moved"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0", "Q5_1", "Q6_K", "IQ4_XS"])
def test_llama_cpp_s_files_are_explained(base: Path, told: Told, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("llama_cpp")
    told("convert", "./base", "--to", "gguf", "-o", "f16.gguf")
    command = [sys.executable, "-m", "benchmarks.llama_quantize", str(tmp_path / "f16.gguf"), str(tmp_path / "q.gguf")]
    subprocess.run([*command, kind, "1"], cwd=ROOT, check=True, capture_output=True)
    for against in ("./base", "./f16.gguf"):
        found = told("audit", "./q.gguf", "--against", against)
        assert found["explained"]
        assert found["changes"] == []


@pytest.mark.parametrize("target", ["gguf:Q4_K_S", "gguf:Q4_0", "gguf:Q8_0", "gguf:F16"])
def test_a_few_altered_weights_are_found(base: Path, told: Told, tmp_path: Path, target: str) -> None:
    """Three weights of the original changed by a tenth of a row's spread before the file is made."""
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    changed = tensors[name].copy()
    for row, column in ((7, 100), (8, 3), (100, 255)):
        changed[row, column] = -changed[row, column] + np.float16(0.05)
    save_file(tensors | {name: changed}, other / "model.safetensors")
    told("quantize", "./other", "--to", target, "-o", "out.gguf")
    found = told("audit", "./out.gguf", "--against", "./base", code=5)
    assert [tensor for tensor, verdict in verdicts(found).items() if verdict == "unexplained"] == [name]
    (one,) = [one for one in found["tensors"] if one["tensor"] == name]
    assert 1 <= one["outside"] <= 3
    assert (one["worst"]["row"], one["worst"]["column"]) in {(7, 100), (8, 3), (100, 255)}
    told("audit", "./out.gguf", "--against", "./other")


def test_a_changed_byte_of_a_file_is_found(base: Path, told: Told, tmp_path: Path) -> None:
    told("quantize", "./base", "--to", "gguf:Q4_K_S", "-o", "out.gguf")
    reader = open_reader(tmp_path / "out.gguf")
    info = reader.native_infos()["blk.0.ffn_gate.weight"]
    reader.close()
    data = bytearray((tmp_path / "out.gguf").read_bytes())
    data[info.offset + 144 * 5 + 20] ^= 0x44  # two codes of one block, four steps each
    (tmp_path / "out.gguf").write_bytes(data)
    found = told("audit", "./out.gguf", "--against", "./base", code=5)
    (one,) = [one for one in found["tensors"] if one["verdict"] == "unexplained"]
    assert one["tensor"] == "model.layers.0.mlp.gate_proj.weight"
    assert one["worst"]["row"] == 5
    assert one["outside"] == 2


def test_template_tokens_and_configuration_are_compared(base: Path, told: Told, tmp_path: Path) -> None:
    told("convert", "./base", "--to", "gguf", "-o", "out.gguf")

    def swapped(name: str, old: bytes, new: bytes) -> dict[str, Any]:
        assert len(old) == len(new)
        data = (tmp_path / "out.gguf").read_bytes()
        assert old in data
        (tmp_path / f"{name}.gguf").write_bytes(data.replace(old, new, 1))
        return told("audit", f"./{name}.gguf", "--against", "./base", code=5)

    changed = swapped("template", b"{{ m.content }}", b"{{ m.CONTENT }}")
    assert [one["what"] for one in changed["changes"]] == ["template"]
    assert changed["verdicts"] == {"exact": 21}
    changed = swapped("token", b"<|end_of_text|>", b"<|end_of_texx|>")
    assert "tokenizer" in {one["what"] for one in changed["changes"]}
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 500000.0}))
    changed = told("audit", "./out.gguf", "--against", "./base", code=5)
    assert [(one["what"], one["name"]) for one in changed["changes"]] == [("config", "rope_theta")]


def test_a_second_template_is_no_part_of_the_original(base: Path, told: Told, tmp_path: Path) -> None:
    """A key that ggml's programs read and no configuration has; one of the file's own is renamed to it in place."""
    told("convert", "./base", "--to", "gguf", "-o", "out.gguf")
    data = (tmp_path / "out.gguf").read_bytes()
    old, new = b"weightsmith.provenance.recipe", b"tokenizer.chat_template.evilx"
    assert len(old) == len(new)
    (tmp_path / "two.gguf").write_bytes(data.replace(old, new, 1))
    found = told("audit", "./two.gguf", "--against", "./base", code=5)
    assert [(one["what"], one["name"]) for one in found["changes"]] == [("template", new.decode())]
    found = told("audit", "./two.gguf", "--against", "./out.gguf", code=5)
    assert [(one["what"], one["name"]) for one in found["changes"]] == [("metadata", new.decode())]


def test_missing_extra_and_misshapen(base: Path, told: Told, tmp_path: Path) -> None:
    write_llama(
        tmp_path / "tied", hidden_size=256, intermediate_size=256, num_attention_heads=4, tie_word_embeddings=True
    )
    told("convert", "./base", "--to", "gguf:Q8_0", "-o", "out.gguf")
    told("convert", "./tied", "--to", "gguf:Q8_0", "-o", "tied.gguf")
    found = told("audit", "./out.gguf", "--against", "./tied", code=5)
    (head,) = [one for one in found["tensors"] if one["tensor"] == "lm_head.weight"]
    assert head["reason"] == "the original has no such tensor"
    found = told("audit", "./tied.gguf", "--against", "./base", code=5)
    (head,) = [one for one in found["tensors"] if one["tensor"] == "lm_head.weight"]
    assert head["reason"] == "is missing"
    write_llama(tmp_path / "wide", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    found = told("audit", "./out.gguf", "--against", "./wide", code=5)
    assert (
        "has shape" in next(one for one in found["tensors"] if one["tensor"].endswith("0.mlp.up_proj.weight"))["reason"]
    )


def test_people_are_told_too(base: Path, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    told("quantize", "./base", "--to", "gguf:Q4_0", "-o", "out.gguf")
    assert run(["audit", "./out.gguf", "--against", "./base", "-q", "--all"]) == 0
    said = capsys.readouterr().out
    assert "Everything is explained by rounding the original." in said
    assert "model.layers.0.self_attn.q_proj.weight" in said
    assert run(["audit", "./out.gguf", "-q"]) == 2, "--against is required"

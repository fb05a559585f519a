"""Our GGUF beside the one that llama.cpp's own converter makes of the same folder: metadata and tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import LLAMA3_ROPE, write_llama
from weightsmith.cli.app import run

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).parent.parent.parent

# Keys that differ, each with its reason. Anything else must be equal.
ONLY_THEIRS = {
    "general.name": "theirs is guessed from the folder's name and README; ours is written only where the model says it",
    "general.basename": "guessed from the folder's name",
    "general.finetune": "guessed from the folder's name",
    "general.size_label": "a label for people; ours is in `show`, from the tensors themselves",
    "general.version": "guessed from the folder's name",
    "general.sampling.top_p": "sampling defaults of generation_config.json, no property of the weights",
    "general.sampling.temp": "sampling defaults of generation_config.json, no property of the weights",
}
PROVENANCE = "weightsmith.provenance."  # where the file comes from; theirs does not say
ONLY_OURS = {
    "general.alignment": "the default, written out",
    "llama.attention.key_length": "always written: head_dim need not be hidden_size / heads",
    "llama.attention.value_length": "always written: head_dim need not be hidden_size / heads",
    "llama.attention.head_count_kv": "always written, also where it equals head_count",
    "tokenizer.ggml.add_eos_token": "always written, so that no reader has to know a default",
    "tokenizer.ggml.add_bos_token": "always written, so that no reader has to know a default",
    "tokenizer.ggml.add_space_prefix": "always written, so that no reader has to know a default",
    "tokenizer.ggml.padding_token_id": "config.json's pad_token_id, which theirs takes only from tokenizer files",
}


def theirs(tree: Path, folder: Path, outtype: str, out: Path, *, pre: str | None = None) -> Path:
    """Convert with llama.cpp's script; `pre` for a tokenizer whose fingerprint it does not know."""
    script = [str(ROOT / "benchmarks" / "llama_cpp_convert.py"), str(tree), pre] if pre else []
    command = [sys.executable, *(script or [str(tree / "convert_hf_to_gguf.py")]), str(folder)]
    command += ["--outtype", outtype, "--outfile", str(out)]
    env = os.environ | {"PYTHONPATH": str(tree / "gguf-py")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def fields(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape), np.asarray(t.data).tobytes())
        for t in gguf.GGUFReader(path).tensors
    }


def compare(ours: Path, peer: Path) -> None:
    a, b = tensors(ours), tensors(peer)
    assert set(a) == set(b)
    for name in b:
        assert a[name][:2] == b[name][:2], name
        if name == "rope_freqs.weight":
            # Ours is computed in float64 and rounded once, theirs in float32 step by step.
            mine, peers = (np.frombuffer(side[name][2], "<f4") for side in (a, b))
            np.testing.assert_allclose(mine, peers, rtol=3e-7, atol=0)
            continue
        assert a[name][2] == b[name][2], f"{name}: other bytes"
    mine, other = fields(ours), fields(peer)
    assert set(other) - set(mine) <= set(ONLY_THEIRS)
    assert {key for key in set(mine) - set(other) if not key.startswith(PROVENANCE)} <= set(ONLY_OURS)
    different = {key: (mine[key], other[key]) for key in mine.keys() & other.keys() if mine[key] != other[key]}
    assert {key: value for key, value in different.items() if key not in ONLY_THEIRS} == {}


@pytest.mark.slow
def test_the_demo_model_as_safetensors(demo_gguf: Path, llama_cpp_tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "SmolLM2-135M-Instruct"
    assert run(["convert", str(demo_gguf), "--to", "safetensors:F16", "-o", str(folder), "-q"]) == 0
    ours = tmp_path / "ours.gguf"
    assert run(["convert", str(folder), "--to", "gguf:F16", "-o", str(ours), "-q"]) == 0
    compare(ours, theirs(llama_cpp_tree, folder, "f16", tmp_path / "theirs.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("BF16", {}),
        ("F16", {"tie_word_embeddings": True}),
        ("F32", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0}),
        ("BF16", {"head_dim": 32}),
    ],
    ids=["bf16", "tied", "llama3-rope", "head-dim"],
)
def test_tiny_checkpoints(dtype: str, changes: dict[str, Any], llama_cpp_tree: Path, tmp_path: Path) -> None:
    """The tiny tokenizer's fingerprint is none that the converter knows, so it is told the pre-tokenizer."""
    folder = write_llama(tmp_path / "tiny", dtype=dtype, **changes)
    ours = tmp_path / "ours.gguf"
    assert run(["convert", str(folder), "--to", f"gguf:{dtype}", "-o", str(ours), "-q"]) == 0
    compare(ours, theirs(llama_cpp_tree, folder, dtype.lower(), tmp_path / "theirs.gguf", pre="llama-bpe"))

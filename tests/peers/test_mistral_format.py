"""Our GGUF of Mistral's original form beside the one that llama.cpp's converter makes of it with --mistral-format."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native import write_mistral
from tests.peers.test_converter import fields, tensors
from weightsmith.cli.app import run

pytest.importorskip("gguf")
DATA = pytest.importorskip("mistral_common", reason="mistral-common is not installed").__file__

# Keys that differ, each with its reason. Anything else must be equal.
DIFFERENT = {
    "general.name": "theirs is the folder's name with a capital letter",
    "general.alignment": "the default, which ours writes out",
    "llama.context_length": "theirs does not know params.json's max_seq_len",
    "llama.rope.freq_base": "theirs leaves it out where params.json does, and 10000 is then assumed",
    "tokenizer.chat_template": "theirs names one of its own; params.json has none",
    "tokenizer.ggml.add_space_prefix": "always written by ours, so that no reader has to know a default",
    "tokenizer.ggml.padding_token_id": "theirs takes the end of a text where the file has no padding token",
    "tokenizer.ggml.pre": "theirs is silent for SentencePiece, where nothing is read from it",
    "tokenizer.ggml.scores": "zeros for a byte-level vocabulary, which has none",
    "tokenizer.ggml.merges": "theirs lists every way to split a token, ours the one that is reached",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "name", "size"),
    [("tekken_240718.json", "tekken.json", 131072), ("tokenizer.model.v1", "tokenizer.model.v1", 32000)],
)
def test_mistral_format(source: str, name: str, size: int, llama_cpp_tree: Path, tmp_path: Path) -> None:
    file = Path(DATA or "").parent / "data" / source
    if not file.exists():
        pytest.skip(f"this mistral-common has no {source}")
    folder = write_mistral(tmp_path / "native", vocab_size=size, params={"max_seq_len": 32768})
    (folder / name).write_bytes(file.read_bytes())
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert run(["convert", str(folder), "--to", "gguf:BF16", "-o", str(ours), "-q"]) == 0
    command = [sys.executable, str(llama_cpp_tree / "convert_hf_to_gguf.py"), str(folder), "--mistral-format"]
    command += ["--outtype", "bf16", "--outfile", str(theirs)]
    env = os.environ | {"PYTHONPATH": str(llama_cpp_tree / "gguf-py")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert tensors(ours) == tensors(theirs)
    mine, peer = fields(ours), fields(theirs)
    assert set(peer) - set(mine) <= set(DIFFERENT)
    for key in mine:
        if not key.startswith("weightsmith."):
            assert key in DIFFERENT or mine[key] == peer.get(key), key
    if mine["tokenizer.ggml.model"] == "gpt2":
        assert set(mine["tokenizer.ggml.merges"]) < set(peer["tokenizer.ggml.merges"])

"""Our GGUF of Grok beside the one that llama.cpp's converter makes of the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.formats.grok import grok2
from tests.peers import test_converter as peer
from tests.tiny import bpe_tokenizer
from weightsmith import formats
from weightsmith.cli.app import run

KEYFAN = {"vocab_size": 384, "hidden_act": "gelu", "rope_theta": 10000.0, "max_position_embeddings": 8192}


def with_tokenizer(folder: Path) -> Path:
    """The converter wants a tokenizer.json and a template beside it."""
    bpe_tokenizer(384).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|begin_of_text|>"}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["keyfan", "grok-2"])
def test_tensors_and_keys(form: str, llama_cpp_tree: Path, tmp_path: Path) -> None:
    """Tensor for tensor, the norm behind the experts under either of its names; keys but for what the page explains."""
    source, ours = tmp_path / form, tmp_path / "ours.gguf"
    if form == "keyfan":
        grok2.write_hf(source, "keyfan", **KEYFAN)
    else:  # the ranks' files are beyond the converter, so it gets what we joined
        grok2.write_grok2(tmp_path / "ranks", vocab_size=384, rope_type="yarn")
        assert run(["convert", str(tmp_path / "ranks"), "--to", "safetensors", "-o", str(source), "-q"]) == 0
    with_tokenizer(source)
    assert run(["convert", str(source), "--to", "gguf", "-o", str(ours), "-q"]) == 0
    theirs = peer.theirs(llama_cpp_tree, source, "bf16", tmp_path / "theirs.gguf", pre="llama-bpe")
    a, b = peer.tensors(ours), {name.replace("post_ffw", "layer_output"): t for name, t in peer.tensors(theirs).items()}
    assert set(a) == set(b)
    assert [name for name in b if a[name] != b[name]] == []
    mine, other = ({k: v for k, v in peer.fields(path).items() if k.startswith("grok.")} for path in (ours, theirs))
    assert {key for key in mine.keys() & other.keys() if mine[key] != other[key]} == set()
    always = {f"grok.{key}" for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    always.add("grok.vocab_size")
    assert mine.keys() - other.keys() <= always
    assert other.keys() - mine.keys() <= ({"grok.router_logit_softcapping"} if form == "keyfan" else set())
    read = formats.open_reader(theirs)  # and theirs is read as the same model
    assert list(read.infos()) == list(formats.open_reader(ours).infos())

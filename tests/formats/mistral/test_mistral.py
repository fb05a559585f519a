"""Mistral's form: read as the tensors that went in, converted as Hugging Face's form, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.native import byte_ranks, gguf_tensors, mistral_config, safetensors_tensors, write_mistral, write_tekken
from tests.tiny import write_llama
from weightsmith import formats
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UnsupportedError, WeightsmithError
from weightsmith.formats.tokenizer import patterns

pytest.importorskip("torch", reason="torch writes these files")


def twin(folder: Path, **changes: Any) -> Path:
    """The same model in Hugging Face's form; without a tokenizer."""
    return write_llama(folder, tokenizer=False, dtype="BF16", **mistral_config(**changes))


def result(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*args, "--json", "-q"]) == code
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


@pytest.mark.parametrize("form", ["safetensors", "sharded", "pth"])
def test_what_went_in_is_read(form: str, tmp_path: Path) -> None:
    native = formats.open_reader(write_mistral(tmp_path / "native", form=form), allow_pickle=form == "pth")
    hf = formats.open_reader(twin(tmp_path / "hf"))
    assert native.container == "mistral"
    assert replace(native.config, name="") == replace(hf.config, name="")
    assert native.config.head_dim == 24
    assert list(native.infos()) == list(hf.infos())
    for name, info in hf.infos().items():
        assert np.array_equal(native.rows(name, 0, info.n_rows), hf.rows(name, 0, info.n_rows)), name


@pytest.mark.parametrize("target", ["safetensors", "gguf", "gguf:Q8_0"])
def test_conversion_equals_that_of_the_other_form(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {"native": write_mistral(tmp_path / "native"), "hf": twin(tmp_path / "hf")}
    verb = "quantize" if ":" in target else "convert"
    made = {}
    for name, path in sources.items():
        made[name] = tmp_path / f"made-{name}"
        assert result(capsys, verb, str(path), "--to", target, "-o", str(made[name]))["target"] == target
    tensors = {name: (safetensors_tensors if path.is_dir() else gguf_tensors)(path) for name, path in made.items()}
    assert tensors["native"] == tensors["hf"]
    again = [replace(formats.open_reader(path).config, name="") for path in made.values()]
    assert again[0] == again[1]


def test_show_and_the_catalog(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = byte_ranks()
    pattern = patterns.by_name("tekken").trained[0]
    folder = write_mistral(tmp_path / "native", vocab_size=len(tokens) - 3 + 24)
    write_tekken(folder / "tekken.json", tokens, pattern=pattern)
    (folder / "notes.txt").write_text("not part of it")
    shown = result(capsys, "show", str(folder))
    assert (shown["container"], shown["tensors"], shown["files"]) == ("mistral", 21, 3)
    assert shown["model"]["family"] == "mistral"
    assert result(capsys, "show", str(folder), "--metadata", "--tensors")["metadata"]["head_dim"] == 24
    assert result(capsys, "pull", str(folder))["ref"] == "native:original"
    assert result(capsys, "convert", "native", "--to", "gguf")["ref"] == "native:bf16"
    path = Path(result(capsys, "path", "native:bf16")["path"])
    vocab = formats.open_reader(path).vocab()
    assert vocab == formats.open_reader(folder).vocab()
    assert vocab is not None
    assert (vocab.pre, vocab.tokens[23], vocab.tokens[24 + 65]) == ("tekken", "<SPECIAL_23>", "A")
    assert result(capsys, "convert", "native", "--to", "mistral", code=2)["error"]["kind"] == "UsageError"


def test_pickles_need_permission(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "native", form="pth")
    with pytest.raises(UnsafeInputError, match="can run code"):
        formats.open_reader(folder)
    assert formats.open_reader(folder / "consolidated.00.pth", allow_pickle=True).container == "mistral"


def test_which_form_counts(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "both")
    assert formats.open_reader(folder / "consolidated.safetensors").container == "mistral"
    (folder / "config.json").write_text(json.dumps(mistral_config()))
    assert formats.open_reader(folder).container == "mistral", "a config.json alone is no other form"
    twin(folder)
    assert formats.open_reader(folder).container == "safetensors"
    write_mistral(tmp_path / "two")
    write_mistral(tmp_path / "two", form="pth")
    with pytest.raises(UnsupportedError, match="which of them count"):
        formats.open_reader(tmp_path / "two", allow_pickle=True)


@pytest.mark.parametrize(
    ("params", "window", "theta"),
    [
        ({}, None, 1e6),
        ({"sliding_window": 4096}, 4096, 1e4),
        ({"sliding_window": "4096"}, 4096, 1e4),
        ({"_sliding_window": 4096}, 4096, 1e4),
        ({"sliding_window": [4096, 4096]}, 4096, 1e4),
        ({"sliding_window": [None]}, None, 1e6),
        ({"sliding_window": 4096, "rope_theta": 2e5}, 4096, 2e5),
    ],
)
def test_windows_and_the_missing_theta(
    params: dict[str, Any], window: int | None, theta: float, tmp_path: Path
) -> None:
    config = formats.open_reader(write_mistral(tmp_path / "native", params=params)).config
    assert (config.sliding_window, config.rope_theta) == (window, theta)


@pytest.mark.parametrize(
    ("params", "context"),
    [({}, 32768), ({"max_seq_len": 1000}, 1000), ({"max_position_embeddings": 2000, "max_seq_len": 1000}, 2000)],
)
def test_length_of_the_context(params: dict[str, Any], context: int, tmp_path: Path) -> None:
    assert formats.open_reader(write_mistral(tmp_path / "x", params=params)).config.max_position_embeddings == context


def test_tied_embeddings(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    reader = formats.open_reader(write_mistral(tmp_path / "tied", params={"tied_embeddings": True}, **tied))
    assert reader.config.tie_word_embeddings
    assert "lm_head.weight" not in reader.infos()
    with pytest.raises(IntegrityError, match="missing") as caught:
        formats.open_reader(write_mistral(tmp_path / "not", **tied)).infos()
    assert caught.value.tensor == "output.weight"
    own = formats.open_reader(write_mistral(tmp_path / "own", params={"tied_embeddings": True}))
    assert not own.config.tie_word_embeddings, "a stored head that is no copy counts"


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2}}, IntegrityError, "missing"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 9}}, IntegrityError, "num_experts_per_tok"),
        ({"moe": {"num_experts": 128, "expert_hidden_dim": 4096}}, UnsupportedError, "expert_hidden_dim"),
        ({"moe": 8}, IntegrityError, "an object"),
        ({"multimodal": {"whisper_model_args": {}}}, UnsupportedError, "image or audio"),
        ({"yarn": {"factor": 16}}, UnsupportedError, "YaRN"),
        ({"llama_4_scaling": {"beta": 0.1}}, UnsupportedError, "scaled by position"),
        ({"quantization": {"qformat_weight": "int8"}}, UnsupportedError, "int8"),
        ({"lora": {"rank": 8}}, UnsupportedError, "adapter"),
        ({"model_type": "mamba"}, UnsupportedError, "mamba"),
        ({"activation": "gelu"}, UnsupportedError, "gelu"),
        ({"sliding_window": [None, 4096]}, UnsupportedError, "different windows"),
        ({"sliding_window": -1}, IntegrityError, "sliding_window"),
        ({"sliding_window": "interleaved"}, IntegrityError, "sliding_window"),
        ({"head_dim": 25}, IntegrityError, "even"),
        ({"head_dim": None}, IntegrityError, "head_dim"),
        ({"head_dim": 16}, IntegrityError, "calls for"),
        ({"vocab_size": 1 << 40}, IntegrityError, "vocab_size"),
        ({"n_kv_heads": 3}, IntegrityError, "divisor"),
        ({"n_layers": 1}, IntegrityError, "not part of a mistral model"),
    ],
)
def test_params_that_do_not_fit(params: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    reader = formats.open_reader(write_mistral(tmp_path / "native", params=params))
    assert reader.native_infos()
    with pytest.raises(error, match=message):
        reader.infos()


def test_the_text_model_beside_an_image_encoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Small 3.1 and 3.2, in Mistral's form and both of Hugging Face's: the same model, and a word on what is left."""
    import torch
    from safetensors.torch import load_file, save_file

    images = {"patch_conv.weight": torch.ones(4, 3, 2, 2), "transformer.layers.0.attention.wq.weight": torch.ones(4, 4)}
    folder = write_mistral(tmp_path / "native", params={"vision_encoder": {"hidden_size": 4}})
    own = {f"vision_encoder.{name}": value for name, value in images.items()}
    own |= {"vision_language_adapter.w_in.weight": torch.ones(4, 4), "pre_mm_projector_norm.weight": torch.ones(4)}
    save_file(load_file(folder / "consolidated.safetensors") | own, folder / "consolidated.safetensors")
    plain = formats.open_reader(twin(tmp_path / "plain"))
    readers = [formats.open_reader(folder)]
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    for form, wrapped in (("old", "language_model.{}"), ("new", "model.language_model.{}")):
        made = {f"{'model.' * (form == 'new')}vision_tower.{name}": value for name, value in images.items()}
        for name, value in tensors.items():
            inner = name.removeprefix("model.") if form == "new" else name
            made["lm_head.weight" if form == "new" and "lm_head" in name else wrapped.format(inner)] = value
        (tmp_path / form).mkdir()
        save_file(made, tmp_path / form / "model.safetensors")
        raw = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": config}
        (tmp_path / form / "config.json").write_text(json.dumps(raw | {"vision_config": {"hidden_size": 4}}))
        readers.append(formats.open_reader(tmp_path / form))
    for reader in readers:
        caplog.clear()
        assert replace(reader.config, name="") == replace(plain.config, name="")
        assert "image encoder is left out" in caplog.text
        assert list(reader.infos()) == list(plain.infos())
        for name, info in plain.infos().items():
            assert np.array_equal(reader.rows(name, 0, info.n_rows), plain.rows(name, 0, info.n_rows)), name


def test_missing_and_hostile_shards(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "native", form="sharded")
    index = folder / "consolidated.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("consolidated-00001", "../consolidated-00001"))
    with pytest.raises(UnsafeInputError):
        formats.open_reader(folder)
    index.write_text(text)
    (folder / "consolidated-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFoundError):
        formats.open_reader(folder)
    index.unlink()
    with pytest.raises(NotFoundError):
        formats.open_reader(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"hidden_dim": }', '{"hidden_dim": 1, "hidden_dim": 2}', '"hidden_dim"' * 9]
)
def test_damaged_params(text: str, tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "native")
    (folder / "params.json").write_text(text)
    with pytest.raises(WeightsmithError):
        assert formats.open_reader(folder).config

"""Meta's form, written rank by rank: read as exactly the tensors that went in, and converted as Hugging Face's form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.native import (
    LLAMA,
    LLAMA3_ROPE,
    byte_ranks,
    cut,
    gguf_tensors,
    meta_params,
    native_tensors,
    safetensors_tensors,
    write_meta,
    write_ranks,
)
from tests.tiny import llama_config, write_llama
from weightsmith import formats, jobs
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UnsupportedError
from weightsmith.types import Reader

torch = pytest.importorskip("torch", reason="torch writes these files")


def twin(folder: Path, **changes: Any) -> Path:
    """The same model in Hugging Face's form; without a tokenizer."""
    return write_llama(
        folder, tokenizer=False, **(LLAMA | {"dtype": "BF16", "max_position_embeddings": 4096} | changes)
    )


def open_meta(folder: Path) -> Reader:
    return formats.open_reader(folder, allow_pickle=True)


def assert_same(meta: Reader, hf: Reader) -> None:
    assert replace(meta.config, name="") == replace(hf.config, name="")
    assert list(meta.infos()) == list(hf.infos())
    for name, info in hf.infos().items():
        found = meta.infos()[name]
        assert (found.shape, found.codec, found.nbytes) == (info.shape, info.codec, info.nbytes), name
        assert np.array_equal(meta.rows(name, 0, info.n_rows), hf.rows(name, 0, info.n_rows)), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_what_went_in_is_read(ranks: int, embedding_axis: int, shared: bool, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", ranks=ranks, embedding_axis=embedding_axis, shared=shared)
    assert_same(open_meta(tmp_path / "meta"), formats.open_reader(twin(tmp_path / "hf")))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_type(dtype: str, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", dtype=dtype)
    assert_same(open_meta(tmp_path / "meta"), formats.open_reader(twin(tmp_path / "hf", dtype=dtype)))


def test_any_run_of_rows(tmp_path: Path) -> None:
    reader = open_meta(write_meta(tmp_path / "meta", embedding_axis=1))
    for name, info in reader.infos().items():
        whole = reader.rows(name, 0, info.n_rows)
        for start in range(0, info.n_rows, 5):
            for stop in (start, start + 1, min(start + 37, info.n_rows)):
                assert np.array_equal(reader.rows(name, start, stop), whole[start:stop]), (name, start, stop)
    with pytest.raises(IndexError):
        reader.rows("model.norm.weight", 0, 2)
    with pytest.raises(NotFoundError):
        reader.rows("model.other.weight", 0, 1)


def test_four_ranks_with_one_head_each(tmp_path: Path) -> None:
    changes = {"num_attention_heads": 4, "num_key_value_heads": 4}
    write_meta(tmp_path / "meta", ranks=4, **changes)
    assert_same(open_meta(tmp_path / "meta"), formats.open_reader(twin(tmp_path / "hf", **changes)))


@pytest.mark.parametrize("target", ["safetensors", "gguf", "gguf:Q8_0", "gguf:Q4_0"])
def test_conversion_equals_that_of_the_other_form(target: str, tmp_path: Path) -> None:
    sources = {"meta": write_meta(tmp_path / "meta", embedding_axis=1), "hf": twin(tmp_path / "hf")}
    made = {
        name: jobs.convert(
            path, jobs.Target.parse(target), tmp_path / f"made-{name}", jobs.Options(allow_pickle=True)
        ).path
        for name, path in sources.items()
    }
    tensors = {name: (safetensors_tensors if path.is_dir() else gguf_tensors)(path) for name, path in made.items()}
    assert tensors["meta"] == tensors["hf"]
    assert len(tensors["meta"]) == 21
    again = {name: formats.open_reader(path) for name, path in made.items()}
    assert replace(again["meta"].config, name="") == replace(again["hf"].config, name="")


def test_llama_3_with_its_tokenizer(tmp_path: Path) -> None:
    tokens = byte_ranks()
    size = len(tokens) + 256
    three = {"vocab_size": size, "rope_theta": 500000.0}
    folder = write_meta(tmp_path / "meta", params={"use_scaled_rope": True}, **three)
    write_ranks(folder / "tokenizer.model", tokens)
    reader = open_meta(folder)
    n = len(tokens)
    ends = {"bos_token_id": n, "eos_token_id": [n + 1, n + 8, n + 9], "pad_token_id": n + 4}
    same = twin(tmp_path / "hf", rope_scaling=LLAMA3_ROPE, max_position_embeddings=131072, **three, **ends)
    assert_same(reader, formats.open_reader(same))
    vocab = reader.vocab()
    assert vocab is not None
    assert (vocab.tokens[n], vocab.tokens[n + 4]) == ("<|begin_of_text|>", "<|finetune_right_pad_id|>")
    made = jobs.convert(folder, jobs.Target.parse("gguf"), tmp_path / "x.gguf", jobs.Options(allow_pickle=True)).path
    assert formats.open_reader(made).vocab() == vocab
    back = jobs.convert(made, jobs.Target.parse("safetensors"), tmp_path / "back", jobs.Options(allow_pickle=True)).path
    assert formats.open_reader(back).vocab() == vocab


def test_small_models_of_llama_3_2(tmp_path: Path) -> None:
    """Both matrices are stored and equal: tied, and the factor is 32."""
    three = {"tie_word_embeddings": True, "rope_theta": 500000.0}
    reader = open_meta(write_meta(tmp_path / "meta", params={"use_scaled_rope": True}, **three))
    assert reader.config.tie_word_embeddings
    assert reader.config.rope_scaling is not None
    assert reader.config.rope_scaling.factor == 32
    assert "lm_head.weight" not in reader.infos()
    assert "output.weight" in reader.native_infos()


@pytest.mark.parametrize(
    ("params", "context", "theta"),
    [
        ({"rope_theta": None}, 4096, 1e4),
        ({"rope_theta": None, "norm_eps": 1e-6}, 2048, 1e4),
        ({"rope_theta": 1e6}, 16384, 1e6),
        ({"rope_theta": 5e5}, 8192, 5e5),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, 131072, 5e5),
    ],
)
def test_what_params_leave_to_code(params: dict[str, Any], context: int, theta: float, tmp_path: Path) -> None:
    config = open_meta(write_meta(tmp_path / "meta", params=params)).config
    assert (config.max_position_embeddings, config.rope_theta) == (context, theta)
    factor = config.rope_scaling.factor if config.rope_scaling else None
    assert factor == (8 if params.get("use_scaled_rope") else None)


def test_absent_and_nested_keys(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta", num_key_value_heads=4, params={"n_kv_heads": None, "vocab_size": -1})
    plain = open_meta(folder).config
    assert (plain.n_kv_heads, plain.vocab_size, plain.intermediate_size) == (4, 384, 192)
    params = folder / "params.json"
    params.write_text(json.dumps({"model": json.loads(params.read_text()), "other": 1}))
    assert open_meta(folder).config == plain
    assert open_meta(folder).metadata()["model"]["dim"] == 64


def test_the_multiplier_of_the_feed_forward_block(tmp_path: Path) -> None:
    # int(8 * 64 / 3) = 170, int(1.3 * 170) = 221, next multiple of 64: 256
    changes = {"intermediate_size": 256}
    folder = write_meta(tmp_path / "meta", params={"ffn_dim_multiplier": 1.3, "multiple_of": 64}, **changes)
    assert_same(open_meta(folder), formats.open_reader(twin(tmp_path / "hf", **changes)))
    wrong = write_meta(tmp_path / "wrong", params={"ffn_dim_multiplier": 1.4, "multiple_of": 64, "n_layers": 2})
    with pytest.raises(IntegrityError, match=r"w1 has 192 rows .* 256 wide"):
        open_meta(wrong).infos()


def write_doubled(folder: Path, *, spoil: str = "") -> Path:
    """Two key heads in four ranks: each head twice. `spoil`: a tensor whose last copy differs."""
    write_meta(folder, ranks=4)
    config = llama_config(**LLAMA)
    tensors = native_tensors(config, "BF16")
    for name in list(tensors):
        if name.endswith(("wk.weight", "wv.weight")):
            heads = tensors[name].reshape(2, 16, 64)
            tensors[name] = heads.repeat_interleave(2, 0).reshape(64, 64).clone()
            if name == spoil:
                tensors[name][-1, -1] += 1
    for rank, part in enumerate(cut(tensors, 4)):
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(config, n_kv_heads=4)))
    return folder


def test_key_heads_stored_twice_are_read_once(tmp_path: Path) -> None:
    folder = write_doubled(tmp_path / "meta")
    reader = open_meta(folder)
    assert_same(reader, formats.open_reader(twin(tmp_path / "hf")))
    params = json.loads((folder / "params.json").read_text()) | {"n_kv_heads": 2}
    (folder / "params.json").write_text(json.dumps(params))
    assert open_meta(folder).config == reader.config


def test_copies_that_differ_are_noticed(tmp_path: Path) -> None:
    reader = open_meta(write_doubled(tmp_path / "late", spoil="layers.1.attention.wv.weight"))
    assert reader.config.n_kv_heads == 2
    with pytest.raises(IntegrityError, match="differ"):
        reader.rows("model.layers.1.self_attn.v_proj.weight", 0, 32)
    early = open_meta(write_doubled(tmp_path / "early", spoil="layers.0.attention.wk.weight"))
    assert early.config.n_kv_heads == 4, "four heads that are not two"


def test_pickles_need_permission(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta")
    for path in (folder, folder / "consolidated.00.pth", folder / "consolidated.01.pth"):
        with pytest.raises(UnsafeInputError, match="can run code") as caught:
            formats.open_reader(path)
        assert caught.value.exit_code == 4
        assert "--allow-pickle" in str(caught.value)
        assert open_meta(path).container == "meta"


def test_the_command_line_refuses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_meta(tmp_path / "meta")
    for args in (["show", str(folder)], ["convert", str(folder), "--to", "gguf", "-o", str(tmp_path / "x.gguf")]):
        assert run([*args, "-q"]) == 4
        assert "can run code" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()


def test_hugging_faces_form_comes_first(tmp_path: Path) -> None:
    write_meta(tmp_path / "both")
    twin(tmp_path / "both")
    assert formats.open_reader(tmp_path / "both").container == "safetensors"


def test_it_is_a_source_and_no_target() -> None:
    assert {"meta", "mistral"} <= set(formats.containers())
    assert not {"meta", "mistral"} & set(formats.targets())


def test_a_missing_rank(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta", ranks=4, num_key_value_heads=4)
    (folder / "consolidated.01.pth").rename(folder / "aside")
    with pytest.raises(NotFoundError, match=r"consolidated\.01\.pth is missing"):
        open_meta(folder)
    (folder / "aside").rename(folder / "consolidated.01.pth")
    (folder / "consolidated.03.pth").unlink()
    with pytest.raises(IntegrityError, match="may be missing"):
        open_meta(folder).infos()


def test_ranks_that_do_not_fit_together(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta")
    second = torch.load(folder / "consolidated.01.pth")
    path = folder / "consolidated.01.pth"
    name = "layers.0.attention.wq.weight"
    cases = {
        "missing": {key: value for key, value in second.items() if key != name},
        "not in the first": second | {"layers.9.attention.wq.weight": second[name]},
        "first rank has BF16": second | {name: second[name].float()},
        r"of \[32, 64\]": second | {name: second[name][:16].clone()},
    }
    for message, tensors in cases.items():
        torch.save(tensors, path)
        with pytest.raises(IntegrityError, match=message):
            open_meta(folder)


def test_norms_that_differ_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_meta(tmp_path / "meta")
    second = torch.load(folder / "consolidated.01.pth")
    second["layers.1.ffn_norm.weight"] += 1
    torch.save(second, folder / "consolidated.01.pth")
    assert open_meta(folder).infos()
    assert "layers.1.ffn_norm.weight" in caplog.text


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"dim": 0}, IntegrityError, "dim"),
        ({"dim": "64"}, IntegrityError, "dim"),
        ({"n_heads": 3}, IntegrityError, "divisor"),
        ({"n_kv_heads": 3}, IntegrityError, "divisor"),
        ({"n_layers": 1}, IntegrityError, "not part of a llama model"),
        ({"n_layers": 3}, IntegrityError, "missing"),
        ({"n_layers": 10**9}, IntegrityError, "n_layers"),
        ({"n_heads": 8}, IntegrityError, "calls for"),
        ({"vocab_size": 400}, IntegrityError, "vocab_size"),
        ({"vocab_size": [1]}, IntegrityError, "vocab_size"),
        ({"norm_eps": -1}, IntegrityError, "norm_eps"),
        ({"use_scaled_rope": 1}, IntegrityError, "use_scaled_rope"),
        ({"quantization_args": {"scheme": "int4"}}, UnsupportedError, "quantized"),
        ({"lora_args": {"rank": 16}}, UnsupportedError, "adapter"),
        ({"vision_chunk_size": 560}, UnsupportedError, "image"),
        ({"moe_args": {"num_experts": 16}}, UnsupportedError, "experts"),
    ],
)
def test_params_that_do_not_fit(params: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    reader = open_meta(write_meta(tmp_path / "meta", params=params))
    assert reader.native_infos()
    with pytest.raises(error, match=message):
        reader.infos()


def test_without_params(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta")
    (folder / "params.json").unlink()
    reader = open_meta(folder)
    assert reader.metadata() == {}
    assert reader.native_infos()["output.weight"].shape == (384, 64)
    with pytest.raises(NotFoundError):
        assert reader.config


def test_unknown_tensors_are_shown_and_refused(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta")
    for path in folder.glob("*.pth"):
        torch.save(torch.load(path) | {"cross_attention.wq.weight": torch.ones(2, 2)}, path)
    reader = open_meta(folder)
    assert {"cross_attention.wq.weight@0", "cross_attention.wq.weight@1"} <= set(reader.native_infos())
    with pytest.raises(IntegrityError, match="not part of a llama model"):
        reader.infos()


def test_the_tokenizer_one_level_up(tmp_path: Path) -> None:
    tokens = byte_ranks()
    folder = write_meta(tmp_path / "meta", vocab_size=len(tokens) + 256, rope_theta=500000.0)
    assert open_meta(folder).vocab() is None
    write_ranks(tmp_path / "tokenizer.model", tokens)
    vocab = open_meta(folder).vocab()
    assert vocab is not None
    assert vocab.bos_id == len(tokens)
    assert {file.name for file in open_meta(folder).files()} == {
        "params.json",
        "consolidated.00.pth",
        "consolidated.01.pth",
    }


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta")
    (folder / "consolidated.01.pth").rename(tmp_path / "outside.pth")
    (folder / "consolidated.01.pth").symlink_to(tmp_path / "outside.pth")
    with pytest.raises(UnsafeInputError):
        open_meta(folder)


def test_llama_2_with_its_sentencepiece_model(tmp_path: Path) -> None:
    """The same file name, told apart by content."""
    from tests.formats.tokenizer.training import sentencepiece_model

    folder = write_meta(tmp_path / "meta", embedding_axis=1, vocab_size=900, params={"vocab_size": -1})
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(size=900))
    reader = open_meta(folder)
    vocab = reader.vocab()
    assert vocab is not None
    assert (vocab.model, len(vocab.tokens), vocab.bos_id, vocab.eos_id, vocab.add_bos) == ("llama", 900, 1, 2, True)
    assert (reader.config.bos_token_id, reader.config.eos_token_ids, reader.config.vocab_size) == (1, (2,), 900)
    assert folder / "tokenizer.model" in reader.files()

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.formats.gguf import rawgguf as raw
from tests.formats.gguf.tinymodel import gguf_name, native_weights, tiny_config, tiny_vocab, tiny_weights, write_ours
from weightsmith.errors import IntegrityError, UnsupportedError, WeightsmithError
from weightsmith.formats import gguf as container
from weightsmith.formats.gguf.keys import FILE_TYPES, size_label
from weightsmith.types import ModelConfig, RopeScaling

CONFIGS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim of its own": {"head_dim": 32},
    "linear": {"rope_scaling": RopeScaling("linear", 2.5)},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)},
    "llama3 of unusual numbers": {"rope_scaling": RopeScaling("llama3", 6.25, 1.5, 3.7, 100_003)},
    "llama3 that never blends": {"rope_scaling": RopeScaling("llama3", 4.0, 1.0, 1.0, 500)},
    "llama3 that scales nothing": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 10**7)},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "no grouped queries": {"n_kv_heads": 4},
    "several ends": {"eos_token_ids": (257, 258, 9)},
    "pad": {"pad_token_id": 279},
    "numbers": {"rms_norm_eps": 3e-6, "rope_theta": 1234567.0, "max_position_embeddings": 1_048_576, "name": "Ä b"},
    "F32": {"dtype": "F32"},
    "BF16": {"dtype": "BF16"},
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("with_vocab", [True, False])
def test_configuration_survives(case: str, with_vocab: bool, tmp_path: Path) -> None:
    config = tiny_config(**CONFIGS[case])
    vocab = tiny_vocab() if with_vocab else None
    path = write_ours(tmp_path / "a.gguf", config, codec=config.dtype, vocab=vocab)
    with container.open_reader(path) as reader:
        assert reader.config == config
        assert (reader.vocab() is None) is not with_vocab


def test_mistral_reads_back_as_llama(tmp_path: Path) -> None:
    config = tiny_config(family="mistral", sliding_window=4096)
    path = write_ours(tmp_path / "a.gguf", config, vocab=tiny_vocab())
    with container.open_reader(path) as reader:
        assert reader.config == tiny_config(family="llama", sliding_window=None)


def test_value_types_are_those_of_the_reference_loader(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = tiny_config(rope_scaling=RopeScaling("linear", 2.0))
    fields = gguf.GGUFReader(write_ours(tmp_path / "a.gguf", config, vocab=tiny_vocab())).fields
    types = {name: field.types[0].name for name, field in fields.items() if not name.startswith("GGUF.")}
    u32 = "vocab_size context_length embedding_length block_count feed_forward_length attention.head_count"
    u32 += " attention.head_count_kv attention.key_length attention.value_length rope.dimension_count"
    expected = {f"llama.{name}": "UINT32" for name in u32.split()}
    expected |= {"general.file_type": "UINT32", "llama.rope.freq_base": "FLOAT32"}
    expected |= {"llama.attention.layer_norm_rms_epsilon": "FLOAT32", "llama.rope.scaling.factor": "FLOAT32"}
    expected |= dict.fromkeys(["general.architecture", "general.type", "llama.rope.scaling.type"], "STRING")
    expected |= {f"tokenizer.ggml.{name}_token_id": "UINT32" for name in ("bos", "eos")}
    expected |= {f"tokenizer.ggml.add_{name}": "BOOL" for name in ("bos_token", "eos_token", "space_prefix")}
    assert {name: types.get(name) for name in expected} == expected
    kinds = {name: fields[f"tokenizer.ggml.{name}"].types[1].name for name in ("tokens", "token_type", "merges")}
    assert kinds == {"tokens": "STRING", "token_type": "INT32", "merges": "STRING"}
    assert fields["general.architecture"].parts[-1].tobytes() == b"llama"


def test_file_types_agree_with_the_recipes() -> None:
    recipes = pytest.importorskip("weightsmith.quant.recipes")
    assert recipes.FILE_TYPES.items() <= FILE_TYPES.items()


@pytest.mark.parametrize(("count", "label"), [(134_515_008, "135M"), (1_235_814_400, "1.2B"), (8_030_261_248, "8.0B")])
def test_size_label(count: int, label: str) -> None:
    assert size_label(count) == label
    gguf = pytest.importorskip("gguf")
    assert gguf.size_label(count, 0, 0, 0) == label


def model_keys(config: ModelConfig, **changes: bytes | None) -> list[bytes]:
    """The keys of a model by hand; a change replaces a key (with "__" for a dot), None leaves it out."""
    keys: dict[str, bytes | None] = {
        "general.architecture": raw.text("general.architecture", "llama"),
        "llama.context_length": raw.u32("llama.context_length", config.max_position_embeddings),
        "llama.embedding_length": raw.u32("llama.embedding_length", config.hidden_size),
        "llama.block_count": raw.u32("llama.block_count", config.n_layers),
        "llama.feed_forward_length": raw.u32("llama.feed_forward_length", config.intermediate_size),
        "llama.attention.head_count": raw.u32("llama.attention.head_count", config.n_heads),
        "llama.attention.head_count_kv": raw.u32("llama.attention.head_count_kv", config.n_kv_heads),
        "llama.attention.layer_norm_rms_epsilon": raw.f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
    }
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    return [value for value in keys.values() if value is not None]


def model_file(path: Path, keys: list[bytes], weights: dict[str, np.ndarray]) -> Path:
    tensors, data = [], b""
    for name, value in weights.items():
        tensors.append(raw.tensor(name, value.shape[::-1], 0, len(data)))
        data += value.astype("<f4").tobytes()
        data += bytes(-len(data) % 32)
    path.write_bytes(raw.gguf(keys, tensors, data))
    return path


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    config = tiny_config(n_kv_heads=4)
    keys = model_keys(config, llama__attention__head_count_kv=None)
    path = model_file(tmp_path / "a.gguf", keys, native_weights(config, tiny_weights(config)))
    with container.open_reader(path) as reader:
        assert reader.config == tiny_config(n_kv_heads=4, dtype="F32", name="", bos_token_id=None, eos_token_ids=())


def test_counts_for_each_layer(tmp_path: Path) -> None:
    config = tiny_config()
    weights = native_weights(config, tiny_weights(config))
    per_layer = "llama.attention.head_count"
    same = raw.key(per_layer, 9, b"\5\0\0\0\2\0\0\0\0\0\0\0\4\0\0\0\4\0\0\0")
    other = raw.key(per_layer, 9, b"\5\0\0\0\2\0\0\0\0\0\0\0\4\0\0\0\2\0\0\0")
    path = model_file(tmp_path / "a.gguf", model_keys(config, llama__attention__head_count=same), weights)
    assert container.open_reader(path).config.n_heads == 4
    path = model_file(tmp_path / "b.gguf", model_keys(config, llama__attention__head_count=other), weights)
    with pytest.raises(UnsupportedError, match=per_layer):
        _ = container.open_reader(path).config


K = "llama."
HOSTILE_KEYS: dict[str, tuple[dict[str, bytes | None], type[WeightsmithError], str]] = {
    "no architecture": ({"general__architecture": None}, UnsupportedError, "general.architecture"),
    "other architecture": (
        {"general__architecture": raw.text("general.architecture", "mamba")},
        UnsupportedError,
        "mamba",
    ),
    "an adapter": ({"general__type": raw.text("general.type", "adapter")}, UnsupportedError, "adapter"),
    "no block count": ({"llama__block_count": None}, IntegrityError, "llama.block_count"),
    "4 billion blocks": ({"llama__block_count": raw.u32(K + "block_count", 2**32 - 1)}, IntegrityError, "block_count"),
    "1 block": ({"llama__block_count": raw.u32(K + "block_count", 1)}, IntegrityError, "block_count"),
    "negative": ({"llama__block_count": raw.key(K + "block_count", 5, b"\xff" * 4)}, IntegrityError, "block_count"),
    "text": ({"llama__block_count": raw.text(K + "block_count", "2")}, IntegrityError, "block_count"),
    "0 heads": ({"llama__attention__head_count": raw.u32(K + "attention.head_count", 0)}, IntegrityError, "head_count"),
    "3 heads": (
        {"llama__attention__head_count": raw.u32(K + "attention.head_count", 3)},
        IntegrityError,
        "attention.key_length",
    ),
    "8 heads": (
        {"llama__attention__head_count": raw.u32(K + "attention.head_count", 8)},
        IntegrityError,
        "tensor 'blk.0.attn_k.weight'",
    ),
    "1 kv head": (
        {"llama__attention__head_count_kv": raw.u32(K + "attention.head_count_kv", 1)},
        IntegrityError,
        "tensor 'blk.0.attn_k.weight'",
    ),
    "hidden size": (
        {"llama__embedding_length": raw.u32(K + "embedding_length", 128)},
        IntegrityError,
        "tensor 'token_embd",
    ),
    "ffn size": (
        {"llama__feed_forward_length": raw.u32(K + "feed_forward_length", 97)},
        IntegrityError,
        "tensor 'blk.0.ffn",
    ),
    "vocab size": ({"llama__vocab_size": raw.u32(K + "vocab_size", 281)}, IntegrityError, "llama.vocab_size"),
    "token count": ({"t": raw.texts("tokenizer.ggml.tokens", ["a"])}, IntegrityError, "tokenizer.ggml.tokens"),
    "no epsilon": ({"llama__attention__layer_norm_rms_epsilon": None}, IntegrityError, "layer_norm_rms_epsilon"),
    "theta 0": ({"llama__rope__freq_base": raw.f32(K + "rope.freq_base", 0.0)}, IntegrityError, "rope.freq_base"),
    "theta below 0": (
        {"llama__rope__freq_base": raw.f32(K + "rope.freq_base", -1e4)},
        IntegrityError,
        "rope.freq_base",
    ),
    "yarn": ({"y": raw.text(K + "rope.scaling.type", "yarn")}, UnsupportedError, "yarn"),
    "experts of which none is used": ({"e": raw.u32(K + "expert_count", 8)}, IntegrityError, "expert_used_count"),
    "experts of a dense model": (
        {"e": raw.u32(K + "expert_count", 8), "u": raw.u32(K + "expert_used_count", 2)},
        IntegrityError,
        "tensor 'blk.0.ffn",
    ),
    "absurd experts": (
        {"e": raw.u32(K + "expert_count", 1 << 31), "u": raw.u32(K + "expert_used_count", 2)},
        IntegrityError,
        "expert_count",
    ),
    "partial rotation": ({"r": raw.u32(K + "rope.dimension_count", 8)}, UnsupportedError, "rope.dimension_count"),
    "value length": ({"v": raw.u32(K + "attention.value_length", 8)}, UnsupportedError, "attention.value_length"),
    "attention scale": ({"s": raw.f32(K + "attention.scale", 0.5)}, UnsupportedError, "attention scale"),
    "not causal": ({"c": raw.key(K + "attention.causal", 7, b"\0")}, UnsupportedError, "causal"),
    "absurd context": ({"llama__context_length": raw.u32(K + "context_length", 0)}, IntegrityError, "context_length"),
}


@pytest.mark.parametrize("case", HOSTILE_KEYS)
def test_keys_are_held_against_the_tensors(case: str, tmp_path: Path) -> None:
    changes, kind, fragment = HOSTILE_KEYS[case]
    config = tiny_config()
    weights = native_weights(config, tiny_weights(config))
    reader = container.open_reader(model_file(tmp_path / "bad.gguf", model_keys(config, **changes), weights))
    assert len(reader.native_infos()) == len(weights)
    for use in (lambda: reader.config, reader.infos):
        with pytest.raises(kind) as caught:
            use()
        assert type(caught.value) is kind
        assert "bad.gguf" in str(caught.value)
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        ("missing", IntegrityError, "blk.1.ffn_up.weight"),
        ("no embedding", IntegrityError, "token_embd.weight"),
        ("extra", IntegrityError, "blk.0.attn_q_norm.weight"),
        ("wrong shape", IntegrityError, "blk.1.ffn_up.weight"),
        ("some biases", UnsupportedError, "attn_q.bias"),
        ("rope shape", IntegrityError, "rope_freqs.weight"),
        ("rope values", UnsupportedError, "rope_freqs.weight"),
    ],
)
def test_tensors_that_are_not_the_models(change: str, kind: type[WeightsmithError], named: str, tmp_path: Path) -> None:
    config = tiny_config()
    weights = native_weights(config, tiny_weights(config))
    match change:
        case "missing" | "no embedding":
            del weights[named]
        case "extra":
            weights[named] = np.ones(16, np.float32)
        case "wrong shape":
            weights[named] = weights[named][:-1]
        case "some biases":
            weights["blk.0.attn_q.bias"] = np.ones(64, np.float32)
        case "rope shape":
            weights[named] = np.ones(9, np.float32)
        case "rope values":
            weights[named] = np.linspace(1, 9, 8, dtype=np.float32)
    reader = container.open_reader(model_file(tmp_path / "bad.gguf", model_keys(config), weights))
    with pytest.raises(kind) as caught:
        reader.infos()
    assert "bad.gguf" in str(caught.value)
    assert named in str(caught.value)


def test_names_of_the_family_are_what_the_tests_say() -> None:
    assert gguf_name("model.layers.11.self_attn.o_proj.weight") == "blk.11.attn_output.weight"

"""config.json to ModelConfig and back, held against transformers' own configuration objects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import LLAMA3_ROPE, llama_config
from weightsmith.errors import IntegrityError, NotFoundError, UnsupportedError, WeightsmithError
from weightsmith.formats.safetensors.config import dump, parse, read_raw
from weightsmith.types import ModelConfig, RopeScaling

PATH = Path("model/config.json")
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
LINEAR = {"rope_type": "linear", "factor": 2.0}


def read(raw: dict[str, Any]) -> ModelConfig:
    return parse(raw, path=PATH, dtype="F16")


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def test_plain_llama() -> None:
    assert read(llama_config()) == ModelConfig(
        family="llama",
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        dtype="F16",
        bos_token_id=0,
        eos_token_ids=(1,),
    )


def test_what_a_missing_key_means() -> None:
    keys = ("num_key_value_heads", "rope_theta", "rms_norm_eps", "max_position_embeddings", "hidden_act", "torch_dtype")
    config = read(
        without(llama_config(), *keys, "bos_token_id", "eos_token_id", "architectures", "tie_word_embeddings")
    )
    assert (config.n_kv_heads, config.rope_theta, config.rms_norm_eps) == (4, 10000.0, 1e-6)
    assert (config.max_position_embeddings, config.dtype, config.tie_word_embeddings) == (2048, "F16", False)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (), None)
    mistral = read(without(llama_config(architectures=["MistralForCausalLM"], num_attention_heads=8), *keys))
    assert (mistral.n_kv_heads, mistral.sliding_window, mistral.max_position_embeddings) == (8, 4096, 131072)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": 32}, {"head_dim": 32}),
        ({"head_dim": None, "num_key_value_heads": None}, {"head_dim": 16, "n_kv_heads": 4}),
        ({"torch_dtype": None, "dtype": "bfloat16"}, {"dtype": "BF16"}),
        ({"torch_dtype": "torch.float32"}, {"dtype": "F32"}),
        ({"torch_dtype": "auto"}, {"dtype": "F16"}),
        ({"eos_token_id": [5, 6, 7]}, {"eos_token_ids": (5, 6, 7)}),
        ({"eos_token_id": None, "bos_token_id": None}, {"eos_token_ids": (), "bos_token_id": None}),
        ({"pad_token_id": -1, "bos_token_id": -1}, {"pad_token_id": None, "bos_token_id": None}),
        ({"pad_token_id": 384}, {"pad_token_id": None}),
        ({"pad_token_id": 383}, {"pad_token_id": 383}),
        ({"attention_bias": True, "mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({"sliding_window": 16}, {"sliding_window": None}),
        ({"quantization_config": None, "layer_types": ["full_attention"] * 2}, {}),
        ({"_name_or_path": "/home/me/org/Tiny-1B/"}, {"name": "Tiny-1B"}),
        ({"auto_map": {"AutoConfig": "evil.py"}, "_attn_implementation_internal": "x/y"}, {}),
    ],
)
def test_llama_keys(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(llama_config(**changes)) == replace(read(llama_config()), **expected)


@pytest.mark.parametrize(
    ("window", "expected"), [({"sliding_window": None}, None), ({"sliding_window": 8}, 8), ({}, 4096)]
)
def test_mistral_window(window: dict[str, Any], expected: int | None) -> None:
    raw = llama_config(architectures=["MistralForCausalLM"], model_type="mistral", attention_bias=True) | window
    config = read(raw)
    assert (config.family, config.sliding_window, config.attention_bias) == ("mistral", expected, False)


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_scaling": None}, 10000.0, None),
        ({"rope_scaling": {"rope_type": "default"}}, 10000.0, None),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 5e5}, 5e5, None),
        ({"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000}, 5e5, LLAMA3),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 10000.0, RopeScaling("linear", 4.0)),
        ({"rope_scaling": LINEAR | {"type": "yarn"}}, 10000.0, RopeScaling("linear", 2.0)),
        ({"rope_parameters": {"rope_theta": 7.0}}, 7.0, None),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}, "rope_theta": None}, 7.0, None),
        ({"rope_parameters": LLAMA3_ROPE | {"rope_theta": 7.0}}, 7.0, LLAMA3),
        ({"rope_parameters": LLAMA3_ROPE, "rope_theta": 9.0}, 9.0, LLAMA3),
        (
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}},
            10000.0,
            RopeScaling("linear", 2.0),
        ),
        ({"rope_parameters": {"full_attention": LLAMA3_ROPE | {"rope_theta": 3.0}}}, 3.0, LLAMA3),
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR}, 10000.0, RopeScaling("linear", 2.0)),
        (
            {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k[0] != "o"}},
            10000.0,
            replace(LLAMA3, original_max_position_embeddings=512),
        ),
        (
            {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 32},
            10000.0,
            LLAMA3,
        ),
    ],
)
def test_both_forms_of_rope(changes: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    config = read(llama_config(**changes))
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'"),
        ({"architectures": None, "model_type": "gpt2"}, "'gpt2'"),
        ({"architectures": None, "model_type": None}, "unknown model family"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_parameters.rope_type 'longrope'"),
        ({"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LLAMA3_ROPE}}, "twice and differently"),
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"factor": 3.0}}, "twice and differently"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config, method 'gptq'"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "NAME_blocks and NAME_scales are not read"),
        (
            {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}},
            "quantized as well (quantization_config, method 'mxfp4')",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_unknown_things_are_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read(llama_config(**changes))
    assert says in str(caught.value)
    assert str(PATH) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({key: value} for key in ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size") for value in
          (0, -1, 1.5, True, "8", [8], None, 2**31, 10**400)),
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 4097},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 0},
        {"head_dim": 15},
        {"head_dim": 0},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": "1e-5"},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": float("inf")},
        {"rope_theta": -1},
        {"rope_theta": True},
        {"tie_word_embeddings": "false"},
        {"tie_word_embeddings": 1},
        {"attention_bias": "yes"},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [["LlamaForCausalLM"]]},
        {"model_type": 3, "architectures": []},
        {"hidden_act": 3},
        {"bos_token_id": 384},
        {"eos_token_id": [1, "2"]},
        {"eos_token_id": [True]},
        {"eos_token_id": 1.0},
        {"rope_scaling": [1]},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
        {"rope_scaling": {"rope_type": 3}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}},
        {"rope_parameters": {"full_attention": 3}},
        {"quantization_config": "gptq"},
    ],
    ids=lambda changes: str(changes)[:60],
)  # fmt: skip
def test_values_of_the_wrong_type_or_size(changes: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError) as caught:
        read(llama_config(**changes))
    assert next(iter(changes)) in str(caught.value)
    assert str(PATH) in str(caught.value)
    assert len(str(caught.value)) < 500


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ROPE_KEYS = ("rope_type", "type", "factor", "rope_theta", "full_attention", "low_freq_factor")


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*llama_config(), "head_dim", "rope_scaling", "layer_types", "pad_token_id"]), ANY),
    st.dictionaries(st.sampled_from(ROPE_KEYS), ANY | st.sampled_from(["linear", "llama3"])),
)
def test_any_values_never_crash(changes: dict[str, Any], rope: dict[str, Any]) -> None:
    try:
        config = read(llama_config(rope_parameters=rope, **changes))
    except WeightsmithError as error:
        str(error)
    else:
        assert read(json.loads(dump(config, dtype="F16"))) == replace(config, dtype="F16")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected an object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b" " * ((16 << 20) + 1), "expected at most"),
    ],
    ids=["empty", "cut", "list", "UTF-16", "twice", "deep", "17 MB"],
)
def test_damaged_file(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        read_raw(path)
    assert says in str(caught.value)
    assert "config.json" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_raw(tmp_path / "config.json")


CONFIGS = [
    read(llama_config()),
    read(llama_config(rope_scaling=LLAMA3_ROPE, eos_token_id=[1, 2], pad_token_id=3, tie_word_embeddings=True)),
    read(
        llama_config(rope_scaling=LINEAR, head_dim=32, attention_bias=True, _name_or_path="org/tiny", bos_token_id=None)
    ),
    read(llama_config(architectures=["MistralForCausalLM"], sliding_window=32, eos_token_id=None)),
    read(llama_config(architectures=["MistralForCausalLM"], sliding_window=None, torch_dtype="bfloat16")),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_written_config_reads_back(config: ModelConfig) -> None:
    data = dump(config, dtype=config.dtype)
    assert data == dump(config, dtype=config.dtype)
    assert read(json.loads(data)) == config


def test_golden_config() -> None:
    assert json.loads(dump(CONFIGS[3], dtype="F16")) == {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": None,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": 384,
    }


def agrees(config: ModelConfig, theirs: Any) -> None:
    """Hold ours against a transformers configuration object, field by field."""
    assert theirs.model_type == config.family
    assert theirs.vocab_size == config.vocab_size
    assert theirs.hidden_size == config.hidden_size
    assert theirs.intermediate_size == config.intermediate_size
    assert theirs.num_hidden_layers == config.n_layers
    assert (theirs.num_attention_heads, theirs.num_key_value_heads) == (config.n_heads, config.n_kv_heads)
    assert theirs.head_dim == config.head_dim
    assert theirs.rms_norm_eps == config.rms_norm_eps
    assert theirs.max_position_embeddings == config.max_position_embeddings
    assert theirs.tie_word_embeddings == config.tie_word_embeddings
    assert getattr(theirs, "sliding_window", None) == config.sliding_window
    assert getattr(theirs, "attention_bias", False) == config.attention_bias
    assert getattr(theirs, "mlp_bias", False) == config.mlp_bias
    assert (theirs.bos_token_id, theirs.pad_token_id) == (config.bos_token_id, config.pad_token_id)
    eos = theirs.eos_token_id
    assert (tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)) == config.eos_token_ids
    rope = dict(theirs.rope_parameters)
    rope.pop("type", None)  # the old name of rope_type stays where it was
    assert rope.pop("rope_theta") == config.rope_theta
    scaling = config.rope_scaling
    if scaling is None:
        assert rope == {"rope_type": "default"}
    elif scaling.kind == "linear":
        assert rope == {"rope_type": "linear", "factor": scaling.factor}
    else:
        assert rope == {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_transformers_reads_what_we_write(config: ModelConfig, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig

    (tmp_path / "config.json").write_bytes(dump(config, dtype=config.dtype))
    theirs = AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    agrees(config, theirs)
    assert theirs.dtype == {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[config.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_we_read_what_transformers_writes(config: ModelConfig, tmp_path: Path) -> None:
    """Its own form: rope_parameters, and `dtype`."""
    from transformers import AutoConfig

    (tmp_path / "config.json").write_bytes(dump(config, dtype=config.dtype))
    theirs = AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    theirs.save_pretrained(tmp_path / "again")
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in raw
    assert "rope_theta" not in raw
    assert replace(read(raw), name=config.name) == config


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3_ROPE},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 77.0},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 7.0}, "rope_theta": 9.0},
        {"rope_parameters": {"rope_theta": 7.0}},
        {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k[0] != "o"}},
        {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 32},
        {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k[0] != "o"}, "original_max_position_embeddings": 32},
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_attention_heads": 8,
         "num_key_value_heads": None, "max_position_embeddings": None},
    ],
)  # fmt: skip
def test_we_understand_as_transformers_does(changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    raw = {key: value for key, value in llama_config(**changes).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    agrees(read(raw), AutoConfig.from_pretrained(tmp_path, local_files_only=True))

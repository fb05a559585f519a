"""Mixtral between Hugging Face's form and GGUF: stacks, names, configuration, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.moe import as_torch, mixtral_config, mixtral_tensors, write_mixtral
from tests.native import gguf_tensors, paired, safetensors_tensors
from weightsmith import jobs
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError, UsageError, WeightsmithError
from weightsmith.formats import open_reader
from weightsmith.jobs import Options, Target
from weightsmith.types import Recipe

STACKS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}


def convert(source: Path, target: str, output: Path, **options: object) -> Path:
    return jobs.convert(source, Target.parse(target), output, Options(threads=2, **options)).path  # type: ignore[arg-type]


def stored_bytes(value: object) -> bytes:
    import torch

    return value.reshape(-1).view(torch.uint8).numpy().tobytes()  # type: ignore[attr-defined]


def test_gguf_has_what_went_in(tmp_path: Path) -> None:
    config = mixtral_config()
    source = write_mixtral(tmp_path / "hf")
    path = convert(source, "gguf", tmp_path / "a.gguf")
    found = gguf_tensors(path)
    half = as_torch(mixtral_tensors(config), "F16")
    for layer in range(2):
        for stack, part in STACKS.items():
            codec, shape, data = found.pop(f"blk.{layer}.{stack}.weight")
            names = [f"model.layers.{layer}.block_sparse_moe.experts.{e}.{part}.weight" for e in range(4)]
            rows, width = half[names[0]].shape
            assert (codec, shape) == ("F16", (width, rows, 4))
            assert data == b"".join(stored_bytes(half[name]) for name in names)
        codec, shape, data = found.pop(f"blk.{layer}.ffn_gate_inp.weight")
        router = half[f"model.layers.{layer}.block_sparse_moe.gate.weight"].float().numpy()
        assert (codec, shape, data) == ("F32", (64, 4), router.tobytes())
        query = half[f"model.layers.{layer}.self_attn.q_proj.weight"].numpy()
        assert found.pop(f"blk.{layer}.attn_q.weight")[2] == paired(query, 4).tobytes()
        for other in ("attn_k", "attn_v", "attn_output", "attn_norm", "ffn_norm"):
            del found[f"blk.{layer}.{other}.weight"]
    assert set(found) == {"token_embd.weight", "output_norm.weight", "output.weight"}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "head_dim": 32}, {"num_local_experts": 8}])
def test_there_and_back(changes: dict[str, object], tmp_path: Path) -> None:
    source = write_mixtral(tmp_path / "hf", dtype="BF16", **changes)
    path = convert(source, "gguf:BF16", tmp_path / "a.gguf")
    back = convert(path, "safetensors:BF16", tmp_path / "back")
    ours, theirs = safetensors_tensors(back), safetensors_tensors(source)
    assert set(ours) == set(theirs)
    for name, (dtype, shape, data) in ours.items():
        if len(shape) > 1:  # GGUF's vectors are F32, and stay so
            assert (dtype, shape, data) == theirs[name], name
    one, other = open_reader(source), open_reader(back)
    import dataclasses

    assert dataclasses.replace(one.config, name="") == dataclasses.replace(other.config, name="")
    assert json.loads((back / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    again = convert(back, "gguf:BF16", tmp_path / "b.gguf")
    assert gguf_tensors(again) == gguf_tensors(path)


def test_stacks_of_transformers_in_memory_are_the_same_model(tmp_path: Path) -> None:
    plain, stacks = write_mixtral(tmp_path / "plain"), write_mixtral(tmp_path / "stacks", stacks=True)
    one, other = open_reader(plain), open_reader(stacks)
    assert len(other.native_infos()) < len(one.native_infos())
    assert list(one.infos()) == list(other.infos())
    for name, info in one.infos().items():
        assert np.array_equal(one.rows(name, 0, info.n_rows), other.rows(name, 0, info.n_rows)), name
        middle = info.n_rows // 2
        assert np.array_equal(one.rows(name, middle, middle + 1), other.rows(name, middle, middle + 1)), name


def test_an_expert_stored_twice_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_mixtral(tmp_path / "both", stacks=True)
    single = as_torch(mixtral_tensors(mixtral_config()), "F16")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file(load_file(folder / "model.safetensors") | {name: single[name]}, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"experts\.2\.w3.*twice"):
        open_reader(folder).infos()


def test_a_stack_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path / "a", stacks=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(IntegrityError, match=r"mlp\.experts"):
        open_reader(folder).infos()


def split_form(path: Path, output: Path) -> Path:
    """A GGUF as llama.cpp wrote it before it stacked experts."""
    import gguf

    source = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(output, "llama")
    for name, key in source.fields.items():
        if name.startswith("llama.") and key.types[0] in (gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32):
            writer.add_key_value(name, key.contents(), key.types[0])
    for tensor in source.tensors:
        if "_exps" not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        for expert, data in enumerate(tensor.data):
            name = tensor.name.replace("_exps", f".{expert}")
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def test_one_tensor_for_each_expert_is_read(tmp_path: Path) -> None:
    new = convert(write_mixtral(tmp_path / "hf"), "gguf:Q8_0", tmp_path / "new.gguf")
    old = split_form(new, tmp_path / "old.gguf")
    one, other = open_reader(new), open_reader(old)
    assert "blk.1.ffn_up.3.weight" in other.native_infos()
    assert list(one.infos()) == list(other.infos())
    for name, info in one.infos().items():
        assert np.array_equal(one.rows(name, 0, info.n_rows), other.rows(name, 0, info.n_rows)), name
    again = convert(old, "gguf", tmp_path / "again.gguf")
    assert gguf_tensors(again) == gguf_tensors(new)


@pytest.mark.parametrize("limit", [40_000, 10**6])
def test_stacks_stay_whole_in_split_files(limit: int, tmp_path: Path) -> None:
    source = write_mixtral(tmp_path / "hf")
    whole = gguf_tensors(convert(source, "gguf:F16", tmp_path / "a.gguf"))
    first = convert(source, "gguf:F16", tmp_path / "b.gguf", split_bytes=limit)
    parts = [gguf_tensors(file) for file in open_reader(first).files()]
    assert {name: value for part in parts for name, value in part.items()} == whole
    assert sum(map(len, parts)) == len(whole)


def test_experts_of_a_layer_share_a_type(tmp_path: Path) -> None:
    source = write_mixtral(tmp_path / "hf")
    recipe = Recipe(overrides=(("experts.2.w1", "Q8_0"),))
    with pytest.raises(UsageError, match="ffn_gate_exps"):
        convert(source, "gguf:Q4_0", tmp_path / "a.gguf", recipe=recipe)
    for pattern in (r"experts\.\d+\.w1", "ffn_gate_exps"):
        path = convert(
            source, "gguf:Q4_0", tmp_path / f"{len(pattern)}.gguf", recipe=Recipe(overrides=((pattern, "Q8_0"),))
        )
        assert gguf_tensors(path)["blk.1.ffn_gate_exps.weight"][0] == "Q8_0"
        assert gguf_tensors(path)["blk.1.ffn_up_exps.weight"][0] == "Q4_0"


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    reader = open_reader(write_mixtral(tmp_path / "hf"))
    from weightsmith.formats import gguf

    planned = gguf.plan(reader, Recipe("F16")).tensors
    lost = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    with pytest.raises(IntegrityError, match=r"experts\.3\.w2"):
        gguf.create(tmp_path / "a.gguf", reader.config, [info for info in planned if info.name != lost], None)
    writer = gguf.create(tmp_path / "b.gguf", reader.config, planned, None)
    for info in planned:
        if info.name != lost:
            writer.write(info, 0, np.zeros((info.n_rows, info.row_bytes), np.uint8))
    with pytest.raises(IntegrityError, match=r"experts\.3\.w2"):
        writer.close()
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_local_experts": 0}, "num_local_experts"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_local_experts": 10**9}, "num_local_experts"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_hostile_configurations(changes: dict[str, object], word: str, tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path / "hf")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(WeightsmithError, match=word):
        _ = open_reader(folder).config


def test_absent_keys_mean_what_the_class_says(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_mixtral(tmp_path / "hf")
    kept = (
        "architectures",
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
    )
    raw = {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key in kept}
    (folder / "config.json").write_text(json.dumps(raw | {"num_attention_heads": 8}))
    theirs = transformers.MixtralConfig(**raw | {"num_attention_heads": 8})
    ours = open_reader(folder).config
    assert (ours.n_experts, ours.n_experts_used) == (theirs.num_local_experts, theirs.num_experts_per_tok)
    assert (ours.n_kv_heads, ours.rms_norm_eps) == (theirs.num_key_value_heads, theirs.rms_norm_eps)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.sliding_window == theirs.sliding_window
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_show_tells_experts_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = convert(write_mixtral(tmp_path / "hf"), "gguf:Q8_0", tmp_path / "a.gguf")
    assert run(["show", str(path), "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    weights = 2 * 4 * 3 * 64 * 96
    assert (model["experts"], model["expert_parameters"]) == ("2 of 4 for each token", weights)
    assert model["expert_bytes"] == weights // 32 * 34
    everything = sum(info.n_weights for info in open_reader(path).infos().values())
    assert model["active_parameters"] == everything - weights // 2
    assert run(["show", str(path)]) == 0
    assert "2 of 4 for each token" in capsys.readouterr().out


def test_an_imatrix_of_a_stack_reaches_each_expert(tmp_path: Path) -> None:
    source = write_mixtral(tmp_path / "hf", tokenizer=False)
    from weightsmith.formats import imatrix
    from weightsmith.formats.imatrix import Entry, Imatrix
    from weightsmith.quant import codecs

    rng = np.random.default_rng(0)
    sums = rng.uniform(0.1, 100, (4, 64))
    entries = {f"blk.{n}.ffn_up_exps.weight": Entry(sums, np.array([7, 0, 3, 9])) for n in range(2)}
    matrix = imatrix.write(tmp_path / "i.gguf", Imatrix(entries, ["x"], 1, 19))
    found = gguf_tensors(convert(source, "gguf:Q4_0", tmp_path / "a.gguf", imatrix=matrix))["blk.1.ffn_up_exps.weight"][
        2
    ]
    half = mixtral_tensors(mixtral_config())
    expected = []
    for expert, count in enumerate((7, 0, 3, 9)):
        rows = half[f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"].astype(np.float16).astype(np.float32)
        weights = sums[expert].astype(np.float32) / np.float32(count) if count else np.ones(64, np.float32)
        expected.append(codecs.encode("Q4_0", rows, importance=weights).tobytes())
    assert found == b"".join(expected)

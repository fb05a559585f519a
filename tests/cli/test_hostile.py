"""Hostile and broken input through the command line: exit code, message, nothing half-written, little memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import measure
from tests import craft
from tests.craft import ARRAY, F32, STRING, U32, kv, tensor
from tests.tiny import llama_config, llama_shapes, write_llama

FAILURE, USAGE, INTEGRITY, UNSAFE, NOT_FOUND = 1, 2, 3, 4, 7
ROOT = Path(__file__).parent.parent.parent
HUGE = 2**62


@dataclass(frozen=True)
class Case:
    """make: writes the input into a folder and returns its path. code: exit code. says: what the message must hold."""

    name: str
    make: Callable[[Path], Path]
    code: int
    says: tuple[str, ...]
    header: bool = True


CASES: list[Case] = []


def case(code: int, *says: str, header: bool = True) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def add(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES.append(Case(make.__name__, make, code, says, header))
        return make

    return add


# ---------------------------------------------------------------- GGUF


def pairs(**changes: bytes) -> list[bytes]:
    found = {
        "general.architecture": kv("general.architecture", STRING, "llama"),
        "llama.block_count": kv("llama.block_count", U32, 1),
        "llama.context_length": kv("llama.context_length", U32, 128),
        "llama.embedding_length": kv("llama.embedding_length", U32, 32),
        "llama.feed_forward_length": kv("llama.feed_forward_length", U32, 32),
        "llama.attention.head_count": kv("llama.attention.head_count", U32, 2),
        "llama.attention.head_count_kv": kv("llama.attention.head_count_kv", U32, 2),
        "llama.attention.layer_norm_rms_epsilon": kv("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        "tokenizer.ggml.model": kv("tokenizer.ggml.model", STRING, "llama"),
        "tokenizer.ggml.tokens": kv("tokenizer.ggml.tokens", ARRAY, (STRING, ["<unk>", "<s>", "</s>", "a"])),
        "tokenizer.ggml.scores": kv("tokenizer.ggml.scores", ARRAY, (F32, [0.0] * 4)),
        "tokenizer.ggml.token_type": kv("tokenizer.ggml.token_type", ARRAY, (craft.I32, [2, 3, 3, 1])),
    }
    return list((found | changes).values())


NAMES = ["token_embd", "blk.0.attn_norm", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_output"]
NAMES += ["blk.0.ffn_norm", "blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down", "output_norm"]


def layout(names: list[str] = NAMES) -> tuple[list[bytes], bytes]:
    infos, data = [], b""
    for name in names:
        dims = [32] if "norm" in name else [32, 4 if name == "token_embd" else 32]
        infos.append(tensor(f"{name}.weight", dims, 0, len(data)))
        count = 32 * (dims[1] if len(dims) > 1 else 1)
        data += struct.pack(f"<{count}f", *([0.5] * count))
    return infos, data


def write(folder: Path, data: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def good() -> bytes:
    infos, data = layout()
    return craft.gguf(pairs(), infos, data)


@case(FAILURE, "model.gguf")
def gguf_wrong_magic(folder: Path) -> Path:
    return write(folder, b"GGUX" + good()[4:])


@case(INTEGRITY, "model.gguf")
def gguf_zero_magic_of_a_killed_quantizer(folder: Path) -> Path:
    return write(folder, b"\0" * 4 + good()[4:])


@case(FAILURE, "model.gguf", "version")
def gguf_version_from_the_future(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), *layout(), version=99))


@case(INTEGRITY, "model.gguf")
def gguf_header_cut(folder: Path) -> Path:
    return write(folder, good()[:200])


@case(INTEGRITY, "model.gguf", "weight")
def gguf_data_cut(folder: Path) -> Path:
    return write(folder, good()[:-100])


@case(INTEGRITY, "model.gguf")
def gguf_empty_file_after_the_magic(folder: Path) -> Path:
    return write(folder, b"GGUF")


@case(INTEGRITY, "model.gguf")
def gguf_key_count_beyond_the_file(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), *layout(), n_kv=HUGE))


@case(INTEGRITY, "model.gguf")
def gguf_tensor_count_beyond_the_file(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), *layout(), n_tensors=HUGE))


@case(INTEGRITY, "model.gguf")
def gguf_string_length_beyond_the_file(folder: Path) -> Path:
    return write(folder, craft.gguf([struct.pack("<Q", HUGE) + b"x"], [], b""))


@case(INTEGRITY, "model.gguf", "big.array")
def gguf_array_length_beyond_the_file(folder: Path) -> Path:
    bad = kv("big.array", ARRAY, struct.pack("<IQ", U32, HUGE))
    return write(folder, craft.gguf([*pairs(), bad], *layout()))


@case(INTEGRITY, "model.gguf", "odd.kind")
def gguf_value_of_no_type(folder: Path) -> Path:
    return write(folder, craft.gguf([*pairs(), kv("odd.kind", 77, b"\0" * 8)], *layout()))


@case(INTEGRITY, "model.gguf", "general.architecture")
def gguf_duplicate_key(folder: Path) -> Path:
    return write(folder, craft.gguf([*pairs(), kv("general.architecture", STRING, "llama")], *layout()))


@case(INTEGRITY, "model.gguf", "token_embd.weight")
def gguf_duplicate_tensor(folder: Path) -> Path:
    infos, data = layout([*NAMES, "token_embd"])
    return write(folder, craft.gguf(pairs(), infos, data))


@case(INTEGRITY, "model.gguf", "wide.weight")
def gguf_a_million_dimensions(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), [tensor("wide.weight", [1], 0, 0, n_dims=10**6)], b"\0" * 64))


@case(INTEGRITY, "model.gguf", "wrap.weight")
def gguf_dimensions_whose_product_wraps(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), [tensor("wrap.weight", [2**33, 2**33], 0, 0)], b"\0" * 64))


@case(INTEGRITY, "model.gguf", "none.weight")
def gguf_zero_dimension(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), [tensor("none.weight", [0, 32], 0, 0)], b"\0" * 64))


@case(INTEGRITY, "model.gguf", "far.weight")
def gguf_tensor_beyond_the_file(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), [tensor("far.weight", [32], 0, 2**40)], b"\0" * 128))


@case(INTEGRITY, "model.gguf", "second.weight")
def gguf_overlapping_tensors(folder: Path) -> Path:
    infos = [tensor("first.weight", [32], 0, 0), tensor("second.weight", [32], 0, 64)]
    return write(folder, craft.gguf(pairs(), infos, b"\0" * 256))


@case(INTEGRITY, "model.gguf", "crooked.weight")
def gguf_misaligned_tensor(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), [tensor("crooked.weight", [32], 0, 4)], b"\0" * 256))


@case(FAILURE, "model.gguf", "strange.weight")
def gguf_unknown_tensor_type(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), [tensor("strange.weight", [32], 250, 0)], b"\0" * 256))


@case(INTEGRITY, "model.gguf", "uneven.weight")
def gguf_row_that_no_block_divides(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), [tensor("uneven.weight", [33, 2], 2, 0)], b"\0" * 256))


@case(INTEGRITY, "model.gguf", "alignment")
def gguf_alignment_zero(folder: Path) -> Path:
    return write(folder, craft.gguf([*pairs(), kv("general.alignment", U32, 0)], *layout()))


@case(FAILURE, "model.gguf", "mamba")
def gguf_unknown_arch(folder: Path) -> Path:
    changed = pairs(**{"general.architecture": kv("general.architecture", STRING, "mamba")})
    return write(folder, craft.gguf(changed, *layout()))


@case(INTEGRITY, "model.gguf", "block_count")
def gguf_wrong_type_of_a_known_key(folder: Path) -> Path:
    changed = pairs(**{"llama.block_count": kv("llama.block_count", STRING, "one")})
    return write(folder, craft.gguf(changed, *layout()))


@case(INTEGRITY, "model.gguf")
def gguf_a_billion_layers(folder: Path) -> Path:
    changed = pairs(**{"llama.block_count": kv("llama.block_count", U32, 10**9)})
    return write(folder, craft.gguf(changed, *layout()))


@case(INTEGRITY, "model.gguf", "blk.0.ffn_down.weight")
def gguf_missing_tensor(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), *layout([n for n in NAMES if "ffn_down" not in n])))


@case(INTEGRITY, "model.gguf", "blk.0.ffn_extra.weight")
def gguf_extra_tensor(folder: Path) -> Path:
    return write(folder, craft.gguf(pairs(), *layout([*NAMES, "blk.0.ffn_extra"])))


@case(FAILURE, "model.gguf", "bert")
def gguf_unknown_tokenizer(folder: Path) -> Path:
    changed = pairs(**{"tokenizer.ggml.model": kv("tokenizer.ggml.model", STRING, "bert")})
    return write(folder, craft.gguf(changed, *layout()))


@case(INTEGRITY, "model.gguf", "model.layers.0.self_attn.q_proj.weight", header=False)
def gguf_nan_weight(folder: Path) -> Path:
    infos, data = layout()
    at = 4 * (32 * 4 + 32 + 5)
    return write(folder, craft.gguf(pairs(), infos, data[:at] + struct.pack("<f", float("nan")) + data[at + 4 :]))


@case(NOT_FOUND, "model-00002-of-00003.gguf")
def gguf_missing_split(folder: Path) -> Path:
    split = [kv("split.no", 2, struct.pack("<H", 0)), kv("split.count", 2, struct.pack("<H", 3))]
    split.append(kv("split.tensors.count", craft.I32, 11))
    return write(folder, craft.gguf([*pairs(), *split], *layout()), "model-00001-of-00003.gguf")


# ---------------------------------------------------------------- safetensors


def checkpoint(folder: Path, data: bytes, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps(llama_config(**changes)))
    (folder / "model.safetensors").write_bytes(data)
    return folder


def header() -> dict[str, object]:
    found: dict[str, object] = {}
    offset = 0
    for name, shape in llama_shapes(llama_config()).items():
        nbytes = 2
        for n in shape:
            nbytes *= n
        found[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    return found


@case(INTEGRITY, "model.safetensors")
def st_header_longer_than_the_file(folder: Path) -> Path:
    return checkpoint(folder, craft.safetensors("{}", length=HUGE))


@case(INTEGRITY, "model.safetensors")
def st_truncated_to_seven_bytes(folder: Path) -> Path:
    return checkpoint(folder, b"\0" * 7)


@case(INTEGRITY, "model.safetensors")
def st_no_json(folder: Path) -> Path:
    return checkpoint(folder, craft.safetensors("{nonsense"))


@case(INTEGRITY, "model.safetensors")
def st_json_nested_too_deep(folder: Path) -> Path:
    return checkpoint(folder, craft.safetensors("{" + '"a":' + "[" * 100_000 + "]" * 100_000 + "}"))


@case(INTEGRITY, "model.safetensors", "twice")
def st_duplicate_name(folder: Path) -> Path:
    entry = '"twice":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}'
    return checkpoint(folder, craft.safetensors("{" + entry + "," + entry + "}", b"\0" * 4))


@case(INTEGRITY, "model.safetensors", "cut.weight")
def st_data_cut(folder: Path) -> Path:
    return checkpoint(
        folder,
        craft.safetensors({"cut.weight": {"dtype": "F16", "shape": [64], "data_offsets": [0, 128]}}, b"\0" * 100),
    )


@case(INTEGRITY, "model.safetensors", "b.weight")
def st_overlap(folder: Path) -> Path:
    entries = {
        "a.weight": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]},
        "b.weight": {"dtype": "F16", "shape": [4], "data_offsets": [4, 12]},
    }
    return checkpoint(folder, craft.safetensors(entries, b"\0" * 12))


@case(INTEGRITY, "model.safetensors")
def st_bytes_after_the_last_tensor(folder: Path) -> Path:
    entry = {"a.weight": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}
    return checkpoint(folder, craft.safetensors(entry, b"\0" * 16))


@case(INTEGRITY, "model.safetensors", "neg.weight")
def st_negative_offset(folder: Path) -> Path:
    entry = {"neg.weight": {"dtype": "F16", "shape": [4], "data_offsets": [-8, 0]}}
    return checkpoint(folder, craft.safetensors(entry, b"\0" * 8))


@case(INTEGRITY, "model.safetensors", "lie.weight")
def st_shape_and_range_disagree(folder: Path) -> Path:
    entry = {"lie.weight": {"dtype": "F16", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}
    return checkpoint(folder, craft.safetensors(entry, b"\0" * 8))


@case(FAILURE, "model.safetensors", "odd.weight")
def st_unknown_dtype(folder: Path) -> Path:
    entry = {"odd.weight": {"dtype": "F3", "shape": [4], "data_offsets": [0, 8]}}
    return checkpoint(folder, craft.safetensors(entry, b"\0" * 8))


@case(INTEGRITY, "lm_head.weight")
def st_missing_tensor(folder: Path) -> Path:
    entries = header()
    del entries["lm_head.weight"]
    end = max(e["data_offsets"][1] for e in entries.values())  # type: ignore[index]
    return checkpoint(folder, craft.safetensors(entries, b"\0" * end))


@case(INTEGRITY, "model.layers.0.self_attn.q_proj.weight")
def st_wrong_shape_for_the_config(folder: Path) -> Path:
    entries = header()
    end = max(e["data_offsets"][1] for e in entries.values())  # type: ignore[index]
    return checkpoint(folder, craft.safetensors(entries, b"\0" * end), num_attention_heads=8, head_dim=64)


@case(FAILURE, "config.json", "GPT2LMHeadModel")
def st_unknown_arch(folder: Path) -> Path:
    entries = header()
    end = max(e["data_offsets"][1] for e in entries.values())  # type: ignore[index]
    data = craft.safetensors(entries, b"\0" * end)
    return checkpoint(folder, data, architectures=["GPT2LMHeadModel"], model_type="gpt2")


@case(INTEGRITY, "config.json")
def st_config_is_no_json(folder: Path) -> Path:
    write_llama(folder)
    (folder / "config.json").write_text("{,}")
    return folder


@case(INTEGRITY, "config.json")
def st_config_with_a_billion_layers(folder: Path) -> Path:
    return write_changed(folder, num_hidden_layers=10**9)


@case(FAILURE, "config.json", "yarn")
def st_rope_scaling_not_known(folder: Path) -> Path:
    return write_changed(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0})


@case(INTEGRITY, "model.layers.1.mlp.up_proj.weight", header=False)
def st_nan_weight(folder: Path) -> Path:
    write_llama(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    begin = json.loads(data[8 : 8 + length])["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    data[8 + length + begin : 8 + length + begin + 2] = struct.pack("<H", 0x7E00)
    path.write_bytes(data)
    return folder


@case(FAILURE, "tokenizer.json", "--pre", header=False)
def st_unknown_pre_tokenizer(folder: Path) -> Path:
    write_llama(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("{1,3}", "{1,7}"))
    return folder


@case(NOT_FOUND, "model-00002-of-00003.safetensors")
def st_missing_shard(folder: Path) -> Path:
    write_llama(folder, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    return folder


@case(UNSAFE, "../../etc/passwd")
def st_index_that_leaves_the_folder(folder: Path) -> Path:
    return write_index(folder, "../../etc/passwd")


@case(UNSAFE, "/etc/passwd")
def st_index_with_an_absolute_path(folder: Path) -> Path:
    return write_index(folder, "/etc/passwd")


@case(UNSAFE, "model-00002-of-00003.safetensors")
def st_shard_that_is_a_link_out_of_the_folder(folder: Path) -> Path:
    write_llama(folder, shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    outside = folder.parent / "outside.safetensors"
    shutil.move(shard, outside)
    shard.symlink_to(outside)
    return folder


@case(INTEGRITY, "model.norm.weight")
def st_index_that_names_a_tensor_twice_placed(folder: Path) -> Path:
    write_llama(folder, shards=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    others = {file for name, file in index["weight_map"].items() if file != index["weight_map"]["model.norm.weight"]}
    index["weight_map"]["model.norm.weight"] = sorted(others)[0]
    path.write_text(json.dumps(index))
    return folder


@case(INTEGRITY, "model.safetensors")
def st_lfs_pointer_instead_of_weights(folder: Path) -> Path:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"
    return checkpoint(folder, pointer)


@case(FAILURE, "only.bin")
def a_pickle(folder: Path) -> Path:
    return write(folder, b"\x80\x04cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "only.bin")


@case(NOT_FOUND, "absent.gguf")
def a_path_that_does_not_exist(folder: Path) -> Path:
    return folder / "absent.gguf"


def write_changed(folder: Path, **changes: object) -> Path:
    write_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def write_index(folder: Path, target: str) -> Path:
    write_llama(folder, shards=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = target
    path.write_text(json.dumps(index))
    return folder


def test_there_are_at_least_forty() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused_with_a_clear_message(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    source = case.make(folder)
    out = tmp_path / "out"
    out.mkdir()
    target = "safetensors" if source.suffix == ".gguf" else "gguf:F16"
    command = [sys.executable, "-m", "weightsmith", "convert", str(source), "--to", target, "-o", str(out / "made")]
    env = os.environ | {"WEIGHTSMITH_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=-1, stderr=-1, text=True) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == case.code, stderr
    assert "Traceback" not in stderr + stdout
    for part in case.says:
        assert part in stderr
    assert "input" in stderr or any(part in stderr for part in case.says)
    assert list(out.iterdir()) == [], "a partial output was left"


@pytest.mark.parametrize("case", [case for case in CASES if case.header], ids=lambda case: case.name)
def test_a_bad_header_costs_little_memory(case: Case, tmp_path: Path) -> None:
    """`show` reads headers only; whatever they claim, the process stays under 100 MB."""
    folder = tmp_path / "input"
    folder.mkdir()
    source = case.make(folder)
    env = {"WEIGHTSMITH_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = measure.run([sys.executable, "-m", "weightsmith", "show", str(source)], tmp_path / "log", env=env)
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert done.code in (0, case.code)
    assert done.peak_rss < 100e6

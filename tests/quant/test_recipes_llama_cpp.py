"""Our recipes beside llama.cpp's: its recorded choices for twelve real models, and its own quantizer on tiny ones."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.tiny import write_llama
from weightsmith.errors import UsageError
from weightsmith.formats import gguf as container
from weightsmith.formats import safetensors
from weightsmith.formats.archs import llama
from weightsmith.quant import codecs, recipes
from weightsmith.quant.blocks import BLOCKS
from weightsmith.quant.recipes import Traits
from weightsmith.types import Recipe

# Columns (input sizes) of a model's matrices by the part of their name that decides; what is absent has n_embd. The
# snapshots do not record them; they come from the models' config.json.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "deepseek-v3.1": (
        "deepseek2",
        {"attn_k_b": 128, "attn_output": 16384, "attn_q_b": 1536, "ffn_down_": 2048, "ffn_down": 18432},
    ),
    "gemma-3-4b-it": ("gemma3", {"attn_output": 2048, "ffn_down": 10240}),
    "glm-4.6v": ("glm4moe", {"attn_output": 12288, "ffn_down_": 1408, "ffn_down": 10944}),
    "gpt-oss-120b": ("gpt-oss", {"attn_output": 4096, "ffn_down": 2880}),
    "meta-llama-3.1-70b-instruct": ("llama", {"attn_output": 8192, "ffn_down": 28672}),
    "nvidia-nemotron-3-nano-30b-a3b": (
        "nemotron_h_moe",
        {"attn_output": 4096, "ssm_out": 4096, "ffn_down_exps": 1856, "ffn_down_shexp": 3712},
    ),
    "qwen3-0.6b": ("qwen3", {"attn_output": 2048, "ffn_down": 3072}),
    "qwen3-14b": ("qwen3", {"attn_output": 5120, "ffn_down": 17408}),
    "qwen3-coder-next": ("qwen3next", {"attn_output": 4096, "ssm_out": 4096, "ffn_down": 512}),
    "qwen3.5-397b-a17b": ("qwen35moe", {"attn_output": 8192, "ssm_out": 8192, "ffn_down": 1024}),
    "qwen3.6-27b": ("qwen35", {"attn_output": 6144, "ssm_out": 6144, "ffn_down": 17408}),
    "step-3.5-flash": ("step35", {"attn_output": 8192, "ffn_down_": 1280, "ffn_down": 11264}),
}
# Every rule that depends on the layer shows at 16 of them. The last has rows of 288, 256 and 144.
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"num_key_value_heads": 2},
    "ungrouped": {"num_key_value_heads": 8},
    "grouped, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "odd rows": {"num_key_value_heads": 2, "hidden_size": 288, "head_dim": 32, "intermediate_size": 144},
}
TINY = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 8}


def sections(path: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(file type, its base codec, what differs from that) of a snapshot."""
    for part in re.split(r"^\[", path.read_text(), flags=re.M)[1:]:
        head, *lines = part.split("\n")
        file_type, codec = head.split("] ")
        yield file_type, codec.upper(), {k: v.upper() for k, v in (line.split(" ") for line in lines if line)}


def header(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", path.read_text().split("\n")[1])}


def shapes_of(model: str, names: set[str], n_embd: int) -> dict[str, tuple[int, ...]]:
    columns = MODELS[model][1]
    found = {name: next((n for part, n in columns.items() if part in name), n_embd) for name in names}
    return {name: (256, row_len) for name, row_len in found.items()}


@pytest.mark.parametrize("model", MODELS)
def test_snapshots(model: str, llama_cpp_tree: Path) -> None:
    path = llama_cpp_tree / "tests" / "snapshots" / f"{model}.schema"
    if not path.is_file():
        pytest.skip(f"llama.cpp's tree has no {path.name}")
    recorded = {file_type: (codec, given) for file_type, codec, given in sections(path)}
    counts = header(path)
    names = {name for _, given in recorded.values() for name in given}
    shapes = shapes_of(model, names, counts["n_embd"])
    heads = counts["n_head_kv"]
    traits = Traits(
        counts["n_layer"], counts["n_head"] // heads if heads else 0, counts.get("n_expert", 0), MODELS[model][0]
    )
    rows, wrong = 0, []
    for file_type in set(recorded) & set(recipes.FILE_TYPES):
        codec, given = recorded[file_type]
        assert recipes.base_codec(file_type) == codec
        chosen = recipes.choose(shapes, Recipe(file_type), tied="output.weight" not in names, traits=traits)
        for name, got in chosen.items():
            rows += 1
            if got.codec != given.get(name, codec):
                wrong.append((file_type, name, got, given.get(name, codec)))
    assert wrong == []
    assert rows > 15 * 100


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F16 GGUF of a model of that shape."""
    folder = tmp_path_factory.mktemp("model")
    write_llama(folder / "hf", **TINY | SHAPES[request.param])
    reader = safetensors.open_reader(folder / "hf")
    planned = container.plan(reader, Recipe("F16"))
    with container.create(folder / "f16.gguf", reader.config, planned.tensors, reader.vocab()) as writer:
        for info in writer.order:
            was = reader.infos()[info.name]
            rows = codecs.decode(was.codec, reader.rows(info.name, 0, info.n_rows), info.row_len)
            writer.write(info, 0, codecs.encode(info.codec, rows))
    return folder / "f16.gguf"


def theirs(source: Path, out: Path, recipe: Recipe) -> tuple[dict[str, str], int] | None:
    """The codec of every tensor, and general.file_type, of what llama.cpp's own quantizer makes; None if it refuses."""
    llama_cpp = pytest.importorskip("llama_cpp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = recipes.FILE_TYPES[recipe.type or ""]
    params.pure = recipe.pure
    if recipe.output_type:
        params.output_tensor_type = BLOCKS[recipe.output_type].id
    if recipe.embedding_type:
        params.token_embedding_type = BLOCKS[recipe.embedding_type].id
    overrides = (llama_cpp.llama_model_tensor_override * (len(recipe.overrides) + 1))()
    for place, (pattern, codec) in zip(overrides, recipe.overrides, strict=False):
        place.pattern, place.type = pattern.encode(), BLOCKS[codec].id
    params.tt_overrides = overrides
    with container.open_reader(source) as reader:
        infos = reader.native_infos()
        names = [name for name, info in infos.items() if len(info.shape) > 1]
        shapes = [infos[name].shape for name in names]
        ones = [np.ones(math.prod(shape[:-2]) * shape[-1], np.float32) for shape in shapes]
    measured = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()
    for place, name, row in zip(measured, names, ones, strict=False):
        place.name, place.size = name.encode(), len(row)
        place.data = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if recipe.imatrix:
        params.imatrix = measured
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        return None
    with container.open_reader(out) as reader:
        found = {name: info.codec for name, info in reader.native_infos().items()}
        return found, reader.metadata()["general.file_type"]


def ours(source: Path, recipe: Recipe) -> tuple[dict[str, str], int]:
    with container.open_reader(source) as reader:
        planned = container.plan(reader, recipe)
    assert planned.file_type is not None
    return {llama.gguf_name(info.name): info.codec for info in planned.tensors}, planned.file_type


def check(source: Path, out: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    # The rules hold for every codec, written here or not.
    monkeypatch.setattr(codecs, "writable", lambda: tuple(BLOCKS))
    expected = theirs(source, out, recipe)
    if expected is None:
        with pytest.raises(UsageError, match="imatrix"):
            ours(source, recipe)
    else:
        assert ours(source, recipe) == expected


ALIASES = ("Q3_K", "Q4_K", "Q5_K")  # tested in test_recipes.py
# The types whose mix asks whether there is an imatrix, and one that must not care.
MEASURED = ("Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS", "Q2_K_S", "Q4_K_M")
RECIPES = [Recipe(name) for name in recipes.FILE_TYPES if name not in ALIASES]
RECIPES += [Recipe(name, imatrix=True) for name in MEASURED]


def label(recipe: Recipe) -> str:
    return f"{recipe.type}{'-imatrix' * recipe.imatrix}"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=label)
def test_their_quantizer(source: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(source, tmp_path / "theirs.gguf", recipe, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("Q4_K_M", pure=True),
        Recipe("IQ4_XS", pure=True),
        Recipe("Q4_K_M", output_type="Q8_0"),
        Recipe("Q4_K_M", embedding_type="Q5_0"),
        Recipe("Q3_K_M", output_type="Q8_0", embedding_type="Q4_0"),
        Recipe("Q4_K_M", overrides=(("attn_v", "Q8_0"),)),
        Recipe("Q4_K_S", overrides=((r"blk\.[02]\.attn_v", "Q8_0"), (r"blk\.0\.", "Q6_K"), ("token_embd", "Q5_1"))),
        Recipe("Q4_K_M", overrides=((r"blk\.1\.ffn_down", "Q4_0"), (r"blk\.1\.attn_v", "Q4_0"))),
        Recipe("Q5_K_M", overrides=(("token_embd|^output", "Q5_0"),), output_type="Q8_0"),
    ],
    ids=str,
)
def test_their_options(source: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(source, tmp_path / "theirs.gguf", recipe, monkeypatch)


class Stub(NamedTuple):
    """A model of which only the rows' lengths are real: llama.cpp's quantizer asks for no more."""

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    tied: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        experts = (self.experts,) if self.experts else ()
        suffix = "_exps" if experts else ""
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (2, 256), "output_norm.weight": (256,)}
        for layer in range(self.layers):
            shapes |= {f"blk.{layer}.attn_{part}.weight": (2, 256) for part in ("q", "k", "v", "output")}
            shapes |= {f"blk.{layer}.ffn_{part}{suffix}.weight": (*experts, 2, 256) for part in ("gate", "up", "down")}
            shapes[f"blk.{layer}.attn_norm.weight"] = (256,)
            if experts:
                shapes[f"blk.{layer}.ffn_gate_inp.weight"] = (*experts, 256)
        return shapes if self.tied else shapes | {"output.weight": (2, 256)}

    def write(self, path: Path) -> Path:
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(path, self.arch)
        writer.add_vocab_size(2)
        writer.add_context_length(512)
        writer.add_embedding_length(256)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(256)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(2)
        for name, shape in self.shapes.items():
            is_f32 = len(shape) == 1 or "gate_inp" in name
            writer.add_tensor(name, np.ones(shape, np.float32 if is_f32 else np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


STUBS = {
    "70B": Stub("llama", 80, 64, 8),
    "65B": Stub("llama", 80, 64, 64),
    "70B of 72 layers": Stub("llama", 72, 64, 8),
    "qwen2 of 80 layers": Stub("qwen2", 80, 64, 64),
    "8 experts": Stub("llama", 32, 32, 8, experts=8),
    "8 experts, tied, ungrouped": Stub("llama", 20, 8, 8, experts=8, tied=True),
    "8 experts, 80 layers": Stub("llama", 80, 64, 8, experts=8),
    "16 experts": Stub("llama", 32, 32, 8, experts=16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUBS)
def test_large_models_and_experts(name: str, tmp_path: Path) -> None:
    stub = STUBS[name]
    source = stub.write(tmp_path / "source.gguf")
    traits = Traits(stub.layers, stub.heads // stub.kv_heads, stub.experts, stub.arch)
    compared = 0
    for recipe in RECIPES:
        expected = theirs(source, tmp_path / "theirs.gguf", recipe)
        if expected is None:
            assert label(recipe) == "Q2_K_S"
            continue
        chosen = recipes.choose(stub.shapes, recipe, tied=stub.tied, traits=traits)
        assert {name: got.codec for name, got in chosen.items()} == expected[0], label(recipe)
        compared += 1
    assert compared == len(RECIPES) - 1

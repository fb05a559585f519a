"""GGUF, the container of llama.cpp: one file, or parts NAME-00001-of-000NN.gguf, with tokenizer and configuration.

| module | what it knows |
|---|---|
| parse | one file's header, every claim checked against the file |
| metadata | its keys, decoded when asked for |
| shards | which files belong together |
| keys, grok_keys, vocab, rope_freqs | keys to `ModelConfig` and `Vocab`, and back |
| pack | the bytes of a header |
| stacks | experts, several canonical tensors in one |
| reader, writer | the protocols of `weightsmith.types` |
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.errors import UnsupportedError, UsageError
from weightsmith.formats import archs
from weightsmith.formats.gguf.parse import MAGIC, POINTER
from weightsmith.formats.gguf.reader import GgufReader
from weightsmith.formats.gguf.shards import stem_of
from weightsmith.formats.gguf.writer import TYPES, GgufWriter, create
from weightsmith.quant import recipes
from weightsmith.quant.blocks import BLOCKS, row_nbytes
from weightsmith.types import Plan, Reader, Recipe, TensorInfo

__all__ = ["NAME", "TYPES", "GgufReader", "GgufWriter", "create", "open_reader", "plan", "sniff"]

NAME = "gguf"
RESUMES = True  # its writer takes over what an unfinished run left


def sniff(path: Path) -> bool:
    """True for a file with GGUF's magic, and for a folder that holds such files and no safetensors."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError:
        return False
    # What a killed llama-quantize and an unfinished git clone leave deserves a better word than "unknown".
    leftover = start[:4] == b"\0\0\0\0" or start == POINTER
    return start[:4] == MAGIC or (path.suffix == ".gguf" and leftover)


def open_reader(path: Path) -> GgufReader:
    """Open a file, any part of a split checkpoint, or a folder with one checkpoint; reads and checks headers only.

    Raises UsageError for a folder with several, and what `shards.read_headers` raises.
    """
    if path.is_dir():
        stems = {stem_of(file): file for file in sorted(path.glob("*.gguf"), reverse=True)}
        if len(stems) > 1:
            names = ", ".join(sorted(stems))
            raise UsageError(f"holds {len(stems)} checkpoints: {names}", path=path, hint="Name one file.")
        path = next(iter(stems.values()))
    return GgufReader(path)


def plan(reader: Reader, recipe: Recipe) -> Plan:
    """Say in which codec every canonical tensor of `reader` is written.

    No type: every matrix keeps its codec where GGUF has it (8-bit floats become F16, which holds them exactly); vectors
    and routers are F32. Patterns of the recipe are looked for in canonical and in GGUF names.
    Raises UnsupportedError for a codec that GGUF has not, and what `recipes.assign` raises.
    """
    infos = reader.infos()
    if recipe.type is None:
        return Plan([_planned(info, _kept(info)) for info in infos.values()])
    config = reader.config
    family = archs.by_name(config.family)
    shapes = {name: info.shape for name, info in infos.items()}
    aliases = {name: family.gguf_name(name) for name in infos}
    gqa = config.n_heads // config.n_kv_heads
    traits = recipes.Traits(config.n_layers, gqa, config.n_experts, family.GGUF_ARCH)
    chosen = recipes.assign(shapes, recipe, tied=config.tie_word_embeddings, traits=traits, aliases=aliases)
    tensors = [_planned(info, chosen[name].codec) for name, info in infos.items()]
    fallbacks = [(name, got.wanted, got.codec) for name, got in chosen.items() if got.wanted != got.codec]
    return Plan(tensors, fallbacks, recipes.file_type_id(recipe.type))


def _planned(info: TensorInfo, codec: str) -> TensorInfo:
    return TensorInfo(info.name, info.shape, codec, info.n_rows * row_nbytes(codec, info.row_len))


def _kept(info: TensorInfo) -> str:
    if not recipes.is_matrix(info.name, info.shape):
        return "F32"
    block = BLOCKS.get(info.codec)
    integers = info.codec in ("I8", "I16", "I32", "I64")
    if block is not None and block.id >= 0 and not integers:
        return info.codec
    if info.codec.startswith("F8_"):
        return "F16"
    raise UnsupportedError(f"GGUF has no type {info.codec}", path=info.path, tensor=info.name)

"""Random Llama checkpoints of a chosen size, written shard by shard so that making them needs little memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.tiny import bpe_tokenizer, llama_config, llama_shapes

SIZES = {
    "0.15B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 9, "vocab_size": 32000},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
}
SHARD_BYTES = 500_000_000


def write(folder: Path, size: str, *, seed: int = 0) -> Path:
    """Write `size` (a key of SIZES) as sharded F16 safetensors into `folder`, unless it is there already."""
    if (folder / "config.json").exists():
        return folder
    heads = {"num_attention_heads": SIZES[size]["hidden_size"] // 64, "num_key_value_heads": 4}
    config = llama_config(**SIZES[size], **heads, max_position_embeddings=2048)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    used = 0
    shapes = llama_shapes(config)
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if used and used + nbytes > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    rng = np.random.default_rng(seed)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, {name: shapes[name] for name in names}, rng)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    bpe_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}')
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            noise = rng.standard_normal(shape, dtype=np.float32)
            noise = 1 + 0.1 * noise if len(shape) == 1 else noise * np.float32(0.02)
            file.write(noise.astype(np.float16).tobytes())

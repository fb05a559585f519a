"""A two-layer Llama with grouped-query attention as canonical weights, and two ways to write it as GGUF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.formats import archs
from weightsmith.formats import gguf as container
from weightsmith.quant.blocks import row_nbytes
from weightsmith.types import ModelConfig, Reader, TensorInfo, Vocab

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_config(**changes: Any) -> ModelConfig:
    config = ModelConfig(
        family="llama",
        vocab_size=280,
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
        bos_token_id=256,
        eos_token_ids=(257,),
        name="tiny",
    )
    return replace(config, **changes)


def tiny_vocab(size: int = 280) -> Vocab:
    """256 byte tokens in GPT-2's alphabet, two control tokens, fillers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    tokens = [letters[byte] for byte in range(256)] + ["<|begin|>", "<|end|>", "th", "the"]
    tokens += [f"[PAD{n}]" for n in range(len(tokens), size)]
    types = [1] * 256 + [3, 3, 1, 1] + [5] * (size - 260)
    return Vocab(
        model="gpt2",
        tokens=tokens,
        types=types,
        merges=[("t", "h"), ("th", "e")],
        pre="llama-bpe",
        bos_id=256,
        eos_id=257,
        add_bos=True,
        add_space_prefix=False,
        ignore_merges=True,
        chat_template="{{ messages }} <é>",
    )


def tiny_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in archs.by_name(config.family).tensors(config).items():
        noise = rng.standard_normal(shape).astype(np.float32)
        weights[name] = 1 + 0.1 * noise if len(shape) == 1 else noise / np.float32(np.sqrt(shape[-1]))
    return weights


def packed(weights: np.ndarray, codec: str) -> np.ndarray:
    """float32 [..., row_len] as uint8 rows of "F32", "F16" or "BF16" (truncated)."""
    rows = weights.reshape(-1, weights.shape[-1])
    if codec == "BF16":
        return np.ascontiguousarray((rows.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)
    return rows.astype({"F32": "<f4", "F16": "<f2"}[codec]).view(np.uint8)


def planned(config: ModelConfig, codec: str = "F16") -> list[TensorInfo]:
    infos = []
    for name, shape in archs.by_name(config.family).tensors(config).items():
        own = codec if len(shape) > 1 else "F32"
        rows = int(np.prod(shape[:-1]))
        infos.append(TensorInfo(name, shape, own, rows * row_nbytes(own, shape[-1])))
    return infos


def write_ours(
    path: Path,
    config: ModelConfig,
    *,
    codec: str = "F16",
    vocab: Vocab | None = None,
    source: Reader | None = None,
    split_bytes: int | None = None,
    seed: int = 0,
) -> Path:
    weights = tiny_weights(config, seed)
    infos = planned(config, codec)
    with container.create(path, config, infos, vocab, source=source, split_bytes=split_bytes) as writer:
        for info in writer.order:
            rows = packed(weights[info.name], info.codec)
            step = 2 * writer.row_unit(info)
            for start in range(0, info.n_rows, step):
                writer.write(info, start, rows[start : start + step])
        return writer.close()


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{PARTS['.'.join(part)]}.{kind}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The row order of GGUF, said one row at a time: row 2i of a head was row i, row 2i+1 was row i + d/2."""
    out = np.empty_like(rows)
    dim = rows.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = rows[head * dim + i]
            out[head * dim + 2 * i + 1] = rows[head * dim + dim // 2 + i]
    return out


def native_weights(config: ModelConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    native = {}
    for name, value in weights.items():
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
        native[gguf_name(name)] = interleaved(value, heads) if heads else value
    return native

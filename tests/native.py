"""Tiny checkpoints in the vendors' original forms, each the same model as a Hugging Face one of tests/tiny.py."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import bpe_tokenizer, llama_config, llama_tensors

PARTS = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
GLOBAL = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The same model in either form; 192 is Meta's formula for dim 64 and multiple_of 32.
LLAMA: dict[str, Any] = {"intermediate_size": 192, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def native_name(name: str) -> str:
    if ".block_sparse_moe." in name:
        return name.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"layers.{found[1]}.{PARTS[found[2]]}.weight" if found else GLOBAL[name]


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rows as neighbouring pairs, said one row at a time."""
    out = np.empty_like(rows)
    dim = rows.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = rows[head * dim + i]
            out[head * dim + 2 * i + 1] = rows[head * dim + dim // 2 + i]
    return out


def native_tensors(
    config: dict[str, Any], dtype: str, seed: int = 0, canonical: dict[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """torch tensors under original names, in the original order of rows; `canonical` ones, or a dense model's."""
    import torch

    tensors = {}
    for name, value in (canonical or llama_tensors(config, seed)).items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        count = heads.get(name.split(".")[-2])
        rows = paired(value, count) if count else value
        tensors[native_name(name)] = torch.from_numpy(rows.copy()).to(getattr(torch, DTYPES[dtype]))
    return tensors


def cut(tensors: dict[str, Any], ranks: int, *, embedding_axis: int = 0) -> list[dict[str, Any]]:
    """What each of `ranks` model-parallel ranks holds."""
    parts: list[dict[str, Any]] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        axis = embedding_axis if name == "tok_embeddings.weight" else axis
        pieces = tensor.chunk(ranks, axis) if tensor.ndim == 2 else [tensor] * ranks
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.contiguous()
    return parts


def meta_params(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "multiple_of": 32,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
    }
    return {key: value for key, value in (params | changes).items() if value is not None}


def write_meta(
    folder: Path,
    *,
    ranks: int = 2,
    dtype: str = "BF16",
    embedding_axis: int = 0,
    shared: bool = False,
    params: dict[str, Any] | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Meta's form. `changes` are of the Hugging Face config, `params` of params.json (None leaves a key out).

    shared: the tensors of a rank are views into one storage. A tied model stores its output matrix all the same.
    """
    import torch

    config = llama_config(**(LLAMA | changes))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = native_tensors(config, dtype, seed)
    if config["tie_word_embeddings"]:
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    for rank, part in enumerate(cut(tensors, ranks, embedding_axis=embedding_axis)):
        part["rope.freqs"] = torch.ones(8)
        torch.save(in_one_storage(part) if shared else part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(config, **(params or {}))))
    return folder


def in_one_storage(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors as views into one storage for each type."""
    import torch

    views: dict[str, Any] = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        group = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        storage = torch.cat([torch.zeros(7, dtype=dtype), *(tensor.reshape(-1) for tensor in group.values())])
        at = 7
        for name, tensor in group.items():
            views[name] = storage[at : at + tensor.numel()].view(tensor.shape)
            at += tensor.numel()
    return {name: views[name] for name in tensors}


def mistral_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Mistral whose head_dim is not hidden / heads."""
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 24}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "sliding_window": None, "rope_theta": 1000000.0}
    return llama_config(**(mistral | ends | {"max_position_embeddings": 32768} | changes))


def write_mistral(
    folder: Path,
    *,
    form: str = "safetensors",
    dtype: str = "BF16",
    params: dict[str, Any] | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Mistral's form, as "safetensors", "sharded" safetensors or "pth"."""
    import torch
    from safetensors.torch import save_file

    config = mistral_config(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = native_tensors(config, dtype, seed)
    if form == "pth":
        torch.save(tensors, folder / "consolidated.00.pth")
    elif form == "safetensors":
        save_file(tensors, folder / "consolidated.safetensors")
    else:
        names = [f"consolidated-{k:05d}-of-00002.safetensors" for k in (1, 2)]
        for k, name in enumerate(names):
            save_file(dict(list(tensors.items())[k::2]), folder / name)
        index = {name: names[k % 2] for k, name in enumerate(tensors)}
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "consolidated.safetensors.index.json").write_text(text)
    plain = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
    } | (params or {})
    (folder / "params.json").write_text(json.dumps({key: value for key, value in plain.items() if value is not None}))
    return folder


def byte_ranks(vocab_size: int = 640) -> list[bytes]:
    """Tokens of a small byte-level vocabulary, in the order in which they merge."""
    from weightsmith.formats.tokenizer.alphabet import to_bytes

    model = json.loads(bpe_tokenizer(vocab_size).to_str())["model"]
    merged = list(dict.fromkeys("".join(pair) for pair in model["merges"]))
    return [bytes([byte]) for byte in range(256)] + [to_bytes(text) or b"" for text in merged]


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    """A tokenizer.model of Llama 3's kind."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path


def write_tekken(path: Path, tokens: list[bytes], *, pattern: str, special: int = 24, unused: int = 3) -> Path:
    """A tekken.json without a list of special tokens and with more tokens than it uses."""
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    config = {
        "pattern": pattern,
        "num_vocab_tokens": len(tokens),
        "default_vocab_size": len(tokens) - unused + special,
        "default_num_special_tokens": special,
        "version": "v3",
    }
    path.write_text(json.dumps({"config": config, "vocab": vocab}))
    return path


def gguf_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor of a GGUF, by the gguf package."""
    import gguf

    found = gguf.GGUFReader(path).tensors
    return {one.name: (one.tensor_type.name, tuple(map(int, one.shape)), one.data.tobytes()) for one in found}


def safetensors_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same of a safetensors folder, by torch's loader."""
    import torch
    from safetensors.torch import load_file

    found = load_file(folder / "model.safetensors")
    return {
        name: (str(one.dtype), tuple(one.shape), one.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, one in found.items()
    }

"""Tiny random Mixtrals in every form they are published in, written without any code of the project's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests import native
from tests.tiny import bpe_tokenizer, llama_config, llama_tensors

DTYPES = native.DTYPES


def mixtral_config(**changes: Any) -> dict[str, Any]:
    """config.json of a two-layer Mixtral of four experts."""
    own = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
    own |= {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1000000.0}
    return llama_config(**(own | changes))


def mixtral_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under published names."""
    rng = np.random.default_rng(seed + 1)
    found = {}
    for name, value in llama_tensors(config, seed).items():
        if ".mlp." not in name:
            found[name] = value
        elif "gate_proj" in name:
            moe = name.removesuffix("mlp.gate_proj.weight") + "block_sparse_moe"
            ffn, hidden = value.shape
            shapes = {"gate": (config["num_local_experts"], hidden)}
            for e in range(config["num_local_experts"]):
                shapes |= {f"experts.{e}.{part}": (ffn, hidden) for part in ("w1", "w3")}
                shapes[f"experts.{e}.w2"] = (hidden, ffn)
            for part, shape in shapes.items():
                noise = rng.standard_normal(shape, dtype=np.float32)
                found[f"{moe}.{part}.weight"] = noise / np.float32(np.sqrt(shape[-1]))
    return found


def as_torch(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, Any]:
    import torch

    return {k: torch.from_numpy(v.copy()).to(getattr(torch, DTYPES[dtype])) for k, v in tensors.items()}


def stacked(tensors: dict[str, Any], n_experts: int) -> dict[str, Any]:
    """Published names to those of transformers 5 in memory: gate and up in one stack, down in another."""
    import torch

    found = {name: value for name, value in tensors.items() if ".block_sparse_moe." not in name}
    for name, router in tensors.items():
        if not name.endswith(".block_sparse_moe.gate.weight"):
            continue
        moe = name.removesuffix(".gate.weight")
        mlp = moe.replace("block_sparse_moe", "mlp")
        parts = {w: [tensors[f"{moe}.experts.{e}.{w}.weight"] for e in range(n_experts)] for w in ("w1", "w2", "w3")}
        both = zip(parts["w1"], parts["w3"], strict=True)
        found[f"{mlp}.gate.weight"] = router
        found[f"{mlp}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
        found[f"{mlp}.experts.down_proj"] = torch.stack(parts["w2"])
    return found


def write_mixtral(
    folder: Path, *, dtype: str = "F16", stacks: bool = False, tokenizer: bool = True, seed: int = 0, **changes: Any
) -> Path:
    """Hugging Face's form; stacks: experts as transformers 5 holds them in memory."""
    from safetensors.torch import save_file

    config = mixtral_config(**changes) | {"torch_dtype": DTYPES[dtype]}
    tensors = as_torch(mixtral_tensors(config, seed), dtype)
    if stacks:
        tensors = stacked(tensors, config["num_local_experts"])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if tokenizer:
        bpe_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
        settings |= {"bos_token": "<|begin_of_text|>", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_native(
    folder: Path,
    *,
    form: str = "safetensors",
    dtype: str = "BF16",
    params: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Mistral's form of mistral-inference and 8x22B ("safetensors", "pth"), or the first 8x7B's ("disjoint" files)."""
    import torch
    from safetensors.torch import save_file

    config = mixtral_config(max_position_embeddings=32768, bos_token_id=1, eos_token_id=2, **changes)
    count = config["num_local_experts"]
    tensors = native.native_tensors(config, dtype, canonical=mixtral_tensors(config))
    folder.mkdir(parents=True, exist_ok=True)
    common = {"vocab_size": config["vocab_size"], "rope_theta": config["rope_theta"]}
    if form == "disjoint":
        tensors = by_rows(tensors, count)
        for k in range(4):
            torch.save(dict(list(tensors.items())[k::4]), folder / f"consolidated.{k:02d}.pt")
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        own = {name: config[name] for name in (*names, "rms_norm_eps", "num_local_experts", "num_experts_per_tok")}
    else:
        if form == "pth":
            torch.save(tensors, folder / "consolidated.00.pth")
        else:
            save_file(tensors, folder / "consolidated.safetensors")
        own = {"dim": config["hidden_size"], "hidden_dim": config["intermediate_size"]}
        own |= {"n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"]}
        own |= {"n_kv_heads": config["num_key_value_heads"], "norm_eps": config["rms_norm_eps"]}
        own |= {"head_dim": config["hidden_size"] // config["num_attention_heads"]}
        own |= {"moe": {"num_experts": count, "num_experts_per_tok": config["num_experts_per_tok"]}}
    raw = common | own | (params or {})
    (folder / "params.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return folder


def by_rows(tensors: dict[str, Any], count: int) -> dict[str, Any]:
    """Native tensors as the first 8x7B has them: all experts of a layer as rows of one tensor, w2 transposed."""
    import torch

    found = {}
    for name, value in tensors.items():
        if ".experts." not in name:
            found[name.replace("feed_forward", "block_sparse_moe")] = value
        elif ".experts.0." in name:
            stem, part = name.removesuffix(".weight").split(".experts.0.")
            blocks = [tensors[f"{stem}.experts.{e}.{part}.weight"] for e in range(count)]
            whole = torch.cat([block.T if part == "w2" else block for block in blocks]).contiguous()
            found[f"{stem.replace('feed_forward', 'block_sparse_moe')}.{part}"] = whole
    return found

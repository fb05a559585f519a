"""bitsandbytes checkpoints by the published description, one weight at a time, written with the safetensors package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import bpe_tokenizer, llama_config, llama_tensors

# QLoRA, appendix E
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
NF4 += (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
NF4 += (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
NF4 += (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4 += tuple(-value for value in FP4)
LEVELS = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32)}
HALVES = {"float16": np.float16, "float32": np.float32}


def random_linear(
    shape: tuple[int, int], kind: str, *, seed: int, blocksize: int = 64, nested: bool = False, dtype: str = "float16"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Stored tensors by suffix of X.weight ("" is itself), and the weights they stand for."""
    rng = np.random.default_rng(seed)
    n = shape[0] * shape[1]
    n_blocks = -(-n // blocksize)
    packed = rng.integers(0, 256, (-(-n // 2), 1), np.uint8)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": blocksize, "dtype": dtype, "shape": list(shape)}
    parts = {"": packed, "quant_map": LEVELS[kind]}
    if nested:
        absmax = rng.integers(0, 256, n_blocks).astype(np.uint8)
        parts["nested_absmax"] = rng.uniform(0.01, 0.05, -(-n_blocks // 256)).astype(np.float32)
        parts["nested_quant_map"] = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0625}
    else:
        absmax = rng.uniform(0.01, 0.1, n_blocks).astype(np.float32)
    parts["absmax"] = absmax
    parts[f"quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    weights = np.empty(n, np.float32)
    for i in range(n):
        byte = int(packed[i // 2, 0])
        level = LEVELS[kind][byte >> 4 if i % 2 == 0 else byte & 15]
        scale = absmax[i // blocksize]
        if nested:
            block = i // blocksize
            scale = parts["nested_quant_map"][absmax[block]] * parts["nested_absmax"][block // 256]
            scale = np.float32(scale + np.float32(0.0625))
        weights[i] = HALVES[dtype](level * scale)
    return parts, weights.reshape(shape)


def write_folder(folder: Path, kind: str = "nf4", **kinds: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """A tiny packed Llama; returns the folder and the weights it stands for, float32 by canonical name."""
    from safetensors.numpy import save_file

    config = llama_config()
    stored: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    for seed, (name, value) in enumerate(llama_tensors(config).items()):
        if "_proj" not in name:
            stored[name] = value.astype(np.float16)
            expected[name] = stored[name].astype(np.float32)
        elif kind == "int8":
            rng = np.random.default_rng(seed)
            codes = rng.integers(-128, 128, value.shape).astype(np.int8)
            scales = rng.uniform(0.5, 2, value.shape[0]).astype(np.float32)
            stem = name.removesuffix(".weight")
            stored |= {name: codes, f"{stem}.SCB": scales, f"{stem}.weight_format": np.array(0, np.uint8)}
            expected[name] = codes.astype(np.float32) * scales[:, None] * np.float32(7.874015718698502e-3)
        else:
            parts, expected[name] = random_linear(value.shape, kind, seed=seed, **kinds)
            stored |= {f"{name}.{suffix}" if suffix else name: part for suffix, part in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": kind != "int8"}
    settings |= {"load_in_8bit": kind == "int8", "bnb_4bit_quant_type": kind}
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    bpe_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    save_file(stored, folder / "model.safetensors")
    return folder, expected

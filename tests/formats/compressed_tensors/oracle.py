"""compressed-tensors checkpoints by the published description, one number at a time, written with safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.formats.gptq.oracle import pack_bits
from tests.tiny import bpe_tokenizer, llama_config, llama_tensors

Tensors = dict[str, torch.Tensor]
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def whole_words(values: list[int], bits: int) -> list[int]:
    """The bits of `values` in as few words as hold them."""
    missing = -(len(values) * bits) % 32
    return pack_bits(values + [0] * (-(-missing // bits) if missing else 0), bits)[: -(-len(values) * bits // 32)]


def integers(
    shape: tuple[int, int],
    *,
    seed: int,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    plain_zeros: bool = False,
    scattered: bool = False,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensors, np.ndarray]:
    """pack-quantized: parts by suffix and weights; group None is whole rows."""
    rng = np.random.default_rng(seed)
    out, columns = shape
    groups = 1 if group is None else columns // group
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = rng.integers(low, high, shape)
    zeros = np.zeros((out, groups), int) if symmetric else rng.integers(low, high, (out, groups))
    scales = torch.from_numpy(rng.uniform(0.001, 0.02, (out, groups)).astype(np.float32)).to(dtype)
    index = np.zeros(columns, int) if group is None else np.arange(columns) // group
    index = rng.permutation(index) if scattered else index
    packed = [whole_words((row + high).tolist(), bits) for row in codes]
    parts = {
        "weight_packed": torch.tensor(packed, dtype=torch.int32),
        "weight_scale": scales,
        "weight_shape": torch.tensor([out, columns]),
    }
    if not symmetric:
        shifted = [whole_words((column + high).tolist(), bits) for column in zeros.T]
        parts["weight_zero_point"] = torch.tensor(shifted, dtype=torch.int32).T.contiguous()
        if plain_zeros:
            parts["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
    if scattered:
        parts["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
    weights = np.empty(shape, np.float32)
    for o in range(out):
        for i in range(columns):
            weights[o, i] = (codes[o, i] - zeros[o, index[i]]) * np.float64(scales[o, index[i]].item())
    return parts, weights


def one_by_one(
    shape: tuple[int, int], *, seed: int, kind: str = "float", scale: str = "channel", suffix: str = "weight_scale"
) -> tuple[Tensors, np.ndarray]:
    """int-quantized and float-quantized, and FP8. scale: tensor, scalar, channel, vector, or tile (of 32 x 48)."""
    rng = np.random.default_rng(seed)
    out, columns = shape
    tall, wide = {"channel": (1, columns), "vector": (1, columns), "tile": (32, 48)}.get(scale, shape)
    scales = rng.uniform(0.001, 0.02, (-(-out // tall), -(-columns // wide))).astype(np.float32)
    if kind == "float":
        stored = torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 30).to(torch.float8_e4m3fn)
    else:
        stored = torch.from_numpy(rng.integers(-128, 128, shape).astype(np.int8))
    numbers = stored.to(torch.float64).numpy()
    weights = np.empty(shape, np.float32)
    for o in range(out):
        for i in range(columns):
            weights[o, i] = numbers[o, i] * float(scales[o // tall, i // wide])
    given = {"scalar": (), "tensor": (1,), "vector": (out,)}.get(scale, scales.shape)
    return {"weight": stored, suffix: torch.from_numpy(scales.reshape(given))}, weights


def fours(shape: tuple[int, int], *, seed: int, kind: str) -> tuple[Tensors, np.ndarray]:
    """nvfp4- and mxfp4-pack-quantized."""
    rng = np.random.default_rng(seed)
    out, columns = shape
    group = 16 if kind == "nvfp4" else 32
    codes = rng.integers(0, 16, shape)
    parts = {"weight_packed": torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))}
    if kind == "nvfp4":
        stored = torch.from_numpy(rng.uniform(1, 400, (out, columns // group)).astype(np.float32)).to(
            torch.float8_e4m3fn
        )
        whole = torch.tensor([4321.0])
        parts |= {"weight_scale": stored, "weight_global_scale": whole}
        scales = (stored.float() / whole).numpy()
    else:
        exponents = rng.integers(110, 125, (out, columns // group))
        parts["weight_scale"] = torch.from_numpy(exponents.astype(np.uint8))
        scales = 2.0 ** (exponents - 127)
    weights = np.empty(shape, np.float32)
    for o in range(out):
        for i in range(columns):
            weights[o, i] = np.float32(E2M1[codes[o, i]]) * np.float32(scales[o, i // group])
    return parts, weights


def write_folder(
    folder: Path,
    settings: dict[str, Any],
    make: Callable[..., tuple[Tensors, np.ndarray]],
    *,
    extra: Callable[[str], Tensors] | None = None,
    **kinds: Any,
) -> tuple[Path, dict[str, np.ndarray]]:
    """A tiny packed Llama; returns the folder and the weights it stands for, float32 by canonical name."""
    from safetensors.torch import save_file

    config = llama_config()
    stored: Tensors = {}
    expected: dict[str, np.ndarray] = {}
    for seed, (name, value) in enumerate(llama_tensors(config).items()):
        if "_proj" not in name:
            stored[name] = torch.from_numpy(value).to(torch.bfloat16)
            expected[name] = stored[name].float().numpy()
            continue
        stem = name.removesuffix(".weight")
        parts, expected[name] = make(value.shape, seed=seed, **kinds)
        stored |= {f"{stem}.{suffix}": part for suffix, part in parts.items()}
        stored |= extra(stem) if extra else {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    bpe_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    save_file(stored, folder / "model.safetensors")
    return folder, expected


def settings_for(form: str, **weights: Any) -> dict[str, Any]:
    """quantization_config with one group of modules."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }

"""GPTQ checkpoints by the published description, one number at a time, written with the safetensors package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import bpe_tokenizer, llama_config, llama_tensors


def pack_bits(values: list[int], bits: int) -> list[int]:
    """Numbers as int32 words: their bits, lowest first, one after another in one long string."""
    string = "".join(format(value, f"0{bits}b")[::-1] for value in values)
    words = [int(string[i : i + 32][::-1], 2) for i in range(0, len(string), 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def packed(linear: dict[str, np.ndarray], bits: int, shift: int) -> dict[str, np.ndarray]:
    """Stored tensors of codes [out, in], zeros [out, groups], scales [out, groups], g_idx [in]."""
    codes, zeros = linear["codes"], linear["zeros"].astype(int) - shift
    return {
        "qweight": np.array([pack_bits(row.tolist(), bits) for row in codes], np.int32).T.copy(),
        "qzeros": np.array([pack_bits(column.tolist(), bits) for column in zeros.T], np.int32),
        "scales": linear["scales"].T.astype(np.float16).copy(),
        "g_idx": linear["g_idx"].astype(np.int32),
    }


def weights(linear: dict[str, np.ndarray]) -> np.ndarray:
    """(code - zero) * scale, float32 [out, in], one weight at a time."""
    out, columns = linear["codes"].shape
    found = np.empty((out, columns), np.float32)
    for o in range(out):
        for i in range(columns):
            g = int(linear["g_idx"][i])
            step = int(linear["codes"][o, i]) - int(linear["zeros"][o, g])
            found[o, i] = step * float(np.float16(linear["scales"][o, g]))
    return found


def random_linear(
    shape: tuple[int, int], bits: int, group: int, *, sym: bool = False, scattered: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out, columns = shape
    size = columns if group == -1 else group
    groups = -(-columns // size)
    places = np.arange(columns) // size
    return {
        "codes": rng.integers(0, 1 << bits, shape).astype(np.uint8),
        "zeros": np.full((out, groups), 1 << (bits - 1)) if sym else rng.integers(1, 1 << bits, (out, groups)),
        "scales": rng.uniform(0.001, 0.02, (out, groups)).astype(np.float16).astype(np.float32),
        "g_idx": rng.permutation(places) if scattered else places,
    }


def write_folder(
    folder: Path,
    *,
    bits: int = 4,
    group: int = 32,
    checkpoint_format: str | None = "gptq",
    old: bool = False,
    **kinds: Any,
) -> tuple[Path, dict[str, np.ndarray]]:
    """A tiny packed Llama; returns the folder and the weights it stands for, float32 by canonical name.

    old: settings in quantize_config.json only, as AutoGPTQ first wrote them.
    """
    import torch
    from safetensors.torch import save_file

    config = llama_config()
    stored: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    for seed, (name, value) in enumerate(llama_tensors(config).items()):
        if "_proj" not in name:
            stored[name] = value.astype(np.float16)
            expected[name] = stored[name].astype(np.float32)
            continue
        linear = random_linear(value.shape, bits, group, seed=seed, **kinds)
        expected[name] = weights(linear)
        shift = 0 if checkpoint_format == "gptq_v2" else 1
        for suffix, part in packed(linear, bits, shift).items():
            stored[f"{name.removesuffix('.weight')}.{suffix}"] = part
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"bits": bits, "group_size": group, "sym": kinds.get("sym", False)}
    settings["desc_act"] = kinds.get("scattered", False)
    if old:
        settings |= {"damp_percent": 0.01, "true_sequential": True, "model_name_or_path": None}
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    else:
        settings["quant_method"] = "gptq"
        if checkpoint_format is not None:
            settings["checkpoint_format"] = checkpoint_format
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    bpe_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    file = f"gptq_model-{bits}bit-{group}g.safetensors" if old else "model.safetensors"
    save_file({name: torch.from_numpy(value) for name, value in stored.items()}, folder / file)
    return folder, expected

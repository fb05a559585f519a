"""A real model that no codec has seen: SmolLM2-135M-Instruct, dithered and padded. The original of quality tables.

The model travels as Q4_1, so its weights lie on that lattice and any codec with the same blocks would look far too
good. Every quantized weight is moved by a seeded uniform amount within half a step of its lattice. Then the hidden size
is padded from 576 to 768, and the heads from 9/3 to 12/4, with zeros: 256 divides the rows and the function stays the
same, because norm weights are scaled by sqrt(576/768) and their epsilon by 576/768. The plain form leaves the shapes
alone, for containers whose groups divide them.

    python -m benchmarks.dithered [--plain] GGUF FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from weightsmith import formats
from weightsmith.cli.app import run
from weightsmith.quant import codecs
from weightsmith.types import Reader

WIDTH, HEADS, KV_HEADS = 768, 12, 4


def write(gguf: Path, folder: Path, *, seed: int = 0, padded: bool = True) -> Path:
    """Write the dithered model as F16 safetensors into `folder`, unless it is there already."""
    if (folder / "config.json").exists():
        return folder
    plain = folder.with_name(folder.name + ".plain")
    shutil.rmtree(plain, ignore_errors=True)
    if run(["convert", str(gguf), "--to", "safetensors", "-o", str(plain), "-q"]):
        raise SystemExit("the demo model cannot be converted")
    reader = formats.open_reader(gguf)
    rng = np.random.default_rng(seed)
    tensors = {name: _dithered(reader, name, rng) for name in reader.infos()}
    if padded:
        tensors = {name: _padded(name, value) for name, value in tensors.items()}
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file({name: value.astype(np.float16) for name, value in tensors.items()}, folder / "model.safetensors")
    if padded:
        config = json.loads((folder / "config.json").read_text())
        config |= {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": 64}
        config["rms_norm_eps"] *= 576 / WIDTH
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(plain)
    return folder


def _dithered(reader: Reader, name: str, rng: np.random.Generator) -> np.ndarray:
    info = reader.infos()[name]
    packed = reader.rows(name, 0, info.n_rows)
    values = codecs.decode(info.codec, packed, info.row_len).reshape(info.shape)
    if info.codec not in ("Q4_1", "Q8_0"):
        return values
    size = {"Q4_1": 20, "Q8_0": 34}[info.codec]
    step = packed.reshape(-1, size)[:, :2].copy().view(np.float16).astype(np.float32)  # d, one per block of 32
    noise = rng.uniform(-0.5, 0.5, (step.size, 32)).astype(np.float32) * np.abs(step)
    return values + noise.reshape(info.shape)


def _padded(name: str, value: np.ndarray) -> np.ndarray:
    wide = {576: WIDTH, 192: KV_HEADS * 64}  # no other axis of this model has these lengths
    if value.ndim == 1:
        out = np.zeros(WIDTH, np.float32)
        out[: value.size] = value * np.float32(np.sqrt(576 / WIDTH))
        return out
    out = np.zeros([wide.get(n, n) for n in value.shape], np.float32)
    out[: value.shape[0], : value.shape[1]] = value
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="as narrow as it is")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write(options.gguf, options.folder, padded=not options.plain)


if __name__ == "__main__":
    main()

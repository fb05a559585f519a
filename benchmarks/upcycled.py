"""A mixture of experts with the statistics of a real model, where none is at hand: a dense one, upcycled.

    python -m benchmarks.upcycled FOLDER --text FILE --out FOLDER [--experts 4] [--used 2] [--noise 0.1]

Every expert is the dense model's, moved by seeded noise (a share of each matrix's root mean square). Routers are drawn
at random over whitened inputs, H^-1/2 of `--text`, so that no direction of the states decides alone and all experts get
their part of the tokens.

Ref: Komatsuzaki et al., arXiv 2212.05055 (sparse upcycling).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from weightsmith import formats
from weightsmith.evals.calibration import calibrate
from weightsmith.evals.calibration.rows import Options
from weightsmith.evals.forward.weights import Place, tensor

ROWS, CTX = 8, 512
PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--used", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.1)
    options = parser.parse_args()
    reader = formats.open_reader(options.folder)
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name in reader.infos():
        own = tensor(reader, name, Place(torch.device("cpu"), torch.float32))
        layer, mlp, part = name.removesuffix(".weight").rpartition(".mlp.")
        if not mlp:
            tensors[name] = own
            continue
        size = options.noise * own.square().mean().sqrt()
        for expert in range(options.experts):
            moved = own + size * torch.randn(own.shape, generator=draw)
            tensors[f"{layer}.block_sparse_moe.experts.{expert}.{PARTS[part]}.weight"] = moved
    text = options.text.read_text(encoding="utf-8")
    for block in calibrate(reader, text, Options(rows=ROWS, ctx=CTX), sequential=False):
        moments = block.moments[f"{block.prefix}mlp.gate_proj.weight"]
        values, vectors = torch.linalg.eigh(moments.h.double() / moments.tokens)
        values = values.clamp(min=values[-1] * 1e-6)
        rows = torch.randn(options.experts, len(values), generator=draw, dtype=torch.float64)
        whitened = rows @ (vectors / values.sqrt()) @ vectors.T / np.sqrt(len(values))
        tensors[f"{block.prefix}block_sparse_moe.gate.weight"] = whitened.float()
    shutil.copytree(options.folder, options.out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file({name: value.half() for name, value in tensors.items()}, options.out / "model.safetensors")
    config = json.loads((options.out / "config.json").read_text())
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
    config |= {"num_local_experts": options.experts, "num_experts_per_tok": options.used}
    (options.out / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()

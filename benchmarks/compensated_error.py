"""What error feedback and each sweep of descent take off the loss of single matrices, in the real layer of a model.

    python -m benchmarks.compensated_error MODEL --calibrate FILE [--types Q4_K,...] [--layer N] [--rows N]

Shares of the loss tr((W - Q) H (W - Q)^T) that the same layout's search by the diagonal of H leaves; the first 512 rows
of each matrix, H measured behind the original's own layers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from weightsmith import formats
from weightsmith.evals.calibration import Options, calibrate
from weightsmith.quant import codecs
from weightsmith.quant.algorithms import compensated
from weightsmith.quant.algorithms.compensated import Inputs
from weightsmith.quant.algorithms.moments import loss_of

SWEEPS = (0, 1, 2, 4, 8)
NAMES = ("k_proj", "o_proj", "gate_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--types", default="Q2_K,Q3_K,Q4_K,Q6_K,IQ4_XS")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    text = options.calibrate.read_text()
    passes = calibrate(formats.open_reader(options.model), text, Options(rows=options.rows), sequential=False)
    block = next(block for block in passes if block.index == options.layer)
    print("| layout | matrix | " + " | ".join(f"{count} sweeps" for count in SWEEPS) + " |")
    print("|---|---|" + "---|" * len(SWEEPS))
    for codec in options.types.split(","):
        for name, moments in block.moments.items():
            if name.split(".")[-2] not in NAMES:
                continue
            w = block.weights[name.removeprefix(block.prefix)][:512].float()
            inputs = Inputs.of(moments.h, 0.01)
            packed = codecs.encode(codec, w.numpy(), importance=inputs.diagonal.numpy())
            plain = loss_of(w, torch.from_numpy(codecs.decode(codec, packed, w.shape[1])), moments.h)
            made = (compensated.encode(codec, w, inputs, sweeps=count)[1] for count in SWEEPS)
            cells = " | ".join(f"{loss_of(w, q, moments.h) / plain:.3f}" for q in made)
            print(f"| {codec} | {name.split('.')[-2]} | {cells} |", flush=True)


if __name__ == "__main__":
    main()

"""Weighted squared error of the k-quant searches relative to ggml's at equal bytes.

    python -m benchmarks.kquants_error [--rows 256] [--codecs Q4_K,Q6_K] [--model FILE.gguf]

Rows are Gaussian and Student-t(5), importances log-normal. With --model the weights of a real model join: every
Q4_1 tensor of a GGUF file, dithered uniformly by half a lattice step (or codecs with the same blocks would look too
good), its rows padded with zeros to a multiple of 256. "worse" counts blocks with a larger error than ggml's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from benchmarks import kquants_reference as reference
from weightsmith.quant import codecs
from weightsmith.quant.algorithms.weighted import EFFORTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--codecs", default=",".join(reference.CODECS))
    parser.add_argument("--model")
    options = parser.parse_args()
    quantize = reference.ggml_quantizer()
    sets = {name: [rows] for name, rows in reference.samples(options.rows, 4096).items()}
    if options.model:
        sets["model"] = list(model_rows(options.model))
    print("error relative to ggml's, and blocks that are worse\n")
    print(f"| codec | rows | imatrix | {' | '.join(EFFORTS)} |\n|---|---|---|{'---|' * len(EFFORTS)}")
    for codec in options.codecs.split(","):
        for name, parts in sets.items():
            for guided in (False, True):
                cells = [compare(codec, parts, guided, effort, quantize) for effort in EFFORTS]
                print(f"| {codec} | {name} | {'yes' if guided else 'no'} | {' | '.join(cells)} |", flush=True)


def compare(codec: str, parts: list[np.ndarray], guided: bool, effort: str, quantize: object) -> str:
    total = [0.0, 0.0]
    worse = blocks = 0
    for rows in parts:
        importance = reference.importances(rows.shape[1]) if guided else None
        theirs = reference.block_errors(codec, rows, quantize(codec, rows, importance), importance)
        ours = reference.block_errors(
            codec, rows, codecs.encode(codec, rows, importance=importance, effort=effort), importance
        )
        total[0] += theirs.sum()
        total[1] += ours.sum()
        worse += np.count_nonzero(ours > theirs * (1 + 1e-6))
        blocks += len(ours)
    return f"{100 * (total[1] / total[0] - 1):+.1f} % ({worse} of {blocks})"


def model_rows(path: str) -> Iterator[np.ndarray]:
    """Every fourth Q4_1 matrix of a GGUF file, dithered and padded."""
    import gguf

    rng = np.random.default_rng(7)
    found = [t for t in gguf.GGUFReader(path).tensors if t.tensor_type.name == "Q4_1" and t.name.startswith("blk.")]
    for tensor in found[::4]:
        blocks = tensor.data.reshape(tensor.data.shape[0], -1, 20)
        step = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[..., 0].astype(np.float32).repeat(32, 1)
        rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        rows = (rows + rng.uniform(-0.5, 0.5, rows.shape) * step).astype(np.float32)
        yield np.ascontiguousarray(np.pad(rows, ((0, 0), (0, -rows.shape[1] % 256))))


if __name__ == "__main__":
    main()

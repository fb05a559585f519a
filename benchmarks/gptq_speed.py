"""Processor seconds that GPTQ takes for the matrices of one real layer, part by part, and what it loses.

    OMP_NUM_THREADS=1 python -m benchmarks.gptq_speed MODEL --calibrate FILE [--layer N] [--rows N] [--bits N] [--asym]

Linears that share their inputs are one matrix, as they are when a model is quantized. Least of several runs; parts are
those of the last run, under a profiler.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from pathlib import Path

import torch

from weightsmith import formats
from weightsmith.evals.calibration import Options, calibrate
from weightsmith.quant.algorithms import gptq
from weightsmith.quant.algorithms.moments import loss_of, shrinkage
from weightsmith.quant.algorithms.rtn import Grid

RUNS = 5
PARTS = ("search", "factor", "feedback", "_move_grid", "_move_codes", "sweep", "quantize")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asym", action="store_true")
    options = parser.parse_args()
    grid = Grid(options.bits, options.group_size, not options.asym)
    text = options.calibrate.read_text()
    passes = calibrate(formats.open_reader(options.model), text, Options(rows=options.rows), sequential=False)
    block = next(block for block in passes if block.index == options.layer)
    groups: dict[int, list[str]] = {}
    for name, moments in block.moments.items():
        groups.setdefault(id(moments), []).append(name)
    profile = cProfile.Profile(time.process_time)
    print("| matrix | shape | s | share lost |\n|---|---|---|---|")
    for names in groups.values():
        moments = block.moments[names[0]]
        w = torch.cat([block.weights[name.removeprefix(block.prefix)].float() for name in names])
        h, shrink = moments.h, shrinkage(moments.size, moments.tokens)
        gptq.quantize(w[:64], h, grid, shrink=shrink)
        seconds = []
        for _ in range(RUNS):
            start = time.process_time()
            found = gptq.quantize(w, h, grid, shrink=shrink)
            seconds.append(time.process_time() - start)
        profile.runcall(gptq.quantize, w, h, grid, shrink=shrink)
        share = loss_of(w, found.dequantize(), h) / loss_of(w, None, h)
        print(f"| {names[0].split('.')[-2]} | {list(w.shape)} | {min(seconds):.4f} | {share:.8f} |")
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for part in PARTS:
        spent = [row[3] for (file, _, function), row in stats.items() if function == part and "algorithms" in file]
        if spent:
            print(f"{part}: {max(spent):.3f} s")


if __name__ == "__main__":
    main()

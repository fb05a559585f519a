"""Codecs beside the gguf package's, one core: GB of float32 a second, encode and decode.

python -m benchmarks.codecs [--mb 4]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import gguf
import numpy as np

from benchmarks import measure
from weightsmith.quant import codecs

CODECS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def rate(function: Callable[[], object], nbytes: int) -> float:
    """Best of seven, each long enough to time; the first call, which may compile, is not counted."""
    function()
    best = float("inf")
    for _ in range(7):
        begun = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begun)
    return nbytes / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=4, help="megabytes of float32 per call")
    width = 2048
    rows = (np.random.default_rng(0).standard_normal((parser.parse_args().mb * 1_000_000 // 4 // width, width))).astype(
        np.float32
    )
    print(f"{measure.machine()}; one core; slabs of {rows.nbytes / 1e6:.0f} MB; GB/s of float32\n")
    print("| codec | encode | gguf-py | decode | gguf-py |")
    print("|---|---|---|---|---|")
    for name in CODECS:
        kind = gguf.GGMLQuantizationType[name]
        packed = codecs.encode(name, rows)
        cells = [
            rate(lambda name=name: codecs.encode(name, rows), rows.nbytes),
            rate(lambda kind=kind: gguf.quants.quantize(rows, kind), rows.nbytes),
            rate(lambda name=name, packed=packed: codecs.decode(name, packed, width), rows.nbytes),
            rate(lambda kind=kind, packed=packed: gguf.quants.dequantize(packed, kind), rows.nbytes),
        ]
        print(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")


if __name__ == "__main__":
    main()

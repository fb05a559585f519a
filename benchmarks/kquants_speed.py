"""Weights per second and core of the k-quant searches beside ggml's, one thread, with and without an imatrix.

    python -m benchmarks.kquants_speed [--rows 256] [--repeat 3] [--codecs Q4_K,Q6_K]

Processor time of the thread, so that other work on the machine does not count. The first column is what compiling the
codec takes when nothing is cached (NUMBA_CACHE_DIR set to an empty folder shows it; otherwise it is loading time).
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks import kquants_reference as reference
from benchmarks import measure
from weightsmith.quant import codecs
from weightsmith.quant.algorithms.weighted import EFFORTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--row-len", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--codecs", default=",".join(reference.CODECS))
    options = parser.parse_args()
    quantize = reference.ggml_quantizer()
    rows = reference.samples(options.rows, options.row_len)["student"]
    print(
        f"{measure.machine()}; {rows.size / 1e6:.1f} M weights, one thread; million weights per second (times ggml's)\n"
    )
    print("| codec | load s | imatrix | ggml | fast | normal | best |\n|---|---|---|---|---|---|---|")
    for codec in options.codecs.split(","):
        begun = time.thread_time()
        codecs.encode(codec, np.zeros((1, 256), np.float32))
        load = time.thread_time() - begun
        for importance in (None, reference.importances(options.row_len)):
            theirs = reference.seconds(lambda c=codec, i=importance: quantize(c, rows, i), 1)
            cells = [f"{rows.size / theirs / 1e6:.1f}"]
            for effort in EFFORTS:
                ours = reference.seconds(
                    lambda c=codec, i=importance, e=effort: codecs.encode(c, rows, importance=i, effort=e),
                    options.repeat,
                )
                cells.append(f"{rows.size / ours / 1e6:.1f} ({theirs / ours:.1f}x)")
            print(
                f"| {codec} | {load:.1f} | {'no' if importance is None else 'yes'} | {' | '.join(cells)} |", flush=True
            )


if __name__ == "__main__":
    main()

"""Quantize an F16 GGUF beside llama.cpp's own quantizer: seconds of the whole process, ratio, peak memory.

    python -m benchmarks.quantize [--times 3] [--types Q4_K_M,Q8_0] [--threads 2] [--work build/bench]

Contestants run in turn on the same file, read into the page cache before each run, with their kernels compiled (ours
compile once on a machine, 5 to 7 s for a k-quant). llama.cpp takes part through
llama-cpp-python (`benchmarks.llama_quantize`), which is the code behind llama-quantize.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import measure, random_llama
from tests.tiny import write_llama

TYPES = "Q8_0,Q4_0,Q4_K_M,Q5_K_M,Q6_K,Q3_K_M,Q2_K,IQ4_XS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=list(random_llama.SIZES), default="1.1B")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    source = _source(options.work, options.model)
    print(
        f"{measure.machine()}; {options.model}, {source.stat().st_size / 1e9:.2f} GB F16; {options.threads} threads; "
    )
    print(f"median of {options.times}, interleaved; seconds of the whole process\n")
    print("| type | llama.cpp s | weightsmith s | ratio | llama.cpp RSS MB | weightsmith RSS MB |")
    print("|---|---|---|---|---|---|")
    for kind in options.types.split(","):
        target = options.work / "quantized.gguf"
        _compile(options.work, kind)
        runs = contestants(source, target, kind, options.threads)
        results = measure.repeat(options.times, runs, partial(measure.settle, source))
        theirs, ours = (measure.median(results[name]) for name in ("llama.cpp", "weightsmith"))
        cells = [f"{theirs.seconds:.1f}", f"{ours.seconds:.1f}", f"{ours.seconds / theirs.seconds:.2f}"]
        cells += [f"{run.peak_rss / 1e6:.0f}" for run in (theirs, ours)]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
        target.unlink()


def _compile(work: Path, kind: str) -> None:
    """Let the kernels of a type compile, once for a machine, outside what is timed."""
    tiny = write_llama(work / "tiny", hidden_size=256, intermediate_size=256)
    tool = str(Path(sys.executable).parent / "weightsmith")
    out = work / "tiny.gguf"
    measure.run_checked(
        [tool, "quantize", str(tiny), "--to", f"gguf:{kind}", "-o", str(out), "--force"], work / "log.txt"
    )


def contestants(source: Path, target: Path, kind: str, threads: int) -> dict[str, Callable[[], measure.Run]]:
    tool = str(Path(sys.executable).parent / "weightsmith")

    def fresh(command: list[str]) -> measure.Run:
        target.unlink(missing_ok=True)
        os.sync()
        return measure.run_checked(command, target.with_name("log.txt"))

    ours = [tool, "quantize", str(source), "--to", f"gguf:{kind}", "-o", str(target), "--threads", str(threads)]
    theirs = [sys.executable, "-m", "benchmarks.llama_quantize", str(source), str(target), kind, str(threads)]
    return {"llama.cpp": partial(fresh, theirs), "weightsmith": partial(fresh, ours)}


def _source(work: Path, size: str) -> Path:
    source = work / f"{size}-F16.gguf"
    if not source.exists():
        folder = random_llama.write(work / size, size)
        tool = str(Path(sys.executable).parent / "weightsmith")
        measure.run_checked([tool, "convert", str(folder), "--to", "gguf:F16", "-o", str(source)], work / "log.txt")
    return source


if __name__ == "__main__":
    main()

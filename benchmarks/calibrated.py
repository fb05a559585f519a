"""What calibration is worth: files made with error feedback beside llama.cpp's, made with an imatrix of the same text.

    python -m benchmarks.calibrated --calibrate FILE --text FILE [--types Q4_K_M,...] [--rows N] [--windows N]
                                    [--effort normal] [--work build/bench]

The original is `benchmarks.dithered`. The imatrix is measured once, on the rows that ours calibrate on, and all files
are judged by the same decoder on the same tokens of another text. What does not depend on our code is kept in the work
folder for the next run: the imatrix, the original's hidden states and llama.cpp's results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import dithered, measure
from weightsmith import formats
from weightsmith.evals import calibration, compare
from weightsmith.evals.forward import load
from weightsmith.evals.ruler import Ruler
from weightsmith.formats import imatrix

TYPES = "Q4_K_M,IQ4_XS,Q3_K_M,Q2_K"
TOOL = [sys.executable, "-m", "weightsmith"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    demo = Path(os.environ.get("WEIGHTSMITH_DEMO_GGUF", "build/assets/demo.gguf"))
    folder = dithered.write(demo, options.work / "dithered")
    source, log = options.work / "dithered-F16.gguf", options.work / "log.txt"
    if not source.exists():
        measure.run_checked([*TOOL, "convert", str(folder), "--to", "gguf:F16", "-o", str(source)], log)
    original = prepare(folder, options)
    matrix = measured(folder, options)
    print(f"{options.rows} rows to calibrate on, {len(original.windows.tokens)} windows to judge by\n")
    print("| type | bytes | KL llama.cpp | KL ours | ratio | ppl ratio llama.cpp | ppl ratio ours | seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for kind in options.types.split(","):
        theirs = peer(source, matrix, kind, original, options)
        path = options.work / f"ours-{kind}.gguf"
        own = [*TOOL, "quantize", str(folder), "--to", f"gguf:{kind}", "-o", str(path), "--force", "-q"]
        own += ["--calibrate", str(options.calibrate), "--rows", str(options.rows), "--effort", options.effort]
        begun = time.perf_counter()
        measure.run_checked(own, log)
        seconds = time.perf_counter() - begun
        ours = judged(path, original)
        if ours["bytes"] != theirs["bytes"]:
            sys.exit(f"{kind}: {ours['bytes']} bytes, llama.cpp's file has {theirs['bytes']}")
        cells = [f"{ours['bytes']}", f"{theirs['kld']:.5f}", f"{ours['kld']:.5f}", f"{ours['kld'] / theirs['kld']:.3f}"]
        cells += [f"{theirs['ratio']:.4f}", f"{ours['ratio']:.4f}", f"{seconds:.0f}"]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def prepare(folder: Path, options: argparse.Namespace) -> compare.Original:
    """The original with its hidden states, from the work folder if they are there."""
    text = options.text.read_text()
    original = compare.prepare(formats.open_reader(folder), text, Ruler(max_windows=options.windows), keep=True)
    kept = options.work / f"states-{digest(text, options.windows)}.pt"
    if not kept.exists():
        for _ in original.logits(lambda _count: None):
            pass
        torch.save(original._states, kept)
    original._decoder, original._states = load(original.reader), torch.load(kept)
    return original


def measured(folder: Path, options: argparse.Namespace) -> Path:
    """An imatrix of the rows that ours will calibrate on."""
    text = options.calibrate.read_text()
    path: Path = options.work / f"imatrix-{digest(text, options.rows)}.gguf"
    if not path.exists():
        rows = calibration.Options(rows=options.rows)
        imatrix.write(path, calibration.imatrix(formats.open_reader(folder), text, rows))
    return path


def peer(source: Path, matrix: Path, kind: str, original: compare.Original, options: argparse.Namespace) -> Any:
    """llama.cpp's result for a type."""
    kept = options.work / f"peer-{kind}-{matrix.stem}-{digest(original.text, options.windows)}.json"
    if not kept.exists():
        path = options.work / f"theirs-{kind}.gguf"
        command = [sys.executable, "-m", "benchmarks.llama_quantize", str(source), str(path), kind, "2", str(matrix)]
        measure.run_checked(command, options.work / "log.txt")
        kept.write_text(json.dumps(judged(path, original)))
        path.unlink()
    return json.loads(kept.read_text())


def judged(path: Path, original: compare.Original) -> dict[str, float]:
    """Bytes of tensors, mean KL divergence and ratio of perplexities."""
    reader = formats.open_reader(path)
    found = compare.against(reader, original)
    return {
        "bytes": sum(info.nbytes for info in reader.infos().values()),
        "kld": found.kld_mean,
        "ratio": found.ratio,
    }


def digest(text: str, count: int | None) -> str:
    return hashlib.sha256(f"{count} {text}".encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()

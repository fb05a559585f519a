"""What calibration is worth: our GGUF files beside llama.cpp's and AutoRound's of the same type and the same text.

    python -m benchmarks.calibrated --calibrate FILE --text FILE [--types Q4_K_M,...] [--rows N] [--windows N]
                                    [--contestants llama.cpp,AutoRound-30,weightsmith-best] [--work build/bench]

The original is `benchmarks.dithered`. llama.cpp's files are made with an imatrix that is measured once, on the rows
that all others calibrate on, token for token; AutoRound-N (`sh benchmarks/peers.sh build/peers`) tunes each block for N
steps, 0 rounds by an imatrix of its own. All files are judged by the same decoder on the same tokens of another text.
Files and what was measured stay in the work folder: remove ours there when the code has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from benchmarks import dithered, measure
from weightsmith import formats
from weightsmith.evals import calibration, compare
from weightsmith.evals.calibration.rows import Options, draw
from weightsmith.evals.forward import load
from weightsmith.evals.ruler import Ruler
from weightsmith.formats import imatrix

TYPES = "Q4_K_M,IQ4_XS,Q3_K_M,Q2_K"
CONTESTANTS = "llama.cpp,weightsmith"
TOOL = [sys.executable, "-m", "weightsmith"]
AUTOROUND = Path(__file__).with_name("autoround_quantize.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--contestants", default=CONTESTANTS)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    demo = Path(os.environ.get("WEIGHTSMITH_DEMO_GGUF", "build/assets/demo.gguf"))
    folder = dithered.write(demo, options.work / "dithered")
    original = prepare(folder, options)
    print(f"{measure.machine()}; {options.rows} rows to calibrate, {len(original.windows.tokens)} to judge\n")
    print("| type | contestant | bytes | KL | of the first's | ppl ratio | top-1 | s | s of all cores | RSS MB |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for kind in options.types.split(","):
        first: dict[str, float] = {}
        for name in options.contestants.split(","):
            found = result(folder, kind, name, original, options)
            first = first or found
            if found["bytes"] != first["bytes"]:
                sys.exit(f"{kind}: {found['bytes']} bytes of {name}, the first file has {first['bytes']}")
            cells = [f"{found['bytes']:.0f}", f"{found['kld']:.5f} ± {found['kld_stderr']:.5f}"]
            cells += [f"{found['kld'] / first['kld']:.3f}", f"{found['ratio']:.4f}", f"{found['top1']:.4f}"]
            cells += [f"{found['seconds']:.0f}", f"{found['cpu']:.0f}", f"{found['peak_rss'] / 1e6:.0f}"]
            print(f"| {kind} | {name} | {' | '.join(cells)} |", flush=True)


def result(
    folder: Path, kind: str, name: str, original: compare.Original, options: argparse.Namespace
) -> dict[str, float]:
    """What a contestant's file of a type loses, and what it took to make; from the work folder if it is there."""
    stem = f"{name}-{kind}-{options.rows}"
    path, kept = options.work / f"{stem}.gguf", options.work / f"{stem}-{digest(original.text, options.windows)}.json"
    run = path.with_suffix(".run")
    if not path.exists() or not run.exists():
        run.write_text(json.dumps(asdict(make(folder, path, kind, name, options))))
        kept.unlink(missing_ok=True)
    if not kept.exists():
        kept.write_text(json.dumps(judged(path, original)))
    made = measure.Run(**json.loads(run.read_text()))
    found: dict[str, float] = json.loads(kept.read_text())
    return found | {"seconds": made.seconds, "cpu": made.cpu, "peak_rss": made.peak_rss}


def make(folder: Path, path: Path, kind: str, name: str, options: argparse.Namespace) -> measure.Run:
    """One file by one contestant."""
    peer, _, variant = name.partition("-")
    log = path.with_suffix(".log")
    if peer == "llama.cpp":
        source = options.work / "dithered-F16.gguf"
        if not source.exists():
            measure.run_checked([*TOOL, "convert", str(folder), "--to", "gguf:F16", "-o", str(source)], log)
        matrix = measured(folder, options)
        command = [sys.executable, "-m", "benchmarks.llama_quantize", str(source), str(path), kind, "2", str(matrix)]
    elif peer == "AutoRound":
        rows = options.work / f"rows-{options.rows}.npy"
        np.save(rows, draw(formats.open_reader(folder), options.calibrate.read_text(), Options(rows=options.rows)))
        command = [str(options.peers / "bin" / "python"), str(AUTOROUND), str(folder), str(path)]
        command += ["gguf", kind, "0", str(rows), variant]
    else:
        command = [*TOOL, "quantize", str(folder), "--to", f"gguf:{kind}", "-o", str(path), "--force", "-q"]
        command += ["--calibrate", str(options.calibrate), "--rows", str(options.rows)]
        command += ["--effort", variant] if variant else []
    return measure.run_checked(command, log)


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
        rows = Options(rows=options.rows)
        imatrix.write(path, calibration.imatrix(formats.open_reader(folder), text, rows))
    return path


def judged(path: Path, original: compare.Original) -> dict[str, float]:
    """Bytes of tensors, and what was lost."""
    reader = formats.open_reader(path)
    found = compare.against(reader, original)
    lost = {"kld": found.kld_mean, "kld_stderr": found.kld_stderr, "ratio": found.ratio, "top1": found.top1}
    return lost | {"bytes": sum(info.nbytes for info in reader.infos().values())}


def digest(text: str, count: int | None) -> str:
    return hashlib.sha256(f"{count} {text}".encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()

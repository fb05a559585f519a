"""GPTQ and AWQ checkpoints, ours beside GPTQModel's, AutoRound's and plain rounding: what is lost, bytes, seconds.

    sh benchmarks/peers.sh build/peers
    python -m benchmarks.packed --text CALIBRATION.txt --eval OTHER.txt [--rows 128] [--windows N] [--cells gptq:4]
                                [--contestants GPTQModel,AutoRound-30,weightsmith]

The original is `benchmarks.dithered`, plain. All calibrate on the same rows, token for token, run in turn as processes
of their own, and are judged by the same decoder on the same tokens. GPTQ is symmetric, AWQ has zero points, groups are
of 64. Bytes are those of the packed linears: what is left alone, everyone writes as it likes. "rounding" is the nearest
code on a grid that spans each group. weightsmith-EFFORT is ours with another effort than normal. AutoRound-N tunes each
block for N steps and takes part in cells of gptq only. Both kinds of seconds are given: on a machine that does other
work, those of all cores are the ones to compare.

Checkpoints and results stay in --work, so a run that was stopped goes on, and more windows only judge again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import dithered, measure
from weightsmith import formats
from weightsmith.evals import compare
from weightsmith.evals.calibration.rows import Options, draw
from weightsmith.evals.prose import default_text
from weightsmith.evals.ruler import Ruler
from weightsmith.quant import codecs
from weightsmith.quant.algorithms import rtn

GROUP = 64
CONTESTANTS = ("rounding", "GPTQModel", "weightsmith")
SCRIPTS = {name: Path(__file__).with_name(f"{name.lower()}_quantize.py") for name in ("GPTQModel", "AutoRound")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on")
    parser.add_argument("--eval", type=Path, help="to judge by; the built-in text unless told")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--cells", default="gptq:4,gptq:3,awq:4")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--work", type=Path, default=Path("build/packed"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    demo = Path(os.environ.get("WEIGHTSMITH_DEMO_GGUF", "build/assets/demo.gguf"))
    source = dithered.write(demo, options.work / "plain", padded=False)
    for cell in options.cells.split(","):
        for name in options.contestants.split(","):
            _make(source, cell, name, options)
    _judge(source, options)


def _folder(cell: str, name: str, options: argparse.Namespace) -> Path:
    rows = "" if name == "rounding" else f"-{options.rows}"
    return Path(options.work / f"{cell.replace(':', '')}-{name}{rows}")


def _make(source: Path, cell: str, name: str, options: argparse.Namespace) -> None:
    """One checkpoint, unless it is there; what it took lies beside it."""
    folder = _folder(cell, name, options)
    report = folder.with_suffix(".run")
    if report.exists() or (name == "rounding" and folder.exists()):
        return
    method, bits = cell.split(":")
    if name == "rounding":
        _round(source, folder, rtn.Grid(int(bits), GROUP, sym=method == "gptq"))
        return
    log = folder.with_suffix(".log")
    peer, _, variant = name.partition("-")
    if peer in SCRIPTS:
        rows = _rows(source, options)
        command = [str(options.peers / "bin" / "python"), str(SCRIPTS[peer]), str(source), str(folder)]
        command += [method, bits, str(GROUP), str(rows), *([variant] if variant else [])]
    else:
        target = cell if method == "gptq" else method
        command = [sys.executable, "-m", "weightsmith", "quantize", str(source), "--to", target, "-o", str(folder)]
        command += ["--calibrate", str(options.text), "--rows", str(options.rows), "--group-size", str(GROUP), "-q"]
        command += ["--sym" if method == "gptq" else "--asym", "--force", *(["--effort", variant] if variant else [])]
    measure.settle(source)
    report.write_text(json.dumps(asdict(measure.run_checked(command, log))))


def _rows(source: Path, options: argparse.Namespace) -> Path:
    """The rows that `quantize --calibrate` draws, as a file for the peer."""
    path = Path(options.work / f"rows-{options.rows}.npy")
    if not path.exists():
        np.save(path, draw(formats.open_reader(source), options.text.read_text(), Options(rows=options.rows)))
    return path


def _round(source: Path, folder: Path, grid: rtn.Grid) -> None:
    """Every linear of the layers rounded to `grid`, as F32 safetensors: what it computes, not what it would weigh."""
    reader = formats.open_reader(source)
    infos = list(reader.infos().values())
    container = formats.containers()["safetensors"]
    with container.create(folder, reader.config, infos, reader.vocab(), source=reader) as writer:
        for info in infos:
            packed = reader.rows(info.name, 0, info.n_rows)
            if "_proj" in info.name:
                values = codecs.decode(info.codec, packed, info.row_len)
                found = rtn.quantize(torch.from_numpy(values), grid).dequantize()
                packed = codecs.encode(info.codec, found.numpy())
            writer.write(info, 0, packed)


def _judge(source: Path, options: argparse.Namespace) -> None:
    text = options.eval.read_text() if options.eval else default_text()
    original = compare.prepare(formats.open_reader(source), text, Ruler(max_windows=options.windows), keep=True)
    print(f"{measure.machine()}; {options.rows} rows of 512 to calibrate, {len(original.windows.tokens)} to judge\n")
    print("| cell | contestant | KL | of GPTQModel's | ppl ratio | top-1 | bytes | s | s of all cores | RSS MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    kept = options.work / "judged.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for cell in options.cells.split(","):
        peer = None
        for name in sorted(options.contestants.split(","), key=lambda name: name != "GPTQModel"):
            folder = _folder(cell, name, options)
            key = f"{folder.name}@{len(original.windows.tokens)}"
            if key not in known:
                known[key] = _measured(folder, original)
                kept.write_text(json.dumps(known, indent=1))
            peer = known[key]["kld"] if name == "GPTQModel" else peer
            print(f"| {cell} | {name} | {' | '.join(_cells(folder, known[key], peer))} |", flush=True)


def _measured(folder: Path, original: compare.Original) -> dict[str, float]:
    reader = formats.open_reader(folder)
    found = compare.against(reader, original)
    stored = reader.native_infos() if hasattr(reader, "native_infos") else {}
    packed = sum(info.nbytes for name, info in stored.items() if "_proj" in name and not name.endswith(".g_idx"))
    values = {"kld": found.kld_mean, "kld_stderr": found.kld_stderr, "ratio": found.ratio, "top1": found.top1}
    return values | {"bytes": packed if reader.container != "safetensors" else 0}


def _cells(folder: Path, one: dict[str, float], peer: float | None) -> list[str]:
    cells = [f"{one['kld']:.5f} ± {one['kld_stderr']:.5f}", f"{one['kld'] / peer:.3f}" if peer else ""]
    cells += [f"{one['ratio']:.4f}", f"{one['top1']:.4f}", str(one["bytes"] or "")]
    report = folder.with_suffix(".run")
    if not report.exists():
        return [*cells, "", "", ""]
    run = measure.Run(**json.loads(report.read_text()))
    return [*cells, f"{run.seconds:.0f}", f"{run.cpu:.0f}", f"{run.peak_rss / 1e6:.0f}"]


if __name__ == "__main__":
    main()

"""The main job on a built-in default: pull a trained model, convert it, quantize it, prove what was lost.

`make demo` runs this. Every step is the command line a user would type; the catalog is a folder of its own
(build/demo), so nothing of yours is touched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path("build/demo")
MODEL = "smollm2-135m"
TYPES = ("Q8_0", "Q4_0")


def weightsmith(*args: str) -> tuple[dict[str, Any], float]:
    """Run one verb with --json; return its result and the seconds it took."""
    print(f"$ weightsmith {' '.join(args)}", flush=True)
    begun = time.monotonic()
    command = [sys.executable, "-m", "weightsmith", *args, "--json"]
    done = subprocess.run(
        command, env=os.environ | {"WEIGHTSMITH_HOME": str(HOME)}, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout), time.monotonic() - begun


def row(name: str, made: float, shown: dict[str, Any], verified: dict[str, Any] | None) -> tuple[str, ...]:
    if verified is None:
        return (name, f"{shown['tensor_bytes']:,}", f"{shown['bpw']:.3f}", "", "", "", f"{made:.1f}", "")
    return (
        name,
        f"{shown['tensor_bytes']:,}",
        f"{shown['bpw']:.3f}",
        f"{verified['candidate']['perplexity']:.4f}",
        f"{verified['ratio']:.4f}",
        f"{verified['kld_mean']:.5f}",
        f"{made:.1f}",
        f"{verified['seconds']:.1f}",
    )


def main() -> None:
    begun = time.monotonic()
    shutil.rmtree(HOME, ignore_errors=True)
    _, seconds = weightsmith("pull", MODEL)
    original, _ = weightsmith("show", f"{MODEL}:original")
    rows = [row("original (GGUF Q4_1)", seconds, original, None)]
    _, seconds = weightsmith("convert", MODEL, "--to", "safetensors")
    steps = [("safetensors F16", f"{MODEL}:safetensors", seconds)]
    for kind in TYPES:
        _, seconds = weightsmith("quantize", f"{MODEL}:safetensors", "--to", f"gguf:{kind}")
        steps.append((f"GGUF {kind}", f"{MODEL}:{kind.lower()}", seconds))
    for name, ref, made in steps:
        shown, _ = weightsmith("show", ref)
        verified, _ = weightsmith("verify", ref, "--against", f"{MODEL}:original", "--max-ppl-ratio", "1.25")
        rows.append(row(name, made, shown, verified))
    base = f"{verified['original']['perplexity']:.4f}"
    rows[0] = (*rows[0][:3], base, "1.0000", "0.00000", *rows[0][6:])
    headers = ("file", "bytes", "bpw", "perplexity", "ratio", "KL (nats)", "made in s", "verified in s")
    table = (headers, *rows)
    widths = [max(len(line[i]) for line in table) for i in range(len(headers))]
    print()
    for first, *cells in table:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))]))
    print(f"\n{verified['original']['tokens']} tokens scored; {time.monotonic() - begun:.0f} s in all; catalog {HOME}")


if __name__ == "__main__":
    main()

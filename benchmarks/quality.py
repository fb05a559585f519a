"""What a type costs, ours beside llama.cpp's own quantizer at the same types and bytes: perplexity and KL divergence.

    python -m benchmarks.quality [--types Q4_K_M,...] [--text FILE] [--windows N] [--imatrix FILE] [--work build/bench]
                                 [--convention llama.cpp|paper] [--ctx N]

The original is `benchmarks.dithered`. Both files are measured by the same decoder on the same tokens against it. The
paper's convention scores every token of a window, so a number of scored tokens costs half the computing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import dithered, measure
from weightsmith import formats
from weightsmith.evals import compare
from weightsmith.evals.prose import default_text
from weightsmith.evals.ruler import Ruler

TOOL = [sys.executable, "-m", "weightsmith"]
TYPES = "Q6_K,Q5_K_M,Q5_K_S,Q4_K_M,Q4_K_S,IQ4_XS,IQ4_NL,Q3_K_L,Q3_K_M,Q3_K_S,Q2_K"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--convention", default="llama.cpp")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    demo = Path(os.environ.get("WEIGHTSMITH_DEMO_GGUF", "build/assets/demo.gguf"))
    folder = dithered.write(demo, options.work / "dithered")
    source = options.work / "dithered-F16.gguf"
    log = options.work / "log.txt"
    if not source.exists():
        measure.run_checked([*TOOL, "convert", str(folder), "--to", "gguf:F16", "-o", str(source)], log)
    text = options.text.read_text() if options.text else default_text()
    ruler = Ruler(options.convention, ctx=options.ctx, max_windows=options.windows)
    original = compare.prepare(formats.open_reader(folder), text, ruler, keep=True)
    scored = f"{original.windows.scored} tokens scored in {len(original.windows.tokens)} windows of {options.ctx}"
    print(f"{scored}; {'with' if options.imatrix else 'without'} imatrix\n")
    print("| type | bytes | KL llama.cpp | KL ours | ratio | ppl ratio llama.cpp | ppl ratio ours |")
    print("|---|---|---|---|---|---|---|")
    for kind in options.types.split(","):
        files = {name: options.work / f"{name}-{kind}.gguf" for name in ("theirs", "ours")}
        extra = [str(options.imatrix)] if options.imatrix else []
        peer = [sys.executable, "-m", "benchmarks.llama_quantize", str(source), str(files["theirs"]), kind, "2", *extra]
        measure.run_checked(peer, log)
        own = [*TOOL, "quantize", str(source), "--to", f"gguf:{kind}", "-o", str(files["ours"]), "--force"]
        measure.run_checked([*own, "--imatrix", *extra] if extra else own, log)
        theirs, ours = (compare.against(formats.open_reader(path), original) for path in files.values())
        sizes = [sum(i.nbytes for i in formats.open_reader(path).infos().values()) for path in files.values()]
        if sizes[0] != sizes[1]:
            sys.exit(f"{kind}: {sizes} bytes differ")
        cells = [f"{sizes[1]}", f"{theirs.kld_mean:.5f}", f"{ours.kld_mean:.5f}"]
        cells += [f"{ours.kld_mean / theirs.kld_mean:.3f}", f"{theirs.ratio:.4f}", f"{ours.ratio:.4f}"]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
        for path in files.values():
            path.unlink()


if __name__ == "__main__":
    main()

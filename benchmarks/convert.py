"""Convert safetensors to GGUF F16 beside a plain copy and llama.cpp's converter: seconds, ratios, peak memory, growth.

    python -m benchmarks.convert [--times 3] [--work build/bench]

A plain copy reads and writes the same bytes and flushes them to disk, as the conversion does. llama.cpp's converter
takes part where its tree is (tests/assets.py fetches it); it does not flush.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from benchmarks import measure, random_llama

COPY = """
import os, sys
source, target = sys.argv[1:]
out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for name in sorted(os.listdir(source)):
    if name.endswith(".safetensors"):
        with open(os.path.join(source, name), "rb", buffering=0) as file:
            while data := file.read(1 << 23):
                os.write(out, data)
os.fsync(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    print(f"{measure.machine()}; {options.times} runs each, interleaved; median seconds, largest peak\n")
    print("| model | contestant | seconds | of a copy's speed | peak RSS MB |")
    print("|---|---|---|---|---|")
    for size in random_llama.SIZES:
        source = random_llama.write(options.work / size, size)
        nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        results = measure.repeat(options.times, contestants(source, options.work), partial(measure.settle, source))
        copy = measure.median(results["plain copy"]).seconds
        for name, runs in results.items():
            got = measure.median(runs)
            cells = (f"{size}, {nbytes / 1e9:.2f} GB", name, f"{got.seconds:.2f}", f"{copy / got.seconds:.2f}")
            print(f"| {' | '.join(cells)} | {got.peak_rss / 1e6:.0f} |")


def contestants(source: Path, work: Path) -> dict[str, object]:
    target = work / "out.gguf"
    tool = str(Path(sys.executable).parent / "weightsmith")

    def fresh(command: list[str]) -> measure.Run:
        target.unlink(missing_ok=True)
        os.sync()
        return measure.run_checked(command, work / "log.txt")

    found = {
        "plain copy": lambda: fresh([sys.executable, "-c", COPY, str(source), str(target)]),
        "weightsmith convert": lambda: fresh([tool, "convert", str(source), "--to", "gguf:F16", "-o", str(target)]),
    }
    tree = Path(os.environ.get("WEIGHTSMITH_LLAMA_CPP", "build/assets/llama.cpp"))
    if (tree / "convert_hf_to_gguf.py").exists():
        script = str(Path(__file__).parent / "llama_cpp_convert.py")
        peer = [sys.executable, script, str(tree), "llama-bpe", str(source)]
        peer += ["--outtype", "f16", "--outfile", str(target)]
        found["convert_hf_to_gguf"] = lambda: fresh(peer)
    return found


if __name__ == "__main__":
    main()

"""How long `weightsmith build` takes when there is nothing to do: three models, six targets, a whole process.

    python -m benchmarks.builds_again [--times 5] [--size 0.15B]

Random checkpoints, taken in from folders; Q8_0 and Q4_0 of each, held against a gate of size and licence. The first
build makes them all and is not measured. By default the models are tiny: what is there is looked at, not read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import random_llama
from benchmarks.measure import machine, median, repeat, run_checked
from tests.tiny import write_llama

_REGISTRY = """\
models:
  one: {source: ./one, licence: MIT}
  two: {source: ./two, licence: MIT}
  three: {source: ./three, licence: MIT}
recipes:
  q8: {target: "gguf:Q8_0"}
  q4: {target: "gguf:Q4_0", effort: fast}
gates:
  open: {licences: [MIT], max_bytes: 5GB}
builds:
  all: {model: [one, two, three], recipe: [q8, q4], gate: open}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--size", choices=random_llama.SIZES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="builds-") as name:
        folder = Path(name)
        for number, model in enumerate(("one", "two", "three")):
            if options.size:
                random_llama.write(folder / model, options.size, seed=number)
            else:
                write_llama(folder / model, seed=number)
        (folder / "registry.yaml").write_text(_REGISTRY)
        env = {"WEIGHTSMITH_HOME": str(folder / "home"), "PYTHONPATH": str(Path(__file__).parent.parent)}
        command = [sys.executable, "-m", "weightsmith", "build", "--registry", "registry.yaml", "--json", "-q"]
        os.chdir(folder)
        log = folder / "log"
        first = run_checked(command, log, env=env)

        def again():  # type: ignore[no-untyped-def]
            done = run_checked(command, log, env=env)
            made = [job["ref"] for job in json.loads(log.read_text())["jobs"] if job["status"] != "there"]
            assert not made, made
            return done

        middle = median(repeat(options.times, {"again": again}, lambda: None)["again"])
    print(f"{machine()}; 3 models, 6 targets; first build {first.seconds:.1f} s; {options.times} runs again, median\n")
    print("| | seconds | of all cores | peak RSS MB |\n|---|---|---|---|")
    print(f"| build, nothing to do | {middle.seconds:.2f} | {middle.cpu:.2f} | {middle.peak_rss / 1e6:.0f} |")


if __name__ == "__main__":
    main()

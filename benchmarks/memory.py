"""Memory and time of calibrating and evaluating as layers or experts are added, and what that means for Llama-2-70B.

    python -m benchmarks.memory [--rows 8] [--more 40] [--work build/memory] [--experts]

With --experts: random Mixtrals of 2 layers with 2 and with 16 experts of one size, and nothing else. If peaks grow with
the experts, more of them are in memory than one.

First table: random Llamas of one width with 4 and with 24 layers, measured, each verb a process of its own. If peaks
grow with the layers, something is kept that should not be.

Second table: a layer of Llama-2-70B from those figures. Everything in it is extrapolated but the shapes. A layer costs
a * weights * tokens + b * sum of (out + in) * in^2 over its linears: the first from runs with more rows, the second
(none for verbs that only evaluate) from what is left. Attention is not counted apart. Seconds are those of all cores,
because they can be told on a machine that does other work; wall time is at least that over the number of cores.
Peak: what the process holds besides arrays (measured peak less what the same sum gives for the small model), plus the
sum for the large one: two layers as float32, the budget of --max-memory, and for GPTQ the moments of a layer, then
copies of the widest ones and of the tallest group's weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from tests.moe import write_mixtral
from tests.tiny import CORPUS, write_llama

BUDGET = 1 << 30  # --max-memory's default
TOKENS = 128 * 512  # a calibration at the defaults
VERBS = ("eval", "imatrix", "gptq")
MEASURED = (*VERBS, "best")  # gptq with --effort best, which is not projected


@dataclass(frozen=True)
class Shape:
    """The widths of a Llama's layer: hidden, intermediate, and of keys and values."""

    hidden: int
    ffn: int
    kv: int
    layers: int

    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of what shares its inputs: query, key and value; output; gate and up; down."""
        first = (self.hidden + 2 * self.kv, self.hidden)
        return [first, (self.hidden, self.hidden), (2 * self.ffn, self.hidden), (self.hidden, self.ffn)]

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.linears())

    @property
    def solving(self) -> int:
        return sum((rows + columns) * columns**2 for rows, columns in self.linears())

    def peak(self, verb: str, tokens: int) -> int:
        """Bytes of arrays: see the module."""
        states = min(BUDGET, 4 * tokens * self.hidden)
        if verb != "gptq":
            return 8 * self.weights + states
        moments = 4 * sum(columns**2 for _, columns in self.linears())
        solving = max(5 * 4 * columns**2 + 5 * 4 * rows * columns for rows, columns in self.linears())
        return 8 * self.weights + states + max(moments, solving)


SMALL = Shape(512, 1408, 256, 4)
LARGE = Shape(8192, 28672, 1024, 80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--more", type=int, default=40)
    parser.add_argument("--work", type=Path, default=Path("build/memory"))
    parser.add_argument("--experts", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.work / "text.txt"
    text.write_text(" ".join(CORPUS[:2]) * (options.more * 20))
    if options.experts:
        _experts(options.work, text, options.rows)
        return
    models = {layers: _model(options.work, layers) for layers in (4, 24)}
    print(f"{measure.machine()}; hidden {SMALL.hidden}, {options.rows} rows of 512 (or {options.more})\n")
    print("| verb | 4 layers RSS MB | 24 layers | grown | 4 layers s of all cores | 24 layers | more rows |")
    print("|---|---|---|---|---|---|---|")
    found = {}
    for verb in MEASURED:
        runs = [_run(verb, models[layers], text, options.rows, options.work) for layers in (4, 24)]
        runs.append(_run(verb, models[4], text, options.more, options.work))
        found[verb] = runs
        grown = runs[1].peak_rss / runs[0].peak_rss - 1
        cells = [f"{runs[0].peak_rss / 1e6:.0f}", f"{runs[1].peak_rss / 1e6:.0f}", f"{100 * grown:+.1f} %"]
        print(f"| {verb} | {' | '.join(cells + [f'{run.cpu:.1f}' for run in runs])} |", flush=True)
    _project(found, options.rows, options.more)


def _experts(work: Path, text: Path, rows: int) -> None:
    counts, hidden, ffn = (2, 16), 512, 2048
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": 8, "num_key_value_heads": 4}
    models = {}
    for count in counts:
        folder = models[count] = work / f"experts-{count}"
        if not (folder / "config.json").exists():
            write_mixtral(folder, **sizes, num_local_experts=count, max_position_embeddings=2048)
    print(f"{measure.machine()}; hidden {hidden}, an expert {12 * hidden * ffn / 1e6:.1f} MB, {rows} rows of 512\n")
    print("| verb | 2 experts RSS MB | 16 experts | grown MB | 2 experts s of all cores | 16 experts |")
    print("|---|---|---|---|---|---|")
    for verb in MEASURED:
        # With more room the moments of all experts are kept as well.
        extra = ("--max-memory", "64MB") if verb in ("gptq", "best") else ()
        few, many = (_run(verb, models[count], text, rows, work, *extra) for count in counts)
        grown = (many.peak_rss - few.peak_rss) / 1e6
        cells = [f"{few.peak_rss / 1e6:.0f}", f"{many.peak_rss / 1e6:.0f}", f"{grown:.0f}"]
        print(f"| {verb} | {' | '.join([*cells, f'{few.cpu:.1f}', f'{many.cpu:.1f}'])} |", flush=True)


def _model(work: Path, layers: int) -> Path:
    folder = Path(work / f"layers-{layers}")
    if not (folder / "config.json").exists():
        sizes = {"hidden_size": SMALL.hidden, "intermediate_size": SMALL.ffn, "num_hidden_layers": layers}
        write_llama(folder, **sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048)
    return folder


def _run(verb: str, model: Path, text: Path, rows: int, work: Path, *extra: str) -> measure.Run:
    tool, out = [sys.executable, "-m", "weightsmith"], work / "out"
    commands = {
        "eval": ["eval", str(model), "--text", str(text), "--windows", str(rows)],
        "imatrix": ["imatrix", str(model), "--text", str(text), "--rows", str(rows), "-o", f"{out}.gguf", "--force"],
        "gptq": ["quantize", str(model), "--to", "gptq:4", "--group-size", "64", "--calibrate", str(text)],
    }
    commands["gptq"] += ["--rows", str(rows), "-o", str(out), "--force"]
    commands["best"] = [*commands["gptq"], "--effort", "best"]
    return measure.run_checked([*tool, *commands[verb], *extra, "-q"], work / "log.txt", env=dict(os.environ))


def _project(found: dict[str, list[measure.Run]], rows: int, more: int) -> None:
    print(
        f"\nLlama-2-70B, {TOKENS} tokens, {LARGE.layers} layers of {LARGE.weights / 1e6:.0f} M weights; extrapolated:\n"
    )
    print("| verb | GFLOP/s of a core, measured | core hours | of it solving | read once GB | peak GB |")
    print("|---|---|---|---|---|---|")
    for verb in VERBS:
        few, deep, tall = found[verb]
        wide = (tall.cpu - few.cpu) / 4 / (SMALL.weights * 512 * (more - rows))  # a
        rest = max(0.0, (deep.cpu - few.cpu) / 20 - wide * SMALL.weights * 512 * rows)
        solving = rest / SMALL.solving * LARGE.solving * LARGE.layers if verb == "gptq" else 0.0
        passing = wide * LARGE.weights * TOKENS * LARGE.layers
        peak = few.peak_rss - SMALL.peak(verb, 512 * rows) + LARGE.peak(verb, TOKENS)
        cells = [f"{2e-9 / wide:.0f}", f"{(passing + solving) / 3600:.1f}", f"{solving / 3600:.1f}"]
        cells += [f"{2 * LARGE.weights * LARGE.layers / 1e9:.0f}", f"{peak / 1e9:.1f}"]
        print(f"| {verb} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

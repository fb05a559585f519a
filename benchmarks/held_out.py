"""Best effort, block by block: what making up for drift is worth on rows that nothing was fitted on.

    python -m benchmarks.held_out MODEL... --calibrate FILE [--to gptq:4 | gguf:Q4_K] [--rows 128]

Every linear is rounded twice, as `--effort best` does: its own weights (the start) and those that make up for what was
lost before it. Of each layer: the squared error of its output, and of attention's, against the original model's on the
rows held out, relative to the start's, for the rounded others and for what was kept; and of its linears, how many kept
their own. "kept" can be at most 1. The output of a mixture's layer is that of all its experts, summed. MODEL is a
folder, or random:SEED, a random Llama of 9 layers and 0.15 billion weights. GGUF codecs need rows that their blocks
divide.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks import random_llama
from weightsmith import formats
from weightsmith.evals.calibration import encoded, packed, stream
from weightsmith.evals.calibration.best import Best
from weightsmith.evals.calibration.rows import Options
from weightsmith.evals.calibration.stream import Block, calibrate
from weightsmith.quant.algorithms.drift import error_of
from weightsmith.quant.algorithms.rtn import Grid

CLOSING = (("o_proj",), ("down_proj", "w2"))  # what they put out goes into the residual stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--to", default="gptq:4")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path("build/held_out"))
    options = parser.parse_args()
    for model in options.models:
        kind, _, seed = model.partition(":")
        folder = Path(model)
        if kind == "random":
            folder = random_llama.write(options.work / f"random-{seed}", "0.15B", seed=int(seed))
        show(model, folder, options)


def show(model: str, folder: Path, options: argparse.Namespace) -> None:
    """The table of one model."""
    reader, text = formats.open_reader(folder), options.calibrate.read_text()
    calibration = Options(rows=options.rows)
    method, _, kind = options.to.partition(":")
    seen: dict[int, dict[str, list[float]]] = defaultdict(dict)
    plain = stream.nearest

    def watched(block: Block, name: str, w: object, rounded: object) -> int:
        chosen = plain(block, name, w, rounded)
        errors = [error_of(w, q, block.drifts[name]) for q in rounded] if name in block.drifts else []
        if len(errors) > 1:
            seen[block.index][name.removesuffix(".weight")] = [*errors, errors[chosen]]
        return chosen

    packed.nearest = encoded.nearest = watched
    layouts = {name: kind for name in reader.infos() if "_proj" in name or ".experts." in name}
    print(f"\n{model}, {options.to}, {options.rows} rows, {stream.held_out(options.rows)} of them held out\n")
    print("| layer | attention, rounded others | kept | output, rounded others | kept | own weights kept |")
    print("|---|---|---|---|---|---|", flush=True)
    done = -1
    losses: dict[str, float] = {}
    if method == "gptq":
        made = packed.PackedOptions(Grid(int(kind), 64), calibration=calibration, best=Best())
        layout = packed._layout(made, routers=reader.config.n_experts > 0)
    for block in calibrate(reader, text, calibration, drift=True):
        if block.index > done + 1:
            done += 1
            row(done, seen[done])
        if method == "gptq":
            packed._quantize_block(block, layout, made, losses)
        else:
            encoded._encode_block(block, encoded.EncodedOptions(layouts, calibration, effort="best", best=Best()))
    row(done + 1, seen[done + 1])
    packed.nearest = encoded.nearest = plain


def row(layer: int, found: dict[str, list[float]]) -> None:
    """One line of the table."""
    cells = []
    for closing in CLOSING:
        errors = [one for name, one in found.items() if name.endswith(closing)]
        start, others, kept = np.sum(errors, axis=0) if errors else (1.0, 1.0, 1.0)
        cells += [f"{others / start:.3f}", f"{kept / start:.3f}"]
    own = sum(others != kept for _, others, kept in found.values())
    print(f"| {layer} | {' | '.join(cells)} | {own} of {len(found)} |", flush=True)


if __name__ == "__main__":
    main()

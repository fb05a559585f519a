"""Convert one layer of Grok's real shapes from xAI's files: seconds, and peak memory beside the largest output tensor.

    python -m benchmarks.merging [--work build/bench]

The inputs are holes in files (zeros that take no disk), so what is measured is reading through turned or cut matrices,
not a disk. Grok-1: pickles of up to 1.6 GB, columns to rows, to a GGUF of 5.3 GB. Grok-2: matrices of up to 268 MB in
eight tensor-parallel files each, to safetensors of 3.5 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

from benchmarks import measure
from tests.formats.grok import grok1, grok2
from weightsmith import formats
from weightsmith.formats.safetensors.header import lay_out
from weightsmith.types import TensorInfo

HIDDEN, FFN, EXPERTS = 6144, 32768, 8
VOCAB = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    work: Path = parser.parse_args().work
    cases = {
        "Grok-1, pickles to GGUF": (write_pickles(work / "grok-1"), "gguf", work / "grok-1.gguf"),
        "Grok-2, 8 ranks to safetensors": (write_ranks(work / "grok-2"), "safetensors", work / "grok-2-whole"),
    }
    print(f"{measure.machine()}; one run each\n")
    print("| case | output | seconds | GB/s | largest tensor MB | peak RSS MB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, (source, target, output) in cases.items():
        tool = str(Path(sys.executable).parent / "weightsmith")
        command = [tool, "convert", str(source), "--to", target, "-o", str(output), "--allow-pickle", "--quiet"]
        got = measure.run_checked(command, work / "log.txt")
        sizes = [info.nbytes for info in formats.open_reader(output).native_infos().values()]
        cells = [f"{sum(sizes) / 1e9:.2f} GB", f"{got.seconds:.1f}", f"{sum(sizes) / got.seconds / 1e9:.2f}"]
        cells += [f"{max(sizes) / 1e6:.0f}", f"{got.peak_rss / 1e6:.0f}", f"{got.peak_rss / max(sizes):.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        shutil.rmtree(output) if output.is_dir() else output.unlink()


def write_pickles(folder: Path) -> Path:
    """One layer of Grok-1 with a small vocabulary."""
    below = folder / "ckpt-0"
    shutil.rmtree(folder, ignore_errors=True)
    below.mkdir(parents=True)

    def floats(*shape: int) -> grok1.Pickle:
        return grok1.plain(("f4", shape, 4 * math.prod(shape)))

    def codes(*shape: int, groups: int) -> grok1.Pickle:
        scales = (*shape[:-2], groups, shape[-1])
        return grok1.quantized(("i1", shape, math.prod(shape)), ("bf16", scales, 2 * math.prod(scales)))

    made = [floats(VOCAB, HIDDEN), floats(HIDDEN)]
    made += [
        codes(EXPERTS, *((FFN, HIDDEN) if slot == 1 else (HIDDEN, FFN)), groups=8 if slot == 1 else 1)
        for slot in range(3)
    ]
    made += [codes(HIDDEN, 1024, groups=1), codes(HIDDEN, HIDDEN, groups=8)]
    made += [codes(HIDDEN, HIDDEN, groups=1), codes(HIDDEN, 1024, groups=1)]
    made += [floats(HIDDEN) for _ in range(4)] + [floats(HIDDEN, EXPERTS)]
    for index, pickle in enumerate(made):
        with (below / f"tensor{index:05d}_000").open("wb") as file:
            pickle.write(file)
    return folder


def write_ranks(folder: Path) -> Path:
    """One layer of Grok-2 with two experts and a small vocabulary, in eight ranks."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = {"hidden_size": 8192, "intermediate_size": 32768, "moe_intermediate_size": 16384, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCAB}
    config = grok2.grok2_config(**sizes, num_local_experts=2)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = grok2.grok_shapes(config)
    for kind in range(len(grok2.KINDS)):
        group = {name: shape for name, shape in shapes.items() if grok2.kind_of(name) == kind}
        cut = kind in (6, 7, 8)
        for rank in range(grok2.RANKS if cut else 1):
            axis = int(kind == 7)
            parts = []
            for name, shape in group.items():
                part = tuple(size // grok2.RANKS if cut and at == axis else size for at, size in enumerate(shape))
                parts.append(TensorInfo(f"{name}.weight", part, "BF16", 2 * math.prod(part)))
            suffix = f"{rank:03d}" if cut else "common"
            header, _ = lay_out(parts)
            with (folder / f"pytorch_model-{kind:05d}-TP-{suffix}.safetensors").open("wb") as file:
                file.write(header)
                file.truncate(len(header) + sum(part.nbytes for part in parts))
    return folder


if __name__ == "__main__":
    main()

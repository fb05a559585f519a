"""Convert one layer of real shapes from the vendors' files: seconds, and peak memory beside the largest output tensor.

    python -m benchmarks.merging [--work build/bench] [--only WORD]

The inputs are holes in files (zeros that take no disk), so what is measured is reading through turned or cut matrices,
not a disk. Grok-1: pickles of up to 1.6 GB, columns to rows, to a GGUF of 5.3 GB; and its embedding, one pickled tensor
of 3.2 GB, to safetensors. Grok-2: matrices of up to 268 MB in eight tensor-parallel files each, to safetensors of 3.5
GB. Llama 3 70B: eight pickled ranks, cut by rows and by columns, to safetensors of 3.8 GB (the output matrix is
all zeros like the embedding, so it counts as tied).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import measure
from tests.formats.grok import grok1, grok2
from tests.formats.pickles import crafted
from weightsmith import formats
from weightsmith.formats.safetensors.header import lay_out
from weightsmith.types import TensorInfo

HIDDEN, FFN, EXPERTS = 6144, 32768, 8
VOCAB = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--only", default="", metavar="WORD", help="Cases with WORD in their names.")
    options = parser.parse_args()
    work: Path = options.work
    cases: dict[str, tuple[Callable[[Path], Path], str]] = {
        "Grok-1, pickles to GGUF": (write_pickles, "gguf"),
        "Grok-1, a pickled embedding to safetensors": (partial(write_pickles, vocab=131072, ffn=256), "safetensors"),
        "Grok-2, 8 ranks to safetensors": (write_ranks, "safetensors"),
        "Llama 3 70B, 8 pickled ranks to safetensors": (write_meta, "safetensors"),
    }
    cases = {name: case for name, case in cases.items() if options.only in name}
    print(f"{measure.machine()}; one run each\n")
    print("| case | output | seconds | GB/s | largest tensor MB | peak RSS MB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, (write, target) in cases.items():
        source, output = write(work / "merging"), work / f"merged.{target}"
        tool = [sys.executable, "-m", "weightsmith"]
        command = [*tool, "convert", str(source), "--to", target, "-o", str(output), "--allow-pickle", "--quiet"]
        got = measure.run_checked(command, work / "log.txt")
        sizes = [info.nbytes for info in formats.open_reader(output).native_infos().values()]
        cells = [f"{sum(sizes) / 1e9:.2f} GB", f"{got.seconds:.1f}", f"{sum(sizes) / got.seconds / 1e9:.2f}"]
        cells += [f"{max(sizes) / 1e6:.0f}", f"{got.peak_rss / 1e6:.0f}", f"{got.peak_rss / max(sizes):.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        shutil.rmtree(output) if output.is_dir() else output.unlink()
        shutil.rmtree(source)


def write_pickles(folder: Path, *, vocab: int = VOCAB, ffn: int = FFN) -> Path:
    """One layer of Grok-1, by itself with a small vocabulary."""
    below = folder / "ckpt-0"
    shutil.rmtree(folder, ignore_errors=True)
    below.mkdir(parents=True)

    def floats(*shape: int) -> grok1.Pickle:
        return grok1.plain(("f4", shape, 4 * math.prod(shape)))

    def codes(*shape: int, groups: int) -> grok1.Pickle:
        scales = (*shape[:-2], groups, shape[-1])
        return grok1.quantized(("i1", shape, math.prod(shape)), ("bf16", scales, 2 * math.prod(scales)))

    made = [floats(vocab, HIDDEN), floats(HIDDEN)]
    made += [
        codes(EXPERTS, *((ffn, HIDDEN) if slot == 1 else (HIDDEN, ffn)), groups=8 if slot == 1 else 1)
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


def write_meta(folder: Path) -> Path:
    """One layer of Llama 3 70B in eight ranks, and its embedding and output matrix."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dim, ffn, heads, keys, vocab, ranks = 8192, 28672, 64, 8, 128256, 8
    params = {"dim": dim, "n_layers": 1, "n_heads": heads, "n_kv_heads": keys, "vocab_size": vocab}
    params |= {"ffn_dim_multiplier": 1.3, "multiple_of": 4096, "norm_eps": 1e-5, "rope_theta": 500000.0}
    (folder / "params.json").write_text(json.dumps(params))
    kv = dim // heads * keys
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (vocab // ranks, dim), "output": (vocab // ranks, dim)}
    shapes |= {"norm": (dim,), "layers.0.attention_norm": (dim,), "layers.0.ffn_norm": (dim,)}
    shapes |= {f"layers.0.attention.w{part}": (rows // ranks, dim) for part, rows in (("q", dim), ("k", kv), ("v", kv))}
    shapes |= {f"layers.0.feed_forward.w{part}": (ffn // ranks, dim) for part in (1, 3)}
    shapes |= {"layers.0.attention.wo": (dim, dim // ranks), "layers.0.feed_forward.w2": (dim, ffn // ranks)}
    items, members = [], dict[str, bytes | int]()
    for number, (name, shape) in enumerate(shapes.items()):
        of = crafted.storage(str(number), math.prod(shape), "BFloat16Storage")
        stride = (shape[1], 1) if len(shape) > 1 else (1,)
        items.append((f"{name}.weight", crafted.tensor(size=shape, stride=stride, of=of)))
        members[f"data/{number}"] = 2 * math.prod(shape)
    for rank in range(ranks):
        crafted.sparse(folder / f"consolidated.{rank:02d}.pth", {"data.pkl": crafted.state_dict(*items), **members})
    return folder


if __name__ == "__main__":
    main()

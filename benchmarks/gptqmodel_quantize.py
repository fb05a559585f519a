"""GPTQModel as a process of its own, in the environment of `benchmarks/peers.sh`: one checkpoint, GPTQ or AWQ.

Usage: PEERS/bin/python benchmarks/gptqmodel_quantize.py SOURCE OUT gptq|awq BITS GROUP ROWS.npy

ROWS.npy: int64 [rows, length], what it calibrates on, token for token. Its own defaults otherwise (group-aware
reordering for GPTQ, zero points for AWQ), batches of 4 rows, everything in float32. AWQ refuses that, because what
packs without CUDA says to take 16 bits only; but products in float16 are many times slower on processors without
instructions for them, and float32 is packed as well (`in_float32`).
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import textwrap
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one worker, its default on two cores, it does not start

import numpy as np
import torch


def in_float32() -> None:
    """Let AWQ compute in float32. Its search puts candidates into the weights and then the originals back, of which it
    keeps a copy in float32: of a float32 weight that is the weight itself, so it has to be told to make one."""
    from gptqmodel.looper import awq_processor
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    AwqTorchLinear.SUPPORTS_DTYPES = [*AwqTorchLinear.SUPPORTS_DTYPES, torch.float32]
    search = textwrap.dedent(inspect.getsource(awq_processor.AWQProcessor._compute_best_scale))
    mended = search.replace(".to(torch.float32).cpu().contiguous()", ".to(torch.float32).cpu().clone()")
    if mended == search:
        raise SystemExit("GPTQModel's search for scales reads otherwise than in 7.6.0: look whether it copies weights")
    exec(mended, vars(awq_processor))
    awq_processor.AWQProcessor._compute_best_scale = vars(awq_processor)["_compute_best_scale"]


def main(source: str, out: str, method: str, bits: str, group: str, rows: str) -> None:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig

    source, out, rows = (os.path.abspath(path) for path in (source, out, rows))
    os.chdir(os.path.dirname(out))  # it writes logs/ where it stands
    grid = {"bits": int(bits), "group_size": int(group), "offload_to_disk": False}
    if method == "awq":
        config = QuantizeConfig(**grid, sym=False, method=METHOD.AWQ, format=FORMAT.GEMM)
        backend = BACKEND.AWQ_TORCH  # packs as its default does, which asks for CUDA
        in_float32()
    else:
        config = QuantizeConfig(**grid, sym=True)
        backend = BACKEND.AUTO
    tokens = torch.from_numpy(np.load(rows))
    texts = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    begun = time.perf_counter()
    model = GPTQModel.load(source, config, device="cpu", dtype=torch.float32)
    loaded = time.perf_counter()
    model.quantize(texts, batch_size=4, backend=backend)
    quantized = time.perf_counter()
    model.save(out)
    times = {"load": loaded - begun, "quantize": quantized - loaded, "save": time.perf_counter() - quantized}
    print("TIMES", json.dumps(times), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

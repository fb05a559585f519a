"""GPTQModel as a process of its own, in the environment of `benchmarks/peers.sh`: one checkpoint, GPTQ or AWQ.

Usage: PEERS/bin/python benchmarks/gptqmodel_quantize.py SOURCE OUT gptq|awq BITS GROUP ROWS.npy

ROWS.npy: int64 [rows, length], what it calibrates on, token for token. Its own defaults otherwise (group-aware
reordering for GPTQ, zero points for AWQ), and batches of 4 rows. The source is loaded as float32 for GPTQ and as
float16 for AWQ, whose kernel that packs without CUDA takes nothing wider.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one worker, its default on two cores, it does not start

import numpy as np
import torch


def main(source: str, out: str, method: str, bits: str, group: str, rows: str) -> None:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig

    source, out, rows = (os.path.abspath(path) for path in (source, out, rows))
    os.chdir(os.path.dirname(out))  # it writes logs/ where it stands
    grid = {"bits": int(bits), "group_size": int(group), "offload_to_disk": False}
    if method == "awq":
        config = QuantizeConfig(**grid, sym=False, method=METHOD.AWQ, format=FORMAT.GEMM)
        backend, dtype = BACKEND.AWQ_TORCH, torch.float16  # packs as its default does, which asks for CUDA
    else:
        config = QuantizeConfig(**grid, sym=True)
        backend, dtype = BACKEND.AUTO, torch.float32
    tokens = torch.from_numpy(np.load(rows))
    texts = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    begun = time.perf_counter()
    model = GPTQModel.load(source, config, device="cpu", dtype=dtype)
    loaded = time.perf_counter()
    model.quantize(texts, batch_size=4, backend=backend)
    quantized = time.perf_counter()
    model.save(out)
    times = {"load": loaded - begun, "quantize": quantized - loaded, "save": time.perf_counter() - quantized}
    print("TIMES", json.dumps(times), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

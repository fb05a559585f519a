"""AutoRound as a process of its own, in the environment of `benchmarks/peers.sh`: one GPTQ checkpoint.

Usage: PEERS/bin/python benchmarks/autoround_quantize.py SOURCE OUT gptq BITS GROUP ROWS.npy STEPS

ROWS.npy: int64 [rows, length], what it calibrates on, token for token. STEPS: of tuning a block (its `iters`, 200 by
default). Symmetric, everything else by its own defaults; the source is loaded as it is stored.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
import torch


def main(source: str, out: str, method: str, bits: str, group: str, rows: str, steps: str) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if method != "gptq":
        raise SystemExit(f"no cell of {method} for AutoRound")
    tokens = torch.from_numpy(np.load(rows))
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    loaded = time.perf_counter()
    tuner = AutoRound(
        model,
        tokenizer,
        bits=int(bits),
        group_size=int(group),
        sym=True,
        iters=int(steps),
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        dataset=list(tokens.split(8)),
        device_map="cpu",
    )
    _, folders = tuner.quantize_and_save(f"{out}.made", format="auto_gptq")
    os.rename(folders if isinstance(folders, str) else folders[0], out)
    os.rmdir(f"{out}.made")
    times = {"load": loaded - begun, "quantize": time.perf_counter() - loaded}
    print("TIMES", json.dumps(times), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

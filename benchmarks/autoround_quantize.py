"""AutoRound as a process of its own, in the environment of `benchmarks/peers.sh`: one GPTQ checkpoint or GGUF file.

Usage: PEERS/bin/python benchmarks/autoround_quantize.py SOURCE OUT gptq BITS GROUP ROWS.npy STEPS
       PEERS/bin/python benchmarks/autoround_quantize.py SOURCE OUT gguf TYPE 0 ROWS.npy STEPS

ROWS.npy: int64 [rows, length], what it calibrates on, token for token. STEPS: of tuning a block (its `iters`, 200 by
default; 0 rounds by an imatrix). GPTQ is symmetric, everything else by its own defaults; the source is loaded as it is
stored.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch


def main(source: str, out: str, method: str, kind: str, group: str, rows: str, steps: str) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if method == "gptq":
        scheme, made_as = {"bits": int(kind), "group_size": int(group), "sym": True}, "auto_gptq"
    elif method == "gguf":
        scheme, made_as = {}, f"gguf:{kind.lower()}"
    else:
        raise SystemExit(f"no cell of {method} for AutoRound")
    tokens = torch.from_numpy(np.load(rows))
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    loaded = time.perf_counter()
    tuner = AutoRound(
        model,
        tokenizer,
        **scheme,
        iters=int(steps),
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        dataset=list(tokens.split(8)),
        device_map="cpu",
    )
    made = Path(f"{out}.made")
    _, folders = tuner.quantize_and_save(str(made), format=made_as)
    folder = Path(folders if isinstance(folders, str) else folders[0])
    (next(made.rglob("*.gguf")) if method == "gguf" else folder).rename(out)
    shutil.rmtree(made, ignore_errors=True)
    times = {"load": loaded - begun, "quantize": time.perf_counter() - loaded}
    print("TIMES", json.dumps(times), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What GPTQModel makes of packed checkpoints, in the environment of `benchmarks/peers.sh`: weights, logits, tokens.

Usage: PEERS/bin/python benchmarks/gptqmodel_logits.py gptqmodel|transformers TOKENS.npy CHECKPOINT [CHECKPOINT ...]

The first word says who loads: GPTQModel itself (its plain torch kernel), or transformers, which needs GPTQModel and for
GPTQ optimum too. TOKENS.npy: int64 [windows, length]. Each checkpoint gets CHECKPOINT.npz: logits float32 [windows,
length, vocabulary], made int64, the greedy continuation of the first window behind it, kernel, the class its linears
became, and from GPTQModel their weights float16 [in, out] by module name. A checkpoint that is refused gets its error
as text instead.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one worker, its default on two cores, it does not start
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its kernels would be compiled for each checkpoint

import numpy as np
import torch

NEW = 8


def load(who: str, path: str) -> Any:
    if who == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, device_map="cpu")
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(path, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model


def weights(model: Any) -> dict[str, np.ndarray]:
    """The weights that its kernels multiply with, [in, out]."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "dequantize_weight"):
            found[name] = module.dequantize_weight().half().numpy()
        elif hasattr(module, "qweight"):
            parts = (module.qweight, module.qzeros, module.scales)
            found[name] = dequantize_gemm(*parts, bits=module.bits, group_size=module.group_size).half().numpy()
    return found


@torch.no_grad()
def computed(who: str, path: str, tokens: torch.Tensor) -> dict[str, Any]:
    model = load(who, path)
    found: dict[str, Any] = {"kernel": type(model.model.layers[0].mlp.down_proj).__name__}
    found["logits"] = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float().numpy()
    one = tokens[:1]
    wanted = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    found["made"] = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **wanted)[0].numpy()
    return found | (weights(model) if who == "gptqmodel" else {})


def main(who: str, tokens_path: str, *checkpoints: str) -> None:
    tokens = torch.from_numpy(np.load(tokens_path))
    for path in checkpoints:
        try:
            found = computed(who, path, tokens)
        except Exception as error:  # noqa: BLE001  (whatever it says is the finding)
            found = {"error": f"{type(error).__name__}: {error}"}
        np.savez(f"{path}.npz", **found)
        print("DONE", path, found.get("kernel") or found["error"], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

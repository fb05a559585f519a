"""How precisely a calibration pass multiplies: in bfloat16, summed in float32, where a processor has AMX.

Models are trained and served in bfloat16, and the rows' states are a sample of text anyway. Only what the states
become is computed so. Second moments are not: rounded inputs of a channel with massive activations would look like
chance correlations with all others (GPTQ of SmolLM2-135M, 32 rows: mean KL 0.102 with them in bfloat16, 0.097 without,
0.097 with everything in float32). Processors without the unit gain nothing and compute in float32 throughout, and so
does all that judges (evaluation) and decides (factors, feedback, descent).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def quick(device: torch.device) -> str:
    """The precision, in torch's words, that rows go through layers with: "medium" or "highest"."""
    has_unit = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    return "medium" if has_unit else "highest"


@contextmanager
def precision(wanted: str = "highest") -> Iterator[None]:
    """Products of float32 matrices inside the block; "medium" rounds their factors to bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

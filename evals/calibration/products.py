"""How precisely a calibration pass multiplies: in bfloat16, summed in float32, where a processor can do so quickly.

Models are trained and served in bfloat16, and the rows' states are a sample of text anyway. Only what the states
become is computed so. Second moments are not: rounded inputs of a channel with massive activations would look like
chance correlations with all others (GPTQ of SmolLM2-135M, 32 rows: mean KL 0.102 with them in bfloat16, 0.097 without,
0.097 with everything in float32). Processors without these instructions (AMX, AVX-512 BF16) gain nothing and compute in
float32 throughout, and so does all that judges (evaluation) and decides (factors, feedback, descent).
"""

from __future__ import annotations

import torch

from weightsmith.evals.forward.weights import Layer

INSTRUCTIONS = ("amx_bf16", "avx512_bf16")


def is_quick(device: torch.device) -> bool:
    """Whether products in bfloat16 are several times, or twice, as fast as in float32 there, by its instructions."""
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(known.get(name, False) for name in INSTRUCTIONS)


def multiplied(layer: Layer, device: torch.device) -> Layer:
    """A layer as rows are multiplied with it."""
    return layer.rounded() if is_quick(device) else layer

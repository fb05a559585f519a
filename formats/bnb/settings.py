"""quantization_config of a bitsandbytes checkpoint. What is packed how is read off the tensors; this only says by whom.

| key | |
|---|---|
| quant_method | "bitsandbytes" |
| load_in_4bit, load_in_8bit | which of the two |
| bnb_4bit_quant_type, bnb_4bit_use_double_quant, bnb_4bit_quant_storage | of 4-bit linears, which say so themselves |
| bnb_4bit_compute_dtype | what is computed in; nothing stored depends on it |
| llm_int8_skip_modules | linears left alone |

Ref: transformers utils/quantization_config.py (BitsAndBytesConfig), version 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError

DOUBLED = "_DQ"  # of a type: absmax in 8 bits of its own
TYPES = ("NF4", f"NF4{DOUBLED}", "FP4", f"FP4{DOUBLED}")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check(raw: Mapping[str, Any], *, path: Path) -> Mapping[str, Any]:
    """The settings, if they are sound; IntegrityError for flags that are none, or both widths at once."""
    for key in ("load_in_4bit", "load_in_8bit"):
        if raw.get(key) is not None and type(raw[key]) is not bool:
            raise IntegrityError(f"{key} is {str(raw[key])[:40]!r}, expected true or false", path=path)
    if raw.get("load_in_4bit") and raw.get("load_in_8bit"):
        raise IntegrityError("load_in_4bit and load_in_8bit are both true", path=path)
    return raw


def dump(kind: str, *, doubled: bool, dtype: str, skipped: Sequence[str]) -> dict[str, Any]:
    """As `quantization_config`. kind: "nf4" or "fp4"; dtype: codec of the rest; skipped: linears left alone."""
    return {
        "bnb_4bit_compute_dtype": DTYPES[dtype],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": doubled,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skipped),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }

"""params.json: typed access to its values.

Copies of Llama's original files on Hugging Face nest everything under "model"; that is unwrapped. A null counts as
absent, and every value is checked for type and size (`safetensors.keys`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightsmith.formats.safetensors.keys import Keys
from weightsmith.formats.safetensors.strictjson import read_object
from weightsmith.safename import resolve_inside
from weightsmith.types import RopeScaling

PARAMS_NAME = "params.json"
MAX_PARAMS = 1 << 20  # bytes


def read_file(folder: Path) -> dict[str, Any]:
    """params.json of `folder` as it is; IntegrityError, NotFoundError (none) or UnsafeInputError (a link outside)."""
    return read_object(resolve_inside(folder, PARAMS_NAME), limit=MAX_PARAMS)


def read_params(folder: Path) -> Keys:
    """The keys of `folder`'s params.json; raises what `read_file` raises."""
    found = read_file(folder)
    inner = found.get("model")
    return Keys(inner if isinstance(inner, dict) and "dim" not in found else found, folder / PARAMS_NAME)


def heads(params: Keys) -> tuple[int, int]:
    """n_heads and n_kv_heads (n_heads where absent), the second a divisor of the first."""
    n_heads = params.count("n_heads")
    n_kv_heads = params.count("n_kv_heads", n_heads)
    if n_heads % n_kv_heads:
        raise params.fault("n_kv_heads", n_kv_heads, f"a divisor of n_heads, {n_heads}")
    return n_heads, n_kv_heads


def llama3_scaling(factor: float) -> RopeScaling:
    """Llama 3.1's rotary scaling; Meta's code holds everything but the factor as constants."""
    return RopeScaling("llama3", factor, 1.0, 4.0, 8192)

"""params.json: typed access to its values.

Copies of Llama's original files on Hugging Face nest everything under "model"; that is unwrapped. A null counts as
absent. Every value is checked for type and size, because other code allocates by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError
from weightsmith.formats.safetensors.strictjson import read_object
from weightsmith.safename import resolve_inside
from weightsmith.types import RopeScaling

PARAMS_NAME = "params.json"
MAX_PARAMS = 1 << 20  # bytes
MAX_SIZE = (1 << 31) - 1
MAX_LAYERS = 4096


class Params:
    """The keys of one params.json; `raw` is the object that holds them, `found` the file as it is."""

    def __init__(self, found: Mapping[str, Any], path: Path) -> None:
        self.found, self.path = found, path
        inner = found.get("model")
        self.raw: Mapping[str, Any] = inner if isinstance(inner, dict) and "dim" not in found else found

    def fault(self, key: str, found: object, expected: str) -> IntegrityError:
        """The error for a value that cannot be."""
        return IntegrityError(f"{key} is {str(found)[:80]!r}, expected {expected}", path=self.path)

    def has(self, key: str) -> bool:
        """Whether the key is there and says something."""
        return self.raw.get(key) not in (None, False, {}, [])

    def count(self, key: str, default: int | None = None, *, limit: int = MAX_SIZE) -> int:
        """A whole number from 1 to `limit`."""
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= limit:
            raise self.fault(key, value, f"a whole number from 1 to {limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fault(key, value, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; absent is false."""
        value = self.raw.get(key)
        if value is not None and type(value) is not bool:
            raise self.fault(key, value, "true or false")
        return bool(value)


def read_params(folder: Path) -> Params:
    """Read params.json of `folder`; IntegrityError, NotFoundError (none) or UnsafeInputError (a link outside)."""
    path = resolve_inside(folder, PARAMS_NAME)
    return Params(read_object(path, limit=MAX_PARAMS), path)


def heads(params: Params) -> tuple[int, int]:
    """n_heads and n_kv_heads (n_heads where absent), the second a divisor of the first."""
    n_heads = params.count("n_heads")
    n_kv_heads = params.count("n_kv_heads", n_heads)
    if n_heads % n_kv_heads:
        raise params.fault("n_kv_heads", n_kv_heads, f"a divisor of n_heads, {n_heads}")
    return n_heads, n_kv_heads


def llama3_scaling(factor: float) -> RopeScaling:
    """Llama 3.1's rotary scaling; Meta's code holds everything but the factor as constants."""
    return RopeScaling("llama3", factor, 1.0, 4.0, 8192)

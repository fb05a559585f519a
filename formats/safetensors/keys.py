"""Typed access to the keys of a configuration's JSON object, because other code allocates by their values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError

MAX_LAYERS, MAX_EXPERTS = 4096, 1024
MAX_SIZE = (1 << 31) - 1


class Keys:
    """The keys of one object; null counts as absent. absent: what a key means that is not there."""

    def __init__(self, raw: Mapping[str, Any], path: Path, where: str = "") -> None:
        self.raw, self.path, self.where = raw, path, where
        self.absent: Mapping[str, Any] = {}

    def fault(self, key: str, found: object, expected: str) -> IntegrityError:
        """The error for a value that cannot be."""
        return IntegrityError(f"{self.where}{key} is {str(found)[:80]!r}, expected {expected}", path=self.path)

    def has(self, key: str) -> bool:
        """Whether the key is there and says something."""
        return self.raw.get(key) not in (None, False, {}, [])

    def count(self, key: str, default: int | None = None, *, limit: int = MAX_SIZE) -> int:
        """A whole number from 1 to `limit`."""
        value = self.raw.get(key)
        value = self.absent.get(key, default) if value is None else value
        if type(value) is not int or not 0 < value <= limit:
            raise self.fault(key, value, f"a whole number from 1 to {limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.raw.get(key)
        value = self.absent.get(key, default) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fault(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.fault(key, value, "true or false")
        return value

    def text(self, key: str) -> str:
        """A text, empty where there is none."""
        value = self.raw.get(key)
        if value is not None and type(value) is not str:
            raise self.fault(key, value, "a string")
        return value or ""

    def table(self, key: str) -> Mapping[str, Any]:
        """An object, empty where there is none."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fault(key, value, "an object")
        return value or {}

    def ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids; a negative one is an old way to say that there is none."""
        value = self.raw.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int and item < vocab_size for item in listed) or len(listed) > 1024:
            raise self.fault(key, value, f"token ids below {vocab_size}")
        return tuple(item for item in listed if item >= 0)

    def heads(self, hidden: int) -> tuple[int, int, int]:
        """Query heads, key heads (a divisor of those), and the size of one, which is even."""
        n_heads = self.count("num_attention_heads")
        n_kv_heads = self.count("num_key_value_heads", n_heads)
        if n_heads % n_kv_heads:
            raise self.fault("num_key_value_heads", n_kv_heads, f"a divisor of num_attention_heads, {n_heads}")
        if self.raw.get("head_dim") is None and hidden % n_heads:
            raise self.fault("num_attention_heads", n_heads, f"a divisor of hidden_size, {hidden}")
        head_dim = self.count("head_dim", hidden // n_heads)
        if head_dim % 2:
            raise self.fault("head_dim", head_dim, "an even number, because rotary embedding turns pairs")
        return n_heads, n_kv_heads, head_dim

"""The quant_state of a 4-bit linear: JSON as bytes of a tensor X.weight.quant_state.bitsandbytes__nf4 (or __fp4).

    {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [out, in],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.02}      (the last three if doubled)

Written here it is filled up with spaces to SIZE bytes: the offset is known only when all rows have come, the tensor's
size before.

Ref: bitsandbytes functional.py (QuantState.as_dict) and utils.py (pack_dict_to_tensor).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.bnb.settings import DTYPES
from weightsmith.formats.safetensors.strictjson import parse_object
from weightsmith.quant import doubled, float4

KEY = "weight.quant_state.bitsandbytes__"
SIZE = 256  # bytes
MAX_SIZE = 1 << 16
_CODECS = {name: codec for codec, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class State:
    """One linear's. kind: NF4 or FP4. codec: what it is dequantized to. nested: absmax per nested one, 0 if plain."""

    kind: str
    shape: tuple[int, int]
    codec: str
    blocksize: int = float4.BLOCK
    nested: int = 0
    offset: float = 0.0

    @property
    def n_blocks(self) -> int:
        """Absmax in all."""
        return -(-math.prod(self.shape) // self.blocksize)

    def dump(self) -> bytes:
        """As stored, SIZE bytes."""
        raw: dict[str, Any] = {"quant_type": self.kind.lower(), "blocksize": self.blocksize}
        raw |= {"dtype": DTYPES[self.codec], "shape": list(self.shape)}
        if self.nested:
            raw |= {"nested_blocksize": self.nested, "nested_dtype": "float32", "nested_offset": self.offset}
        return json.dumps(raw).encode().ljust(SIZE)


def parse(data: bytes, kind: str, shape: tuple[int, int], *, nested: bool, path: Path) -> State:
    """Read the state of a linear (out, in) stored as `kind`.

    Raises IntegrityError for one that contradicts its name, its shape or what is stored beside it, UnsupportedError for
    a type that is not known.
    """
    raw = parse_object(data, path=path, what="quant_state")
    if raw.get("quant_type") != kind.lower():
        raise IntegrityError(f"quant_type is {str(raw.get('quant_type'))[:40]!r}, its name says {kind.lower()}")
    if raw.get("shape") != list(shape):
        raise IntegrityError(f"quant_state's shape is {str(raw.get('shape'))[:80]}, expected {list(shape)}")
    codec = _CODECS.get(str(raw.get("dtype")))
    if codec is None:
        raise UnsupportedError(
            f"dtype {str(raw.get('dtype'))[:40]!r} is not known", hint=f"Known: {', '.join(_CODECS)}."
        )
    size = raw.get("blocksize")
    if type(size) is not int or size not in float4.SIZES:
        raise IntegrityError(f"blocksize is {str(size)[:40]}, expected one of {float4.SIZES}")
    if not nested:
        return State(kind, shape, codec, size)
    inner, offset = raw.get("nested_blocksize"), raw.get("nested_offset")
    if type(inner) is not int or inner not in float4.SIZES:
        raise IntegrityError(f"nested_blocksize is {str(inner)[:40]}, expected one of {float4.SIZES}")
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not math.isfinite(offset):
        raise IntegrityError(f"nested_offset is {str(offset)[:40]}, expected a number")
    return State(kind, shape, codec, size, inner, float(offset))


def of_plan(kind: str, shape: tuple[int, int], codec: str, *, double: bool) -> State:
    """The state that is written, its offset still open."""
    return State(kind, shape, codec, nested=doubled.BLOCK if double else 0)

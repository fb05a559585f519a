"""What config.json's `quantization_config`, or an older quantize_config.json, says of a GPTQ checkpoint.

| key | |
|---|---|
| bits, group_size | of every packed linear; -1 is whole rows. Older synonyms: w_bit, q_group_size |
| sym | written with the zero in the middle; nothing depends on it when reading |
| desc_act | columns of a group are not neighbours; the g_idx tensors say so themselves |
| checkpoint_format | "gptq" (stored zero = zero - 1; also where absent) or "gptq_v2" (zeros as they are) |
| dynamic | pattern: overrides; only patterns that leave modules out ("-:...") are known |

Other packings (marlin, bitblas, GPTQModel's planar form, words other than int32) are refused by name.

Ref: GPTQModel quantization/config.py; AutoGPTQ quantization/config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, UnsupportedError

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
MAX_GROUP = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """One checkpoint's settings; see the module. meta: how it was made, free keys."""

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = "gptq"
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def zero_shift(self) -> int:
        """A stored zero is this much less than the zero."""
        return 1 if self.checkpoint_format == "gptq" else 0

    def dump(self) -> dict[str, Any]:
        """As `quantization_config`."""
        return {
            "bits": self.bits,
            "checkpoint_format": self.checkpoint_format,
            "desc_act": self.desc_act,
            "group_size": self.group_size,
            "lm_head": False,
            "meta": dict(self.meta),
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": self.sym,
        }


def parse(raw: Mapping[str, Any], *, path: Path) -> Settings:
    """Read a quantization_config. Raises UnsupportedError for an unknown variant, IntegrityError for a wrong value."""
    _refuse_unknown(raw, path)
    bits = _integer(raw, ("bits", "w_bit"), path)
    if bits not in BITS:
        raise UnsupportedError(f"{bits}-bit GPTQ is not known", path=path, hint=f"Known: {BITS}.")
    group_size = _integer(raw, ("group_size", "q_group_size"), path)
    if group_size != -1 and not 0 < group_size <= MAX_GROUP:
        raise IntegrityError(f"group_size is {group_size}, expected a count or -1", path=path)
    return Settings(
        bits=bits,
        group_size=group_size,
        sym=_flag(raw, "sym", path, default=True),
        desc_act=_flag(raw, "desc_act", path, default=False),
        checkpoint_format=_format(raw, path),
        meta=raw["meta"] if isinstance(raw.get("meta"), dict) else {},
    )


def _format(raw: Mapping[str, Any], path: Path) -> str:
    named = {raw[key] for key in ("checkpoint_format", "format") if isinstance(raw.get(key), str)}
    if len(named) > 1:
        raise IntegrityError(f"checkpoint_format and format differ: {sorted(named)}", path=path)
    found: str = named.pop() if named else "gptq"
    if found not in FORMATS:
        raise UnsupportedError(
            f"GPTQ checkpoint format {found[:40]!r} is not known",
            path=path,
            hint=f"Known: {', '.join(FORMATS)}. Start from a checkpoint in one of them.",
        )
    return found


def _refuse_unknown(raw: Mapping[str, Any], path: Path) -> None:
    if raw.get("is_marlin_format"):
        raise UnsupportedError("GPTQ checkpoint format 'marlin' is not known", path=path)
    packed = raw.get("pack_dtype") or "int32"
    if packed not in ("int32", "torch.int32"):
        raise UnsupportedError(f"codes packed as {str(packed)[:40]!r} are not known, only int32", path=path)
    dynamic = raw.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise IntegrityError("dynamic is not an object", path=path)
    for pattern, override in dynamic.items():
        if not pattern.startswith("-:") and override:
            raise UnsupportedError(
                f"settings of their own for some modules ({pattern[:80]!r}) are not known", path=path
            )


def _integer(raw: Mapping[str, Any], keys: tuple[str, ...], path: Path) -> int:
    value = next((raw[key] for key in keys if raw.get(key) is not None), None)
    if type(value) is not int:
        raise IntegrityError(f"{keys[0]} is {str(value)[:40]!r}, expected a whole number", path=path)
    return value


def _flag(raw: Mapping[str, Any], key: str, path: Path, *, default: bool) -> bool:
    value = raw.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise IntegrityError(f"{key} is {str(value)[:40]!r}, expected true or false", path=path)
    return value

"""quantization_config of a compressed-tensors checkpoint.

| key | |
|---|---|
| format, and of each group | how weights are stored, see FORMATS |
| config_groups | name: {targets, weights: {num_bits, type, symmetric, strategy, group_size, block_structure, ...}} |
| ignore | modules left alone |
| sparsity_config | sparse storage, not known |
| transform_config | rotations that the runtime applies to activations, not known |

Ref: compressed-tensors quantization/quant_config.py and quant_args.py, version 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, UnsupportedError

FORMATS = (
    *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mxfp8-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision"),
)
MAX_GROUP = 1 << 20
MAX_GROUPS = 1024  # config_groups


@dataclass(frozen=True, slots=True)
class Weights:
    """How the weights of one group of modules are quantized. tile: (rows, columns) per scale, for blocks."""

    bits: int
    is_float: bool
    tile: tuple[int, int] | None


def parse(raw: Mapping[str, Any], *, path: Path) -> tuple[Weights, ...]:
    """The ways of packing, each once. UnsupportedError for an unknown one, IntegrityError for a wrong value."""
    _refuse_unknown(raw, path)
    groups = raw.get("config_groups") or {}
    if not isinstance(groups, dict) or len(groups) > MAX_GROUPS:
        raise IntegrityError("config_groups is no object of a few groups", path=path)
    found: list[Weights] = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise IntegrityError(f"config_groups: {name[:40]!r} is no object", path=path)
        _check_format(group.get("format"), path)
        weights = group.get("weights")
        if weights is None:
            continue  # activations only
        if not isinstance(weights, dict):
            raise IntegrityError(f"config_groups: weights of {name[:40]!r} are no object", path=path)
        if (one := _weights(weights, path)) not in found:
            found.append(one)
    return tuple(found)


def _weights(raw: Mapping[str, Any], path: Path) -> Weights:
    bits, kind = raw.get("num_bits", 8), raw.get("type", "int")
    if type(bits) is not int or not 1 <= bits <= 8:
        raise IntegrityError(f"num_bits is {str(bits)[:40]!r}, expected 1 to 8", path=path)
    if kind not in ("int", "float"):
        raise UnsupportedError(f"weights of type {str(kind)[:40]!r} are not known", path=path)
    if kind == "float" and bits not in (4, 8):
        raise UnsupportedError(f"{bits}-bit floats are not known, only 4 and 8", path=path)
    size = raw.get("group_size")
    if size is not None and (type(size) is not int or (size != -1 and not 0 < size <= MAX_GROUP)):
        raise IntegrityError(f"group_size is {str(size)[:40]!r}, expected a count", path=path)
    tile = raw.get("block_structure")
    if tile is None:
        return Weights(bits, kind == "float", None)
    if not isinstance(tile, list) or len(tile) != 2 or any(type(n) is not int or not 0 < n <= MAX_GROUP for n in tile):
        raise IntegrityError(f"block_structure is {str(tile)[:40]}, expected two sizes", path=path)
    return Weights(bits, kind == "float", (tile[0], tile[1]))


def _check_format(found: Any, path: Path) -> None:
    if found is not None and found not in FORMATS:
        raise UnsupportedError(
            f"compressed-tensors format {str(found)[:40]!r} is not known",
            path=path,
            hint=f"Known: {', '.join(FORMATS)}. Start from a checkpoint in one of them.",
        )


def _refuse_unknown(raw: Mapping[str, Any], path: Path) -> None:
    _check_format(raw.get("format"), path)
    sparsity = raw.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise UnsupportedError("sparse storage (sparsity_config) is not known", path=path)
    transforms = raw.get("transform_config") or {}
    if not isinstance(transforms, dict) or transforms.get("config_groups"):
        raise UnsupportedError(
            "rotations of the activations (transform_config) are not known, and without them the weights mean nothing",
            path=path,
        )
    status = raw.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise UnsupportedError(f"quantization_status {str(status)[:40]!r}: not a finished checkpoint", path=path)

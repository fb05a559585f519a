"""FP8 checkpoints in Hugging Face's form: a safetensors folder whose linears are 8-bit floats with scales.

    X.weight            F8_E4M3 [out, in]
    X.weight_scale_inv  [ceil(out / 128), ceil(in / 128)]: a scale per tile (DeepSeek, Qwen), or one number (Mistral)
    X.weight_scale      one number or [out, 1] (static FP8, Meta's fbgemm_fp8)

    weight = stored * scale, in all of them: "inv" is the inverse of what the weights were multiplied by

Scales of activations (input_scale, activation_scale, ...) are no weights and are passed over. Weights are handed out as
F32: a float of four significant bits times a scale, rounded once.

| quant_method | |
|---|---|
| fp8 | tiles of weight_block_size, or one scale per matrix |
| fbgemm_fp8 | one scale per row |

Ref: transformers integrations/finegrained_fp8.py and integrations/fbgemm_fp8.py, version 5.23; DeepSeek-V3
inference/fp8_cast_bf16.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.packed.parts import Source
from weightsmith.formats.packed.reader import PackedReader
from weightsmith.formats.packed.scaled import FLOAT8, Scaled, block_of, float_parts
from weightsmith.formats.packed.settings import method_of
from weightsmith.types import TensorInfo

NAME = "fp8"
METHODS = ("fp8", "fbgemm_fp8")
MAX_TILE = 1 << 16
ACTIVATIONS = (
    *(".input_scale", ".activation_scale", ".input_scale_ub", ".output_scale"),
    *(".q_scale", ".k_scale", ".v_scale", ".prob_scale", ".prob_output_scale"),
)


def sniff(path: Path) -> bool:
    """True for a folder of config.json and safetensors weights whose configuration names FP8."""
    return method_of(path) in METHODS


def open_reader(path: Path) -> PackedReader:
    """Open a folder; reads and checks headers only. See `PackedReader` for what it raises."""
    return PackedReader(path, NAME, lambda raw, where: Fp8(tile_of(raw, path=where)))


def tile_of(raw: Mapping[str, Any], *, path: Path) -> tuple[int, int] | None:
    """weight_block_size, None if scales are not per tile; IntegrityError for one that is no size.

    Raises UnsupportedError for experts in another format.
    """
    if (experts := raw.get("expert_dtype") or "fp8") != "fp8":
        raise UnsupportedError(f"experts stored as {str(experts)[:40]!r} are not known", path=path)
    found = raw.get("weight_block_size")
    if found is None:
        return None
    if (
        not isinstance(found, list)
        or len(found) != 2
        or any(type(n) is not int or not 0 < n <= MAX_TILE for n in found)
    ):
        raise IntegrityError(f"weight_block_size is {str(found)[:40]}, expected two sizes", path=path)
    return found[0], found[1]


@dataclass(frozen=True, slots=True)
class Fp8:
    """The scheme of a checkpoint. tile: (rows, columns) per scale, None for one per matrix or row."""

    tile: tuple[int, int] | None

    def linear(
        self, name: str, shape: tuple[int, int], stored: Mapping[str, TensorInfo], source: Source
    ) -> Scaled | None:
        """The linear that stands for weight `name`, None for a plain one."""
        del source
        weight, stem = stored.get(name), name.removesuffix(".weight")
        if weight is None or weight.codec not in FLOAT8:
            return None
        for suffix in ("weight_scale_inv", "weight_scale"):
            scale = stored.get(f"{stem}.{suffix}")
            if scale is not None:
                block = block_of(shape, scale, self.tile)
                return Scaled(shape, float_parts(shape, scale, suffix), suffix, block)
        raise IntegrityError(
            f"stored as {weight.codec} without weight_scale_inv or weight_scale",
            path=weight.path,
            tensor=name,
            hint="Its values cannot be told without a scale; pull the checkpoint again.",
        )

    def is_dropped(self, name: str) -> bool:
        """True for scales of activations."""
        return name.endswith(ACTIVATIONS)

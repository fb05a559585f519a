"""One packed linear of an AWQ checkpoint, [out, in] in the model, and the weights it stands for.

    X.qweight  I32 [in, out / 8]         codes, packed along out
    X.qzeros   I32 [groups, out / 8]     zeros, packed alike
    X.scales   F16 [groups, out]

    weight[o, i] = (code[i, o] - zero[g, o]) * scale[g, o],  g = i // group_size

Nibble k of a word, the lowest first, holds column ORDER[k] of its eight. Groups are whole, so in must be a multiple
of the group size.

| key of quantization_config | |
|---|---|
| bits, group_size | 4; -1 is whole rows. Synonyms: w_bit, q_group_size |
| zero_point | False where all zeros are in the middle; they are stored all the same |
| version (or format) | "gemm" |

Other versions (gemv, gemv_fast, marlin, exllama, ipex) pack differently and are refused by name.

Ref: AutoAWQ modules/linear/gemm.py, utils/packing_utils.py; AWQ arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.gptq.columns import Load
from weightsmith.formats.packed.parts import FLOATS, Part
from weightsmith.quant.steps import Lattice
from weightsmith.types import Rows

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MAX_GROUP = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """One checkpoint's settings; see the module. meta: how it was made, free keys. kept: parts of the names of linears
    that are not packed, as loaders look for them."""

    group_size: int
    zero_point: bool = True
    meta: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ("lm_head",)

    def dump(self) -> dict[str, Any]:
        """As `quantization_config`."""
        return {
            "bits": 4,
            "group_size": self.group_size,
            "meta": dict(self.meta),
            "modules_to_not_convert": list(self.kept),
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": self.zero_point,
        }


def parse(raw: Mapping[str, Any], *, path: Path) -> Settings:
    """Read a quantization_config. Raises UnsupportedError for an unknown variant, IntegrityError for a wrong value."""
    bits = raw.get("bits", raw.get("w_bit"))
    if type(bits) is not int:
        raise IntegrityError(f"bits is {str(bits)[:40]!r}, expected a whole number", path=path)
    if bits != 4:
        raise UnsupportedError(f"{bits}-bit AWQ is not known, only 4", path=path)
    version = raw.get("version") or raw.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        hint = "Known: gemm. Start from a checkpoint of that version."
        raise UnsupportedError(f"AWQ version {str(version)[:40]!r} is not known", path=path, hint=hint)
    group_size = raw.get("group_size", raw.get("q_group_size"))
    if type(group_size) is not int or (group_size != -1 and not 0 < group_size <= MAX_GROUP):
        raise IntegrityError(f"group_size is {str(group_size)[:40]!r}, expected a count or -1", path=path)
    zero_point = raw.get("zero_point", True)
    if type(zero_point) is not bool:
        raise IntegrityError(f"zero_point is {str(zero_point)[:40]!r}, expected true or false", path=path)
    return Settings(group_size, zero_point, raw["meta"] if isinstance(raw.get("meta"), dict) else {})


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Codes [n, k] of 4 bits as words [n, k / 8]."""
    eights = codes.reshape(len(codes), codes.shape[1] // 8, 8).astype(np.uint32)
    words = np.zeros(eights.shape[:2], np.uint32)
    for k, column in enumerate(ORDER):
        words |= eights[:, :, column] << np.uint32(4 * k)
    return words


def unpack(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The codes [n, 8 k] of words [n, k]."""
    codes = np.empty((*words.shape, 8), np.uint8)
    for k, column in enumerate(ORDER):
        codes[:, :, column] = (words >> np.uint32(4 * k)) & np.uint32(15)
    return codes.reshape(len(words), 8 * words.shape[1])


@dataclass(frozen=True, slots=True)
class Layout:
    """How linears are packed under `settings`."""

    settings: Settings

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4

    @property
    def group_size(self) -> int:
        """Columns per group, -1 for all."""
        return self.settings.group_size

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors by suffix for a linear (out, in); UnsupportedError where it cannot be packed."""
        out, columns = shape
        size = columns if self.settings.group_size == -1 else self.settings.group_size
        if out % 8 or columns % size:
            raise UnsupportedError(
                f"a matrix {list(shape)} cannot be packed: out must be a multiple of 8, in of the group size, {size}"
            )
        groups = columns // size
        return {
            "qweight": Part((columns, out // 8), ("I32",)),
            "qzeros": Part((groups, out // 8), ("I32",)),
            "scales": Part((groups, out), FLOATS),
        }

    def rows(self, load: Load, shape: tuple[int, int], start: int, stop: int, *, has_index: bool) -> Rows:
        """Weights float32 [stop - start, in]."""
        return self.lattice(load, shape, start, stop, has_index=has_index).weights()

    def lattice(self, load: Load, shape: tuple[int, int], start: int, stop: int, *, has_index: bool) -> Lattice:
        """Codes of rows [start, stop)."""
        del has_index
        size = shape[1] if self.settings.group_size == -1 else self.settings.group_size
        begin, end = start // 8, -(-stop // 8)
        here = slice(start - 8 * begin, stop - 8 * begin)
        codes = unpack(load("qweight", begin, end).view(np.uint32))[:, here]
        zeros = unpack(load("qzeros", begin, end).view(np.uint32))[:, here].astype(np.int16)
        scales = load("scales", start, stop).astype(np.float32)
        return Lattice.transposed(codes, scales, zeros, size)

    def spread(self, load: Load, shape: tuple[int, int], start: int, stop: int, *, has_index: bool) -> Lattice:
        """As `lattice`: groups are always runs of columns."""
        return self.lattice(load, shape, start, stop, has_index=has_index)

    def store(self, linear: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Stored tensors by suffix for codes uint8 [out, in], scales float [out, groups], zeros [out, groups].

        Raises IntegrityError for a scale that is no half, UnsupportedError for columns out of order (g_idx).
        """
        scales, zeros, codes = linear["scales"], linear["zeros"], linear["codes"]
        size = codes.shape[1] if self.settings.group_size == -1 else self.settings.group_size
        halves = scales.astype("<f2")
        if not np.array_equal(halves.astype(scales.dtype), scales):
            raise IntegrityError("a scale is no half-precision number")
        if zeros.min() < 0 or zeros.max() > 15:
            raise IntegrityError("a zero is no 4-bit number")
        if "g_idx" in linear and not np.array_equal(linear["g_idx"], np.arange(codes.shape[1]) // size):
            raise UnsupportedError("AWQ cannot store groups whose columns are no neighbours")
        return {
            "qweight": pack(np.ascontiguousarray(codes.T)).view("<i4"),
            "qzeros": pack(np.ascontiguousarray(zeros.T.astype(np.uint8))).view("<i4"),
            "scales": np.ascontiguousarray(halves.T),
        }

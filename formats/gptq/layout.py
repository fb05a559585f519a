"""One packed linear of a GPTQ checkpoint, [out, in] in the model, and the weights it stands for.

    X.qweight  I32 [in * bits / 32, out]            codes, packed along in
    X.qzeros   I32 [groups, out * bits / 32]        zeros (or zeros - 1), packed along out
    X.scales   F16 [groups, out]
    X.g_idx    I32 [in]                             group of every column; column // group_size where it is absent

    weight[o, i] = (code[i, o] - zero[g, o]) * scale[g, o],  g = g_idx[i]

A g_idx of zeros only means that it was never filled in: old writers left it so where columns are in order. A stored
zero of 2^bits - 1 in the older format is the zero 0, gone round once.

Ref: AutoGPTQ nn_modules/qlinear; GPTQModel utils/model.py (convert_gptq_v1_to_v2_format_module).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.gptq import words
from weightsmith.formats.gptq.columns import Load
from weightsmith.formats.gptq.settings import Settings
from weightsmith.formats.packed.parts import FLOATS, Part
from weightsmith.quant.steps import Lattice
from weightsmith.types import Rows


@dataclass(frozen=True, slots=True)
class Layout:
    """How linears are packed under `settings`."""

    settings: Settings

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.settings.bits

    @property
    def group_size(self) -> int:
        """Columns per group, -1 for all."""
        return self.settings.group_size

    def groups(self, columns: int) -> int:
        """Groups in rows of `columns`."""
        size = self.settings.group_size
        return 1 if size == -1 else -(-columns // size)

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors by suffix for a linear (out, in); UnsupportedError where it cannot be packed."""
        out, columns = shape
        bits = self.settings.bits
        count = words.period(bits)[0]
        if out % count or columns % count:
            raise UnsupportedError(f"a matrix {list(shape)} cannot be packed, both must be multiples of {count}")
        groups = self.groups(columns)
        return {
            "qweight": Part((columns * bits // 32, out), ("I32",)),
            "qzeros": Part((groups, out * bits // 32), ("I32",)),
            "scales": Part((groups, out), FLOATS),
            "g_idx": Part((columns,), ("I32", "I64"), optional=True),
        }

    def rows(self, load: Load, shape: tuple[int, int], start: int, stop: int, *, has_index: bool) -> Rows:
        """Weights float32 [stop - start, in]; IntegrityError for a g_idx that leads nowhere."""
        codes, zeros, scales = self._fields(load, start, stop)
        g_idx = self._index(load, shape[1], has_index=has_index)
        steps = codes.astype(np.float32)
        steps -= zeros.astype(np.float32)[g_idx]
        steps *= scales[g_idx]
        return np.ascontiguousarray(steps.T)

    def lattice(self, load: Load, shape: tuple[int, int], start: int, stop: int, *, has_index: bool) -> Lattice | None:
        """Codes of rows [start, stop), None for columns out of order."""
        if not np.array_equal(self._index(load, shape[1], has_index=has_index), self._trivial(shape[1])):
            return None
        codes, zeros, scales = self._fields(load, start, stop)
        size = shape[1] if self.group_size == -1 else self.group_size
        return Lattice.transposed(codes, scales, zeros.astype(np.int16), size)

    def spread(self, load: Load, shape: tuple[int, int], start: int, stop: int, *, has_index: bool) -> Lattice:
        """Codes of rows [start, stop), each with a zero and a scale of its own."""
        codes, zeros, scales = self._fields(load, start, stop)
        index = self._index(load, shape[1], has_index=has_index)
        return Lattice.transposed(codes, scales[index], zeros.astype(np.int16)[index], 1)

    def _fields(self, load: Load, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Codes uint8 [in, n], zeros uint8 [groups, n] and scales float32 [groups, n] of rows [start, stop)."""
        bits = self.settings.bits
        codes = words.unpack(load("qweight", start, stop).view(np.uint32), bits)
        count, n_words = words.period(bits)
        begin, end = start // count, -(-stop // count)
        stored = load("qzeros", begin * n_words, end * n_words).view(np.uint32)
        zeros = words.unpack(np.ascontiguousarray(stored.T), bits).T[:, start - begin * count : stop - begin * count]
        zeros = (zeros + np.uint8(self.settings.zero_shift)) & np.uint8((1 << bits) - 1)
        return codes, zeros, load("scales", start, stop).astype(np.float32)

    def _index(self, load: Load, columns: int, *, has_index: bool) -> NDArray[np.int64]:
        return self._places(load("g_idx", 0, columns), columns) if has_index else self._trivial(columns)

    def _trivial(self, columns: int) -> NDArray[np.int64]:
        size = columns if self.settings.group_size == -1 else self.settings.group_size
        return np.arange(columns) // size

    def _places(self, g_idx: NDArray[Any], columns: int) -> NDArray[np.int64]:
        groups = self.groups(columns)
        if g_idx.min() < 0 or g_idx.max() >= groups:
            raise IntegrityError(f"g_idx goes from {g_idx.min()} to {g_idx.max()}, there are {groups} groups")
        return g_idx.astype(np.int64) if g_idx.any() else self._trivial(columns)

    def store(self, linear: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Stored tensors by suffix for codes uint8 [out, in], scales float [out, groups], zeros [out, groups], g_idx.

        Raises IntegrityError for a scale that is no half, UnsupportedError for a zero that this format cannot hold.
        """
        bits, scales = self.settings.bits, linear["scales"]
        halves = scales.astype("<f2")
        if not np.array_equal(halves.astype(scales.dtype), scales):
            raise IntegrityError("a scale is no half-precision number")
        zeros = linear["zeros"].astype(np.int64) - self.settings.zero_shift
        if zeros.min() < 0 or zeros.max() >> bits:
            raise UnsupportedError(f"the zero {zeros.min() + self.settings.zero_shift} cannot be stored in this format")
        return {
            "qweight": words.pack(np.ascontiguousarray(linear["codes"].T), bits).view("<i4"),
            "qzeros": np.ascontiguousarray(words.pack(zeros.astype(np.uint8), bits).T).view("<i4"),
            "scales": np.ascontiguousarray(halves.T),
            "g_idx": linear["g_idx"].astype("<i4"),
        }

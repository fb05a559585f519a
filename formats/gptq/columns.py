"""GPTQ's and AWQ's linears as `formats.packed` knows them: both store matrices as [in, out] and are read by columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from weightsmith.formats.packed.parts import Part, Source
from weightsmith.quant.steps import Lattice, as_blocks, candidates
from weightsmith.quant.units import Units
from weightsmith.types import Packed, Rows, TensorInfo

Load = Callable[[str, int, int], NDArray[Any]]  # (suffix, first column, end column) -> that part of a stored tensor


class Layout(Protocol):
    """What a linear that is packed by columns consists of; made from the checkpoint's settings."""

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def group_size(self) -> int:
        """Columns per group, -1 for all."""

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors by suffix for a linear (out, in)."""

    def rows(self, load: Load, shape: tuple[int, int], start: int, stop: int, *, has_index: bool) -> Rows:
        """Weights float32 [stop - start, in]."""

    def lattice(self, load: Load, shape: tuple[int, int], start: int, stop: int, *, has_index: bool) -> Lattice | None:
        """Codes of rows [start, stop), None where groups are no runs of neighbouring columns."""

    def spread(self, load: Load, shape: tuple[int, int], start: int, stop: int, *, has_index: bool) -> Lattice:
        """Codes of rows [start, stop), each with a scale of its own where groups are no runs of columns."""


@dataclass(frozen=True, slots=True)
class ColumnLinear:
    """One linear (see `formats.packed.parts.Linear`)."""

    layout: Layout
    shape: tuple[int, int]
    parts: Mapping[str, Part]
    codec: str = "F32"  # which holds a step times a half exactly

    @property
    def blocks(self) -> tuple[str, ...]:
        """Block layouts that may take the codes over."""
        size = self.shape[1] if self.layout.group_size == -1 else self.layout.group_size
        return candidates(self.layout.bits, size, self.shape[1])

    def rows(self, source: Source, start: int, stop: int) -> Rows:
        """Weights float32 [stop - start, in]."""
        return self.layout.rows(source.columns, self.shape, start, stop, has_index="g_idx" in source)

    def as_blocks(self, codec: str, source: Source, start: int, stop: int) -> tuple[Packed, float] | None:
        """The codes as blocks, without rounding a weight again."""
        return as_blocks(codec, self.lattice(source, start, stop))

    def lattice(self, source: Source, start: int, stop: int) -> Lattice | None:
        """Codes of rows [start, stop)."""
        return self.layout.lattice(source.columns, self.shape, start, stop, has_index="g_idx" in source)

    def units(self, source: Source, start: int, stop: int) -> Units:
        """Steps of rows [start, stop) before they are scaled."""
        found = self.layout.spread(source.columns, self.shape, start, stop, has_index="g_idx" in source)
        return Units.of(found, self.layout.bits)


@dataclass(frozen=True, slots=True)
class ByColumns:
    """The scheme of a checkpoint whose linears are all packed alike: X.qweight says that X.weight is."""

    layout: Layout

    def linear(
        self, name: str, shape: tuple[int, int], stored: Mapping[str, TensorInfo], source: Source
    ) -> ColumnLinear | None:
        """The linear that stands for weight `name`."""
        del source
        if f"{name.removesuffix('.weight')}.qweight" not in stored:
            return None
        return ColumnLinear(self.layout, shape, self.layout.parts(shape))

    def is_dropped(self, name: str) -> bool:
        """Every part belongs to a weight."""
        del name
        return False

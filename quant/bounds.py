"""Can a quantizer of this layout have made these bytes from those weights? Told weight by weight, whoever's it was.

Every layout stores a grid: a step and two ends for each block. A quantizer searches for the grid, and then gives each
weight the value next to it; so, however clever the search, a weight w and its stored value q keep

    |w - q| <= (1/2 + SLACK) * gap          gap: from q to the next value on w's side
     w - q  <= END * gap + rest             where q is the last value on that side

rest: what fitting the block's integers to one d may cost at an end, a unit of d (times the largest code) and of dmin.
To both sides comes what rounding d and dmin to halves moves q by, 2^-11 of its parts. Where the stored scale was fitted
after the codes were chosen (FITTED), a block also passes if some other grid has these codes (`quant.refit`).

A search with importances gives up outliers of channels that matter little, so at an end a weight may lie up to FAR_END
gaps away; no tensor may have more of these than SHARE. Floats are held against one unit in the last place, so that
truncation passes as rounding does.

The numbers were measured on ggml's and on our own searches, with and without importances (docs/LOG.md). Error feedback
(GPTQ) rounds weights that it has shifted before and keeps no such bound: `judge` takes how many gaps to allow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import UnsupportedError
from weightsmith.quant import codecs, refit
from weightsmith.quant.blocks import BLOCKS
from weightsmith.quant.lattice import Lattice, blocks_of, half_at
from weightsmith.quant.units import Units
from weightsmith.types import Packed, Rows

SLACK = 0.01  # gaps
END = 1.5
FAR_END = 32.0
SHARE = 0.02  # of a tensor's weights
SHARE_FITTED = 0.1
FITTED = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1"})
_HALF, _LEAST = np.float32(2.0**-11), np.float32(2.0**-25)  # of a normal half, of a subnormal one
_NOISE = np.float32(2.0**-20)  # of what float32 sums lose
# Layouts of floats: one unit in the last place is at most this share of a value, and this much near zero.
_FLOATS = {
    "F64": (2.0**-23, 0.0),
    "F32": (2.0**-23, 0.0),
    "F16": (2.0**-10, 2.0**-24),
    "BF16": (2.0**-7, 2.0**-133),
    "F8_E4M3": (2.0**-3, 2.0**-9),
    "F8_E5M2": (2.0**-2, 2.0**-16),
}


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Where weights may lie, all float32 [rows, in].

    values: decoded. down, up: to the next value below and above, 0 if there is none. end: how far beyond an end the
    block's integers may leave a weight. slack: what the values may be off by. fitted: the codes, where a block of
    them may pass by another grid.
    """

    values: Rows
    down: Rows
    up: Rows
    end: Rows | float
    slack: Rows
    fitted: Lattice | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many weights: all; far beyond an end but kept (wide); explained by another grid (fitted); beyond rounding
    but within what was allowed as moved (shifted); outside every bound.

    worst: distance in gaps of one outside, else of one between two values; its row, column, weight and stored value.
    """

    weights: int = 0
    wide: int = 0
    fitted: int = 0
    shifted: int = 0
    outside: int = 0
    worst: float = 0.0
    at: tuple[int, int] = (0, 0)
    wanted: float = 0.0
    found: float = 0.0

    @property
    def within(self) -> bool:
        """Whether a quantizer can have made them."""
        far, fitted = max(2, SHARE * self.weights), max(2, SHARE_FITTED * self.weights)
        return self.outside == 0 and self.wide <= far and self.fitted <= fitted

    def joined(self, other: Outcome, *, below: int) -> Outcome:
        """This and that of further rows, the first of which is row `below`."""
        lead = (other.outside > 0, other.worst) > (self.outside > 0, self.worst)
        kept = replace(other, at=(other.at[0] + below, other.at[1])) if lead else self
        names = ("weights", "wide", "fitted", "shifted", "outside")
        return replace(kept, **{name: getattr(self, name) + getattr(other, name) for name in names})


def judge(base: Rows, grid: Grid, *, moved: float = 0.0) -> Outcome:
    """Hold float32 [rows, in] against what is stored of them. moved: gaps that error feedback may have shifted by."""
    if not base.size:
        return Outcome()
    with np.errstate(all="ignore"):
        apart = base - grid.values
        above = apart > 0
        gap = np.where(above, grid.up, grid.down)
        last = gap == 0
        gap = np.where(last, np.where(above, grid.down, grid.up), gap)
        apart = np.maximum(np.abs(apart) - grid.slack, np.float32(0))  # NaN stays and keeps no bound
        near = np.where(last, END * gap + grid.end, (0.5 + SLACK) * gap)
        far = np.where(last, max(FAR_END, moved) * gap + grid.end, (0.5 + SLACK + moved) * gap)
        outside = ~(apart <= far)
        by_grid = outside
        if grid.fitted is not None and outside.any():
            outside = _refitted(base, grid.fitted, outside)
        by_grid = by_grid & ~outside
        beyond = (apart > near) & ~outside
        away = np.nan_to_num(apart / np.maximum(gap, np.float32(1e-30)), nan=np.inf, posinf=np.inf)
    at = int(np.argmax(np.where(outside, away, -1) if outside.any() else np.where(last | by_grid, 0, away)))
    row, column = divmod(at, base.shape[1])
    stored, wanted = float(grid.values[row, column]), float(base[row, column])
    worst = float(away[row, column])
    wide = 0 if moved else int(np.count_nonzero(beyond & last))
    shifted = int(np.count_nonzero(beyond & ~by_grid)) if moved else 0
    fitted, beside = (int(np.count_nonzero(mask)) for mask in (by_grid, outside))
    return Outcome(base.size, wide, fitted, shifted, beside, worst, (row, column), wanted, stored)


def of_rows(codec: str, packed: Packed, row_len: int) -> Grid:
    """The grid of packed rows; UnsupportedError for a layout whose grid is not known here."""
    if codec in _FLOATS:
        return _of_floats(codec, codecs.decode(codec, packed, row_len))
    if codec == "Q8_0":
        with np.errstate(all="ignore"):
            return _of_q8_0(packed)
    if codec not in codecs.OPEN:
        known = ", ".join(name for name in BLOCKS if name in codecs.OPEN or name in _FLOATS or name == "Q8_0")
        raise UnsupportedError(f"the grid of {codec} is not known", hint=f"Known: {known}.")
    with np.errstate(all="ignore"):  # scales that are no numbers keep no bound
        return _of_lattice(codec, packed, row_len)


def of_units(units: Units) -> Grid:
    """The grid of a packed linear."""
    if units.table is None:
        below = (units.numbers > units.low).astype(np.float32)
        above = (units.numbers < units.high).astype(np.float32)
    else:
        below, above = _gaps(units.table, np.searchsorted(units.table, units.numbers))
    values = units.numbers * units.scales
    size = np.abs(units.scales)
    down, up = _turned(below * size, above * size, units.scales)
    slack = np.abs(values) * _HALF + size * _NOISE + units.slack
    return Grid(values, down, up, 0.0, np.asarray(slack, np.float32))


def _refitted(base: Rows, found: Lattice, outside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`outside` less the blocks whose codes are those of some other grid."""
    shape, left = found.shape, outside.copy()
    rows, blocks = np.nonzero(outside.reshape(len(outside), -1, shape.block).any(axis=2))
    wide = (len(outside), -1, shape.block)
    d = found.d[rows, blocks]
    codes = found.codes.reshape(wide)[rows, blocks].astype(np.float32) - shape.zero
    weights = base.reshape(wide)[rows, blocks] * np.where(d < 0, np.float32(-1), np.float32(1))[:, None]
    ends = (float(-shape.zero), float(shape.top - shape.zero))
    offset = None if shape.mins is None else found.dmin[rows, blocks] * np.where(d < 0, np.float32(-1), np.float32(1))
    fits = refit.exists(weights, codes, ends, np.abs(d), offset)
    left.reshape(wide)[rows[fits], blocks[fits]] = False
    return left


def _of_lattice(codec: str, packed: Packed, row_len: int) -> Grid:
    found = codecs.unpack(codec, packed)
    shape = found.shape
    table = np.array(shape.table if shape.table is not None else range(shape.top + 1), np.float32) - shape.zero
    d, dmin = (np.abs(half).repeat(shape.block, axis=1) for half in (found.d, found.dmin))
    scales, mins = (part.astype(np.float32).repeat(shape.sub, axis=1) for part in (found.scales, found.mins))
    size = d * np.abs(scales)
    below, above = _gaps(table, found.codes)
    signed = np.sign(found.d).repeat(shape.block, axis=1) * scales
    down, up = _turned(below * size, above * size, signed)
    values = codecs.decode(codec, packed, row_len)
    rest: Rows = np.zeros_like(d)
    if shape.scales != (1, 1):
        rest += np.abs(table).max() * d
    if shape.mins is not None and shape.mins != (-1, -1):
        rest += dmin
    parts = np.maximum(d * _HALF, _LEAST) * np.abs(scales * table[found.codes])
    parts = parts + np.maximum(dmin * _HALF, _LEAST) * np.abs(mins)
    parts = np.where(d == 0, np.abs(table).max() * max(map(abs, shape.scales)) * _LEAST, parts)  # too small for a half
    return Grid(values, down, up, rest, parts + np.abs(values) * _NOISE + _LEAST, found if codec in FITTED else None)


def _of_q8_0(packed: Packed) -> Grid:
    blocks = blocks_of("Q8_0", packed)
    codes = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)
    d = np.abs(half_at(blocks, 0))[:, None]
    values = (half_at(blocks, 0)[:, None] * codes).reshape(len(packed), -1)
    down, up = _turned((codes > -127) * d, (codes < 127) * d, half_at(blocks, 0)[:, None])
    slack = np.maximum(d * _HALF, _LEAST) * np.abs(codes)
    wide = values.shape
    return Grid(values, down.reshape(wide), up.reshape(wide), 0.0, slack.reshape(wide) + _LEAST)


def _of_floats(codec: str, values: Rows) -> Grid:
    share, least = _FLOATS[codec]
    with np.errstate(all="ignore"):
        gap = np.float32(2) * (np.abs(values) * np.float32(share) + np.float32(least))
    return Grid(values, gap, gap, 0.0, np.zeros_like(values))


def _gaps(table: NDArray[np.float32], places: NDArray[Any]) -> tuple[Rows, Rows]:
    """From every place of an ascending table down and up to its neighbours, 0 at the ends."""
    apart = np.diff(table)
    none = np.zeros(1, np.float32)
    return np.concatenate([none, apart])[places], np.concatenate([apart, none])[places]


def _turned(down: Rows, up: Rows, sign: Rows) -> tuple[Rows, Rows]:
    """Below and above change places where a scale is negative."""
    negative = sign < 0
    return np.where(negative, up, down), np.where(negative, down, up)

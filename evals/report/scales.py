"""From values to pixels, linear or logarithmic, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` lie from pixel `start` to `stop`. Zero lies at the start of a logarithmic one."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        if self.log:
            value = min(max(value, self.low), self.high)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def linear(values: Iterable[float], start: float, stop: float, *, zero: bool = True, whole: bool = False) -> Scale:
    """A scale with about five ticks at 1, 2 or 5 times a power of ten. whole: no ticks between whole numbers."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min([0.0, *known] if zero else known), max(known)
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * k for k in range(first, last + 1))
    if whole:  # layers end where they end
        return Scale(low, high, start, stop, False, tuple(tick for tick in ticks if low <= tick <= high))
    return Scale(ticks[0], ticks[-1], start, stop, False, ticks)


def logarithmic(values: Iterable[float], start: float, stop: float) -> Scale:
    """A scale whose ends are 1, 2 or 5 times a power of ten; zeros do not count, and without others it is 0.1 to 1."""
    known = [value for value in values if value > 0 and math.isfinite(value)] or [0.1, 1.0]
    powers = range(math.floor(math.log10(min(known))) - 1, math.ceil(math.log10(max(known))) + 2)
    fine = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    low = max(value for value in fine if value <= min(known))
    high = min(value for value in fine if value >= max(known) and value > low)
    inside = [value for value in fine if low <= value <= high]
    if len(inside) > 7:
        inside = [value for value in inside if f"{value:e}".startswith("1.0")]
    return Scale(low, high, start, stop, True, tuple(inside))


def spread(values: Iterable[float]) -> bool:
    """True if a logarithmic scale serves these values better."""
    known = [value for value in values if value > 0 and math.isfinite(value)]
    return bool(known) and max(known) > 20 * min(known)

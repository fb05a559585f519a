"""What is measured of a layer while rows pass: the tap that its linears show their inputs to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightsmith.evals.calibration import routed
from weightsmith.evals.forward.beside import Beside
from weightsmith.evals.forward.moe import EnoughError
from weightsmith.quant.algorithms.drift import Drift
from weightsmith.quant.calibration import Moments


@dataclass(slots=True, eq=False)
class Collector:
    """The tap of a layer. done: linears measured before. one_group: stop behind the first group that is not; the
    experts' linears of one kind are one group, as many of them as have `room` (bytes of H) beside each other. passed:
    those that were seen but not measured."""

    device: torch.device
    full: bool
    one_group: bool
    done: set[str] = field(default_factory=set)
    room: int = 0
    passed: set[str] = field(default_factory=set)
    found: dict[str, Moments] = field(default_factory=dict)
    drifts: dict[str, Drift] = field(default_factory=dict)

    def __call__(self, names: tuple[str, ...], into: Tensor, beside: Beside | None = None) -> None:
        """Count the input of the linears `names`, and how far it is from the original's, if that lies beside it; raises
        EnoughError where the evaluation need not go on."""
        if not self.wants(names, into.shape[-1]):
            return
        if names[0] not in self.found:
            self.found |= dict.fromkeys(names, Moments(into.shape[-1], full=self.full, device=self.device))
        self.found[names[0]].add(into)
        if beside is not None:
            self._compare(names, into, beside)
        if self.one_group and routed.stage_of(names[0]) is None:
            raise EnoughError

    def _compare(self, names: tuple[str, ...], into: Tensor, beside: Beside) -> None:
        if names[0] not in self.drifts:
            width = 0 if beside.off is None else beside.off.shape[-1]
            self.drifts |= dict.fromkeys(names, Drift(into.shape[-1], width, self.device))
        drift, lost = self.drifts[names[0]], beside.lost(into)
        for take, rows in ((drift.add, slice(beside.counted)), (drift.hold, slice(beside.counted, None))):
            if len(into[rows]):
                take(lost[rows], into[rows])

    def wants(self, names: tuple[str, ...], size: int) -> bool:
        """Whether the input of linears is measured in this evaluation."""
        if names[0] in self.done:
            return False
        if names[0] in self.found or not self.one_group or not self.found or self._has_room(names[0], size):
            return True
        self.passed.update(names)  # an expert of the stage may yet come
        return False

    def _has_room(self, name: str, size: int) -> bool:
        """Whether an expert's linear belongs to the stage under way and its moments fit in."""
        stage = routed.stage_of(next(iter(self.found)))
        count = len({id(moments) for moments in self.found.values()})
        drift = next(iter(self.drifts.values()), None)
        each = 4 * (size**2 + (0 if drift is None else drift.sums.numel()))
        return stage is not None and routed.stage_of(name) == stage and (count + 1) * each <= self.room

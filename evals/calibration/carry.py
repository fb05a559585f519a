"""What all rows carry from one stage of a layer to the next: the residual stream, and what feeds the next linears.

The stream is replaced in place. The other tensor has another width after every stage, so there are two of it while a
stage runs. The memory budget covers all of them but a quarter, which is for the stage itself; what finds no room lies
in a file (`states`). A file serves the next layer again: to write over one costs less than a new one.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from weightsmith.evals.calibration.states import States
from weightsmith.evals.forward.stages import Carried
from weightsmith.evals.forward.weights import Place


class Carry:
    """Rows of shape [rows, length, hidden] to begin with; close it."""

    def __init__(self, shape: tuple[int, int, int], *, memory: int, spill: Path | None) -> None:
        self._shape, self._spill = shape, spill
        self._stream = States(shape, memory=memory // 2, spill=spill)
        self._room = memory - memory // 4 - self._stream.held_bytes
        self._beside: States | None = None
        self._next: States | None = None
        self._files: dict[tuple[int, int, int], list[States]] = {}  # that are not in use, by shape

    @property
    def rows(self) -> int:
        """How many there are."""
        return self._shape[0]

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self._shape[1]

    def take(self, start: int, stop: int, place: Place) -> Carried:
        """What rows [start, stop), those that there are, carry; not to be changed in place."""
        kept = [self._stream] if self._beside is None else [self._stream, self._beside]
        return tuple(states.take(start, stop).to(*place) for states in kept)

    def put(self, start: int, carried: Carried, *, moved: bool = True) -> None:
        """What rows from `start` on carry out of the stage under way. moved: the stream is not what `take` gave."""
        if moved:
            self._stream.put(start, carried[0])
        if len(carried) > 1:
            if self._next is None:
                shape = (*self._shape[:2], carried[1].shape[-1])
                held = self._beside.held_bytes if self._beside is not None else 0
                free = self._files.get(shape)
                self._next = free.pop() if free else States(shape, memory=self._room - held, spill=self._spill)
            self._next.put(start, carried[1])

    def turn(self) -> None:
        """The stage is through: what was put beside the stream is what `take` gives."""
        if self._beside is not None:
            if self._beside.spilled:
                self._files.setdefault(self._beside.shape, []).append(self._beside)
            else:
                self._beside.close()
        self._beside, self._next = self._next, None

    def close(self) -> None:
        """Free memory and files."""
        for states in (self._stream, self._beside, self._next, *chain(*self._files.values())):
            if states is not None:
                states.close()

"""The last step of best effort: scales of the whole model move until its logits come nearer to the original's.

Everything before it looks at one linear, or at what feeds it. Here the loss is the KL divergence from the original's
distribution of the next token to the quantized model's, over tokens of the calibration rows, and what moves are the
halves that groups or blocks are scaled by (`quant.algorithms.scales`): one number for tens or hundreds of weights, so
a few rows teach them something that holds elsewhere. Codes stay.

Rows go through in steps of some 1,000 tokens. Forward, what enters every layer is kept (in a file beyond the memory
budget); backward, a layer is evaluated again and differentiated alone, so of weights, activations and gradients those
of one layer are in memory at a time, however many there are. What grows with the model are a scale's position and its
two averages, 12 bytes for each, and the output matrix. A step moves logarithms of scales by Adam with a rate that rises
and then falls to zero.

A quarter of the rows is enough: what counts are steps, not tokens (docs/LOG.md). Some others are held out. Only if the
divergence on them has become smaller in the end are the new scales used.

Ref: Adam arXiv 1412.6980; end-to-end training of step sizes as in EfficientQAT, arXiv 2407.11062 section 3.3.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightsmith.evals.calibration.rows import Options
from weightsmith.evals.calibration.states import States
from weightsmith.evals.calibration.stream import Run, begun
from weightsmith.evals.calibration.student import Load, Moves, Student
from weightsmith.evals.calibration.work import Parts, Work
from weightsmith.evals.forward import load, moe, weights
from weightsmith.progress import progress
from weightsmith.quant.algorithms.scales import Halves, Movable
from weightsmith.types import Reader

log = logging.getLogger(__name__)

TOKENS = 1024  # of a step
RATE = 1e-3  # the greatest change of a logarithm in one step
RISES = 0.1  # share of the steps in which the rate rises
DECAYS = (0.9, 0.95)
LIMIT = 0.5  # no scale moves by more than this share of itself
HELD_OUT = 8  # at most one row in so many, and at most so many rows
SAVE_EVERY = 60.0  # seconds

PROGRESS, RESULT = "distil", "scales"  # in the folder of finished layers


class Layers(Protocol):
    """Finished layers."""

    def movable(self, index: int) -> Mapping[str, Movable]:
        """A layer's matrices by name within it."""

    def give(self, index: int, halves: Mapping[str, Sequence[NDArray[np.float32]]]) -> None:
        """Store a layer with these halves instead of its own."""


@dataclass(frozen=True, slots=True)
class Settings:
    """rate: see RATE. epochs: how often the rows are gone through, or what share of them is. seed: of their order."""

    rate: float = RATE
    epochs: float = 0.25
    seed: int = 0


@dataclass(slots=True, eq=False)
class _Moving:
    """Where the scales of one matrix are: logarithms' changes so far [fields, out, groups], and Adam's averages."""

    by: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, movable: Movable) -> _Moving:
        zeros = torch.zeros_like(torch.stack(movable.halves))
        return cls(zeros, zeros.clone(), zeros.clone())

    def to(self, device: torch.device) -> _Moving:
        """The same on a device."""
        return _Moving(self.by.to(device), self.first.to(device), self.second.to(device))

    def step(self, slopes: Halves, rate: float, number: int) -> None:
        """One of Adam's steps, the `number`th, from 1 on."""
        slope = torch.stack(slopes)
        kept, kept_squares = DECAYS
        self.first.lerp_(slope, 1 - kept)
        self.second.lerp_(slope.square(), 1 - kept_squares)
        size = (self.second / (1 - kept_squares**number)).sqrt_().add_(1e-20)
        change = (self.first / (1 - kept**number)).div_(size)
        self.by.add_(change, alpha=-rate).clamp_(-LIMIT, LIMIT)


@dataclass(slots=True)
class Progress:
    """What a run that was killed goes on from. steps: done. before: divergence on rows held out at the beginning."""

    steps: int = 0
    before: float | None = None
    moving: dict[str, _Moving] = field(default_factory=dict)

    @property
    def moves(self) -> Moves:
        """Where scales are."""
        return {name: one.by for name, one in self.moving.items()}

    def dump(self) -> Parts:
        """As tensors by name."""
        found: Parts = {"steps": np.array([self.steps], np.int32), "before": np.array([self.before], np.float32)}
        for name, one in self.moving.items():
            for key in ("by", "first", "second"):
                found[f"{name}:{key}"] = getattr(one, key).cpu().numpy()
        return found

    @classmethod
    def load(cls, parts: Parts, device: torch.device) -> Progress:
        """The inverse of `dump`, on a device."""
        moving: dict[str, dict[str, Tensor]] = {}
        for key, value in parts.items():
            name, _, part = key.rpartition(":")
            if name:
                moving.setdefault(name, {})[part] = torch.from_numpy(value)
        made = {name: _Moving(**found).to(device) for name, found in moving.items()}
        return cls(int(parts["steps"][0]), float(parts["before"][0]), made)


@torch.no_grad()
def judged(student: Student, rows: NDArray[np.int64], moves: Moves) -> float:
    """The mean KL divergence of `rows` by number, in nats per token."""
    total, steps = 0.0, list(_steps(rows, student.run.step))
    states = [student.enter(some) for some in steps]
    for index in range(student.config.n_layers):
        layer = student.layer(index)
        matrices = student.matrices(layer, moves)
        states = [student.through(layer, matrices, x) for x in states]
    for some, x in zip(steps, states, strict=True):
        total += student.divergence(_target(student, some), student.normed(x).flatten(0, 1), slope=False)[0]
    return total / student.tokens[rows].size


def keep(run: Run, work: Work, layers: Layers, tokens: NDArray[np.int64], settings: Settings) -> None:
    """Distil what `work` holds, from where an earlier run was, and store there what becomes of it; `give` uses that."""
    found: Parts = {}
    if moe.is_mixture(run.decoder.kind) or len(tokens) < 2:
        log.info("scales are not distilled: %s", "one row is too few" if len(tokens) < 2 else "the model has experts")
    else:
        begin = work.load(PROGRESS) if work.has(PROGRESS) else None
        halves = distil(run, layers.movable, tokens, settings, begin=begin, save=partial(work.store, PROGRESS))
        for index, of_layer in (halves or {}).items():
            for key, fields in of_layer.items():
                found |= {f"{index}:{key}:{number}": one.cpu().numpy() for number, one in enumerate(fields)}
    work.store(RESULT, {"changed": np.array([len(found)], np.int32), **found})


def give(work: Work, layers: Layers) -> None:
    """Give the layers the scales that `keep` stored; may be repeated, because those are values and not moves."""
    found: dict[int, dict[str, dict[int, NDArray[np.float32]]]] = {}
    for name, half in work.load(RESULT).items():
        if ":" in name:
            layer, key, number = name.split(":")
            found.setdefault(int(layer), {}).setdefault(key, {})[int(number)] = half
    for index, of_layer in found.items():
        layers.give(index, {key: [fields[number] for number in sorted(fields)] for key, fields in of_layer.items()})


def distil(
    run: Run,
    movable: Load,
    tokens: NDArray[np.int64],
    settings: Settings,
    *,
    begin: Parts | None = None,
    save: Callable[[Parts], object] | None = None,
) -> dict[int, dict[str, Halves]] | None:
    """The halves of every layer's matrices, by layer and name within it; None if those that there are are better.

    run: at its end, with the original's rows, whose own rows are used up. movable: a layer's matrices that move. begin:
    what `save` was last given by a run that did not come to its end.
    """
    student = Student(run, movable, tokens)
    made = Progress.load(begin, student.place.device) if begin is not None else Progress()
    train, held = split(len(tokens), settings.seed)
    if made.before is None:
        made.before = float(np.float32(judged(student, held, made.moves)))
    at_once = max(1, TOKENS // tokens.shape[1])
    rng = np.random.default_rng(settings.seed)
    order = np.concatenate([rng.permutation(train) for _ in range(math.ceil(settings.epochs))])
    steps = list(_steps(order[: math.ceil(settings.epochs * len(train))], at_once))
    shape = (student.config.n_layers * at_once, tokens.shape[1], student.config.hidden_size)
    saved = time.monotonic()
    with (
        progress("distil", len(steps), "steps") as ticker,
        closing(States(shape, memory=run.decoder.memory // 4, spill=run.spill)) as entering,
    ):
        ticker.update(made.steps)
        for number, rows in enumerate(steps[made.steps :], made.steps):
            _step(student, made, rows, entering, _rate(number, len(steps), settings.rate))
            made.steps = number + 1
            ticker.update(1)
            if save is not None and time.monotonic() - saved > SAVE_EVERY:
                save(made.dump())
                saved = time.monotonic()
    after = judged(student, held, made.moves)
    log.info("distilled: KL divergence on %d rows held out %.4g, before %.4g", len(held), after, made.before)
    if not after < made.before:  # NaN neither
        log.info("the scales stay as they were")
        return None
    return {index: student.layer(index).halves(made.moves) for index in range(student.config.n_layers)}


def split(count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of rows to learn from and to judge by, of `count`; ValueError if that are fewer than two."""
    if count < 2:
        raise ValueError("one row cannot be split")
    shuffled = np.random.default_rng(seed).permutation(count)
    held = min(HELD_OUT, max(1, count // HELD_OUT))
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])


def seconds_of_row(reader: Reader, options: Options, settings: Settings | None) -> float:
    """How long it takes here to distil one row more, from one layer, and the output matrix, that are measured."""
    kind, rows = load(reader).kind, max(1, TOKENS // options.ctx)
    if settings is None or moe.is_mixture(kind):
        return 0.0
    tokens = np.random.default_rng(0).integers(reader.config.vocab_size, size=(rows, options.ctx))
    with begun(reader, tokens, options, drift=True) as run:
        prefix, place = kind.LAYER.format(0), run.decoder.place

        def whole(_index: int) -> dict[str, Movable]:
            names = [name for name, info in reader.infos().items() if name.startswith(prefix) and len(info.shape) == 2]
            found = {name.removeprefix(prefix): weights.tensor(reader, name, place).float() for name in names}
            return {key: Movable(w, (torch.ones(len(w), 1),)) for key, w in found.items()}

        student, made, numbers = Student(run, whole, tokens), Progress(), np.arange(rows)
        x = student.enter(numbers)
        layer = student.layer(0)
        for _ in range(2):  # the first time waits for kernels
            times = [time.perf_counter()]
            with torch.no_grad():
                out = student.through(layer, student.matrices(layer, {}), x)
            times.append(time.perf_counter())
            _back(student, made, 0, x, torch.ones_like(x), 0.0)
            times.append(time.perf_counter())
            # Not what lies behind one layer: its probabilities are subnormal numbers, which take far longer.
            even = torch.zeros_like(out).flatten(0, 1)
            student.divergence(even, even)
            times.append(time.perf_counter())
    forward, back, head = np.diff(times).tolist()
    layers = reader.config.n_layers
    step, judged = layers * (forward + back) + head, 2 * (layers * forward + head) / HELD_OUT
    return float((settings.epochs * step + judged) / rows)


def _steps(rows: NDArray[np.int64], at_once: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), at_once):
        yield rows[start : start + at_once]


def _rate(number: int, count: int, rate: float) -> float:
    return rate * min(1.0, (number + 1) / max(1.0, RISES * count)) * (1 - number / count)


def _target(student: Student, rows: NDArray[np.int64]) -> Tensor:
    """What the original's output matrix is fed for rows by number, [tokens, hidden]."""
    original = student.run.original
    if original is None:
        raise ValueError("a pass without the original's rows")
    found = [original.take(int(row), int(row) + 1, student.place)[0] for row in rows]
    return student.normed(torch.cat(found)).flatten(0, 1)


def _step(student: Student, made: Progress, rows: NDArray[np.int64], entering: States, rate: float) -> None:
    """Move every scale once, by what these rows show."""
    x, count = student.enter(rows), student.config.n_layers
    with torch.no_grad():
        for index in range(count):
            entering.put(index * len(rows), x)
            layer = student.layer(index)
            matrices = student.matrices(layer, made.moves)
            x = torch.cat([student.through(layer, matrices, part) for part in torch.split(x, student.run.step)])
    leaf = x.detach().requires_grad_()
    normed = student.normed(leaf)
    _, slope = student.divergence(_target(student, rows), normed.detach().flatten(0, 1))
    (gradient,) = torch.autograd.grad(normed, leaf, slope.view_as(normed) / len(slope))
    for index in reversed(range(count)):
        x = entering.take(index * len(rows), (index + 1) * len(rows)).to(*student.place)
        gradient = _back(student, made, index, x, gradient, rate)


def _back(student: Student, made: Progress, index: int, x: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Move the scales of a layer, given the slope along what it puts out for x; the slope along x."""
    layer = student.layer(index)
    matrices = student.matrices(layer, made.moves)
    leaves = [w.requires_grad_() for w in matrices.values()]
    sums, slopes = [torch.zeros_like(w) for w in leaves], torch.empty_like(x)
    for at in range(0, len(x), student.run.step):
        here = slice(at, at + student.run.step)
        into = x[here].detach().requires_grad_()
        out = student.through(layer, matrices, into)
        slopes[here], *found = torch.autograd.grad(out, [into, *leaves], gradient[here])
        for sum_, slope in zip(sums, found, strict=True):
            sum_.add_(slope)
        del out, found
    for (key, one), total in zip(layer.movable.items(), sums, strict=True):
        name = f"{index}.{key}"
        if name not in made.moving:
            made.moving[name] = _Moving.of(one)
        made.moving[name].step(one.slopes(total), rate, made.steps + 1)
    return slopes

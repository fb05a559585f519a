"""The calibration pass: rows go through one layer at a time, a layer's weights are in memory only meanwhile.

Linears that are fed by the same tensor (query, key and value; gate and up) form a group and share one `Moments`. In a
sequential pass a layer goes through its groups in order of computation: the group's inputs are measured with the
weights as they stand, the consumer may replace them by what their quantized form computes, and the next group is
measured behind that. So every quantizer sees the inputs that its linear will really get, and can make up for what the
ones before it lost. What feeds the next group is carried from stage to stage (`forward.stages`), so a layer costs one
evaluation. Only a mixture of experts, which is one stage, is evaluated again for each of its groups; `routed` says how,
and `forward.moe` how its experts are loaded one by one.

With `drift` the original's rows go along, a stage ahead: what feeds its linears is compared with what feeds ours, and a
consumer can choose weights that make up for what is off (`quant.algorithms.drift`). An expert is compared on the tokens
that it is sent in ours, whatever experts the original sends them to. Where each token's shares sum to 1, every expert
it is sent to makes up for all that the stream has lost; experts that saw too few tokens make up for nothing.

Scales that move between linears (`prepare`) are told before a group is quantized: from its own moments where a norm
feeds it, and where one of its linears feeds the next group from moments of that, which a sample of the rows is sent
ahead for, through the weights as they stand.

Ref: GPTQ arXiv 2210.17323 section 3.3 and its "true sequential" order; llama.cpp tools/imatrix.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightsmith.errors import WeightsmithError
from weightsmith.evals.calibration import products, routed
from weightsmith.evals.calibration.carry import Carry
from weightsmith.evals.calibration.collector import Collector
from weightsmith.evals.calibration.rows import Options, draw
from weightsmith.evals.engines.torch import threads
from weightsmith.evals.forward import Decoder, load, moe, weights
from weightsmith.evals.forward.beside import Beside
from weightsmith.evals.forward.moe import EnoughError
from weightsmith.evals.forward.stages import Stage
from weightsmith.evals.forward.weights import Later, Layer
from weightsmith.progress import progress
from weightsmith.quant.algorithms.drift import Drift, error_of, made_up_for
from weightsmith.quant.calibration import Moments
from weightsmith.types import Reader

log = logging.getLogger(__name__)

Finished = Callable[[int], Mapping[str, Tensor | Later] | None]
Prepare = Callable[["Block", Mapping[str, Moments]], None]
Ended = Callable[["Run"], None]

SAMPLE = 8  # one step of so many is sent ahead
HELD_OUT, MOST_HELD_OUT = 64, 4  # one row of so many, and at most so many


@dataclass(slots=True, eq=False)
class Block:
    """A group of linears (all of a layer's, in a pass that is not sequential) and what calibration saw of them.

    index: the layer. prefix: what canonical names of its tensors begin with. moments: by canonical weight name.
    weights: all of the layer, by the rest of the name; replaced entries are what the rows then pass through (an
    expert's is best replaced by a `Later`). drifts: by canonical weight name, of those linears that it was measured
    of. All mappings are emptied when the next layer begins.
    """

    index: int
    prefix: str
    weights: Layer
    moments: dict[str, Moments]
    drifts: dict[str, Drift] = field(default_factory=dict)

    def groups(self) -> list[list[str]]:
        """Canonical weight names of the linears that are fed by the same tensor."""
        found: dict[int, list[str]] = {}
        for name, moments in self.moments.items():
            found.setdefault(id(moments), []).append(name)
        return list(found.values())


@dataclass(slots=True, eq=False)
class Run:
    """A pass under way. step: rows evaluated at once. original: what the rows carry in the original model, if they are
    compared with it. spill: folder for what finds no room in memory."""

    decoder: Decoder
    carry: Carry
    tables: Any
    step: int
    original: Carry | None = None
    spill: Path | None = None

    @torch.no_grad()
    def evaluate(
        self,
        layer: Layer,
        stages: Sequence[Stage],
        *,
        tap: Collector | None = None,
        keep: bool = True,
        every: int = 1,
        carry: Carry | None = None,
    ) -> None:
        """Send all rows, or every so many steps of them, through stages; what comes out is carried on if `keep`."""
        kind, carry = self.decoder.kind, carry or self.carry
        multiplied = products.multiplied(layer, self.decoder.place.device)
        if moe.is_mixture(kind) and stages[-1] is kind.STAGES[-1]:
            self._by_expert(multiplied, stages[:-1], carry, tap=tap, keep=keep)
        else:
            self._by_step(multiplied, stages, carry, tap=tap, keep=keep, every=every)
        if keep:
            carry.turn()

    def _by_step(
        self, layer: Layer, stages: Sequence[Stage], carry: Carry, *, tap: Collector | None, keep: bool, every: int
    ) -> None:
        for start in range(0, carry.rows, self.step * every):
            carried = before = carry.take(start, start + self.step, self.decoder.place)
            with suppress(EnoughError):
                for stage in stages:
                    carried = stage.run(layer, carried, self.tables, self.decoder.config, tap)
                if keep:
                    carry.put(start, carried, moved=carried[0] is not before[0])
            del carried, before

    @torch.no_grad()
    def compare(self, layer: Layer, unchanged: Layer, stage: Stage, original: Carry, tap: Collector) -> None:
        """Send the original's rows through a stage of `unchanged` weights, and ours up to its linears.

        Of a mixture, whose linears are several groups, the original's rows stay where they are.
        """
        place, config = self.decoder.place, self.decoder.config
        multiplied = products.multiplied(unchanged, place.device)
        if not stage.linears:
            quantized = products.multiplied(layer, place.device)
            self._by_expert(quantized, (), self.carry, tap=tap, keep=False, against=(multiplied, original))
            return
        matrix = multiplied[f"{stage.linears[0]}.weight"] if stage.adds else None
        for start in range(0, original.rows, self.step):
            theirs, ours = (carry.take(start, start + self.step, place) for carry in (original, self.carry))
            fed: dict[tuple[str, ...], Tensor] = {}
            done = stage.run(multiplied, theirs, self.tables, config, fed.__setitem__)
            off = theirs[0] - ours[0] if stage.adds else None
            beside = Beside(fed.popitem()[1], learnt(original.rows, start), off, matrix)
            with suppress(EnoughError):
                stage.run(layer, ours, self.tables, config, partial(tap, beside=beside))
            original.put(start, done, moved=done[0] is not theirs[0])
            del theirs, ours, off, done, beside
        original.turn()

    def _by_expert(
        self,
        layer: Layer,
        before: Sequence[Stage],
        carry: Carry,
        *,
        tap: Collector | None,
        keep: bool,
        against: tuple[Layer, Carry] | None = None,
    ) -> None:
        """The same with experts that are loaded one by one: as many steps of rows at once as half the budget holds.

        against: the original's weights and rows, if the tap is to compare.
        """
        place, config = self.decoder.place, self.decoder.config
        row = 4 * carry.length * config.hidden_size
        kept = 2 if against is None else 3  # states, sums of the experts, the original's states
        at_once = max(1, self.decoder.memory // 2 // kept // row // self.step) * self.step
        for first in range(0, carry.rows, at_once):
            steps, theirs = [], []
            for start in range(first, min(first + at_once, carry.rows), self.step):
                stop = min(start + self.step, first + at_once)
                carried = carry.take(start, stop, place)
                for stage in before:
                    carried = stage.run(layer, carried, self.tables, config, tap)
                steps.append(carried[0] if before else carried[0].clone())
                if against is not None:
                    (x,) = against[1].take(start, stop, place)
                    theirs.append((x, learnt(carry.rows, start) * carry.length))
                del carried
            original = None if against is None else moe.Original(against[0], theirs)
            mixture = self.decoder.kind.MIXTURE
            moe.evaluate(mixture, layer, steps, self.tables, config, tap, keep=keep, original=original)
            for number, x in enumerate(steps if keep else ()):
                carry.put(first + number * self.step, (x,))

    def blocks(
        self, *, full: bool, sequential: bool, finished: Finished | None = None, prepare: Prepare | None = None
    ) -> Iterator[Block]:
        """Blocks of all layers in turn; afterwards the rows are what comes out of the last."""
        config, stages = self.decoder.config, self.decoder.kind.STAGES
        with progress("calibrate", config.n_layers, "layers") as ticker:
            layers = self.decoder.layers()
            for index in range(config.n_layers):
                layer = next(layers)
                ready = finished(index) if finished is not None else None
                if ready is not None:
                    if self.original is not None:
                        self.evaluate(layer, stages, carry=self.original)
                    for name in ready:
                        layer[name] = ready[name]
                    self.evaluate(layer, stages)
                elif sequential:
                    yield from self._staged(index, layer, prepare)
                else:
                    tap = Collector(self.decoder.place.device, full, one_group=False)
                    self.evaluate(layer, stages, tap=tap)
                    yield self._block(index, layer, tap, full=full)
                layer.clear()
                del layer, ready
                ticker.update(1)

    def _staged(self, index: int, layer: Layer, prepare: Prepare | None) -> Iterator[Block]:
        """A layer's groups, stage after stage."""
        matrices = {name.removesuffix(".weight") for name in layer if len(layer.shape(name)) == 2}
        stages, done = self.decoder.kind.STAGES, set[str]()
        original = self.original
        unchanged = layer if original is None else layer.copy()
        for at, stage in enumerate(stages):
            while (set(stage.linears) or matrices) - done:
                tap = Collector(self.decoder.place.device, full=True, one_group=True, done=done)
                tap.room = self.decoder.memory
                if original is not None:
                    self.compare(layer, unchanged, stage, original, tap)
                else:
                    self.evaluate(layer, [stage], tap=tap, keep=False)
                block = self._block(index, layer, tap, full=True)
                if not block.moments:
                    break
                done |= set(tap.found)
                del tap
                if prepare is not None:
                    prepare(block, self._ahead(block, stages[at : at + 2]))
                yield block
                block.moments.clear()
                block.drifts.clear()
            if original is not None and not stage.linears:
                self.evaluate(unchanged, [stage], carry=original)
            self.evaluate(layer, [stage])

    def _block(self, index: int, layer: Layer, tap: Collector, *, full: bool) -> Block:
        """What a tap found, with experts that saw too little filled up."""
        prefix = self.decoder.kind.LAYER.format(index)
        drifts = {name: found for name, found in tap.drifts.items() if not routed.lacking(name, tap.found[name])}
        if full:
            missing = routed.unseen(layer, tap.found, tap.done | tap.passed)
            sizes = {name: layer.shape(f"{name}.weight")[-1] for name in missing}
            routed.fill_up(tap.found, missing, sizes, prefix.strip("."))
        moments = {f"{prefix}{name}.weight": found for name, found in tap.found.items()}
        for name, found in moments.items():
            found.check(name)
        return Block(index, prefix, layer, moments, {f"{prefix}{name}.weight": found for name, found in drifts.items()})

    def _ahead(self, block: Block, stages: Sequence[Stage]) -> dict[str, Moments]:
        """Moments of the second stage's group on a sample of rows, if scales can move there from the first one's."""
        pairs = [(source, targets) for source, targets in self.decoder.kind.FEEDS if source in stages[0].linears]
        if not any(target in stages[1].linears for _, targets in pairs for target in targets):
            return {}
        tap = Collector(self.decoder.place.device, full=True, one_group=True, done=set(stages[0].linears))
        self.evaluate(block.weights, stages, tap=tap, keep=False, every=SAMPLE)
        return self._block(block.index, block.weights, tap, full=False).moments

    @torch.no_grad()
    def head(self) -> tuple[str, Moments]:
        """The output matrix by canonical name, and the diagonal of its inputs, after all blocks have passed."""
        kind, config, place = self.decoder.kind, self.decoder.config, self.decoder.place
        name = kind.EMBEDDING if config.tie_word_embeddings else kind.HEAD
        norm = weights.tensor(self.decoder.reader, kind.NORM, place)
        moments = Moments(config.hidden_size, full=False, device=place.device)
        for start in range(0, self.carry.rows, self.step):
            moments.add(kind.norm(self.carry.take(start, start + self.step, place)[0], norm, config.rms_norm_eps))
        moments.check(name)
        return name, moments


@contextmanager
def begun(reader: Reader, tokens: NDArray[np.int64], options: Options, *, drift: bool = False) -> Iterator[Run]:
    """A pass whose rows are embedded; drift: twice, for the original too. Raises what `forward.load` raises."""
    decoder = load(reader, device=options.device, memory=options.memory)
    kind, config = decoder.kind, decoder.config
    shape = (*tokens.shape, config.hidden_size)
    count = 2 if drift else 1
    with threads(options.threads), ExitStack() as stack:
        carries = [
            stack.enter_context(closing(Carry(shape, memory=options.memory // count, spill=options.spill)))
            for _ in range(count)
        ]
        at_once = decoder.windows_at_once(options.ctx)
        for start in range(0, len(tokens), at_once):
            ids = torch.from_numpy(tokens[start : start + at_once])
            entered = kind.entered(weights.gather(reader, kind.EMBEDDING, ids, decoder.place), config)
            for carry in carries:
                carry.put(start, (entered,))
        tables, step = kind.tables(config, options.ctx, decoder.place), decoder.step(options.ctx)
        yield Run(decoder, carries[0], tables, step, carries[1] if drift else None, options.spill)


def held_out(rows: int) -> int:
    """How many of so many rows, the last ones, are not learnt from where inputs are compared with the original's."""
    return max(1, min(rows // HELD_OUT, MOST_HELD_OUT)) if rows > 1 else 0


def learnt(rows: int, start: int) -> int:
    """How many of so many rows, from `start` on, are not held out."""
    return max(0, rows - held_out(rows) - start)


def wanted(block: Block, names: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
    """What linears of one group of `block`, by canonical name, may be quantized to: of each its own weights float32
    [out, in], and where something was lost before it, others that make up for that.

    One by one, where they do not depend on each other: an expert's are loaded only then. Raises IntegrityError, naming
    the first of them, for second moments without a factor.
    """
    keys, drift = [name.removeprefix(block.prefix) for name in names], block.drifts.get(names[0])
    if drift is None:
        for key in keys:
            yield (block.weights[key].float(),)
        return
    w = torch.cat([block.weights[key].float() for key in keys])
    try:
        found = made_up_for(w, block.moments[names[0]], drift)
    except WeightsmithError as error:
        error.tensor = error.tensor or names[0]
        raise
    counts = [block.weights.shape(key)[0] for key in keys]
    yield from zip(*(torch.split(one, counts) for one in ([w] if found is w else [w, found])), strict=True)


def nearest(block: Block, name: str, w: Tensor, rounded: Sequence[Tensor]) -> int:
    """Which of those that a linear's own weights w and others that are `wanted` were rounded to is to be taken: the one
    whose outputs are nearest to the original's on rows held out."""
    if len(rounded) == 1:
        return 0
    errors = [error_of(w, q, block.drifts[name]) for q in rounded]
    best = min(range(len(errors)), key=errors.__getitem__)
    if not best:
        log.info("%s: on rows held out nothing is nearer to the original's outputs than its own weights, rounded", name)
    return best


def calibrate(  # noqa: PLR0913  (every choice, all by keyword)
    reader: Reader,
    text: str | NDArray[np.int64],
    options: Options | None = None,
    *,
    full: bool = True,
    sequential: bool = True,
    drift: bool = False,
    finished: Finished | None = None,
    prepare: Prepare | None = None,
    ended: Ended | None = None,
) -> Generator[Block]:
    """Measure the inputs of every linear, group by group; see `Block` for how a consumer feeds quantized weights back.

    text: or the rows that `draw` made of one.
    full: measure H, else only its diagonal, in a pass that is not sequential.
    sequential: see above; else one block per layer, measured behind the original weights. drift: measure it, in a
    sequential pass that prepares nothing; the last rows (`held_out`) are kept to judge by. finished(index): weights of
    a layer that was dealt with before (float tensors by name within the layer), or None; rows only pass through it.
    prepare(block, ahead): called before a group of a sequential pass is given out, with moments of the next group on a
    sample of rows where one of these linears alone feeds it, to replace weights by others that compute the same.
    ended(run): called at the end, when the rows are what comes out of the last layer.
    Raises what `draw` and `forward.load` raise, IntegrityError (inputs that are not finite), ResourceError (disk).
    """
    if drift and (prepare is not None or not sequential):
        raise ValueError("drift is measured in a sequential pass, of weights that nothing has prepared")
    options = options or Options()
    tokens = draw(reader, text, options) if isinstance(text, str) else text
    if drift and not held_out(len(tokens)):
        log.info("one row is too few to learn from and to judge by: linears are quantized to their own weights")
    with begun(reader, tokens, options, drift=drift) as run:
        yield from run.blocks(full=full, sequential=sequential, finished=finished, prepare=prepare)
        if ended is not None:
            ended(run)

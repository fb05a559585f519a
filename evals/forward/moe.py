"""A mixture of experts, for the blocks that have one: tokens sorted by expert, so that only chosen experts compute.

    p = softmax(W_router n), in float32;  the k greatest are chosen, and where the family says so divided by their sum
    y = sum over the chosen e of p_e * W2_e (act(W1_e n) * W3_e n)

Each expert sees the rows of its own tokens as one matrix [tokens, hidden], and so does calibration. An expert that no
token chose is not evaluated.

`stage` makes the last stage of a block of it, for one step of tokens, with all experts at hand. `evaluate` takes many
steps through that stage, expert by expert: each is loaded once, serves the tokens of every step, and goes before the
next one comes, so that one expert is in memory beside the attention. Steps are computed one by one in both, and an
expert's share is added in the order of the experts, so the results are the same to the last bit. A step keeps its
states and the sums of its experts meanwhile; what enters the experts is normed anew for each.

Ref: transformers models/mixtral; arXiv 2401.04088.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from weightsmith.evals.forward.beside import Beside
from weightsmith.evals.forward.stages import Carried, Stage, Weights, linears
from weightsmith.evals.forward.stages import Tap as AnyTap
from weightsmith.evals.forward.weights import Layer
from weightsmith.types import ModelConfig

Linears = Callable[[tuple[str, ...], Tensor], list[Tensor]]  # (names within the layer, input) -> outputs
Activation = Callable[[Tensor], Tensor]


class EnoughError(Exception):
    """Raised by a tap: of this step, nothing more is wanted."""


class Tap(Protocol):
    """A tap (see `stages`) that can say beforehand what it has no use for."""

    def __call__(self, names: tuple[str, ...], into: Tensor, beside: Beside | None = None) -> None:
        """See the input of linears, an expert's beside the original's; may raise EnoughError."""

    def wants(self, names: tuple[str, ...], size: int) -> bool:
        """Whether the input [tokens, size] of linears is to be measured."""


class Mixture(NamedTuple):
    """What families differ in. prefix: of router and experts. entering(weights, x, config): what enters them, [tokens,
    hidden]. route(run, into, tables, config): shares and numbers of the chosen ones. activation(tables): may work in
    place. closed(weights, run, (x, into, mixed), tables, config): the stage's result, a new tensor like x, of what the
    experts made; may use the memory of `mixed`. adds: what the experts make is added to x as it is, in shares that sum
    to 1."""

    prefix: str
    entering: Callable[[Weights, Tensor, ModelConfig], Tensor]
    route: Callable[[Linears, Tensor, Any, ModelConfig], tuple[Tensor, Tensor]]
    activation: Callable[[Any], Activation]
    closed: Callable[[Weights, Linears, tuple[Tensor, Tensor, Tensor], Any, ModelConfig], Tensor]
    adds: bool = False


class Original(NamedTuple):
    """The original's weights of a layer, and of every step its states behind attention, [B, T, hidden], of which so
    many tokens, the first, are counted and the others held out."""

    layer: Layer
    steps: Sequence[tuple[Tensor, int]]


def is_mixture(kind: ModuleType) -> bool:
    """Whether a block module (see `forward`) has experts: its last stage is one of `stage`'s."""
    return hasattr(kind, "MIXTURE")


def stage(mixture: Mixture) -> Stage:
    """The last stage of a block: x behind attention to x behind the experts."""

    def run(weights: Weights, carried: Carried, tables: Any, config: ModelConfig, tap: AnyTap | None) -> Carried:
        (x,) = carried
        own = partial(linears, weights, tap)
        into = mixture.entering(weights, x, config)
        shares, chosen = mixture.route(own, into, tables, config)
        mixed = mix(into, shares, chosen, own, mixture.activation(tables), prefix=mixture.prefix)
        return (mixture.closed(weights, own, (x, into, mixed), tables, config),)

    return Stage(run)


def route(logits: Tensor, used: int, *, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    """Shares float32 and numbers int64 of the `used` best experts of each token, both [tokens, used].

    logits: the router's [tokens, n_experts].
    """
    shares, chosen = torch.softmax(logits.float(), dim=-1).topk(used, dim=-1)
    return (shares / shares.sum(dim=-1, keepdim=True) if renormalise else shares), chosen


def mix(x: Tensor, shares: Tensor, chosen: Tensor, linears: Linears, act: Activation, *, prefix: str = "") -> Tensor:
    """What the chosen experts make of x [tokens, hidden]: a new tensor of the same shape and dtype.

    linears: evaluates `{prefix}experts.E.w1` and `.w3` together, and `.w2`. act: may work in place.
    """
    mixed = torch.zeros_like(x)
    for expert in torch.unique(chosen).tolist():
        tokens, place = torch.where(chosen == expert)
        name = f"{prefix}experts.{expert}."
        gate, up = linears((f"{name}w1", f"{name}w3"), x[tokens])
        (out,) = linears((f"{name}w2",), act(gate).mul_(up))
        _add(mixed, out, shares, tokens, place)
    return mixed


def _add(mixed: Tensor, out: Tensor, shares: Tensor, tokens: Tensor, place: Tensor) -> None:
    mixed.index_add_(0, tokens, out * shares[tokens, place, None].to(out.dtype))


@dataclass(slots=True, eq=False)
class _Step:
    """A step on its way through the experts."""

    x: Tensor
    shares: Tensor
    chosen: Tensor
    mixed: Tensor
    theirs: tuple[Tensor, int] | None


def evaluate(
    mixture: Mixture,
    layer: Layer,
    steps: Sequence[Tensor],
    tables: Any,
    config: ModelConfig,
    tap: Tap | None = None,
    *,
    keep: bool = True,
    original: Original | None = None,
) -> None:
    """Replace each of `steps` [B, T, hidden], states behind attention, by what is behind the experts.

    keep: False if only the tap counts: what it does not want is not computed, and `steps` are of no use afterwards.
    original: what feeds its experts, of the tokens that ours are sent, is shown to the tap as well, if not `keep`.
    """
    block = _Block(mixture, layer, tables, config, tap, keep, original and original.layer)
    under_way = []
    for x, theirs in zip(steps, original.steps if original else [None] * len(steps), strict=True):
        with suppress(EnoughError):
            into = mixture.entering(layer, x, config)
            shares, chosen = mixture.route(partial(linears, layer, tap), into, tables, config)
            under_way.append(_Step(x, shares, chosen, torch.zeros_like(into), theirs))
    for expert in sorted({expert for step in under_way for expert in torch.unique(step.chosen).tolist()}):
        name = f"{mixture.prefix}experts.{expert}."
        with layer.held(name), original.layer.held(name) if original else nullcontext():
            for step in under_way:
                block.expert(step, expert)
    for step in under_way:
        with suppress(EnoughError):
            block.close(step)


@dataclass(slots=True, eq=False)
class _Block:
    """A stage that steps pass through; see `evaluate`."""

    mixture: Mixture
    layer: Layer
    tables: Any
    config: ModelConfig
    tap: Tap | None
    keep: bool
    unchanged: Layer | None

    def expert(self, step: _Step, expert: int) -> None:
        """Add what one expert makes of its tokens of a step."""
        tokens, place = torch.where(step.chosen == expert)
        if not len(tokens):
            return
        name = f"{self.mixture.prefix}experts.{expert}."
        if self.keep or self.tap is None:
            inner = self._inner(self.layer, name, self._into(step.x)[tokens], self.tap)
            (out,) = linears(self.layer, self.tap, (f"{name}w2",), inner)
            _add(step.mixed, out, step.shares, tokens, place)
        else:
            self._measure(name, step, tokens, self.tap)

    def _measure(self, name: str, step: _Step, tokens: Tensor, tap: Tap) -> None:
        """Show the tap what it wants of an expert, and compute no more than that."""
        first, second = (f"{name}w1", f"{name}w3"), (f"{name}w2",)
        if tap.wants(first, step.x.shape[-1]):
            tap(first, self._into(step.x)[tokens], self._beside(step, tokens))
        if tap.wants(second, self.config.intermediate_size):
            inner = self._inner(self.layer, name, self._into(step.x)[tokens], None)
            tap(second, inner, self._beside(step, tokens, name))

    def _beside(self, step: _Step, tokens: Tensor, name: str = "") -> Beside | None:
        """What feeds w1 and w3 in the original; its w2, if the expert is named."""
        if self.unchanged is None or step.theirs is None:
            return None
        x, counted = step.theirs
        counted, into = int((tokens < counted).sum()), self._into(x)[tokens]
        if not name:
            return Beside(into, counted)
        inner = self._inner(self.unchanged, name, into, None)
        if not self.mixture.adds:
            return Beside(inner, counted)
        off = (x - step.x).flatten(0, 1)[tokens]
        return Beside(inner, counted, off, self.unchanged[f"{name}w2.weight"])

    def _inner(self, layer: Layer, name: str, into: Tensor, tap: Tap | None) -> Tensor:
        gate, up = linears(layer, tap, (f"{name}w1", f"{name}w3"), into)
        opened: Tensor = self.mixture.activation(self.tables)(gate)
        return opened.mul_(up)

    def _into(self, x: Tensor) -> Tensor:
        return self.mixture.entering(self.layer, x, self.config)

    def close(self, step: _Step) -> None:
        """What follows the experts."""
        run = partial(linears, self.layer, self.tap)
        made = (step.x, self._into(step.x), step.mixed)
        step.x.copy_(self.mixture.closed(self.layer, run, made, self.tables, self.config))

"""Experts under calibration: they see only the tokens that were sent to them, and some see too few.

The w1 of all experts of a layer (with their w3, which is fed by the same) are one stage, the w2 another: none of a
stage depends on another of it, so they are measured in one evaluation, as many as their moments have room for.

A second moment of fewer than in/4 tokens says little about most directions, and an expert that no token reached has
none. Error feedback by such a matrix would fit noise. So it is filled up to in/4 tokens:

- w1, w3: by tokens of the mean over the layer's experts, whose inputs are all the same normed states;
- w2: by tokens of equal, independent channels of this expert's own mean energy (of 1 if it saw nothing), because a
  channel of one expert has nothing to do with that channel of another. Rounding to nearest is the limit of this.

Which experts were filled up is logged. They are quantized to their own weights, best effort or not. An imatrix is not
touched: it counts tokens for each expert, and says 0.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping

from weightsmith.quant.calibration import Moments

log = logging.getLogger(__name__)

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(\w+)")
_ENOUGH = 4  # a moment of size n wants n / 4 tokens


def stage_of(name: str) -> str | None:
    """What all experts' linears of one kind have in common; None for a linear that is no expert's."""
    found = _EXPERT.fullmatch(name)
    return f"{found[1]}.{found[2]}" if found else None


def unseen(layer: Iterable[str], found: Collection[str], known: Collection[str]) -> list[str]:
    """Experts' linears of a layer (names of its weights) that no token reached.

    They belong to a stage of which some were `found` in the same evaluation, and are not otherwise `known`.
    """
    names = [name.removesuffix(".weight") for name in layer if name.endswith(".weight")]
    begun = {stage_of(name) for name in found} - {None}
    return [name for name in names if stage_of(name) in begun and name not in known and name not in found]


def lacking(name: str, moments: Moments) -> int:
    """How many tokens an expert's linear wants besides those that its moments, not filled up yet, counted; else 0."""
    return 0 if stage_of(name) is None else max(0, moments.size // _ENOUGH - moments.tokens)


def fill_up(found: dict[str, Moments], missing: Iterable[str], sizes: Mapping[str, int], place: str) -> None:
    """Give every expert's linear in `found` enough tokens, and those `missing` moments made of nothing else.

    sizes: inputs of each linear. place: what to call the layer in the log. Linears that share moments go on doing so.
    """
    device = next((moments.device for moments in found.values()), None)
    for name in missing:
        # w3 is fed by what feeds w1, so the two share what is made up as well.
        twin = found.get(f"{name.removesuffix('.w3')}.w1") if name.endswith(".w3") else None
        found[name] = twin or (Moments(sizes[name], device=device) if device is not None else Moments(sizes[name]))
    experts = {id(moments): (name, moments) for name, moments in reversed(found.items()) if stage_of(name)}
    seen = [moments for name, moments in experts.values() if moments.tokens and not name.endswith(".w2")]
    pool = _sum(seen)
    short = {}
    for name, moments in experts.values():
        if wanted := lacking(name, moments):
            short[name] = moments.tokens
            moments.fill(None if name.endswith(".w2") else pool, wanted)
    if short:
        listed = ", ".join(f"{name} {tokens}" for name, tokens in sorted(short.items()))
        log.warning("%s: too few calibration tokens reached some experts, which were filled up: %s", place, listed)


def _sum(every: list[Moments]) -> Moments | None:
    """The moments of all tokens together, None of none."""
    if not every:
        return None
    total = Moments(every[0].size, device=every[0].device)
    for moments in every:
        total.merge(moments)
    return total

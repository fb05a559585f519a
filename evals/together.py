"""Any number of candidates against one original, in one pass over every model: what `verify` runs.

All models go through their layers in lock step (`weightsmith.evals.lockstep`), a group of windows at a time, and
through their output matrices piece by piece. The original is read once for all candidates. Nothing is written to disk,
and nothing is kept but a few numbers per token, layer and candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from weightsmith.evals import compare, engines, scores
from weightsmith.evals.compare import Comparison, Original
from weightsmith.evals.engines.torch import NAME as TORCH
from weightsmith.evals.engines.torch import head, threads
from weightsmith.evals.forward import load
from weightsmith.evals.lockstep import Lockstep, start
from weightsmith.evals.noise import TWIN_WINDOWS, Noise, noise
from weightsmith.evals.perplexity import finite, summary
from weightsmith.evals.ruler import Ruler
from weightsmith.progress import progress
from weightsmith.types import Reader

Parts = list[scores.Pair]  # of one candidate, piece by piece


def together(
    candidates: Sequence[Reader], original: Reader, text: str, ruler: Ruler | None = None, *, own: bool = False
) -> list[Comparison]:
    """Compare each candidate with the original, drift and noise floor included; all readers must stay open.

    own: also measure what each layer adds by itself. An engine other than torch shows no hidden states: then there is
    neither drift nor noise floor. `ruler.memory` holds for two models; more share what two would get.
    Raises UsageError (vocabulary sizes or tokenizations differ) and what `measure` raises.
    """
    ruler = ruler or Ruler()
    prepared = compare.prepare(original, text, ruler)
    if ruler.engine != TORCH:
        return [compare.against(reader, prepared) for reader in candidates]
    for reader in candidates:
        compare.check_same_tokens(reader, prepared)
    memory = max(1, 2 * ruler.memory // (1 + len(candidates)))
    decoders = [
        load(reader, device=ruler.device, memory=memory, graph=ruler.graph) for reader in (original, *candidates)
    ]
    models = start(decoders[0], decoders[1:], own=own, twins=TWIN_WINDOWS)
    parts: list[Parts] = [[] for _ in candidates]
    of_twin: Parts = []
    _pass(models, prepared, parts, of_twin)
    floor = _floor(models, prepared, of_twin)
    found = []
    for reader, lane, pieces in zip(candidates, models.candidates, parts, strict=True):
        result = _result(_joined(pieces), reader, prepared)
        found.append(replace(result, drift=lane.drift(), noise=floor))
    return found


def _pass(models: Lockstep, prepared: Original, parts: list[Parts], of_twin: Parts) -> None:
    windows, ruler = prepared.windows, prepared.ruler
    scored = slice(windows.first, windows.last)
    pieces = engines.cuts(windows, prepared.reader.config.vocab_size, ruler)
    lanes = [models.original, *models.candidates]
    total = len(windows.tokens) * sum(lane.decoder.config.n_layers for lane in lanes)
    at_once = models.windows_at_once(windows.tokens.shape[1])
    with progress("compare", total, "blocks") as ticker, threads(ruler.threads):
        for at in range(0, len(windows.tokens), at_once):
            models.run(torch.from_numpy(windows.tokens[at : at + at_once]), scored, ticker.update)
            used = lanes if models.twin is None else [*lanes, models.twin]
            base, *others = (head(lane.decoder, iter([lane.x[:, scored]]), windows, ruler) for lane in used)
            for target in [window[piece] for window in windows.targets[at : at + at_once] for piece in pieces]:
                a = next(base)
                wanted = torch.from_numpy(target).to(a.device)
                for logits, column in zip(others, [*parts, of_twin], strict=False):
                    b = next(logits, None)  # the twin's end early
                    if b is not None:
                        column.append(scores.token_pair(a, b, wanted))


def _joined(parts: Parts) -> scores.Pair:
    return scores.Pair(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _floor(models: Lockstep, prepared: Original, parts: Parts) -> Noise | None:
    if models.twin is None:
        return None
    pair = _joined(parts)
    finite(pair.original, prepared.reader)
    return noise(pair, models.twin.drift())


def _result(pair: scores.Pair, candidate: Reader, prepared: Original) -> Comparison:
    windows, text, ruler = prepared.windows, prepared.text, prepared.ruler
    finite(pair.original, prepared.reader)
    finite(pair.candidate, candidate)
    return compare.statistics(
        pair, summary(pair.original, windows, text, ruler), summary(pair.candidate, windows, text, ruler)
    )

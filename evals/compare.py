"""What a candidate lost against its original: both perplexities, KL divergence, top-1 agreement, on the same tokens.

Both models run in lock step: each yields logits piece by piece, and a piece of each is reduced to a few numbers per
token before the next is made. No file of logits is written, so nothing is rounded to 16 bits (llama.cpp's base file
shows 5e-4 between a model and itself) and nothing grows with the text but a few numbers per token.

The original's tokenizer serves both. Where the candidate carries one too, it must give the same tokens for the text:
a lost merge or BOS is a defect of the candidate and no matter of statistics.

An `Original` can keep its scored hidden states (tokens times hidden size, far smaller than logits), so that several
candidates are compared at the cost of one pass over the original, whenever they come. Where all are there at once,
`weightsmith.evals.together` keeps nothing and measures more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import UnsupportedError, UsageError
from weightsmith.evals import engines, scores
from weightsmith.evals.drift import Drift
from weightsmith.evals.engines.torch import NAME as TORCH
from weightsmith.evals.engines.torch import head, scored_states, threads
from weightsmith.evals.forward import Decoder, load
from weightsmith.evals.noise import Noise
from weightsmith.evals.perplexity import Perplexity, finite, summary
from weightsmith.evals.ruler import METRICS_VERSION, Ruler
from weightsmith.evals.windows import Windows, cut, tokenize
from weightsmith.progress import progress
from weightsmith.types import Reader


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate against its original. Divergences in nats per token, KL(original || candidate).

    ratio: candidate's perplexity over the original's; ratio_stderr from paired differences. kld_99: 99th percentile.
    top1: share of predictions whose most likely token is the same. drift, noise: where `together` measured them.
    """

    candidate: Perplexity
    original: Perplexity
    ratio: float
    ratio_stderr: float
    kld_mean: float
    kld_stderr: float
    kld_median: float
    kld_99: float
    kld_max: float
    top1: float
    top1_stderr: float
    metrics_version: int = METRICS_VERSION
    drift: Drift | None = None
    noise: Noise | None = None


@dataclass(slots=True)
class Original:
    """The original, its tokens, and if `keep`, after the first comparison, its hidden states; made by `prepare`."""

    reader: Reader
    text: str
    ruler: Ruler
    tokens: list[int]
    windows: Windows
    keep: bool
    _decoder: Decoder | None = field(default=None, init=False)
    _states: list[Tensor] = field(default_factory=list, init=False)

    def logits(self, tick: engines.Tick) -> Iterator[Tensor]:
        """Logits of the scored predictions in pieces; the torch engine streams the weights only the first time."""
        if self.ruler.engine != TORCH or not self.keep:
            yield from engines.by_name(self.ruler.engine).logits(self.reader, self.windows, self.ruler, tick)
        elif self._decoder is None:
            ruler, kept = self.ruler, []
            decoder = load(self.reader, device=ruler.device, memory=ruler.memory, graph=ruler.graph)
            for states in scored_states(decoder, self.windows, tick):
                kept.append(states.clone())
                yield from head(decoder, iter([states]), self.windows, self.ruler)
            self._decoder, self._states = decoder, kept
        else:
            tick(len(self.windows.tokens) * self.reader.config.n_layers)
            yield from head(self._decoder, iter(self._states), self.windows, self.ruler)


def prepare(reader: Reader, text: str, ruler: Ruler | None = None, *, keep: bool = True) -> Original:
    """The original of one or more comparisons; raises what `measure` raises. The reader must stay open.

    keep: hold hidden states between comparisons (float32, scored tokens times hidden size; torch engine only).
    """
    ruler = ruler or Ruler()
    tokens, bos_id = tokenize(reader, text, ruler)
    return Original(reader, text, ruler, tokens, cut(tokens, ruler, bos_id=bos_id), keep)


def check_same_tokens(candidate: Reader, original: Original) -> None:
    """UsageError unless both models have the same vocabulary size and read the text as the same tokens."""
    found, wanted = candidate.config.vocab_size, original.reader.config.vocab_size
    if found != wanted:
        raise UsageError(f"the candidate has {found} tokens, the original {wanted}", path=candidate.path)
    try:
        tokens, bos_id = tokenize(candidate, original.text, original.ruler)
    except UnsupportedError:
        if candidate.vocab(original.ruler.pre) is not None:
            raise
        return  # no tokenizer of its own: nothing that could disagree
    windows = cut(tokens, original.ruler, bos_id=bos_id)
    if tokens != original.tokens or not np.array_equal(windows.tokens, original.windows.tokens):
        same = [a == b for a, b in zip(tokens, original.tokens, strict=False)]
        at = same.index(False) if False in same else len(same)
        raise UsageError(
            f"the candidate reads the text as other tokens than the original (from token {at}, "
            f"{len(tokens)} against {len(original.tokens)}; BOS {bos_id})",
            path=candidate.path,
            hint="The tokenizers differ, so the two are not the same model.",
        )


def against(candidate: Reader, original: Original, *, engine: str | None = None) -> Comparison:
    """Compare a candidate with a prepared original, under the original's ruler.

    engine: for the candidate, if it is not the original's; comparing a model with itself then compares the engines.
    Raises UsageError (vocabulary sizes or tokenizations differ) and what `measure` raises.
    """
    check_same_tokens(candidate, original)
    ruler = original.ruler if engine is None else replace(original.ruler, engine=engine)
    windows, text = original.windows, original.text
    pieces = engines.cuts(windows, original.reader.config.vocab_size, ruler)
    targets = [torch.from_numpy(window[piece]) for window in windows.targets for piece in pieces]
    total = len(windows.tokens) * (candidate.config.n_layers + original.reader.config.n_layers)
    parts = []
    with progress("compare", total, "blocks") as ticker, threads(ruler.threads):
        base = original.logits(ticker.update)
        other = engines.by_name(ruler.engine).logits(candidate, windows, ruler, ticker.update)
        for a, b, wanted in zip(base, other, targets, strict=True):
            parts.append(scores.token_pair(a, b.to(a.device), wanted.to(a.device)))
    columns = scores.Pair(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    finite(columns.original, original.reader)
    finite(columns.candidate, candidate)
    return statistics(
        columns,
        summary(columns.original, windows, text, original.ruler),
        summary(columns.candidate, windows, text, ruler),
    )


def statistics(pair: scores.Pair, original: Perplexity, candidate: Perplexity) -> Comparison:
    """The result for per-token values of both models and their perplexities."""
    ratio, ratio_stderr = scores.exp_mean_error(pair.candidate - pair.original)
    kld, kld_stderr = scores.mean_error(pair.kld)
    top1, top1_stderr = scores.mean_error(pair.same_top.astype(np.float64))
    return Comparison(
        candidate=candidate,
        original=original,
        ratio=ratio,
        ratio_stderr=ratio_stderr,
        kld_mean=kld,
        kld_stderr=kld_stderr,
        kld_median=scores.percentile(pair.kld, 0.5),
        kld_99=scores.percentile(pair.kld, 0.99),
        kld_max=float(pair.kld.max()),
        top1=top1,
        top1_stderr=top1_stderr,
    )


def compare(candidate: Reader, original: Reader, text: str, ruler: Ruler | None = None) -> Comparison:
    """Measure what `candidate` lost against `original` on `text`; see `against` and `prepare` for what is raised."""
    return against(candidate, prepare(original, text, ruler, keep=False))

"""Perplexity: exp of the mean negative log-likelihood of a text's tokens, windows and scoring as the ruler says.

Memory stays bounded whatever the size of model and text: weights stream layer by layer, windows go in groups, logits in
pieces that are reduced to one number per token at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from weightsmith.errors import IntegrityError
from weightsmith.evals import engines, scores
from weightsmith.evals.engines.torch import threads
from weightsmith.evals.ruler import METRICS_VERSION, Ruler, digest
from weightsmith.evals.windows import Windows, cut, tokenize
from weightsmith.progress import Ticker, progress
from weightsmith.types import Reader


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A measured perplexity and all that is needed to repeat it.

    perplexity, stderr: exp(nll) and its standard error. nll: mean, nats per token. tokens: scored predictions.
    windows, ctx, convention, engine: how. text_sha256: of the text in UTF-8. tokens_sha256: see `Windows`.
    """

    perplexity: float
    stderr: float
    nll: float
    tokens: int
    windows: int
    ctx: int
    convention: str
    engine: str
    text_sha256: str
    tokens_sha256: str
    metrics_version: int = METRICS_VERSION


def summary(nll: scores.Values, windows: Windows, text: str, ruler: Ruler) -> Perplexity:
    """The result for per-token nll float64 [scored]."""
    perplexity, stderr = scores.exp_mean_error(nll)
    return Perplexity(
        perplexity=perplexity,
        stderr=stderr,
        nll=float(nll.mean()),
        tokens=len(nll),
        windows=len(windows.tokens),
        ctx=ruler.length,
        convention=ruler.convention,
        engine=ruler.computed_by,
        text_sha256=digest(text.encode()),
        tokens_sha256=windows.sha256,
    )


def finite(values: scores.Values, reader: Reader) -> scores.Values:
    """`values` as they are; IntegrityError if the model's output is no number."""
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise IntegrityError(
            f"the model's output is not finite (first at scored token {bad})",
            path=reader.path,
            hint="Its weights hold NaN or Inf, or overflow the computing precision.",
        )
    return values


def token_nll(reader: Reader, windows: Windows, ruler: Ruler, ticker: Ticker) -> scores.Values:
    """Negative log-likelihood of every scored prediction, float64 [scored], window by window."""
    pieces = engines.cuts(windows, reader.config.vocab_size, ruler)
    targets = [torch.from_numpy(window[piece]) for window in windows.targets for piece in pieces]
    logits = engines.by_name(ruler.engine).logits(reader, windows, ruler, ticker.update)
    parts = [scores.token_nll(found, wanted.to(found.device)) for found, wanted in zip(logits, targets, strict=True)]
    return finite(np.concatenate(parts), reader)


def measure(reader: Reader, text: str, ruler: Ruler | None = None) -> Perplexity:
    """Measure the perplexity of a model on `text`.

    Raises UsageError (text too short, unknown engine), UnsupportedError (family, tokenizer or engine that is not
    there), IntegrityError (ids beyond the embedding, output that is no number).
    """
    ruler = ruler or Ruler()
    tokens, bos_id = tokenize(reader, text, ruler)
    windows = cut(tokens, ruler, bos_id=bos_id)
    total = len(windows.tokens) * reader.config.n_layers
    with progress("perplexity", total, "blocks") as ticker, threads(ruler.threads):
        return summary(token_nll(reader, windows, ruler, ticker), windows, text, ruler)

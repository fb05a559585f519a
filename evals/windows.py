"""Text to tokens to windows: the two conventions in which perplexities are published.

"llama.cpp" (512 tokens): one trailing newline is stripped from the text, the whole text is tokenized once, windows
are consecutive and the rest is dropped. If the tokenizer adds BOS, the first token of every window is overwritten by
it. Predictions made at positions ctx/2 .. ctx-2 are scored, that is tokens ctx/2+1 .. ctx-1: each has at least half a
window of context. It refuses a text of fewer than two windows. Ref: tools/perplexity/perplexity.cpp in llama.cpp.

"paper" (2048 tokens): the recipe of the GPTQ and AWQ repositories. Windows are cut in the same way, nothing is
overwritten, and positions 0 .. ctx-2 all count. Ref: llama_eval in gptq/llama.py.

The two give different numbers for the same model; a perplexity means nothing without its convention's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, UnsupportedError, UsageError
from weightsmith.evals.ruler import CONVENTIONS, Ruler, digest
from weightsmith.types import Reader


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows, ready to run.

    tokens: int64 [n, ctx], BOS already in place. first, last: predictions at positions [first, last) are scored.
    sha256: of the tokens before any was overwritten, as little-endian int32, dropped rest excluded.
    """

    tokens: NDArray[np.int64]
    first: int
    last: int
    sha256: str

    @property
    def targets(self) -> NDArray[np.int64]:
        """The tokens that are predicted, int64 [n, last - first]."""
        return self.tokens[:, self.first + 1 : self.last + 1]

    @property
    def scored(self) -> int:
        """Predictions scored, over all windows."""
        return len(self.tokens) * (self.last - self.first)


def cut(tokens: Sequence[int], ruler: Ruler, *, bos_id: int | None = None) -> Windows:
    """Cut `tokens` into the ruler's windows; `bos_id` is None where the tokenizer adds no BOS.

    Raises UsageError if there are too few tokens.
    """
    convention, ctx = CONVENTIONS[ruler.convention], ruler.length
    needed = convention.min_windows * ctx
    if len(tokens) < needed:
        raise UsageError(
            f"the text has {len(tokens)} tokens, but {ruler.convention!r} with windows of {ctx} needs {needed}",
            hint="Give a longer text or a smaller --ctx.",
        )
    count = len(tokens) // ctx
    if ruler.max_windows is not None:
        count = min(count, ruler.max_windows)
    windows = np.array(tokens[: count * ctx], dtype=np.int64).reshape(count, ctx)
    sha256 = digest(windows.astype("<i4").tobytes())
    if convention.bos and bos_id is not None:
        windows[:, 0] = bos_id
    return Windows(windows, first=ctx // 2 if convention.half else 0, last=ctx - 1, sha256=sha256)


def tokenize(reader: Reader, text: str, ruler: Ruler, *, special: bool = False) -> tuple[list[int], int | None]:
    """The token ids of `text`, BOS included if the tokenizer adds it, and that BOS (else None).

    special: control tokens written in the text are tokens; it then brings its own BOS.
    Raises UnsupportedError (no tokenizer in the checkpoint), IntegrityError (ids beyond the embedding).
    """
    from weightsmith.formats.tokenizer import encoder  # noqa: PLC0415  (brings the tokenizer libraries)

    vocab = reader.vocab(ruler.pre)
    if vocab is None:
        raise UnsupportedError("the checkpoint has no tokenizer, so no text can be measured", path=reader.path)
    if ruler.convention == "llama.cpp":
        text = text.removesuffix("\n")
    tokens: list[int] = encoder(vocab).encode(text, add_bos=vocab.add_bos and not special, special=special)
    size = reader.config.vocab_size
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        found = max(tokens) if max(tokens) >= size else min(tokens)
        raise IntegrityError(f"the tokenizer gave id {found}, but the embedding has {size} rows", path=reader.path)
    return tokens, vocab.bos_id if vocab.add_bos else None

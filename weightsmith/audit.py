"""Can this file have been made from that original? For files of any origin, that nobody can make again.

Every tensor is held against the original's, slab by slab under canonical names, and gets a verdict:

| verdict | |
|---|---|
| exact | the original's values, or the bytes that the one way of packing them gives (F16, BF16, Q8_0) |
| within | every weight lies where a quantizer of its type can have put it (`quant.bounds`) |
| moved | error feedback can have put it there: more than rounding, within the gaps that the caller allowed |
| unexplained | some weights do not, or what they are stored as is not known; or one side lacks the tensor |

Beside the tensors the chat template, the tokenizer and the configuration are compared, and between two GGUF files every
other key that says something of the model: a file may be changed without touching a weight.

What is explained may still be bad: honest rounding of a poisoned original is within every bound, and so are changes
that stay below half a step. An audit tells whether a file is what it is said to be, not whether that is safe.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from weightsmith.difference import Change, settings
from weightsmith.errors import UnsupportedError
from weightsmith.formats.packed.reader import PackedReader
from weightsmith.progress import Ticker, progress
from weightsmith.quant import bounds, codecs
from weightsmith.quant.bounds import Grid, Outcome
from weightsmith.types import NOTES, Packed, Reader, Rows, TensorInfo

Verdict = Literal["exact", "within", "moved", "unexplained"]

SLAB_WEIGHTS = 1 << 19  # a few arrays of so many float32 are under way per thread
# Keys of GGUF that say how a file was made and packed, not what the model is; or that are compared as the tokenizer.
_PACKING = ("general.", "split.", "quantize.", NOTES)
_VOCAB = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")} | {
    "tokenizer.chat_template"
}


@dataclass(frozen=True, slots=True)
class Audited:
    """One tensor. outcome: counts and the worst weight; reason: why it is not explained, for people."""

    name: str
    type: str
    verdict: Verdict
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Audit:
    """All tensors of both sides in the file's order, and what else differs (a: the file, b: the original)."""

    tensors: tuple[Audited, ...]
    changes: tuple[Change, ...]

    @property
    def explained(self) -> bool:
        """Whether everything is."""
        return not self.changes and all(one.verdict != "unexplained" for one in self.tensors)


def audit(reader: Reader, base: Reader, *, moved: float = 0.0, threads: int | None = None) -> Audit:
    """Hold the open checkpoint `reader` against the original `base`.

    moved: gaps between stored values that error feedback may have shifted a weight by before rounding. Memory: a slab
    per thread. Raises what reading raises, UnsupportedError for families that are not known.
    """
    infos, others = reader.infos(), base.infos()
    found = []
    total = sum(info.n_weights for info in infos.values())
    with progress("audit", total) as ticker, ThreadPoolExecutor(threads) as pool:
        for name, info in infos.items():
            other = others.get(name)
            found.append(
                _absent(info, "the original has no such tensor")
                if other is None
                else _tensor(_Pair(reader, base, info, other, moved), pool, ticker)
            )
    found += [_absent(info, "is missing") for name, info in others.items() if name not in infos]
    return Audit(tuple(found), (*settings(reader, base), *_keys(reader, base)))


def _absent(info: TensorInfo, reason: str) -> Audited:
    return Audited(info.name, info.codec, "unexplained", Outcome(), reason)


@dataclass(frozen=True, slots=True)
class _Pair:
    """One tensor on both sides."""

    reader: Reader
    base: Reader
    info: TensorInfo
    other: TensorInfo
    moved: float

    def slabs(self) -> Iterator[tuple[int, int]]:
        unit = math.lcm(self.reader.row_unit(self.info.name), self.base.row_unit(self.info.name))
        step = max(1, SLAB_WEIGHTS // max(1, self.info.row_len) // unit) * unit
        for start in range(0, self.info.n_rows, step):
            yield start, min(start + step, self.info.n_rows)

    def held(self, place: tuple[int, int]) -> tuple[bool, Outcome]:
        """Whether rows [start, stop) are exact, and the outcome if they are not."""
        start, stop = place
        packed = self.reader.rows(self.info.name, start, stop)
        stored = self.base.rows(self.info.name, start, stop)
        same_codec = self.info.codec == self.other.codec
        if same_codec and np.array_equal(packed, stored):
            return True, Outcome(weights=(stop - start) * self.info.row_len)
        weights = codecs.decode(self.other.codec, stored, self.info.row_len)
        grid = self.grid(packed, start, stop)
        if np.array_equal(grid.values, weights) or self.only_way(weights, packed):
            return True, Outcome(weights=weights.size)
        return False, bounds.judge(weights, grid, moved=self.moved)

    def grid(self, packed: Packed, start: int, stop: int) -> Grid:
        units = self.reader.units(self.info.name, start, stop) if isinstance(self.reader, PackedReader) else None
        return (
            bounds.of_units(units) if units is not None else bounds.of_rows(self.info.codec, packed, self.info.row_len)
        )

    def only_way(self, weights: Rows, packed: Packed) -> bool:
        """Whether the codec has one way to pack, and this is what it gives."""
        codec = self.info.codec
        if codec in codecs.SEARCHED or codec not in codecs.writable() or isinstance(self.reader, PackedReader):
            return False
        try:
            return np.array_equal(codecs.encode(codec, weights), packed)
        except UnsupportedError:
            return False  # a weight outside its range


def _tensor(pair: _Pair, pool: ThreadPoolExecutor, ticker: Ticker) -> Audited:
    info, other = pair.info, pair.other
    if info.shape != other.shape:
        return _absent(info, f"has shape {list(info.shape)}, the original's is {list(other.shape)}")
    exact, total = True, Outcome()
    slabs = list(pair.slabs())
    try:
        for (start, stop), (same, outcome) in zip(slabs, pool.map(pair.held, slabs), strict=True):
            exact = exact and same
            total = total.joined(outcome, below=start)
            ticker.update((stop - start) * info.row_len)
    except UnsupportedError as error:
        return _absent(info, error.message)
    if exact:
        return Audited(info.name, info.codec, "exact", total)
    if total.within:
        return Audited(info.name, info.codec, "moved" if total.shifted else "within", total)
    if total.outside:
        reason = f"{total.outside} weights are not where a quantizer of {info.codec} could put them"
    else:
        reason = f"{total.wide + total.fitted} weights are far from what is stored, more than a search gives up"
    return Audited(info.name, info.codec, "unexplained", total, reason)


def _keys(reader: Reader, base: Reader) -> list[Change]:
    """Keys that only GGUF has: of the model where both are, else what the file has besides the one chat template."""
    if reader.container != "gguf":
        return []
    mine = _told(reader.metadata())
    if base.container == "gguf":
        theirs = _told(base.metadata())
        names = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
        return [Change("metadata", name, mine.get(name), theirs.get(name)) for name in names]
    extra = [name for name in mine if name.startswith("tokenizer.chat_template.")]
    return [Change("template", name, mine[name], None) for name in extra]


def _told(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The keys that say something of the model beyond `ModelConfig` and `Vocab`, in a comparable form, shortened."""
    found = {}
    for key in metadata:
        if key.startswith(_PACKING) or key in _VOCAB:
            continue
        text = repr(metadata[key])
        found[key] = text if len(text) <= 80 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return found

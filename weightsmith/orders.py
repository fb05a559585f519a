"""What is to be made, how, and what came of it: plain values for the command line, the catalog and builds alike."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith import formats
from weightsmith._version import __version__
from weightsmith.calibrated import PACKED, Calibration
from weightsmith.errors import UsageError
from weightsmith.formats.imatrix import Imatrix
from weightsmith.quant import ARITHMETIC_VERSION
from weightsmith.quant.blocks import BLOCKS
from weightsmith.transcode import Codes
from weightsmith.types import Recipe, TensorInfo


@dataclass(frozen=True, slots=True)
class Target:
    """What to make: a container and, unless everything keeps its precision, a type of it."""

    container: str
    type: str | None = None

    @classmethod
    def parse(cls, text: str, *, default_type: str | None = None) -> Target:
        """Read "gguf", "gguf:Q8_0", "safetensors:BF16", "gptq:4"; UsageError names what is known."""
        name, _, kind = text.partition(":")
        for container, package in formats.targets().items():
            if not kind and name.lower() in getattr(package, "ALIASES", {}):
                name, kind = container, package.ALIASES[name.lower()]
        known = {name: package.TYPES for name, package in formats.targets().items()} | PACKED
        if name not in known:
            raise UsageError(f"unknown target {name!r}", hint=f"Known targets: {', '.join(known)}.")
        kind = kind.upper() or ("4" if name in PACKED else "")
        if kind and kind not in known[name]:
            raise UsageError(f"{name} has no type {kind!r}", hint=f"Known types: {', '.join(known[name])}.")
        return cls(name, kind or default_type)

    @property
    def is_blocks(self) -> bool:
        """Whether the type is one block layout, not a mix of several and no float."""
        return self.type in BLOCKS and BLOCKS[self.type].weights > 1

    def __str__(self) -> str:
        return f"{self.container}:{self.type}" if self.type else self.container


@dataclass(frozen=True, slots=True)
class Options:
    """How to make it. Defaults are the recipe's own.

    pre: pre-tokenizer override. split_bytes: most bytes per file. threads: None = all cores. memory: most bytes for
    tensors under way, None = no limit. overwrite: replace the output. source_digest: the catalog's name for the source,
    noted in the result. imatrix: file of importances to quantize by. calibration: text to measure importances on, or
    to quantize by. effort: how hard to search. allow_pickle: read pickled weights, without running anything in them.
    strict: a tensor whose rows do not fit the type is an error. keep_rest: of a packed checkpoint only the packed
    linears become blocks, the rest keeps its precision. recipe: its type is the target's. version: of weightsmith, as
    the result notes it; another one only where an earlier result is made again to be compared.
    """

    pre: str | None = None
    split_bytes: int | None = None
    threads: int | None = None
    memory: int | None = None
    overwrite: bool = False
    strict: bool = False
    source_digest: str | None = None
    imatrix: Path | None = None
    effort: str = "normal"
    allow_pickle: bool = False
    calibration: Calibration | None = None
    keep_rest: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    version: str = __version__

    def record(self) -> dict[str, Any]:
        """The options that change what is made (not where or how fast), as plain values; defaults are left out."""
        recipe = self.recipe
        kept: dict[str, Any] = {"pre": self.pre, "split_bytes": self.split_bytes, "pure": recipe.pure}
        kept |= {"output_type": recipe.output_type, "embedding_type": recipe.embedding_type}
        kept |= {"overrides": [list(pair) for pair in recipe.overrides]}
        kept |= {"calibration": self.calibration.record() if self.calibration else None}
        kept |= {"effort": self.effort if self.effort != "normal" else None}
        kept |= {"keep_rest": self.keep_rest}
        return {name: value for name, value in kept.items() if value}

    def notes(self, target: Target, imatrix: Imatrix | None) -> dict[str, str]:
        """Where the result comes from, for the file itself: no paths, no times, so equal work gives equal bytes."""
        found = {"tool": f"weightsmith {self.version}", "recipe": json.dumps({"target": str(target), **self.record()})}
        if self.source_digest is not None:
            found["source"] = f"sha256:{self.source_digest}"
        found["arithmetic"] = str(ARITHMETIC_VERSION)
        if imatrix is not None:
            found["imatrix"] = f"sha256:{imatrix.digest()}"
        return found


@dataclass(frozen=True, slots=True)
class Report:
    """What was made, or would be. fallbacks: (tensor, wanted codec, got codec). seconds: 0 for a plan.

    notes: where it comes from, as the file itself says it. weights: of the model, where tensors hold packed words.
    errors: weighted relative error (`quant.loss`) of every tensor that was packed into blocks, by canonical name; with
    error feedback that of its output.
    codes: what became of a packed source's codes. stored: bytes of tensor data, where they are not those of `tensors`.
    """

    path: Path
    target: str
    tensors: Sequence[TensorInfo]
    fallbacks: Sequence[tuple[str, str, str]]
    seconds: float = 0.0
    notes: Mapping[str, str] = field(default_factory=dict)
    weights: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    codes: Codes = field(default_factory=Codes)
    stored: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return self.stored if self.stored is not None else sum(info.nbytes for info in self.tensors)

    @property
    def bpw(self) -> float:
        """All stored bits over all weights."""
        weights = self.weights or sum(info.n_weights for info in self.tensors)
        return 8 * self.nbytes / max(1, weights)

    @property
    def main_type(self) -> str:
        """The codec of most weights."""
        weights: Counter[str] = Counter()
        for info in self.tensors:
            weights[info.codec] += info.n_weights
        return weights.most_common(1)[0][0]

    @property
    def types(self) -> dict[str, int]:
        """Tensors per codec, most first."""
        return dict(Counter(info.codec for info in self.tensors).most_common())


def parse_override(text: str) -> tuple[str, str]:
    """Read PATTERN=TYPE; the last "=" divides, because a pattern may hold one."""
    pattern, _, codec = text.rpartition("=")
    if not pattern or not codec:
        raise UsageError(f"{text!r} is no PATTERN=TYPE", hint="For instance --tensor-type attn_v=Q8_0.")
    return pattern, codec.upper()

"""What differs between two checkpoints: configuration, tokenizer, chat template, tensors.

Tensors are held against each other under canonical names and in canonical row order, by the SHA-256 of their rows. Of
two plain float types the float32 values are compared, so an F16 GGUF, whose norms are F32, equals the F16 safetensors
that it was made from. Of other types that differ the types are the difference, and the values are not looked at
(`verify` measures those). A family that is not known is
compared under the containers' own names, and then only within one container.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightsmith.errors import UnsupportedError
from weightsmith.formats.tokenizer.template import template_sha256
from weightsmith.progress import Ticker, progress
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import Reader, TensorInfo, Vocab

SLAB_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. what: "config", "tokenizer", "template", "tensor". a, b: None where that side has nothing."""

    what: str
    name: str
    a: Any
    b: Any


@dataclass(slots=True)
class Difference:
    """All differences, and how many tensors had equal bytes, equal values in another float type, or were not read."""

    changes: list[Change] = field(default_factory=list)
    same_tensors: int = 0
    same_values: int = 0
    unhashed: int = 0

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.changes


def difference(a: Reader, b: Reader, *, hashes: bool = True) -> Difference:
    """Compare two open checkpoints. hashes: read the weights; without, equal shape and type count as the same."""
    found = Difference()
    _config(a, b, found)
    _vocab(a, b, found)
    _tensors(a, b, found, hashes=hashes)
    return found


def settings(a: Reader, b: Reader) -> list[Change]:
    """What differs in configuration, tokenizer and chat template; no tensor is looked at."""
    found = Difference()
    _config(a, b, found)
    _vocab(a, b, found)
    return found.changes


def _config(a: Reader, b: Reader, found: Difference) -> None:
    try:
        one, two = dataclasses.asdict(a.config), dataclasses.asdict(b.config)
    except UnsupportedError:
        one, two = dict(a.metadata()), dict(b.metadata())
    for name in sorted(one.keys() | two.keys()):
        left, right = one.get(name), two.get(name)
        if _plain(left) != _plain(right) and name not in ("name", "dtype"):
            found.changes.append(Change("config", name, _plain(left), _plain(right)))


def _vocab(a: Reader, b: Reader, found: Difference) -> None:
    one, two = _vocab_of(a), _vocab_of(b)
    if one is None or two is None:
        if one is not two:
            there = ["none" if vocab is None else f"{len(vocab.tokens)} tokens" for vocab in (one, two)]
            found.changes.append(Change("tokenizer", "tokenizer", *there))
        return
    for item in dataclasses.fields(Vocab):
        left, right = getattr(one, item.name), getattr(two, item.name)
        if left == right:
            continue
        if item.name == "chat_template":
            found.changes.append(Change("template", "chat_template", _hash(left), _hash(right)))
        elif isinstance(left, list):
            found.changes.append(Change("tokenizer", item.name, *_first_difference(left, right)))
        else:
            found.changes.append(Change("tokenizer", item.name, left, right))


def _vocab_of(reader: Reader) -> Vocab | None:
    try:
        return reader.vocab()
    except UnsupportedError:
        return None


def _first_difference(left: list[Any], right: list[Any]) -> tuple[str, str]:
    pairs = zip(left, right, strict=False)
    at = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(left), len(right)))
    shown = [repr(side[at]) if at < len(side) else "nothing" for side in (left, right)]
    return f"{len(left)} entries, at {at} {shown[0]}", f"{len(right)} entries, at {at} {shown[1]}"


def _tensors(a: Reader, b: Reader, found: Difference, *, hashes: bool) -> None:
    try:
        one, two = dict(a.infos()), dict(b.infos())
        by_rows = True
    except UnsupportedError:
        one, two, by_rows = dict(a.native_infos()), dict(b.native_infos()), False
    both = [name for name in one if name in two and _comparable(one[name], two[name], by_rows=by_rows and hashes)]
    for name in list(one) + [name for name in two if name not in one]:
        left = _form(one[name]) if name in one else None
        right = _form(two[name]) if name in two else None
        if name not in both:
            found.changes.append(Change("tensor", name, left, right))
    if not hashes:
        found.unhashed = len(both)
        return
    with progress("compare", sum(one[name].nbytes + two[name].nbytes for name in both)) as ticker:
        for name in both:
            same_type = one[name].codec == two[name].codec
            sums = [
                _rows_sum(reader, infos[name], ticker, values=not same_type)
                if by_rows
                else _bytes_sum(infos[name], ticker)
                for reader, infos in ((a, one), (b, two))
            ]
            if sums[0] == sums[1]:
                found.same_tensors += same_type
                found.same_values += not same_type
            else:
                found.changes.append(Change("tensor", name, f"sha256 {sums[0][:12]}", f"sha256 {sums[1][:12]}"))


def _form(info: TensorInfo) -> str:
    return f"{'x'.join(map(str, info.shape)) or 'scalar'} {info.codec}"


def _comparable(one: TensorInfo, two: TensorInfo, *, by_rows: bool) -> bool:
    """Whether the contents can be held against each other: the same type, or two plain float types."""
    floats = by_rows and all(BLOCKS[info.codec].weights == 1 for info in (one, two))
    return one.shape == two.shape and (one.codec == two.codec or floats)


def _rows_sum(reader: Reader, info: TensorInfo, ticker: Ticker, *, values: bool) -> str:
    from weightsmith.quant import codecs  # noqa: PLC0415  (loads numba)

    digest, unit = hashlib.sha256(), reader.row_unit(info.name)
    step = max(1, SLAB_BYTES // max(1, info.row_bytes) // unit) * unit
    for start in range(0, info.n_rows, step):
        rows = reader.rows(info.name, start, min(start + step, info.n_rows))
        digest.update(codecs.decode(info.codec, rows, info.row_len).tobytes() if values else rows.tobytes())
        ticker.update(rows.nbytes)
    return digest.hexdigest()


def _bytes_sum(info: TensorInfo, ticker: Ticker) -> str:
    digest, left = hashlib.sha256(), info.nbytes
    if info.path is None:
        raise UnsupportedError("its tensors do not lie in one piece", tensor=info.name)
    with open(info.path, "rb") as file:
        file.seek(info.offset)
        while left > 0 and (block := file.read(min(left, SLAB_BYTES))):
            digest.update(block)
            left -= len(block)
            ticker.update(len(block))
    return digest.hexdigest()


def _hash(text: str | None) -> str | None:
    return None if text is None else f"sha256 {template_sha256(text)[:12]}, {len(text)} characters"


def _plain(value: Any) -> Any:
    """A value that two containers may hold in different forms, made comparable."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}")  # GGUF keeps float32
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value

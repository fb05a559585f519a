"""Text that a model writes itself, to calibrate on where there is no other: `--calibrate self`.

Every row begins with BOS (where the tokenizer adds one) and a token drawn evenly from the ordinary vocabulary, so that
rows differ; GREEDY tokens follow by the highest logit, which leads into sense, and the rest is drawn from the model's
own distribution at temperature 1. Control tokens are never drawn. All rows of a batch advance together, with the keys
and values of earlier tokens kept, so a step reads the weights once for all of them.

The weights must fit the memory budget: a model that has to be streamed would read all of itself for every token.

Ref: LLM-QAT, arXiv 2305.17888, section 3.1 (data-free distillation, the first tokens greedy, the rest sampled).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightsmith.errors import ResourceError, UnsupportedError
from weightsmith.evals.calibration.rows import Options
from weightsmith.evals.engines.torch import threads
from weightsmith.evals.forward import Decoder, load
from weightsmith.formats.tokenizer import encoder
from weightsmith.progress import Ticker, progress
from weightsmith.types import Reader, Vocab

GREEDY = 4
ROWS = 128
_NORMAL = 1
_WRITTEN = (_NORMAL, 4, 6)  # token types that may be written: normal, user-defined, byte


@dataclass(slots=True, eq=False)
class Past:
    """Keys and values of one layer, [B, heads, T, head_dim], growing by `join`."""

    room: int
    length: int = 0
    _kept: tuple[Tensor, Tensor] | None = field(default=None)

    def join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep key and value [B, heads, n, head_dim] of the next n positions; all so far."""
        if self._kept is None:
            shape = (*key.shape[:2], self.room, key.shape[3])
            self._kept = key.new_empty(shape), value.new_empty(shape)
        stop = self.length + key.shape[2]
        for kept, new in zip(self._kept, (key, value), strict=True):
            kept[:, :, self.length : stop] = new
        self.length = stop
        return self._kept[0][:, :, :stop], self._kept[1][:, :, :stop]


def write(reader: Reader, options: Options) -> str:
    """`options.rows` texts of `options.ctx` tokens, joined by empty lines; the same for the same seed on one machine.

    Raises what `tokens` raises.
    """
    found = tokens(reader, options)
    reading = encoder(_vocab(reader, options))
    return "\n\n".join(reading.decode(row) for row in found.tolist())


def tokens(reader: Reader, options: Options) -> Tensor:
    """What the model writes, int64 [options.rows, options.ctx].

    Raises UnsupportedError (no tokenizer, or a family that keeps no keys and values), ResourceError (weights beyond
    `options.memory`) and what `forward.load` raises.
    """
    vocab = _vocab(reader, options)
    decoder = load(reader, device=options.device, memory=options.memory)
    config, room = decoder.config, options.memory - _weight_bytes(decoder)
    row = 2 * config.n_layers * config.n_kv_heads * config.head_dim * options.ctx * decoder.place.dtype.itemsize
    if room < row:
        needed = (options.memory - room + row) / 1e9
        raise ResourceError(
            f"writing its own text takes all weights in memory at once, about {needed:.1f} GB",
            path=reader.path,
            hint=f"Pass --max-memory {needed + 0.1:.1f}GB if there is that much, or a text.",
        )
    count, at_once = options.rows or ROWS, int(room // row)
    generator = torch.Generator().manual_seed(options.seed)
    found = []
    with threads(options.threads), progress("write", count * options.ctx, "tokens") as ticker:
        layers = list(decoder.layers(whole=True))
        for start in range(0, count, at_once):
            first = _first(vocab, min(at_once, count - start), config.vocab_size, generator)
            found.append(_continued(decoder, layers, first, options.ctx, generator, ticker))
    return torch.cat(found)


def _vocab(reader: Reader, options: Options) -> Vocab:
    vocab = reader.vocab(options.pre)
    if vocab is None:
        raise UnsupportedError("the checkpoint has no tokenizer, so it can write no text", path=reader.path)
    return vocab


def _weight_bytes(decoder: Decoder) -> int:
    weights = sum(info.n_weights for info in decoder.reader.infos().values())
    return int(weights * decoder.place.dtype.itemsize)


def _first(vocab: Vocab, rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BOS (where the tokenizer adds it) and an ordinary token each, int64 [rows, 1 or 2]; bool [size]: what may be."""
    allowed = torch.zeros(size, dtype=torch.bool)
    kinds = torch.tensor(vocab.types[:size])
    allowed[: len(kinds)] = torch.isin(kinds, torch.tensor(_WRITTEN))
    ordinary = torch.nonzero(kinds == _NORMAL)[:, 0]
    drawn = ordinary[torch.randint(len(ordinary), (rows, 1), generator=generator)]
    if vocab.add_bos and vocab.bos_id is not None:
        drawn = torch.cat((torch.full_like(drawn, vocab.bos_id), drawn), dim=1)
    return drawn, allowed


@torch.inference_mode()
def _continued(
    decoder: Decoder,
    layers: Sequence[Mapping[str, Tensor]],
    first: tuple[Tensor, Tensor],
    length: int,
    generator: torch.Generator,
    ticker: Ticker,
) -> Tensor:
    """Rows of `length` tokens that go on from `first`."""
    begun, allowed = first
    tables = decoder.kind.tables(decoder.config, length, decoder.place)
    if not hasattr(tables, "past"):
        raise UnsupportedError(f"family {decoder.config.family!r} cannot write text yet", path=decoder.reader.path)
    pasts = [Past(length) for _ in layers]
    found = torch.cat((begun, begun.new_zeros(len(begun), length - begun.shape[1])), dim=1)
    for position in range(length - 1):
        x = decoder.embed(found[:, position : position + 1])
        for layer, past in zip(layers, pasts, strict=True):
            x = decoder.kind.layer(layer, x, tables.at(position, past), decoder.config)
        if position + 1 >= begun.shape[1]:
            decoder.finish(x)
            logits = decoder.logits(x[:, 0]).cpu().masked_fill_(~allowed, -torch.inf)
            if position + 1 < begun.shape[1] + GREEDY:
                found[:, position + 1] = logits.argmax(dim=-1)
            else:
                found[:, position + 1] = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
        ticker.update(len(found))
    return found

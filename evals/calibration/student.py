"""The quantized model while scales of it move: from embeddings through one layer after another to the divergence.

Layers are those of the folder of finished ones (`work`), one of them in memory as floats. Embeddings, norms and the
output matrix are the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightsmith.evals.calibration import products
from weightsmith.evals.calibration.stream import Run
from weightsmith.evals.forward import weights
from weightsmith.quant.algorithms.scales import Halves, Movable

AT_ONCE = 128  # rows of logits; with more, several times the cache of a processor, it is slower

Load = Callable[[int], Mapping[str, Movable]]
Moves = Mapping[str, Tensor]  # changes of logarithms [fields, out, groups] by "LAYER.name within it"


@dataclass(slots=True, eq=False)
class StudentLayer:
    """A layer of the quantized model. movable: by name within it; plain: all its other tensors."""

    index: int
    movable: Mapping[str, Movable]
    plain: Mapping[str, Tensor]

    def halves(self, moves: Moves) -> dict[str, Halves]:
        """Of its matrices by name within it, where they are now."""
        found = {}
        for key, one in self.movable.items():
            by = moves.get(f"{self.index}.{key}")
            found[key] = one.halves if by is None else one.moved(tuple(by))
        return found


class Student:
    """The quantized model: scales that move, layer by layer, between embeddings and logits that do not."""

    def __init__(self, run: Run, load: Load, tokens: NDArray[np.int64]) -> None:
        self.run, self.load, self.tokens = run, load, tokens
        decoder = run.decoder
        self.decoder, self.kind, self.config, self.place = decoder, decoder.kind, decoder.config, decoder.place
        self.quick = products.is_quick(self.place.device)
        self.dtype = torch.bfloat16 if self.quick else self.place.dtype
        self._plain: dict[int, dict[str, Tensor]] = {}
        name = self.kind.EMBEDDING if self.config.tie_word_embeddings else self.kind.HEAD
        self._norm = weights.tensor(decoder.reader, self.kind.NORM, self.place)
        self._head = weights.tensor(decoder.reader, name, self.place).to(self.dtype)

    def layer(self, index: int) -> StudentLayer:
        """A layer, opened anew but for what does not move."""
        movable = {key: one.to(self.place.device) for key, one in self.load(index).items()}
        if index not in self._plain:
            prefix, reader = self.kind.LAYER.format(index), self.decoder.reader
            names = [name for name in reader.infos() if name.startswith(prefix)]
            names = [name for name in names if name.removeprefix(prefix) not in movable]
            self._plain[index] = {name.removeprefix(prefix): weights.tensor(reader, name, self.place) for name in names}
        return StudentLayer(index, movable, self._plain[index])

    def matrices(self, layer: StudentLayer, moves: Moves) -> dict[str, Tensor]:
        """Float weights of what moves, where it is now."""
        halves = layer.halves(moves)
        return {key: one.weights(halves[key]).to(self.place.dtype) for key, one in layer.movable.items()}

    def through(self, layer: StudentLayer, matrices: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Rows [B, T, hidden] through a layer."""
        whole = {**layer.plain, **matrices}
        rounded = {key: w.to(self.dtype) if w.ndim == 2 else w for key, w in whole.items()}
        found: Tensor = self.kind.layer(rounded, x, self.run.tables, self.config)
        return found

    def enter(self, rows: NDArray[np.int64]) -> Tensor:
        """Embeddings of rows by number, [B, T, hidden]."""
        return self.decoder.embed(torch.from_numpy(self.tokens[rows]))

    def normed(self, x: Tensor) -> Tensor:
        """States behind the last layer as the output matrix takes them."""
        found: Tensor = self.kind.norm(x, self._norm, self.config.rms_norm_eps)
        return found

    @torch.no_grad()
    def divergence(self, theirs: Tensor, ours: Tensor, *, slope: bool = True) -> tuple[float, Tensor]:
        """The sum of KL divergences over tokens and its slope [n, hidden] along `ours`, if asked for; both are normed
        states [n, hidden]."""
        room = max(16, min(AT_ONCE, self.decoder.memory // 16 // (4 * self.config.vocab_size)))
        # Made once: a new one of tens of MB for every few rows costs more in page faults than what is computed in it.
        p, q, raw = (torch.empty(room, len(self._head), device=self.place.device) for _ in range(3))
        product = raw if self.dtype == raw.dtype else torch.empty_like(raw, dtype=self.dtype)
        total, slopes = 0.0, torch.empty_like(ours) if slope else ours
        for at in range(0, len(ours), room):
            here = slice(at, at + room)
            count = len(ours[here])
            for x, logarithms in ((theirs, p), (ours, q)):
                torch.mm(x[here].to(self.dtype), self._head.T, out=product[:count])
                if product is not raw:
                    raw[:count].copy_(product[:count])
                torch.log_softmax(raw[:count], dim=-1, out=logarithms[:count])
            wanted = torch.exp(p[:count], out=raw[:count])
            total += float(p[:count].sub_(q[:count]).mul_(wanted).sum())
            if slope:
                error = q[:count].exp_().sub_(wanted)
                if product is not raw:
                    error = product[:count].copy_(error)
                slopes[here] = (error @ self._head).to(ours.dtype)
        return total, slopes

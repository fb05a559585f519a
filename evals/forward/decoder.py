"""Hidden states by streaming layers, logits by streaming the output matrix.

Every window's hidden state [T, hidden] stays in memory while layer after layer passes over all of them, so the weights
are read once per call of `hidden`, however many windows there are. Within a layer windows go through in steps, whose
size bounds what the layer itself allocates and keeps it in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from weightsmith.evals.forward import moe, weights
from weightsmith.evals.forward.stages import through
from weightsmith.evals.forward.weights import Layer, Place
from weightsmith.quant.multiply import linear
from weightsmith.types import ModelConfig, Reader

STEP_TOKENS = 2048  # on a CPU, larger steps are no faster and only leave the cache

OnLayer = Callable[[int, Tensor], object]


@dataclass(slots=True)
class Decoder:
    """A model that can be run but is never whole in memory; made by `forward.load`."""

    reader: Reader
    config: ModelConfig
    kind: ModuleType
    place: Place
    memory: int
    _head: Tensor | None = field(default=None, init=False)

    def windows_at_once(self, length: int) -> int:
        """Windows of `length` tokens whose hidden states fit in half the memory budget; at least one."""
        return max(1, self.memory // 2 // (length * self.config.hidden_size * self.place.dtype.itemsize))

    def layers(self, *, whole: bool = False) -> Iterator[Layer]:
        """Each layer's weights in turn, the next one loading meanwhile; drop one before asking for the next.

        whole: experts too, which are otherwise loaded when they are asked for.
        """
        places = [self.layer_at(number) for number in range(self.config.n_layers)]
        return weights.stream(places, self.place, whole=whole)

    def layer_at(self, number: int) -> tuple[Reader, str]:
        """Where a layer's weights lie: a reader and what their names begin with."""
        return self.reader, self.kind.LAYER.format(number)

    def step(self, length: int) -> int:
        """Windows of `length` tokens that go through a layer at once."""
        fits: int = self.memory // 4 // self.kind.working_bytes(self.config, length)
        cap = STEP_TOKENS // length if self.place.device.type == "cpu" else fits
        return max(1, min(fits, cap))

    def embed(self, tokens: Tensor) -> Tensor:
        """What enters the first layer, [B, T, hidden] on the device, for int64 tokens [B, T]."""
        embedded = weights.gather(self.reader, self.kind.EMBEDDING, tokens.cpu(), self.place)
        entered: Tensor = self.kind.entered(embedded, self.config)
        return entered

    @torch.inference_mode()
    def through(self, layer: Layer, tables: Any, *states: Tensor) -> None:
        """Replace states [B, T, hidden] by what a layer makes of them, a step of windows at a time.

        A mixture of experts takes as much memory again as they have.
        """
        steps = [part for x in states if len(x) for part in torch.split(x, self.step(x.shape[1]))]
        if moe.is_mixture(self.kind):
            for part in steps:
                part.copy_(through(self.kind.STAGES[:-1], layer, part, tables, self.config, None))
            moe.evaluate(self.kind.MIXTURE, layer, steps, tables, self.config)
            return
        for part in steps:
            part.copy_(self.kind.layer(layer, part, tables, self.config))

    @torch.inference_mode()
    def finish(self, x: Tensor) -> None:
        """Replace states x [B, T, hidden] by their norm, which is what `logits` takes."""
        final, step = weights.tensor(self.reader, self.kind.NORM, self.place), self.step(x.shape[1])
        for at in range(0, len(x), step):
            x[at : at + step] = self.kind.norm(x[at : at + step], final, self.config.rms_norm_eps)

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        """Hidden states after the final norm, [B, T, hidden] on the device, for int64 tokens [B, T].

        Every window starts at position 0 and sees only itself. `on_layer(i, hidden)` is called after layer i with the
        live states [B, T, hidden], which it must not change.
        """
        x, tables = self.embed(tokens), self.kind.tables(self.config, tokens.shape[1], self.place)
        layers = self.layers()
        for number in range(self.config.n_layers):
            layer = next(layers)  # not by enumerate or zip, which would keep a reference to it
            self.through(layer, tables, x)
            del layer  # the next one is already loading
            if on_layer is not None:
                on_layer(number, x)
        self.finish(x)
        return x

    @property
    def _head_fits(self) -> bool:
        return self.config.vocab_size * self.config.hidden_size * self.place.dtype.itemsize <= self.memory // 2

    def rows_at_once(self) -> int:
        """Hidden states worth handing to `logits` at once: one, or what its result may take, if each call reads all."""
        return 1 if self._head_fits else max(1, self.memory // 4 // (4 * self.config.vocab_size))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [n, V] of final hidden states [n, hidden].

        The output matrix is kept for further calls if it fits in half the memory budget, else read anew, slab by slab.
        """
        name: str = self.kind.EMBEDDING if self.config.tie_word_embeddings else self.kind.HEAD
        if self._head is None and self._head_fits:
            self._head = weights.tensor(self.reader, name, self.place)
        if self._head is not None:
            return self.scored(linear(hidden, self._head).float())
        found = torch.empty(len(hidden), self.config.vocab_size, device=self.place.device)
        for start, rows in weights.slabs(self.reader, name):
            found[:, start : start + len(rows)] = linear(hidden, rows.to(*self.place))
        return self.scored(found)

    def scored(self, products: Tensor) -> Tensor:
        """Products of final states with the output matrix as logits."""
        logits: Tensor = self.kind.scored(products, self.config)
        return logits

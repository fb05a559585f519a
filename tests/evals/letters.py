"""A tokenizer of one token per character, put in place of the real ones: fast, and its ids are known by heart."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from weightsmith.types import Vocab

BOS = 1


class Encoder:
    def __init__(self, vocab: Vocab) -> None:
        self.vocab = vocab

    def encode(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        wanted = self.vocab.add_bos if add_bos is None else add_bos
        ids = [self.vocab.tokens.index(letter) for letter in text]
        return [BOS, *ids] if wanted else ids


def vocab(size: int = 96, *, add_bos: bool = True, first: str = " ") -> Vocab:
    tokens = ["<unk>", "<s>", *(chr(ord(first) + i) for i in range(size - 2))]
    return Vocab("gpt2", tokens, [1] * size, bos_id=BOS, add_bos=add_bos)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("weightsmith.formats.tokenizer")
    module.encoder = Encoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "weightsmith.formats.tokenizer", module)


def text(length: int, seed: int = 0) -> str:
    letters = np.random.default_rng(seed).integers(0, 90, length)
    return "".join(chr(ord(" ") + int(i)) for i in letters)

"""A Reader over a dict of arrays: the test double for everything that streams weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.formats.archs import by_name
from weightsmith.types import ModelConfig, Packed, TensorInfo, Vocab

TINY = ModelConfig(
    family="llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    dtype="F32",
)


@dataclass
class MemoryReader:
    """Serves canonical float32 tensors; counts the rows it was asked for, by name."""

    config: ModelConfig
    tensors: dict[str, np.ndarray]
    tokenizer: Vocab | None = None
    unit: int = 1
    path: Path = Path("memory")
    container: str = "memory"
    asked: dict[str, int] = field(default_factory=dict)

    def files(self) -> list[Path]:
        return []

    def metadata(self) -> Mapping[str, Any]:
        return {}

    def native_infos(self) -> Mapping[str, TensorInfo]:
        return self.infos()

    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(name, value.shape, "F32", value.nbytes) for name, value in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Packed:
        assert start % self.unit == 0
        self.asked[name] = self.asked.get(name, 0) + stop - start
        value = self.tensors[name]
        return value.reshape(-1, value.shape[-1])[start:stop].copy().view(np.uint8)

    def row_unit(self, name: str) -> int:
        return self.unit if self.tensors[name].ndim == 2 else 1

    def vocab(self, pre: str | None = None) -> Vocab | None:
        return self.tokenizer

    def close(self) -> None:
        pass


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Canonical float32 tensors: norms near 1, biases small, matrices loud enough for uneven predictions."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in by_name(config.family).tensors(config).items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("bias"):
            tensors[name] = noise * np.float32(0.3)
        elif len(shape) == 1:
            tensors[name] = 1 + noise * np.float32(0.1)
        else:
            tensors[name] = noise * np.float32(1.5 / np.sqrt(shape[-1]))
    return tensors


def tiny(config: ModelConfig = TINY, *, seed: int = 0, **fields: Any) -> MemoryReader:
    return MemoryReader(config, random_tensors(config, seed), **fields)

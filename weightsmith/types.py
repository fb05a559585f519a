"""The words of the house: what a tensor, a model, a reader and a writer are.

Canonical means Hugging Face's: tensor names as in a Llama or Mistral safetensors checkpoint, matrices as [out, in],
query and key rows half-split for rotary embedding. Every container maps to and from that, so N containers need N
adapters. Bytes travel as rows: `uint8 [rows, row_bytes]`, where a row is one run of the last axis, so tensors of any
size stream in slabs and nothing needs to hold a whole one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

NOTES = "weightsmith.provenance."  # prefix of the metadata keys that say where a file comes from

Packed = NDArray[np.uint8]  # [rows, row_bytes]
Rows = NDArray[np.float32]  # [rows, row_len]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as it lies in a file.

    name: in the naming of whoever hands it out (the container's own, or canonical). shape: torch order, so a matrix
    is (out, in). codec: block layout, named as in `weightsmith.quant.blocks`. nbytes: stored bytes. path, offset:
    the file and the absolute byte where it starts (a planned tensor has neither).
    """

    name: str
    shape: tuple[int, ...]
    codec: str
    nbytes: int
    path: Path | None = None
    offset: int = -1

    @property
    def n_weights(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def row_len(self) -> int:
        """Values in one row (the last axis); 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Rows: the product of all axes but the last."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row."""
        return self.nbytes // self.n_rows if self.n_rows else 0


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary frequency scaling; lengths in tokens. low_ and high_freq_factor are of kind "llama3", betas of "yarn"."""

    kind: Literal["llama3", "linear", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class Grok:
    """What the family Grok multiplies by and caps at: x becomes cap * tanh(x / cap), 0 is no cap.

    dense_size: width of a feed-forward block beside the experts, 0 for none. temperature_length: tokens after which
    scores are sharpened, 0 for never. graph: whose rules to follow where programs differ, empty for the vendor's (see
    `evals.forward.grok`).
    """

    embedding_scale: float
    logit_scale: float
    attention_scale: float
    attention_cap: float = 30.0
    router_cap: float = 0.0
    logit_cap: float = 0.0
    dense_size: int = 0
    temperature_length: int = 0
    graph: str = ""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a decoder-only transformer of a known family is, independent of the container.

    family: a module of `weightsmith.formats.archs`. Sizes are counts; `head_dim` is explicit because it need not be
    hidden_size / n_heads. dtype: codec of the full-precision weights ("F32", "F16", "BF16"). `sliding_window` in
    tokens or None. `eos_token_ids` may hold several. `name` is free text for humans. n_experts: of every layer, 0 in a
    dense model; a token passes through n_experts_used of them, each intermediate_size wide.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    name: str = ""
    n_experts: int = 0
    n_experts_used: int = 0
    grok: Grok | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a checkpoint's tensors shall be stored as.

    type: a type of the target container ("Q4_0", "BF16"); None keeps what loses nothing. pure: one codec for every
    matrix, output and embeddings too. overrides: (pattern, codec); the first pattern found in a tensor's name wins.
    output_type, embedding_type: codec of the output matrix and of the embedding. imatrix: there will be one, which
    some types choose by.
    """

    type: str | None = None
    pure: bool = False
    overrides: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    imatrix: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Canonical tensors with their target codecs, in the order of writing.

    fallbacks: (tensor, wanted codec, got codec) where a row is no multiple of the wanted codec's block. file_type: the
    container's number of the type that was asked for, where codecs do not tell (Q4_K_S and Q4_K_M share most). stored:
    bytes of tensor data, where they are not those of `tensors`.
    """

    tensors: list[TensorInfo]
    fallbacks: list[tuple[str, str, str]] = field(default_factory=list)
    file_type: int | None = None
    stored: int | None = None


@dataclass(slots=True)
class Vocab:
    """A tokenizer, independent of the container (the fields are GGUF's, the only complete public inventory).

    model: "gpt2" (byte-level BPE; tokens in the GPT-2 byte alphabet) or "llama" (SentencePiece BPE; U+2581 marks a
    space, byte pieces are <0xNN>). types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. pre: the
    name of the pre-tokenizer pattern for "gpt2" (see `formats.tokenizer.patterns`), empty for "llama". merges: pairs,
    best first ("gpt2" only). scores: log-probabilities or ranks ("llama" only). chat_template is an opaque string and
    is never rendered.
    """

    model: Literal["gpt2", "llama"]
    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    pre: str = ""
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = True
    ignore_merges: bool = False
    chat_template: str | None = None


class Reader(Protocol):
    """A checkpoint that is open for reading, whatever its container.

    Opening reads and checks headers only. `config` and `infos()` raise UnsupportedError for an unknown family, while
    `native_infos()` and `metadata()` work on any sound file.
    """

    path: Path
    container: str

    def files(self) -> list[Path]:
        """Every file the checkpoint consists of, tokenizer and configuration included."""

    def metadata(self) -> Mapping[str, Any]:
        """The container's own key-value metadata, as found."""

    def native_infos(self) -> Mapping[str, TensorInfo]:
        """Tensors under the container's own names, in file order."""

    @property
    def config(self) -> ModelConfig:
        """The model, canonical."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Tensors under canonical names, in the family's order, complete and of the expected shapes."""

    def rows(self, name: str, start: int, stop: int) -> Packed:
        """Stored bytes of rows [start, stop) of a canonical tensor, in canonical row order; a fresh array."""

    def row_unit(self, name: str) -> int:
        """Rows come cheaply only in multiples of this (the head_dim of a row-permuted tensor, else 1)."""

    def vocab(self, pre: str | None = None) -> Vocab | None:
        """The tokenizer, or None when the checkpoint carries none; `pre` names the pre-tokenizer of one not known."""

    def close(self) -> None:
        """Release file handles."""


@runtime_checkable
class BlockSource(Protocol):
    """A Reader of packed linears, whose codes some block layouts can take over without rounding a weight again."""

    def block_codecs(self, name: str) -> tuple[str, ...] | None:
        """Block layouts that may hold the codes of a canonical tensor; None for one that is not packed."""

    def blocks(self, name: str, codec: str, start: int, stop: int) -> tuple[Packed, float] | None:
        """Rows [start, stop) as blocks of `codec` and the largest error of a weight; None where they do not fit."""


class Writer(Protocol):
    """A checkpoint being written. Nothing is visible under its final name before `close`.

    Planned with canonical tensors and their target codecs, in the order of `order`; rows then arrive in canonical row
    order within a tensor, from any thread. As a context manager: `close` on success, `abort` on any exception.
    """

    order: Sequence[TensorInfo]

    def write(self, info: TensorInfo, start: int, rows: Packed) -> None:
        """Store rows [start, start + len(rows)) of a planned tensor. Offsets are known: any order, any thread."""

    def holds(self, info: TensorInfo, start: int, stop: int, total: int) -> bool:
        """True if an unfinished run left rows [start, stop) with that `quant.checksum`; they then count as arrived."""

    def row_unit(self, info: TensorInfo) -> int:
        """`start` and `len(rows)` must be multiples of this (a row-permuted tensor's head_dim, else 1)."""

    def close(self) -> Path:
        """Check that every row arrived, flush to disk, rename into place, return the final path."""

    def abort(self) -> None:
        """Remove what was written."""

    def suspend(self) -> None:
        """Leave what was written for a later run, where the container can; else as `abort`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

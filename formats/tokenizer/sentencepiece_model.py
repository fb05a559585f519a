"""tokenizer.model: a SentencePiece ModelProto, read and written with the package's own message classes.

A piece is text, score and type; the types have GGUF's numbers. Texts mark spaces with U+2581; only user-defined pieces
are kept with real spaces in a `Vocab`, because llama.cpp looks for those in the raw text. Read are BPE models that
leave text as it is (normalizer "identity"): GGUF has no place for another normalizer's rules, so a model that depends
on one is refused instead of being converted into something else. Reference: google/sentencepiece,
src/sentencepiece_model.proto. The original Llama 3 file of the same name is no such model but a list of lines
"base64 rank".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.tokenizer.pieces import (
    BYTE_PIECES,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    trailing_fillers,
)
from weightsmith.types import Vocab

_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]{1,400}={0,2} [0-9]{1,9}\r?\n")
_BPE = 2
_OURS = "identity"


@dataclass(slots=True)
class Model:
    """What a tokenizer.model says. Special ids are None where the model has no such token."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    add_space_prefix: bool
    special: dict[str, int | None] = field(default_factory=dict)


def _message() -> Any:
    from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415

    return sentencepiece_model_pb2.ModelProto()


def read(data: bytes, path: Path) -> Model:
    """Parse a tokenizer.model. IntegrityError if it is damaged, UnsupportedError if `Vocab` cannot express it."""
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    if _TIKTOKEN.match(data):
        raise UnsupportedError(
            "this tokenizer.model is a list of tiktoken ranks (original Llama 3), no SentencePiece model",
            path=path,
            hint="Use the Hugging Face form of the checkpoint: it has a tokenizer.json.",
        )
    proto = _message()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise IntegrityError("not a SentencePiece model", path=path, hint="Pull the file again.") from error
    if not proto.pieces:
        raise IntegrityError("a SentencePiece model without pieces", path=path)
    _check_kind(proto, path)
    tokens, scores, types = [], [], []
    for piece in proto.pieces:
        kind = int(piece.type)
        tokens.append(piece.piece.replace(SPACE, " ") if kind == USER_DEFINED else piece.piece)
        scores.append(float(piece.score))
        types.append(kind)
    trainer = proto.trainer_spec
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id, "pad": trainer.pad_id}
    special = {name: id_ if 0 <= id_ < len(tokens) else None for name, id_ in ids.items()}
    return Model(tokens, scores, types, proto.normalizer_spec.add_dummy_prefix, special)


def _check_kind(proto: Any, path: Path) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    fault = None
    if trainer.model_type != _BPE:
        fault = "its algorithm is not BPE"
    elif not trainer.byte_fallback:
        fault = "it has no byte fallback"
    elif trainer.treat_whitespace_as_suffix:
        fault = "it marks spaces behind words"
    elif normalizer.precompiled_charsmap:
        fault = f"it rewrites text first (normalizer {normalizer.name[:40]!r})"
    elif normalizer.remove_extra_whitespaces:
        fault = "it removes extra spaces"
    elif not normalizer.escape_whitespaces:
        fault = "it keeps spaces as they are"
    if fault:
        raise UnsupportedError(f"a SentencePiece model that GGUF cannot express: {fault}", path=path)


def write(vocab: Vocab) -> bytes:
    """A ModelProto of a "llama" vocabulary; UnsupportedError if SentencePiece would not load it."""
    unknown = [id_ for id_, kind in enumerate(vocab.types) if kind == UNKNOWN]
    if len(unknown) != 1 or any(piece not in set(vocab.tokens) for piece in BYTE_PIECES):
        raise UnsupportedError("SentencePiece needs exactly one unknown token and all 256 byte pieces")
    proto = _message()
    n = len(vocab.tokens) - trailing_fillers(vocab)
    for text, score, kind in zip(vocab.tokens[:n], vocab.scores, vocab.types, strict=False):
        piece = proto.pieces.add()
        piece.piece = text.replace(" ", SPACE) if kind == USER_DEFINED else text
        piece.score, piece.type = score, kind
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = _BPE, n, True
    for name, id_ in (("bos", vocab.bos_id), ("eos", vocab.eos_id), ("unk", unknown[0]), ("pad", vocab.pad_id)):
        setattr(trainer, f"{name}_id", -1 if id_ is None else id_)
        if id_ is not None:
            setattr(trainer, f"{name}_piece", vocab.tokens[id_])
    normalizer.name, normalizer.add_dummy_prefix = _OURS, vocab.add_space_prefix
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    data = proto.SerializeToString(deterministic=True)
    return _loadable(bytes(data))


def _loadable(data: bytes) -> bytes:
    """`data` itself, once SentencePiece has loaded it."""
    from sentencepiece import SentencePieceProcessor  # noqa: PLC0415

    try:
        SentencePieceProcessor().LoadFromSerializedProto(data)
    except (RuntimeError, ValueError, OSError) as error:
        raise UnsupportedError(f"SentencePiece refuses the model: {str(error)[:300]}") from error
    return data

"""Grok's two tokenizers: tokenizer.tok.json as tiktoken reads it, and tokenizer.model as xAI's code uses it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.evals.memory_reader import TINY
from tests.formats.grok import grok1
from tests.formats.tokenizer.oracles import texts
from tests.formats.tokenizer.training import sentencepiece_model
from tests.native import byte_ranks
from weightsmith import formats
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.tokenizer import encoder, from_folder
from weightsmith.types import Vocab

# sglang's PAT_STR_B, which "V1" stands for.
V1 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|pad|>", "<|eos|>", "<|separator|>", "<|reserved_3|>", "<|control1|>")


def tok_json(**changes: Any) -> dict[str, Any]:
    """Special tokens first, as in Grok-2; the ordinary ones out of order, as nothing says that they are sorted."""
    ordinary = [{"bytes": list(token), "token": len(SPECIALS) + rank} for rank, token in enumerate(byte_ranks())]
    special = [{"bytes": list(text.encode()), "token": id_} for id_, text in enumerate(SPECIALS)]
    raw = {"word_split": "V1", "vocab_size": len(ordinary) + len(special), "default_allowed_special": "all"}
    return raw | {"regular_tokens": ordinary[::-1], "special_tokens": special} | changes


def read(folder: Path, raw: dict[str, Any]) -> Vocab:
    (folder / "tokenizer.tok.json").write_text(json.dumps(raw))
    vocab = from_folder(folder, replace(TINY, vocab_size=raw["vocab_size"] + 3))
    assert vocab is not None
    return vocab


def test_tok_json_tokenizes_as_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    raw = tok_json()
    vocab = read(tmp_path, raw)
    ranks = {bytes(entry["bytes"]): entry["token"] for entry in raw["regular_tokens"]}
    special = {text: id_ for id_, text in enumerate(SPECIALS)}
    original = tiktoken.Encoding("grok-2", pat_str=V1, mergeable_ranks=ranks, special_tokens=special)
    ours = encoder(vocab)
    samples = [text for text in texts(400, 5) if not any(mark in text for mark in SPECIALS)]
    assert [text for text in samples if ours.encode(text) != original.encode_ordinary(text)] == []
    assert (vocab.pre, vocab.eos_id, vocab.pad_id, vocab.bos_id, vocab.add_bos) == ("grok-2", 1, 0, None, False)
    assert [vocab.types[id_] for id_ in (0, 4, 5)] == [3, 3, 1]
    assert vocab.types[-3:] == [5, 5, 5]


def test_a_token_that_no_pair_makes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = tok_json()
    raw["regular_tokens"].append({"bytes": list(b" xyzzyqk"), "token": raw["vocab_size"]})
    raw["vocab_size"] += 1
    with caplog.at_level(logging.WARNING):
        vocab = read(tmp_path, raw)
    assert "1 tokens are no pair" in caplog.text
    assert raw["vocab_size"] - 1 not in encoder(vocab).encode("a xyzzyqk")  # pattern "grok-2" merges every word


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"word_split": "V2"}, UnsupportedError, "V2"),
        ({"pat_str": "x+"}, UnsupportedError, "x\\+"),
        ({"regular_tokens": {}}, IntegrityError, "no list"),
        ({"special_tokens": [{"bytes": [300], "token": 0}]}, IntegrityError, "damaged"),
        ({"special_tokens": [{"bytes": [97], "token": True}]}, IntegrityError, "damaged"),
        ({"special_tokens": [{"bytes": [97], "token": 1}, {"bytes": [98], "token": 1}]}, IntegrityError, "repeats"),
        ({"special_tokens": [{"bytes": [255], "token": 0}]}, IntegrityError, "no text"),
        ({"special_tokens": [{"bytes": [97], "token": 9}]}, IntegrityError, "is also"),
        ({"regular_tokens": [{"bytes": [97], "token": 9}]}, IntegrityError, "are no tokens"),
        ({"special_tokens": [{"bytes": [97], "token": 10**6}]}, IntegrityError, "vocab_size"),
    ],
)
def test_damaged_tok_json(changes: dict[str, Any], error: type[Exception], match: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=match):
        read(tmp_path, tok_json(**changes))
    assert read(tmp_path, tok_json(pat_str=V1)).pre == "grok-2"


def test_grok_1_reads_its_tokenizer_where_xai_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders above the weights; no beginning of a text, and an unknown token that is not the first."""
    monkeypatch.setattr(grok1, "VOCAB", 900)
    options = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "user_defined_symbols": ["\n", "0", "\u2581\u2581"]}
    options |= {"pad_piece": "[PAD]", "bos_piece": "[BOS]", "eos_piece": "[EOS]", "unk_piece": "[UNK]"}
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    grok1.write_grok1(tmp_path / "checkpoints")
    reader = formats.open_reader(tmp_path / "checkpoints" / "ckpt-0", allow_pickle=True)
    vocab = reader.vocab()
    assert vocab is not None
    assert (vocab.pad_id, vocab.bos_id, vocab.eos_id, vocab.unk_id, vocab.add_bos) == (0, 1, 2, 3, False)
    out = tmp_path / "grok.gguf"
    command = ["convert", str(tmp_path / "checkpoints"), "--to", "gguf", "-o", str(out), "--allow-pickle", "--quiet"]
    assert run(command) == 0
    assert formats.open_reader(out).vocab() == vocab

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.tokenizer.oracles import config, judge, texts
from tests.formats.tokenizer.training import byte_level, sentencepiece_model
from weightsmith.errors import IntegrityError, UnsupportedError, UsageError
from weightsmith.formats.tokenizer import encoder, from_folder, patterns
from weightsmith.formats.tokenizer.encoder import merge_by_score
from weightsmith.formats.tokenizer.pieces import BYTE_PIECES
from weightsmith.types import Vocab

SPECIALS = ("<s>", "</s>", "<|pad|>")


def spm_vocab(folder: Path, **options: object) -> Vocab:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    vocab = from_folder(folder, config(900))
    assert vocab is not None
    return vocab


@pytest.mark.parametrize("pattern", patterns.PATTERNS, ids=lambda pattern: pattern.name)
def test_every_pattern_encodes_as_llama_cpp(pattern: patterns.Pattern, tmp_path: Path) -> None:
    vocab = byte_level(pattern.name)
    reference, own = judge(vocab, tmp_path), encoder(vocab)
    for text in texts(1200, 21, SPECIALS):
        assert own.encode(text) == reference.encode(text, ends=True), repr(text)


def test_bytes_without_a_token_block_merges_and_vanish(tmp_path: Path) -> None:
    vocab = byte_level("smollm", drop="ĄñcĖ")
    reference, own = judge(vocab, tmp_path), encoder(vocab)
    assert own.encode("\x04", add_bos=False) == []
    for text in texts(1500, 22):
        assert own.encode(text, add_bos=False) == reference.encode(text), repr(text)


def test_user_defined_tokens_are_cut_out_longest_first(tmp_path: Path) -> None:
    tokens = ("  ", "    ", "<tool>", "<tool>x", "\n\n", "quick", "</s", "日本")
    vocab = byte_level("gpt-2", user_defined=tokens)
    reference, own = judge(vocab, tmp_path), encoder(vocab)
    for text in texts(1500, 23, (*SPECIALS, "<tool>", "<tool>x", "<tool>xx", "     ")):
        assert own.encode(text) == reference.encode(text, ends=True), repr(text)


def test_texts_that_llama_cpp_takes_for_control_tokens_are_plain_text(tmp_path: Path) -> None:
    vocab = byte_level("gpt-2", user_defined=("<|im_end|>", "<|channel|>", "<EOT>"))
    vocab.types[vocab.tokens.index("<|channel|>")] = 3
    reference, own = judge(vocab, tmp_path), encoder(vocab)
    for text in ("a<|im_end|>b", "a<|channel|>b", "<EOT>"):
        assert own.encode(text) == reference.encode(text, ends=True)
    assert len(own.encode("<|channel|>")) == 1
    assert len(own.encode("<|im_end|>")) > 1


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"user_defined_symbols": ["<tool>", "12"]}])
def test_sentencepiece_encodes_as_llama_cpp(options: dict[str, object], tmp_path: Path) -> None:
    vocab = spm_vocab(tmp_path / "spm", **options)
    reference, own = judge(vocab, tmp_path), encoder(vocab)
    for text in texts(2000, 24, (*SPECIALS, "<tool>", " <tool> ")):
        assert own.encode(text) == reference.encode(text, ends=True), repr(text)


def test_equal_scores_take_the_slow_path_and_still_match(tmp_path: Path) -> None:
    vocab = spm_vocab(tmp_path / "spm")
    vocab.scores = [-1000.0] * len(vocab.tokens)
    reference, own = judge(vocab, tmp_path), encoder(vocab)
    assert own.slow
    for text in texts(1500, 25, SPECIALS):
        assert own.encode(text) == reference.encode(text, ends=True), repr(text)


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.text("abc", min_size=2, max_size=5), min_size=1, max_size=12, unique=True),
    text=st.text("abcd", max_size=24),
)
def test_merges_from_scores_do_what_scores_do(pieces: list[str], text: str) -> None:
    """Rank-driven merging against the plain score-driven loop, on vocabularies made to overlap."""
    tokens = ["<unk>", *BYTE_PIECES, *"abc"]
    # Pieces are made in the order of their length, as training makes them: both parts of a piece exist before it.
    for piece in sorted(pieces, key=len):
        if any(piece[:cut] in tokens and piece[cut:] in tokens for cut in range(1, len(piece))):
            tokens.append(piece)
    types = [2] + [6] * 256 + [1] * (len(tokens) - 257)
    scores = [-float(index) for index in range(len(tokens))]
    vocab = Vocab("llama", tokens, types, scores=scores, add_space_prefix=False)
    table = {token: index for index, token in enumerate(tokens)}
    assert encoder(vocab).encode(text) == merge_by_score(text, table, scores)


def test_beginning_and_end(tmp_path: Path) -> None:
    vocab = byte_level("llama-bpe")
    vocab.add_eos = True
    reference, own = judge(vocab, tmp_path), encoder(vocab)
    assert own.encode("x") == reference.encode("x", ends=True) == [0, *own.encode("x", add_bos=False), 1]
    assert own.encode("x", add_bos=True) == [0, *own.encode("x", add_bos=False)]
    assert own.encode("") == reference.encode("", ends=True) == [0, 1]
    vocab.bos_id = None
    with pytest.raises(IntegrityError, match="beginning"):
        own.encode("x")


def test_decode_gives_the_text_back(tmp_path: Path) -> None:
    for vocab in (byte_level("gpt-2", user_defined=("<tool>",)), spm_vocab(tmp_path / "spm")):
        own = encoder(vocab)
        for text in texts(500, 26, ("<tool>",)):
            if "\u2581" not in text:
                assert own.decode(own.encode(text)) == text


@pytest.mark.slow
def test_two_megabytes_take_seconds(tmp_path: Path) -> None:
    text = "".join(texts(60_000, 27))[:2_000_000]
    for vocab in (byte_level("llama-bpe"), spm_vocab(tmp_path / "spm")):
        own = encoder(vocab)
        begun = time.monotonic()
        ids = own.encode(text)
        assert time.monotonic() - begun < 30
        assert ids == judge(vocab, tmp_path).encode(text, ends=True)


def test_vocabularies_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    def broken(**changes: object) -> Vocab:
        vocab = byte_level("gpt-2", size=420)
        for name, value in changes.items():
            setattr(vocab, name, value)
        return vocab

    for changes in (
        {"types": [1]},
        {"bos_id": 10**6},
        {"bos_id": -1},
        {"scores": [1.0]},
        {"scores": [float("nan")] * 420},
    ):
        with pytest.raises(IntegrityError):
            encoder(broken(**changes))
    twice = broken()
    twice.tokens[5] = twice.tokens[6]
    with pytest.raises(IntegrityError, match="occurs 2 times"):
        encoder(twice)
    with pytest.raises(UnsupportedError, match="no-such"):
        encoder(broken(pre="no-such"))
    with pytest.raises(UnsupportedError, match="byte pieces"):
        encoder(Vocab("llama", ["a"], [1], scores=[0.0]))
    with pytest.raises(UsageError, match="surrogates"):
        encoder(broken()).encode("\ud800")


def test_merges_of_tokens_that_do_not_exist_follow_llama_cpp(tmp_path: Path) -> None:
    vocab = byte_level("gpt-2")
    gone = vocab.merges[3]
    index = vocab.tokens.index("".join(gone))
    vocab.tokens[index] = "[GONE]"
    reference, own = judge(vocab, tmp_path), encoder(vocab)
    for text in texts(800, 28):
        assert own.encode(text) == reference.encode(text, ends=True), repr(text)


@pytest.mark.parametrize("name", ["gpt-2", "llama"])
def test_control_tokens_in_the_text_where_asked_for(name: str, tmp_path: Path) -> None:
    vocab = spm_vocab(tmp_path / "spm") if name == "llama" else byte_level(name, user_defined=("<tool>", "</s"))
    reference, own = judge(vocab, tmp_path), encoder(vocab)
    for text in texts(1000, 26, (*SPECIALS, "<tool>", "<unk>", "<s></s>", "</s>a")):
        assert own.encode(text, add_bos=False, special=True) == reference.encode(text, special=True), repr(text)

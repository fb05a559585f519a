"""Original tokenizer files (ranks of Llama 3, tekken.json, SentencePiece) against the libraries they were made for.

Three judges: the vendor's library on its own file, the tokenizers library on the tokenizer.json that is written for it,
and llama.cpp on the GGUF. The first two agree on every text. llama.cpp's form of the tekken pattern knows no marks and
no case beyond ASCII, so it cuts a few texts with those elsewhere; without them it agrees too.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.tokenizer.oracles import PLAIN_POOLS, config, judge, read_vocab, texts
from tests.native import byte_ranks, write_ranks, write_tekken
from tests.tiny import LLAMA3_PATTERN
from weightsmith.errors import IntegrityError, UnsupportedError, WeightsmithError
from weightsmith.formats.tokenizer import encoder, from_folder, patterns, to_files, verify
from weightsmith.formats.tokenizer.alphabet import to_bytes
from weightsmith.formats.tokenizer.ranks import merges_of
from weightsmith.formats.tokenizer.tiktoken import special_tokens
from weightsmith.types import RopeScaling, Vocab

N = 5000
SCALED = RopeScaling("llama3", 8.0)
Encode = Callable[[str], list[int]]


def varied(vocab: Vocab, seed: int) -> list[str]:
    """Texts of every kind, and texts strung together from the vocabulary's own tokens."""
    return texts(N, seed, extra=tuple(vocab.tokens[-30:])) + verify.texts_for(vocab)


def read(folder: Path, size: int, **changes: Any) -> Vocab:
    vocab = from_folder(folder, config(size, **changes))
    assert vocab is not None
    return vocab


def compare(vocab: Vocab, encode: Encode, folder: Path, *, llama_cpp_differs: int) -> list[str]:
    """Hold the three judges against each other; the texts that llama.cpp tokenizes in another way than the library."""
    samples = varied(vocab, 21)
    expected = [encode(text) for text in samples]
    assert verify.differing(samples, expected, verify.rebuilt(vocab, samples)) == []
    llama_cpp = judge(vocab, folder)
    found = [llama_cpp.encode(text) for text in samples]
    assert verify.differing(samples, found, verify.as_llama_cpp(vocab, samples)) == []
    others = [text for text, own, other in zip(samples, expected, found, strict=True) if own != other]
    assert len(others) <= llama_cpp_differs
    return others


@pytest.fixture(scope="session")
def llama3_file() -> Path:
    path = os.environ.get("WEIGHTSMITH_LLAMA3_TOKENIZER")
    if not path:
        pytest.skip("WEIGHTSMITH_LLAMA3_TOKENIZER does not name Llama 3's tokenizer.model (in the wheel llama-models)")
    return Path(path)


@pytest.mark.slow
def test_llama_3_tokenizes_as_tiktoken_and_as_llama_cpp(llama3_file: Path, tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    (tmp_path / "tokenizer.model").write_bytes(llama3_file.read_bytes())
    vocab = read(tmp_path, 128256, rope_scaling=SCALED)
    ranks = {
        base64.b64decode(word): int(rank) for word, rank in map(bytes.split, llama3_file.read_bytes().splitlines())
    }
    source = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    compare(vocab, source.encode_ordinary, tmp_path, llama_cpp_differs=0)
    known = {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128004: "<|finetune_right_pad_id|>"}
    known |= {128006: "<|start_header_id|>", 128007: "<|end_header_id|>", 128008: "<|eom_id|>", 128009: "<|eot_id|>"}
    known |= {
        128010: "<|python_tag|>",
        128002: "<|reserved_special_token_0|>",
        128255: "<|reserved_special_token_247|>",
    }
    assert {id_: vocab.tokens[id_] for id_ in known} == known
    assert (vocab.bos_id, vocab.eos_id, vocab.pad_id, vocab.add_bos) == (128000, 128001, 128004, True)


@pytest.mark.slow
def test_llama_3_is_the_vocabulary_that_llama_cpp_ships(
    llama3_file: Path, llama_cpp_tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(llama3_file.read_bytes())
    vocab = read(tmp_path, 128256)
    shipped = llama_cpp_tree / "models" / "ggml-vocab-llama-bpe.gguf"
    theirs = read_vocab(shipped)
    assert (vocab.tokens, vocab.bos_id, vocab.eos_id, vocab.pre) == (theirs.tokens, theirs.bos_id, 128001, "llama-bpe")
    assert set(vocab.merges) < set(theirs.merges), "theirs lists every way to split a token"
    gold = [line.split() for line in Path(f"{shipped}.out").read_text().splitlines()]
    inputs = Path(f"{shipped}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    encode = encoder(vocab).encode
    for text, ids in zip(inputs, gold, strict=False):
        assert encode(text, add_bos=False) == [int(id_) for id_ in ids], text


def test_the_special_tokens_of_llama_3() -> None:
    old, new = special_tokens(since_3_1=False), special_tokens(since_3_1=True)
    assert len(set(old)) == len(set(new)) == 256
    assert old[2:10] == [
        *(f"<|reserved_special_token_{n}|>" for n in range(4)),
        *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    ]
    assert (old[10], old[255], new[11]) == (
        "<|reserved_special_token_5|>",
        "<|reserved_special_token_250|>",
        "<|reserved_special_token_3|>",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken_tokenizes_as_mistral_common_and_as_llama_cpp(name: str, tmp_path: Path) -> None:
    path, library = mistral_file(name), mistral_library("tekken", "Tekkenizer")
    (tmp_path / "tekken.json").write_bytes(path.read_bytes())
    vocab = read(tmp_path, 131072, family="mistral")
    source = library.from_file(path)

    def encode(text: str) -> list[int]:
        return source.encode(text, bos=False, eos=False)

    others = compare(vocab, encode, tmp_path, llama_cpp_differs=N // 100)
    assert all(any(category(mark)[0] == "M" for mark in text) for text in others), "a text without a mark"
    plain = texts(N, 22, pools=PLAIN_POOLS)
    llama_cpp = judge(vocab, tmp_path)
    assert [llama_cpp.encode(text) for text in plain] == [encode(text) for text in plain]
    assert [vocab.tokens[id_] for id_ in range(1000)] == [source.id_to_piece(id_) for id_ in range(1000)]
    ids = (vocab.bos_id, vocab.eos_id, vocab.unk_id, vocab.pad_id)
    assert ids == (source.bos_id, source.eos_id, source.unk_id, source.pad_id)
    assert all(to_bytes(vocab.tokens[id_]) == source.id_to_byte_piece(id_) for id_ in range(1000, 131072, 37))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("tokenizer.model.v1", 32000),
        ("mistral_instruct_tokenizer_240216.model.v2", 32768),
        ("mistral_instruct_tokenizer_240323.model.v3", 32768),
        ("mistral_instruct_tokenizer_241114.model.v7", 32768),
        ("mistral_instruct_tokenizer_241114.model.v7m1", 32768),
    ],
)
def test_sentencepiece_tokenizes_as_mistral_common_and_as_llama_cpp(name: str, size: int, tmp_path: Path) -> None:
    path, library = mistral_file(name), mistral_library("sentencepiece", "SentencePieceTokenizer")
    version = name.rpartition(".")[2]
    (tmp_path / f"tokenizer.model.{version}").write_bytes(path.read_bytes())
    vocab = read(tmp_path, size, family="mistral")
    source = library(path)
    samples = varied(vocab, 23)
    expected = [source.encode(text, bos=False, eos=False) for text in samples]
    llama_cpp = judge(vocab, tmp_path)
    found = [llama_cpp.encode(text) for text in samples]
    assert verify.differing(samples, found, verify.as_llama_cpp(vocab, samples)) == []
    assert verify.differing(samples, expected, found) == []
    assert verify.differing(samples, expected, verify.rebuilt(vocab, samples)) == []
    assert (vocab.bos_id, vocab.eos_id, vocab.add_bos) == (source.bos_id, source.eos_id, True)


def mistral_file(name: str) -> Path:
    package = pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    path = Path(package.__file__).parent / "data" / name
    if not path.exists():
        pytest.skip(f"this mistral-common has no {name}")
    return path


def mistral_library(module: str, name: str) -> Any:
    found = pytest.importorskip(f"mistral_common.tokens.tokenizers.{module}", reason="mistral-common is not installed")
    return getattr(found, name)


def test_small_ranks_as_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    tokens = byte_ranks()
    tokens += [b"quick", b"xyzzy", b" world"]  # made by no merge
    write_ranks(tmp_path / "tokenizer.model", tokens)
    vocab = read(tmp_path, len(tokens) + 256)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    source = tiktoken.Encoding("tiny", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    compare(vocab, source.encode_ordinary, tmp_path, llama_cpp_differs=0)
    assert len(vocab.merges) < len(tokens) - 256, "some tokens are made by no merge"


def test_a_tekken_of_listed_special_tokens(tmp_path: Path) -> None:
    tokens, pattern = byte_ranks(), patterns.by_name("tekken").trained[0]
    path = write_tekken(tmp_path / "tekken.json", tokens, pattern=pattern, special=8)
    raw = json.loads(path.read_text())
    named = ["<unk>", "<s>", "</s>", "<pad>", "[THINK]"]
    raw["special_tokens"] = [{"rank": n, "token_str": text, "is_control": n < 4} for n, text in enumerate(named)]
    raw["config"]["version"] = "v13"
    path.write_text(json.dumps(raw))
    vocab = read(tmp_path, len(tokens) - 3 + 8)
    assert vocab.tokens[:8] == [*named, "<SPECIAL_5>", "<SPECIAL_6>", "<SPECIAL_7>"]
    assert vocab.types[:9] == [3] * 8 + [1]
    assert (vocab.bos_id, vocab.eos_id, vocab.unk_id, vocab.pad_id) == (1, 2, 0, 3)
    assert vocab.tokens[8 + 65] == "A"
    assert encoder(vocab).encode("[THINK]A") == [1, *encoder(vocab).encode("[THINK]A", add_bos=False)]
    assert 4 not in encoder(vocab).encode("[THINK]")
    del raw["special_tokens"]
    path.write_text(json.dumps(raw))
    with pytest.raises(IntegrityError, match="special_tokens are missing"):
        read(tmp_path, len(tokens) - 3 + 8)


def test_both_survive_hugging_faces_form(tmp_path: Path) -> None:
    tokens = byte_ranks()
    write_ranks(tmp_path / "tokenizer.model", tokens)
    (tmp_path / "chat_template.jinja").write_text("{{ x }}\r\n", newline="")
    ranks = read(tmp_path, len(tokens) + 256)
    (tmp_path / "tokenizer.model").unlink()
    write_tekken(tmp_path / "tekken.json", tokens, pattern=patterns.by_name("tekken").trained[0])
    tekken = read(tmp_path, len(tokens) - 3 + 24)
    for vocab in (ranks, tekken):
        folder = tmp_path / vocab.pre
        folder.mkdir()
        size = len(vocab.tokens)
        for name, content in to_files(vocab, config(size)).items():
            (folder / name).write_bytes(content)
        assert read(folder, size) == vocab
        assert vocab.chat_template == "{{ x }}\r\n"


def test_a_tokenizer_json_comes_first(tmp_path: Path) -> None:
    tokens = byte_ranks()
    write_ranks(tmp_path / "tokenizer.model", tokens)
    vocab = read(tmp_path, len(tokens) + 256)
    for name, content in to_files(vocab, config(len(vocab.tokens))).items():
        (tmp_path / name).write_bytes(content)
    write_tekken(tmp_path / "tekken.json", tokens, pattern="x")
    assert read(tmp_path, len(vocab.tokens)) == vocab


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (b"IQ== 0\nIg== 2\n", IntegrityError, "rank"),
        (b"IQ== 0\n!! 1\n", IntegrityError, "base64"),
        (b"IQ== 0\nIg==\n", IntegrityError, "rank"),
        (b"IQ== 0\n\nIg== 1\n", IntegrityError, "rank"),
        (b"IQ== 0\n" * 4, IntegrityError, "rank"),
        (b"IQ== 0\n" + b"Ig== 1\n", UnsupportedError, "tiktoken"),
    ],
)
def test_damaged_ranks(lines: bytes, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(lines)
    with pytest.raises(error, match=message):
        read(tmp_path, 257)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": lambda tokens: tokens[1:]}, "no tokens"),
        ({"tokens": lambda tokens: [*tokens, tokens[-1]]}, "twice"),
        ({"tokens": lambda tokens: [*tokens, b""]}, "rank|empty"),
        ({"tokens": lambda tokens: [*tokens, b"a" * 5000]}, "longer"),
        ({"tokens": lambda tokens: [*tokens, *(b"%04d" % n * 1000 for n in range(20))]}, "far longer"),
    ],
)
def test_ranks_that_are_no_vocabulary(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tokens = change["tokens"](byte_ranks())
    with pytest.raises(IntegrityError, match=message):
        merges_of(tokens, path=tmp_path)


def test_llama_4_is_refused(tmp_path: Path) -> None:
    tokens = byte_ranks()
    write_ranks(tmp_path / "tokenizer.model", tokens)
    with pytest.raises(UnsupportedError, match="256 special tokens"):
        read(tmp_path, len(tokens) + 2048)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config": None}, IntegrityError, "config"),
        ({"pattern": r"\w+"}, UnsupportedError, "not known"),
        ({"default_vocab_size": "9"}, IntegrityError, "default_vocab_size"),
        ({"default_num_special_tokens": 1 << 30}, IntegrityError, "default_num_special_tokens"),
        ({"default_vocab_size": 9}, IntegrityError, "belong together"),
        ({"special_tokens": [{"rank": 1, "token_str": "x"}]}, IntegrityError, "order"),
        ({"special_tokens": [{"rank": 0, "token_str": ""}]}, IntegrityError, "without text"),
        ({"special_tokens": [{"rank": 0, "token_str": "A"}]}, IntegrityError, "is also"),
        ({"special_tokens": 5}, IntegrityError, "no list"),
        ({"vocab": []}, IntegrityError, "fewer"),
        ({"vocab": [5] * 1000}, IntegrityError, "damaged"),
        ({"vocab": [{"rank": 0, "token_bytes": "\u00e9"}] * 1000}, IntegrityError, "base64"),
    ],
)
def test_damaged_tekken(change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    tokens = byte_ranks()
    path = write_tekken(tmp_path / "tekken.json", tokens, pattern=patterns.by_name("tekken").trained[0])
    raw = json.loads(path.read_text())
    for key, value in change.items():
        (raw if key in ("config", "vocab", "special_tokens") else raw["config"])[key] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(error, match=message):
        read(tmp_path, len(tokens) - 3 + 24)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_files_end_in_an_error_of_ours(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokens = byte_ranks()
    folder = tmp_path_factory.mktemp("mutated")
    if data.draw(st.booleans()):
        path, size = write_ranks(folder / "tokenizer.model", tokens), len(tokens) + 256
    else:
        path = write_tekken(folder / "tekken.json", tokens, pattern=patterns.by_name("tekken").trained[0])
        size = len(tokens) - 3 + 24
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        vocab = from_folder(folder, config(size))
    except WeightsmithError:
        return
    assert vocab is not None
    assert len(vocab.tokens) == size

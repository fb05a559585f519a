from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.formats.gguf import rawgguf as raw
from tests.formats.gguf.tinymodel import tiny_config, tiny_vocab, write_ours
from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats import gguf as container
from weightsmith.formats.gguf.metadata import Metadata
from weightsmith.formats.gguf.parse import read_header
from weightsmith.formats.gguf.vocab import read_vocab
from weightsmith.types import Vocab

MODEL = "tokenizer.ggml.model"


def spm_vocab() -> Vocab:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581the", "e"]
    tokens += [f"[PAD{n}]" for n in range(280 - len(tokens))]
    types = [2, 3, 3] + [6] * 256 + [1, 1] + [5] * (280 - 261)
    scores = [0.0] * 259 + [-1.0, -2.5] + [-10000.0] * (280 - 261)
    return Vocab(
        model="llama",
        tokens=tokens,
        types=types,
        scores=scores,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        add_bos=True,
        chat_template="x\n",
    )


@pytest.mark.parametrize(
    "vocab",
    [
        tiny_vocab(),
        spm_vocab(),
        replace(tiny_vocab(), pre="tekken", add_eos=True, pad_id=279, unk_id=3, chat_template=None),
        replace(tiny_vocab(), pre="something new", ignore_merges=False, add_bos=False),
        replace(spm_vocab(), add_space_prefix=False, add_bos=False),
    ],
)
def test_tokenizer_survives(vocab: Vocab, tmp_path: Path) -> None:
    path = write_ours(tmp_path / "a.gguf", tiny_config(bos_token_id=None, eos_token_ids=()), vocab=vocab)
    with container.open_reader(path) as reader:
        assert reader.vocab() == vocab


def test_the_pattern_name_may_be_overridden(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "a.gguf", tiny_config(), vocab=replace(tiny_vocab(), pre="?", ignore_merges=False))
    with container.open_reader(path) as reader:
        assert reader.vocab("tekken") == replace(tiny_vocab(), pre="tekken")


def read(path: Path, *keys: bytes) -> Vocab | None:
    path.write_bytes(raw.gguf(keys))
    return read_vocab(Metadata(read_header(path)))


def test_no_tokenizer(tmp_path: Path) -> None:
    assert read(tmp_path / "a.gguf") is None
    assert read(tmp_path / "b.gguf", raw.text(MODEL, "no_vocab")) is None


def test_defaults(tmp_path: Path) -> None:
    tokens = raw.texts("tokenizer.ggml.tokens", ["a", "b", "c"])
    merges = raw.texts("tokenizer.ggml.merges", ["a b", " x y"])
    found = read(tmp_path / "a.gguf", raw.text(MODEL, "gpt2"), tokens, merges)
    expected = Vocab("gpt2", ["a", "b", "c"], [1, 1, 1], [("a", "b"), (" x", "y")], pre="default")
    assert found == replace(expected, add_space_prefix=False)
    found = read(tmp_path / "b.gguf", raw.text(MODEL, "llama"), tokens)
    assert found == Vocab("llama", ["a", "b", "c"], [1, 1, 1], [], [0.0] * 3, "", 1, 2, 0, None, True)
    pre = raw.text("tokenizer.ggml.pre", "llama-bpe")
    found = read(tmp_path / "c.gguf", raw.text(MODEL, "gpt2"), tokens, merges, pre)
    assert found is not None
    assert (found.add_bos, found.ignore_merges) == (True, True)


def test_an_id_outside_the_vocabulary_counts_as_absent(tmp_path: Path) -> None:
    tokens = raw.texts("tokenizer.ggml.tokens", ["a", "b", "c"])
    pad = raw.u32("tokenizer.ggml.padding_token_id", 2**32 - 1)
    eos = raw.u32("tokenizer.ggml.eos_token_id", 3)
    found = read(tmp_path / "a.gguf", raw.text(MODEL, "llama"), tokens, pad, eos)
    assert found is not None
    assert (found.pad_id, found.eos_id) == (None, 2)


@pytest.mark.parametrize(
    ("keys", "kind", "named"),
    [
        ([raw.text(MODEL, "bert")], UnsupportedError, "'bert'"),
        ([raw.text(MODEL, "llama")], IntegrityError, "tokenizer.ggml.tokens"),
        ([raw.text(MODEL, "llama"), raw.u32("tokenizer.ggml.tokens", 3)], IntegrityError, "tokenizer.ggml.tokens"),
        ([raw.text(MODEL, "gpt2"), raw.texts("tokenizer.ggml.tokens", ["a"])], IntegrityError, "tokenizer.ggml.merges"),
        (
            [
                raw.text(MODEL, "gpt2"),
                raw.texts("tokenizer.ggml.tokens", ["a"]),
                raw.texts("tokenizer.ggml.merges", ["ab"]),
            ],
            IntegrityError,
            "tokenizer.ggml.merges",
        ),
        (
            [
                raw.text(MODEL, "llama"),
                raw.texts("tokenizer.ggml.tokens", ["a", "b"]),
                raw.key("tokenizer.ggml.token_type", 9, b"\5\0\0\0\1\0\0\0\0\0\0\0\1\0\0\0"),
            ],
            IntegrityError,
            "tokenizer.ggml.token_type",
        ),
        (
            [
                raw.text(MODEL, "llama"),
                raw.texts("tokenizer.ggml.tokens", ["a", "b"]),
                raw.key("tokenizer.ggml.scores", 9, b"\6\0\0\0\3\0\0\0\0\0\0\0" + bytes(12)),
            ],
            IntegrityError,
            "tokenizer.ggml.scores",
        ),
        ([raw.text(MODEL, "llama"), raw.texts("tokenizer.ggml.tokens", [b"\xff"])], IntegrityError, "ggml.tokens"),
    ],
)
def test_broken_tokenizers(keys: list[bytes], kind: type[Exception], named: str, tmp_path: Path) -> None:
    with pytest.raises(kind) as caught:
        read(tmp_path / "bad.gguf", *keys)
    assert "bad.gguf" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"types": [1]}, {"model": "llama"}, {"tokens": ["a"], "types": [1]}], ids=["types", "scores", "count"]
)
def test_a_tokenizer_that_does_not_fit_is_not_written(change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="tokens"):
        write_ours(tmp_path / "a.gguf", tiny_config(), vocab=replace(tiny_vocab(), **change))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "model", "pre", "counts", "flags"),
    [
        ("llama-bpe", "gpt2", "llama-bpe", (128256, 280147), (True, True)),
        ("llama-spm", "llama", "", (32000, 0), (True, False)),
        ("qwen2", "gpt2", "qwen2", (151936, 151387), (False, False)),
    ],
)
def test_vocabularies_of_real_models(
    llama_cpp_tree: Path, name: str, model: str, pre: str, counts: tuple[int, int], flags: tuple[bool, bool]
) -> None:
    with container.open_reader(llama_cpp_tree / "models" / f"ggml-vocab-{name}.gguf") as reader:
        vocab = reader.vocab()
    assert vocab is not None
    assert (vocab.model, vocab.pre) == (model, pre)
    assert (len(vocab.tokens), len(vocab.merges)) == counts
    assert (vocab.add_bos, vocab.ignore_merges) == flags

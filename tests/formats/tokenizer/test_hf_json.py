"""What is written must load in transformers and give llama.cpp's ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.formats.tokenizer.oracles import PLAIN_POOLS, POOLS, LlamaCpp, config, judge, read_vocab, texts
from tests.formats.tokenizer.training import byte_level, sentencepiece_model
from weightsmith.formats.tokenizer import encoder, from_folder, patterns, to_files
from weightsmith.types import Vocab

SPECIALS = ("<s>", "</s>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<unk>", "<|endoftext|>")
# What llama.cpp cuts otherwise than the models' own files (see patterns) needs text where they agree.
AGREE_EVERYWHERE = ("llama-bpe", "smollm", "starcoder", "gpt-2", "grok-2", "smaug-bpe")
AGREE_ON_PLAIN = ("tekken", "gpt-4o", "qwen2")


def load(vocab: Vocab, folder: Path, model_type: str = "llama") -> Any:
    """The vocabulary's files, as transformers loads them."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(exist_ok=True)
    for name, content in to_files(vocab, config(len(vocab.tokens))).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def disagreements(tokenizer: Any, reference: LlamaCpp, samples: list[str], *, special: bool) -> list[str]:
    found = []
    for text in samples:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
        if ids != reference.encode(text, special=special):
            found.append(text)
    return found


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@pytest.mark.parametrize("pre", AGREE_EVERYWHERE + AGREE_ON_PLAIN)
def test_byte_level_in_transformers_is_llama_cpp(pre: str, special: bool, tmp_path: Path) -> None:
    vocab = byte_level(pre, user_defined=("<tool>", "   "))
    tokenizer, reference = load(vocab, tmp_path / "hf"), judge(vocab, tmp_path)
    pools = POOLS if pre in AGREE_EVERYWHERE else PLAIN_POOLS
    samples = texts(1000, 31, (*SPECIALS, "<tool>"), pools=pools)
    assert disagreements(tokenizer, reference, samples, special=special) == []
    assert tokenizer("Hello")["input_ids"] == reference.encode("Hello", ends=True)


def test_tekken_is_written_as_trained_where_llama_cpp_differs(tmp_path: Path) -> None:
    """Marks and non-ASCII case: the file gets the trained pattern, the encoder stays with llama.cpp."""
    vocab = byte_level("tekken")
    library = json.loads(to_files(vocab, config(len(vocab.tokens)))["tokenizer.json"])
    assert patterns.steps(library["pre_tokenizer"]) == list(patterns.by_name("tekken").hf)
    tokenizer, reference = load(vocab, tmp_path / "hf"), judge(vocab, tmp_path)
    samples = texts(1000, 32)
    assert 0 < len(disagreements(tokenizer, reference, samples, special=False)) < 400
    assert [encoder(vocab).encode(text, add_bos=False) for text in samples] == [reference.encode(t) for t in samples]


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}], ids=["prefix", "no-prefix"])
def test_sentencepiece_in_transformers_is_llama_cpp(
    options: dict[str, Any], model_type: str, special: bool, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    vocab = from_folder(tmp_path, config(912))
    assert vocab is not None
    tokenizer, reference = load(vocab, tmp_path / "hf", model_type), judge(vocab, tmp_path)
    samples = texts(1000, 33, SPECIALS)
    assert disagreements(tokenizer, reference, samples, special=special) == []
    assert tokenizer("Hello")["input_ids"] == reference.encode("Hello", ends=True)
    # Nor does the file know the padding up to the model's size.
    assert len(tokenizer) == 900


def test_the_written_tokenizer_model_is_the_trained_one(tmp_path: Path) -> None:
    data = sentencepiece_model(user_defined_symbols=["<tool>"])
    (tmp_path / "tokenizer.model").write_bytes(data)
    vocab = from_folder(tmp_path, config(900))
    assert vocab is not None
    written = to_files(vocab, config(900))["tokenizer.model"]
    ours, theirs = (sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in (written, data))
    assert [ours.encode(text) for text in texts(1000, 34)] == [theirs.encode(text) for text in texts(1000, 34)]


def test_no_tokenizer_model_for_what_sentencepiece_would_refuse(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    vocab = from_folder(tmp_path, config(900))
    assert vocab is not None
    vocab.types[5] = 2
    assert "tokenizer.model" not in to_files(vocab, config(900))


@pytest.mark.parametrize("template", ["{{ x }}\r\n{# é \u2028 #}\t", "", "a" * 100_000])
def test_the_chat_template_survives_byte_for_byte(template: str, tmp_path: Path) -> None:
    vocab = byte_level("gpt-2", size=420)
    vocab.chat_template = template
    tokenizer = load(vocab, tmp_path)
    assert tokenizer.chat_template == template
    again = from_folder(tmp_path, config(len(vocab.tokens)))
    assert again is not None
    assert again.chat_template == template


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken", "smollm", "gpt-2", "qwen2", "deepseek-llm", "falcon"])
def test_a_vocabulary_comes_back_as_it_was(pre: str, tmp_path: Path) -> None:
    vocab = byte_level(pre, user_defined=("<tool>", "  "), drop="ñÀ")
    vocab.chat_template, vocab.add_eos = "{{ messages }}", True
    for name, content in to_files(vocab, config(len(vocab.tokens))).items():
        (tmp_path / name).write_bytes(content)
    assert from_folder(tmp_path, config(len(vocab.tokens))) == vocab


@pytest.mark.slow
def test_the_demo_model_on_ten_thousand_texts(demo_gguf: Path, tmp_path: Path) -> None:
    vocab = read_vocab(demo_gguf)
    reference, own = LlamaCpp(demo_gguf), encoder(vocab)
    tokenizer = load(vocab, tmp_path)
    samples = texts(10_000, 35, SPECIALS)
    for special in (False, True):
        assert disagreements(tokenizer, reference, samples, special=special) == []
    assert [text for text in samples if own.encode(text) != reference.encode(text, ends=True)] == []
    assert tokenizer.chat_template == vocab.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    vocab.scores = []
    assert from_folder(tmp_path, config(len(vocab.tokens))) == vocab

"""Vocabularies of released models: those in llama.cpp's tree, with its gold tokenizations, and Mistral's."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from tests.formats.tokenizer.oracles import LlamaCpp, config, judge, read_vocab, texts
from tests.formats.tokenizer.test_hf_json import disagreements, load
from weightsmith.formats.tokenizer import encoder, from_folder

SPECIALS = (
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<unk>",
)
TREE = (
    *("llama-bpe", "llama-spm", "gpt-2", "starcoder", "refact", "falcon", "qwen2", "qwen35", "deepseek-llm"),
    *("deepseek-coder", "phi-3"),
)
MISTRAL = {
    "v1": ("tokenizer.model.v1", 32000),
    "v2": ("mistral_instruct_tokenizer_240216.model.v2", 32768),
    "v3": ("mistral_instruct_tokenizer_240323.model.v3", 32768),
    "v7": ("mistral_instruct_tokenizer_241114.model.v7", 32768),
}


def tree_file(tree: Path, name: str) -> Path:
    path = tree / "models" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is not in llama.cpp's tree")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", TREE)
def test_the_encoder_gives_the_gold_tokenizations(name: str, llama_cpp_tree: Path) -> None:
    path = tree_file(llama_cpp_tree, name)
    own, reference = encoder(read_vocab(path)), LlamaCpp(path)
    inputs = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    outputs = path.with_suffix(".gguf.out").read_text().splitlines()
    assert inputs.pop().strip() == ""  # the list ends with its separator
    assert len(inputs) == len(outputs) > 30
    for text, gold in zip(inputs, outputs, strict=True):
        assert own.encode(text, add_bos=False) == [int(id_) for id_ in gold.split()], repr(text)
    for text in texts(2000, 51, SPECIALS):
        assert own.encode(text, add_bos=False) == reference.encode(text), repr(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm"])
def test_llama_in_transformers_is_llama_cpp(name: str, llama_cpp_tree: Path, tmp_path: Path) -> None:
    path = tree_file(llama_cpp_tree, name)
    vocab, reference = read_vocab(path), LlamaCpp(path)
    tokenizer = load(vocab, tmp_path)
    for special in (False, True):
        assert disagreements(tokenizer, reference, texts(5000, 52, SPECIALS), special=special) == []
    again = from_folder(tmp_path, config(len(vocab.tokens)))
    assert again is not None
    assert (again.pre, again.tokens, again.types, again.merges) == (vocab.pre, vocab.tokens, vocab.types, vocab.merges)
    assert again.scores == vocab.scores


@pytest.mark.slow
def test_llama_2_scores_made_from_ranks_give_llama_cpps_ids(llama_cpp_tree: Path, tmp_path: Path) -> None:
    path = tree_file(llama_cpp_tree, "llama-spm")
    vocab, reference = read_vocab(path), LlamaCpp(path)
    load(vocab, tmp_path / "hf")
    sentencepiece = pytest.importorskip("sentencepiece")
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "hf" / "tokenizer.model"))
    (tmp_path / "hf" / "tokenizer.model").unlink()
    made = from_folder(tmp_path / "hf", config(len(vocab.tokens)))
    assert made is not None
    assert made.scores != vocab.scores
    other = judge(made, tmp_path)
    for text in texts(5000, 53, SPECIALS):
        assert other.encode(text) == reference.encode(text) == library.encode(text), repr(text)


@pytest.mark.slow
@pytest.mark.parametrize("version", MISTRAL)
def test_mistral_is_the_same_everywhere(version: str, tmp_path: Path) -> None:
    """SentencePiece, llama.cpp on a GGUF made from it, our encoder, and transformers on the files we write."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mistral-common, whose wheel carries the models, is not installed")
    import sentencepiece

    name, size = MISTRAL[version]
    shutil.copy(Path(spec.submodule_search_locations[0]) / "data" / name, tmp_path / "tokenizer.model")
    vocab = from_folder(tmp_path, config(size))
    assert vocab is not None
    assert (len(vocab.tokens), vocab.bos_id, vocab.eos_id, vocab.unk_id) == (size, 1, 2, 0)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    reference, own = judge(vocab, tmp_path), encoder(vocab)
    tokenizer = load(vocab, tmp_path / "hf", "mistral")
    samples = texts(4000, 54, SPECIALS)
    for text in samples:
        assert own.encode(text) == reference.encode(text, ends=True), repr(text)
        assert original.encode(text) == reference.encode(text), repr(text)
    for special in (False, True):
        assert disagreements(tokenizer, reference, samples, special=special) == []

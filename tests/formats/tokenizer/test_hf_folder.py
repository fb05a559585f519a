from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.formats.tokenizer.oracles import config, judge, texts
from tests.formats.tokenizer.training import byte_level, sentencepiece_model
from weightsmith.errors import IntegrityError, UnsafeInputError, UnsupportedError
from weightsmith.formats.tokenizer import encoder, from_folder, to_files
from weightsmith.types import Vocab

Json = dict[str, Any]


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    """A folder with a small byte-level tokenizer, 420 tokens."""
    return fill(tmp_path / "bpe", byte_level("llama-bpe", size=416))


@pytest.fixture
def spm(tmp_path: Path) -> Path:
    """A folder with a small SentencePiece vocabulary in both forms, 900 tokens."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "tokenizer.model").write_bytes(sentencepiece_model())
    vocab = from_folder(tmp_path / "raw", config(900))
    assert vocab is not None
    return fill(tmp_path / "spm", vocab)


def fill(folder: Path, vocab: Vocab) -> Path:
    folder.mkdir()
    for name, content in to_files(vocab, config(len(vocab.tokens))).items():
        (folder / name).write_bytes(content)
    return folder


def change(folder: Path, name: str, **changes: Any) -> Json:
    path = folder / name
    value = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps(value))
    return value


def read(folder: Path, vocab_size: int, **options: Any) -> Vocab:
    vocab = from_folder(folder, config(vocab_size), **options)
    assert vocab is not None
    return vocab


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert from_folder(tmp_path, config(10)) is None


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_other_forms_are_named_and_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedError, match=name):
        from_folder(tmp_path, config(10))


def test_the_original_llama_3_file_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(UnsupportedError, match="tiktoken"):
        from_folder(tmp_path, config(10))


def test_added_tokens_holes_and_padding(bpe: Path) -> None:
    raw = json.loads((bpe / "tokenizer.json").read_text())
    n = len(raw["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] += [
        {"id": n + 1, "content": "<|new|>", "special": True, **flags},
        {"id": n + 3, "content": "  two", "special": False, **flags},
    ]
    raw["model"]["vocab"][f"[PAD{n}]"] = n  # the library itself wants no hole before an added token
    raw["model"]["vocab"][f"[PAD{n + 2}]"] = n + 2
    raw["model"]["vocab"]["<|new|>"], raw["model"]["vocab"]["  two"] = n + 1, n + 3
    (bpe / "tokenizer.json").write_text(json.dumps(raw))
    vocab = read(bpe, n + 8)
    assert vocab.tokens[n + 1 :] == ["<|new|>", f"[PAD{n + 2}]", "  two", *(f"[PAD{n + i}]" for i in range(4, 8))]
    assert [vocab.types[i] for i in (n + 1, n + 3, n + 4, n + 7)] == [3, 4, 5, 5]
    assert encoder(vocab).encode("a  two", add_bos=False)[-1] == n + 3


def test_added_tokens_that_only_the_small_files_know(spm: Path) -> None:
    (spm / "tokenizer.json").unlink()
    (spm / "added_tokens.json").write_text(json.dumps({"<|new|>": 901, "tool": 902}))
    change(spm, "tokenizer_config.json", additional_special_tokens=["<|new|>"])
    vocab = read(spm, 904)
    assert vocab.tokens[899:] == [vocab.tokens[899], "[PAD900]", "<|new|>", "tool", "[PAD903]"]
    assert vocab.types[900:] == [5, 3, 4, 5]
    decoder = {"900": {"content": "<|x|>", "special": True}, "903": {"content": "plain", "special": False}}
    change(spm, "tokenizer_config.json", added_tokens_decoder=decoder)
    vocab = read(spm, 904)
    assert vocab.types[900:] == [3, 3, 4, 4]


def test_more_tokens_than_the_model_has_rows(bpe: Path, spm: Path) -> None:
    for folder in (bpe, spm):
        with pytest.raises(IntegrityError, match="vocab_size is 300"):
            from_folder(folder, config(300))


@pytest.mark.parametrize("vocab_size", [0, -1, 1 << 40])
def test_absurd_vocabulary_sizes(vocab_size: int, bpe: Path) -> None:
    with pytest.raises(IntegrityError, match="vocab_size"):
        from_folder(bpe, config(vocab_size))


def test_special_ids_come_from_the_tokenizer_then_from_config(bpe: Path) -> None:
    change(bpe, "tokenizer_config.json", bos_token={"content": "</s>"}, eos_token="<|pad|>", pad_token=None)
    change(bpe, "special_tokens_map.json", bos_token="<s>", pad_token="<s>")
    change(bpe, "tokenizer.json", post_processor=None)
    vocab = read(bpe, 420)
    assert (vocab.bos_id, vocab.eos_id, vocab.pad_id, vocab.unk_id) == (1, 2, 0, None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (bpe / name).unlink()
    vocab = from_folder(bpe, config(420, bos_token_id=5, eos_token_ids=(7, 8), pad_token_id=9))
    assert vocab is not None
    assert (vocab.bos_id, vocab.eos_id, vocab.pad_id, vocab.unk_id) == (5, 7, 9, None)


def test_the_template_decides_what_is_added(bpe: Path) -> None:
    byte_level_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    change(bpe, "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    assert (read(bpe, 420).add_bos, read(bpe, 420).add_eos) == (True, False)
    change(bpe, "tokenizer.json", post_processor=byte_level_step)
    assert (read(bpe, 420).add_bos, read(bpe, 420).add_eos) == (False, True)
    (bpe / "tokenizer_config.json").unlink()
    assert (read(bpe, 420).add_bos, read(bpe, 420).add_eos) == (False, False)


def test_chat_templates(bpe: Path) -> None:
    named = [7, {"name": ["x"]}, {"name": "tool_use", "template": "t"}, {"name": "default", "template": "d\r\n"}]
    change(bpe, "tokenizer_config.json", chat_template=named)
    assert read(bpe, 420).chat_template == "d\r\n"
    (bpe / "chat_template.jinja").write_bytes("é\r\n".encode())
    assert read(bpe, 420).chat_template == "é\r\n"
    (bpe / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(IntegrityError, match="UTF-8"):
        from_folder(bpe, config(420))
    (bpe / "chat_template.jinja").unlink()
    change(bpe, "tokenizer_config.json", chat_template=3)
    with pytest.raises(IntegrityError, match="chat_template"):
        from_folder(bpe, config(420))


def test_an_unknown_pattern_is_shown_and_can_be_overridden(bpe: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = json.loads((bpe / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,2}|\p{L}+"
    (bpe / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedError) as caught:
        from_folder(bpe, config(420))
    for part in (r"\p{N}{1,2}|\p{L}+", "--pre NAME", "llama-bpe", "tokenizer.json"):
        assert part in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert read(bpe, 420, pre="llama-bpe").pre == "llama-bpe"
    assert "test texts are tokenized differently" in caplog.text
    with pytest.raises(UnsupportedError, match="no-such"):
        from_folder(bpe, config(420), pre="no-such")


def test_a_recognised_structure_is_not_trusted(bpe: Path) -> None:
    """The same cuts, but something else changes the ids: the comparison must notice."""
    flags = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": False, "special": False}
    raw = json.loads((bpe / "tokenizer.json").read_text())
    raw["added_tokens"].append({"id": raw["model"]["vocab"]["e"], "content": "e", **flags})
    (bpe / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedError, match="test texts are tokenized differently"):
        from_folder(bpe, config(420))


def test_old_merges_as_joined_strings(bpe: Path) -> None:
    before = read(bpe, 420)
    raw = json.loads((bpe / "tokenizer.json").read_text())
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    (bpe / "tokenizer.json").write_text(json.dumps(raw))
    assert read(bpe, 420) == before


def test_tokenizer_model_is_preferred_only_if_the_two_agree(spm: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_scores = read(spm, 900)
    (spm / "tokenizer.model").write_bytes(sentencepiece_model(size=700))
    with caplog.at_level(logging.WARNING):
        from_ranks = read(spm, 900)
    assert "is ignored" in caplog.text
    assert from_ranks.tokens == with_scores.tokens
    assert from_ranks.scores != with_scores.scores


def test_a_tokenizer_model_that_is_not_read_is_no_obstacle(spm: Path, caplog: pytest.LogCaptureFixture) -> None:
    (spm / "tokenizer.model").write_bytes(sentencepiece_model(size=700, normalization_rule_name="nmt_nfkc"))
    with caplog.at_level(logging.WARNING):
        assert read(spm, 900).model == "llama"
    assert "tokenizer.json is used instead" in caplog.text


def test_ranks_become_scores_with_which_llama_cpp_agrees(spm: Path, tmp_path: Path) -> None:
    """tokenizer.json alone: scores are made up, ids must not be."""
    library = Tokenizer.from_file(str(spm / "tokenizer.json"))
    library.encode_special_tokens = True
    (spm / "tokenizer.model").unlink()
    vocab = read(spm, 900)
    assert len(set(vocab.scores)) > 500
    reference = judge(vocab, tmp_path)
    for text in texts(2000, 41, ("<s>", "</s>")):
        assert reference.encode(text) == library.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_is_the_same_vocabulary(scheme: str, spm: Path, tmp_path: Path) -> None:
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    change(spm, "tokenizer.json", normalizer=None, pre_tokenizer=step)
    (spm / "tokenizer.model").unlink()
    vocab = read(spm, 900)
    assert vocab.add_space_prefix == (scheme != "never")
    library, reference = Tokenizer.from_file(str(spm / "tokenizer.json")), judge(vocab, tmp_path)
    library.encode_special_tokens = True
    for text in texts(1000, 42):
        if not text.startswith((" ", "\u2581")):
            assert reference.encode(text) == library.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"model_type": "unigram"}, "not BPE"),
        ({"byte_fallback": False}, "byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites text"),
        ({"remove_extra_whitespaces": True}, "extra spaces"),
    ],
)
def test_sentencepiece_models_that_gguf_cannot_express(options: Json, fault: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(size=700, **options))
    with pytest.raises(UnsupportedError, match=fault):
        from_folder(tmp_path, config(700))


def test_user_defined_pieces_keep_sentencepieces_ids(tmp_path: Path) -> None:
    """llama.cpp puts a space behind user-defined tokens, SentencePiece does not (Grok-1 has digits and newlines so)."""
    symbols = ["\n", "\n\n", "\t", "0", "1", "2", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "<|separator|>"]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(user_defined_symbols=symbols))
    vocab = read(tmp_path, 900)
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    reference = judge(vocab, tmp_path)
    samples = [text for text in texts(1000, 43) if "\x00" not in text]
    assert [text for text in samples if reference.encode(text) != original.encode(text)] == []


def test_links_out_of_the_folder_are_refused(bpe: Path, tmp_path: Path) -> None:
    shutil.move(bpe / "tokenizer.json", tmp_path / "elsewhere.json")
    (bpe / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UnsafeInputError):
        from_folder(bpe, config(420))


CUTS: dict[str, Json] = {
    "no model": {"model": None},
    "model is a list": {"model": []},
    "vocab is a list": {"vocab": ["a"]},
    "vocab is empty": {"vocab": {}},
    "id is text": {"vocab": {"a": "0"}},
    "id is a bool": {"vocab": {"a": True}},
    "id is a float": {"vocab": {"a": 1.0}},
    "id is negative": {"vocab": {"a": -1}},
    "id is huge": {"vocab": {"a": 10**30}},
    "two tokens, one id": {"vocab": {"a": 5, "b": 5}},
    "merges are text": {"merges": "a b"},
    "merge of three": {"merges": [["a", "b", "c"]]},
    "merge of numbers": {"merges": [[1, 2]]},
    "merge of nothing": {"merges": [["", "a"]]},
    "merge of unknown tokens": {"merges": [["a", "\U0001f600"]]},
    "merge that makes no token": {"merges": [["!", "ñ"]]},
    "merge without a space": {"merges": ["ab"]},
    "added tokens are an object": {"added_tokens": {}},
    "added token is text": {"added_tokens": ["a"]},
    "added token without text": {"added_tokens": [{"id": 3}]},
    "added token without id": {"added_tokens": [{"content": "x"}]},
    "added token elsewhere": {"added_tokens": [{"content": "<s>", "id": 7}]},
    "two added tokens, one id": {"added_tokens": [{"content": "x", "id": 419}, {"content": "y", "id": 419}]},
    "template without tokens": {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": 3}]}},
    "template of numbers": {"post_processor": {"type": "TemplateProcessing", "single": [3], "special_tokens": {}}},
}


@pytest.mark.parametrize("name", CUTS)
def test_damaged_files_are_named(name: str, bpe: Path) -> None:
    raw = json.loads((bpe / "tokenizer.json").read_text())
    for key, value in CUTS[name].items():
        (raw["model"] if key in ("vocab", "merges") else raw)[key] = value
    (bpe / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(IntegrityError) as caught:
        from_folder(bpe, config(420))
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"model": ' + b"[" * 100_000,
        b'{"model": 1, "model": 2}',
        b'{"model": {"vocab": {"a": 0, "a": 1}}}',
        b'{"model": ' + b"9" * 10_000 + b"}",
        b'{"a": [' + b"[]," * 9_000_000 + b"[]]}",
    ],
    ids=["empty", "cut", "list", "utf16", "deep", "twice", "token twice", "long number", "many arrays"],
)
def test_what_is_no_sound_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(IntegrityError):
        from_folder(tmp_path, config(420))


def test_files_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        with (tmp_path / name).open("wb") as file:
            file.truncate((256 << 20) + 1)
        with pytest.raises(IntegrityError, match="expected at most"):
            from_folder(tmp_path, config(420))
        (tmp_path / name).unlink()


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"hello world\n"])
def test_damaged_sentencepiece_models(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(IntegrityError):
        from_folder(tmp_path, config(420))


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", 7])
def test_other_algorithms_are_unsupported(kind: object, bpe: Path) -> None:
    raw = json.loads((bpe / "tokenizer.json").read_text())
    raw["model"]["type"] = kind
    (bpe / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedError, match="expected BPE"):
        from_folder(bpe, config(420))


def test_the_original_is_stopped_by_the_clock(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightsmith.formats.tokenizer import verify

    monkeypatch.setattr(verify, "WALL_SECONDS", 0.01)
    with pytest.raises(IntegrityError, match="takes more than"):
        from_folder(bpe, config(420))


@pytest.mark.parametrize("regex", ["(", r"(?:(?:\s|\s\s|\s)*)*q"], ids=["broken", "exponential"])
def test_an_overridden_file_may_hold_any_expression(regex: str, bpe: Path) -> None:
    """It runs in a process of its own; what fails there is an error here."""
    raw = json.loads((bpe / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    (bpe / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(IntegrityError, match="the tokenizer cannot be used"):
        from_folder(bpe, config(420), pre="llama-bpe")


def test_settings_of_the_wrong_type_do_no_harm(bpe: Path) -> None:
    change(bpe, "tokenizer_config.json", bos_token=7, add_bos_token="yes", additional_special_tokens={"a": 1})
    assert read(bpe, 420).bos_id == 0
    change(bpe, "tokenizer_config.json", added_tokens_decoder={"x": {"content": "y"}})
    with pytest.raises(IntegrityError, match="added_tokens_decoder"):
        from_folder(bpe, config(420))
    (bpe / "tokenizer_config.json").write_text("[]")
    with pytest.raises(IntegrityError, match=r"tokenizer_config\.json"):
        from_folder(bpe, config(420))

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from weightsmith.errors import UnsupportedError
from weightsmith.formats.tokenizer import alphabet, patterns
from weightsmith.formats.tokenizer.corpus import corpus


def test_the_byte_alphabet_is_that_of_the_tokenizers_library() -> None:
    assert sorted(alphabet.BYTE_TO_CHAR) == sorted(pre_tokenizers.ByteLevel.alphabet())
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("a b\n", "é中😀", "\x00\x7f\xad"):
        assert alphabet.to_chars(text.encode()) == step.pre_tokenize_str(text)[0][0]
        assert alphabet.to_bytes(alphabet.to_chars(text.encode())) == text.encode()
    assert alphabet.BYTE_TO_CHAR[32] == "\u0120"
    assert alphabet.to_bytes("a b") is None


def test_names_are_unique_and_found() -> None:
    listed = [name for pattern in patterns.PATTERNS for name in (pattern.name, *pattern.aliases)]
    assert len(listed) == len(set(listed))
    assert {"llama-bpe", "tekken", "smollm", "gpt-2", "qwen2", "starcoder", "refact", "falcon", "phi-2"} <= set(listed)
    assert patterns.by_name("llama3").name == "llama-bpe"
    assert patterns.by_name("").name == "default"
    with pytest.raises(UnsupportedError, match="no-such") as caught:
        patterns.by_name("no-such")
    assert "llama-bpe" in str(caught.value)


def test_steps_read_every_notation_of_a_cut() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert patterns.steps(byte_level) == [patterns.GPT2]
    assert patterns.steps({**byte_level, "use_regex": False}) == []
    assert patterns.steps({**byte_level, "add_prefix_space": True}) == ["<ByteLevel>"]
    digits = {"type": "Digits", "individual_digits": True}
    assert patterns.steps({"type": "Sequence", "pretokenizers": [digits, byte_level]}) == [r"\p{N}", patterns.GPT2]
    split = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
    assert patterns.steps(split) == ["x"]
    assert patterns.steps({**split, "behavior": "Removed", "invert": True}) == ["x"]
    for change in ({"behavior": "MergedWithNext"}, {"invert": True}, {"pattern": {"String": "x"}}, {"pattern": 3}):
        assert patterns.steps({**split, **change}) == ["<Split>"]
    assert patterns.steps({"type": "Sequence", "pretokenizers": 3}) == ["<Sequence>"]
    assert patterns.steps(None) == []


@pytest.mark.parametrize("pattern", patterns.PATTERNS, ids=lambda pattern: pattern.name)
def test_each_pattern_or_one_before_it_is_matched_by_its_training_form(pattern: patterns.Pattern) -> None:
    found = patterns.match(list(pattern.trained), ignore_merges=pattern.ignore_merges, nfc=pattern.nfc)
    assert found is not None
    assert (found.trained, found.ignore_merges, found.nfc) == (pattern.trained, pattern.ignore_merges, pattern.nfc)


def test_what_decides_between_patterns_with_the_same_cut() -> None:
    llama3 = list(patterns.by_name("llama-bpe").trained)
    assert [patterns.match(llama3, ignore_merges=flag, nfc=False).name for flag in (True, False)] == [
        "llama-bpe",
        "smaug-bpe",
    ]
    qwen = list(patterns.by_name("qwen2").trained)
    assert [patterns.match(qwen, ignore_merges=False, nfc=flag).name for flag in (True, False)] == ["qwen2", "grok-2"]
    assert patterns.match(llama3, ignore_merges=True, nfc=True) is None


def test_the_corpus_is_the_same_every_time_and_tells_all_patterns_apart() -> None:
    texts = corpus()
    assert texts == corpus()
    assert len(texts) > 300
    cuts = {}
    for pattern in patterns.PATTERNS:
        steps = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pre_tokenizers_regex(regex), "isolated") for regex in pattern.trained]
        )
        cuts.setdefault(pattern.trained, tuple(tuple(steps.pre_tokenize_str(text)) for text in texts))
    assert len(set(cuts.values())) == len(cuts)


def pre_tokenizers_regex(regex: str) -> object:
    from tokenizers import Regex

    return Regex(regex)

"""Random damage: the parsers answer with an error of ours or a result, never with another exception."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.tokenizer.oracles import config
from tests.formats.tokenizer.training import byte_level, sentencepiece_model
from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.tokenizer import patterns, to_files
from weightsmith.formats.tokenizer import sentencepiece_model as proto
from weightsmith.formats.tokenizer.hf_json_model import Parsed, parse

PATH = Path("tokenizer.json")
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@cache
def sound() -> str:
    vocab = byte_level("llama-bpe", size=420)
    return to_files(vocab, config(len(vocab.tokens)))["tokenizer.json"].decode()


@cache
def sound_model() -> bytes:
    return sentencepiece_model(size=700)


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) below `value`, a few of each container."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items[:12]:
        found.append((value, key))
        places(inner, found)
    return found


@settings(max_examples=300, deadline=None)
@given(junk=JUNK, where=st.integers(0, 10**6), delete=st.booleans())
def test_any_part_of_tokenizer_json_may_be_anything(junk: Any, where: int, delete: bool) -> None:
    raw = copy.deepcopy(json.loads(sound()))
    spots = places(raw, [])
    container, key = spots[where % len(spots)]
    if delete:
        del container[key]
    else:
        container[key] = junk
    try:
        assert isinstance(parse(raw, PATH), Parsed)
        patterns.steps(raw.get("pre_tokenizer"))
    except (IntegrityError, UnsupportedError) as error:
        assert "tokenizer.json" in str(error)  # noqa: PT017  (either outcome is right)


@settings(max_examples=200, deadline=None)
@given(where=st.integers(0, 10**6), data=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_any_byte_of_tokenizer_model_may_be_anything(where: int, data: bytes, cut: bool) -> None:
    content = sound_model()
    where %= len(content)
    damaged = content[:where] if cut else content[:where] + data + content[where + len(data) :]
    try:
        model = proto.read(damaged, Path("tokenizer.model"))
        assert len(model.tokens) == len(model.scores) == len(model.types) > 0
    except (IntegrityError, UnsupportedError) as error:
        assert "tokenizer.model" in str(error)  # noqa: PT017  (either outcome is right)

"""Windows by the two conventions, against a plain loop."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evals import letters
from tests.evals.memory_reader import tiny
from weightsmith.errors import IntegrityError, UnsupportedError, UsageError
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.windows import cut, tokenize


def plain(tokens: list[int], ctx: int, convention: str, bos: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """(windows, targets) as the two programs write them."""
    windows, targets = [], []
    for start in range(0, len(tokens) - ctx + 1, ctx):
        window = tokens[start : start + ctx]
        if convention == "llama.cpp":
            if bos is not None:
                window = [bos, *window[1:]]
            targets.append([window[j + 1] for j in range(ctx // 2, ctx - 1)])
        else:
            targets.append(window[1:])
        windows.append(window)
    return windows, targets


@given(
    tokens=st.lists(st.integers(0, 90), max_size=80),
    ctx=st.integers(4, 12),
    convention=st.sampled_from(["llama.cpp", "paper"]),
    bos=st.sampled_from([None, 1]),
)
def test_windows_are_those_of_a_plain_loop(tokens: list[int], ctx: int, convention: str, bos: int | None) -> None:
    ruler = Ruler(convention=convention, ctx=ctx)
    needed = ctx * (2 if convention == "llama.cpp" else 1)
    if len(tokens) < needed:
        with pytest.raises(UsageError, match=f"{len(tokens)} tokens.* needs {needed}"):
            cut(tokens, ruler, bos_id=bos)
        return
    found = cut(tokens, ruler, bos_id=bos)
    windows, targets = plain(tokens, ctx, convention, bos)
    assert found.tokens.tolist() == windows
    assert found.targets.tolist() == targets
    assert found.scored == sum(map(len, targets))
    kept = tokens[: len(windows) * ctx]
    assert found.sha256 == hashlib.sha256(struct.pack(f"<{len(kept)}i", *kept)).hexdigest()


def test_sizes_by_convention() -> None:
    tokens = list(range(90)) * 60
    llama, paper = cut(tokens, Ruler()), cut(tokens, Ruler(convention="paper"))
    assert (llama.tokens.shape, llama.targets.shape) == ((10, 512), (10, 255))
    assert (paper.tokens.shape, paper.targets.shape) == ((2, 2048), (2, 2047))
    assert len(cut(tokens, Ruler(max_windows=3)).tokens) == 3
    assert len(cut(tokens, Ruler(max_windows=30)).tokens) == 10


@pytest.mark.parametrize(
    "wrong", [{"convention": "hf"}, {"ctx": 3}, {"ctx": -512}, {"threads": 0}, {"max_windows": 0}, {"memory": 0}]
)
def test_a_ruler_refuses_nonsense(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Ruler(**wrong)  # type: ignore[arg-type]


def test_tokenize(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    assert tokenize(tiny(tokenizer=letters.vocab()), " !\n"[:2], Ruler()) == ([1, 2, 3], 1)
    assert tokenize(tiny(tokenizer=letters.vocab(add_bos=False)), " !", Ruler()) == ([2, 3], None)
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        tokenize(tiny(), " !", Ruler())
    with pytest.raises(IntegrityError, match=r"id 97.* 96 rows"):
        tokenize(tiny(tokenizer=letters.vocab(100)), "!" + chr(32 + 95), Ruler())


def test_one_trailing_newline_is_no_part_of_the_text_for_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    vocab = letters.vocab()
    vocab.tokens[95] = "\n"
    reader = tiny(tokenizer=vocab)
    assert tokenize(reader, "!\n\n", Ruler())[0] == [1, 3, 95]
    assert tokenize(reader, "!\n\n", Ruler(convention="paper"))[0] == [1, 3, 95, 95]

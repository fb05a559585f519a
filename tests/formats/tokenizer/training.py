"""Small tokenizers, trained on the spot."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.formats.tokenizer.oracles import texts
from weightsmith.formats.tokenizer import alphabet, patterns
from weightsmith.formats.tokenizer.rebuild import tokenizer_json
from weightsmith.types import Vocab

PROSE = [Path(__file__).read_text(encoding="utf-8"), patterns.__doc__ or ""] * 3
SPECIALS = ("<s>", "</s>", "<|pad|>")


def byte_level(pre: str, *, size: int = 900, user_defined: tuple[str, ...] = (), drop: str = "") -> Vocab:
    """A byte-level BPE with the pattern `pre`; `drop` leaves those characters out of the byte alphabet."""
    pattern = patterns.by_name(pre)
    description = tokenizer_json(Vocab("gpt2", list(alphabet.BYTE_TO_CHAR), [1] * 256, pre=pre))
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = Tokenizer.from_str(json.dumps(description)).pre_tokenizer
    letters = [char for char in pre_tokenizers.ByteLevel.alphabet() if char not in drop]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=letters, special_tokens=list(SPECIALS), show_progress=False
    )
    library.train_from_iterator([text for text in texts(1500, 11) if not set(drop) & set(text)] + PROSE, trainer)
    model = json.loads(library.to_str())["model"]
    known = {text: id_ for text, id_ in model["vocab"].items() if not set(drop) & set(text)}
    tokens = [*sorted(known, key=known.__getitem__), *user_defined]
    merges = [tuple(pair) for pair in model["merges"] if "".join(pair) in known]
    assert len(merges) > size // 3
    if pattern.ignore_merges:
        # Tokens that no merge makes: only the words that equal them may use them.
        tokens += [text for text in ("ĠABCXYZ", "Ġquickworld", "xyzzyx", "worlddef") if text not in known]
    types = [3 if text in SPECIALS else 4 if text in user_defined else 1 for text in tokens]
    return Vocab(
        "gpt2",
        tokens,
        types,
        merges=[(left, right) for left, right in merges],
        pre=pattern.name,
        bos_id=0,
        eos_id=1,
        pad_id=2,
        add_bos=pattern.add_bos,
        add_space_prefix=False,
        ignore_merges=pattern.ignore_merges,
    )


def sentencepiece_model(*, size: int = 900, **options: Any) -> bytes:
    """A SentencePiece BPE model in Llama's manner, as bytes of a tokenizer.model."""
    out = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": size,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.995,
        "minloglevel": 2,
    }
    lines = [line for text in texts(1500, 12) + PROSE for line in text.splitlines() if "\x00" not in line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **settings | options)
    return out.getvalue()

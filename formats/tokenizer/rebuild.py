"""A `Vocab` as a tokenizer.json: the tokenizer the model was trained with, as far as a `Vocab` can say.

"gpt2" becomes a byte-level BPE behind the pattern's cuts. Where the vocabulary has no token for some byte (SmolLM2
lacks 21, mostly ones that UTF-8 never uses), the tokenizers library would drop it and let its neighbours merge, while
in llama.cpp it keeps them apart; one more cut around such bytes makes both the same and changes no other text.

"llama" becomes a BPE over whole texts with byte fallback: spaces turn into U+2581, one is put in front of every piece
of text between special tokens (SentencePiece's add_dummy_prefix), merges come from the scores.

Every token is an entry of the model's table, also those matched as added tokens, so that ids cannot shift.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from weightsmith.errors import UnsupportedError
from weightsmith.formats.tokenizer import patterns
from weightsmith.formats.tokenizer.pieces import (
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    check,
    has_order,
    merges_from_scores,
    missing_bytes,
    trailing_fillers,
    user_defined,
)
from weightsmith.types import Vocab

log = logging.getLogger(__name__)

Json = dict[str, Any]


def tokenizer_json(vocab: Vocab) -> Json:
    """The tokenizer.json of a vocabulary, as an object; IntegrityError or UnsupportedError if it cannot be one."""
    check(vocab)
    n = len(vocab.tokens) - trailing_fillers(vocab)
    table = {text: id_ for id_, text in enumerate(vocab.tokens[:n])}
    parts = _byte_level(vocab, table) if vocab.model == "gpt2" else _sentencepiece(vocab, table)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocab, n),
        "post_processor": _post_processor(vocab),
        **parts,
    }


def _added_tokens(vocab: Vocab, n: int) -> list[Json]:
    ordinary = set(user_defined(vocab))
    return [
        {
            "id": id_,
            "content": vocab.tokens[id_],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": id_ not in ordinary,
        }
        for id_ in range(n)
        if vocab.types[id_] in (UNKNOWN, CONTROL, USER_DEFINED) and vocab.tokens[id_]
    ]


def _post_processor(vocab: Vocab) -> Json | None:
    """What adds the beginning and end of a text."""
    ends = [id_ if wanted else None for id_, wanted in ((vocab.bos_id, vocab.add_bos), (vocab.eos_id, vocab.add_eos))]
    front, back = ([vocab.tokens[id_]] if id_ is not None else [] for id_ in ends)
    if not front and not back:
        return None

    def template(sequence: str, kind: int) -> list[Json]:
        special = [[{"SpecialToken": {"id": text, "type_id": kind}} for text in side] for side in (front, back)]
        return [*special[0], {"Sequence": {"id": sequence, "type_id": kind}}, *special[1]]

    used = {vocab.tokens[id_]: id_ for id_ in ends if id_ is not None}
    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": template("A", 0) + template("B", 1),
        "special_tokens": {text: {"id": text, "ids": [id_], "tokens": [text]} for text, id_ in used.items()},
    }


def split(regex: str, behavior: str = "Isolated") -> Json:
    """A step that cuts a text around the matches of `regex`."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False}


def guard(vocab: Vocab) -> Json | None:
    """The step that keeps bytes without a token from joining their neighbours; None if every byte has one."""
    absent = [char if char.isalnum() or not char.isascii() else "\\" + char for char in missing_bytes(vocab)]
    return split("[" + "".join(absent) + "]", "Removed") if absent else None


def _byte_level(vocab: Vocab, table: dict[str, int]) -> Json:
    pattern = patterns.by_name(vocab.pre)
    cuts = list(pattern.trained)
    # The usual spelling of the usual steps, so that other programs that compare structures recognise them too.
    plain = bool(cuts) and cuts[-1] == patterns.GPT2
    steps: list[Json] = [
        {"type": "Digits", "individual_digits": True} if regex == patterns.DIGIT else split(regex)
        for regex in (cuts[:-1] if plain else cuts)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": plain}
    steps.append(byte_level)
    if last := guard(vocab):
        steps.append(last)
    merges = [pair for pair in vocab.merges if pair[0] in table and pair[1] in table and "".join(pair) in table]
    if len(merges) != len(vocab.merges):
        log.warning("%d merges name tokens that do not exist and were left out", len(vocab.merges) - len(merges))
    ignore = vocab.ignore_merges or pattern.ignore_merges
    return {
        "normalizer": {"type": "NFC"} if pattern.nfc else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**byte_level, "use_regex": True},
        "model": {**_bpe(table, merges), "ignore_merges": ignore, "byte_fallback": False},
    }


def _sentencepiece(vocab: Vocab, table: dict[str, int]) -> Json:
    if not has_order(vocab):
        log.warning(
            "most scores of this vocabulary are equal: the order of merges was lost when its file was made, so the "
            "tokenizer written here may cut words differently"
        )
    to_mark: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    from_mark: Json = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [from_mark, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if vocab.add_space_prefix:
        normalizer: Json = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, to_mark]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    else:
        normalizer = to_mark
    unknown = [vocab.tokens[id_] for id_, kind in enumerate(vocab.types) if kind == UNKNOWN]
    merges = [pair for pair in merges_from_scores(vocab) if "".join(pair) in table]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            **_bpe(table, merges),
            "unk_token": unknown[0] if unknown else None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
        },
    }


def _bpe(table: dict[str, int], merges: list[tuple[str, str]]) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "vocab": table,
        # As pairs: a part may hold a space. Libraries from before 0.20 read only the joined form.
        "merges": [list(pair) for pair in merges],
    }


def build(description: Json) -> Any:
    """A `tokenizers.Tokenizer` from an object made here; UnsupportedError if the library will not have it."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    try:
        return Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception and nothing narrower
        raise UnsupportedError(f"the tokenizers library refuses this vocabulary: {str(error)[:300]}") from error

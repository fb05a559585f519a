"""tokenizer.json, read with suspicion: the model's table and merges, added tokens, what adds the ends of a text.

Two kinds of BPE are told apart: byte-level (a ByteLevel step; GPT-2, Llama 3, Mistral Nemo) and SentencePiece-style
(byte fallback, U+2581 for spaces; Llama 2, Mistral). The latter's merges came from scores, which are needed again: the
score of a piece is minus the rank of the first merge that makes it, so "highest score first" is "lowest rank first".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.tokenizer.patterns import has_byte_level
from weightsmith.formats.tokenizer.pieces import SPACE
from weightsmith.formats.tokenizer.settings import Added, token_id, token_text

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parsed:
    """A tokenizer.json. kind: as in `Vocab.model`. ends: token ids in front of and behind a text, None if not said."""

    path: Path
    kind: str
    table: dict[str, int]
    merges: list[tuple[str, str]]
    added: list[Added]
    unk_token: str | None
    ignore_merges: bool
    add_space_prefix: bool
    metaspace: bool
    ends: tuple[list[int], list[int]] | None
    raw: Json


def parse(raw: Json, path: Path) -> Parsed:
    """Check a tokenizer.json. IntegrityError if it contradicts itself, UnsupportedError if it is no BPE we know."""
    model = raw.get("model")
    if not isinstance(model, Mapping):
        raise IntegrityError("tokenizer.json has no model", path=path)
    kind = model.get("type", "BPE" if "merges" in model else "nothing")
    if kind != "BPE":
        raise UnsupportedError(f"a {str(kind)[:40]} tokenizer, expected BPE", path=path)
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedError(f"a BPE tokenizer with {option} cannot be expressed in GGUF", path=path)
    table = _table(model.get("vocab"), path)
    byte_level = has_byte_level(raw.get("pre_tokenizer"))
    if not byte_level and model.get("byte_fallback") is not True:
        raise UnsupportedError("neither a byte-level nor a SentencePiece-style BPE tokenizer", path=path)
    prefix, metaspace = (False, False) if byte_level else _space_prefix(raw, path)
    return Parsed(
        path=path,
        kind="gpt2" if byte_level else "llama",
        table=table,
        merges=_merges(model.get("merges"), table, path),
        added=_added(raw.get("added_tokens"), path),
        unk_token=token_text(model.get("unk_token")),
        ignore_merges=model.get("ignore_merges") is True,
        add_space_prefix=prefix,
        metaspace=metaspace,
        ends=_ends(raw.get("post_processor"), path),
        raw=raw,
    )


def _table(vocab: object, path: Path) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise IntegrityError("the model's vocab is no table of tokens", path=path)
    for text, id_ in vocab.items():
        token_id(id_, text, path=path)
    return vocab


def _merges(merges: object, table: Mapping[str, int], path: Path) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise IntegrityError("the model's merges are no list", path=path)
    found = []
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise IntegrityError(f"merge {rank} is {str(merge)[:80]!r}, expected two tokens", path=path)
        for part in (*pair, "".join(pair)):
            if part not in table:
                raise IntegrityError(f"merge {rank} needs the token {part[:80]!r}, which does not exist", path=path)
        found.append((pair[0], pair[1]))
    return found


def _added(entries: object, path: Path) -> list[Added]:
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise IntegrityError("added_tokens is no list", path=path)
    found: dict[int, Added] = {}
    for entry in entries:
        text = token_text(entry)
        if text is None or not isinstance(entry, Mapping):
            raise IntegrityError(f"an added token is {str(entry)[:80]}, expected an object with content", path=path)
        id_ = token_id(entry.get("id"), text, path=path)
        if id_ in found:
            raise IntegrityError(f"two added tokens have the id {id_}", path=path)
        found[id_] = Added(id_, text, entry.get("special") is True)
    return list(found.values())


def _space_prefix(raw: Mapping[str, Any], path: Path) -> tuple[bool, bool]:
    """(Whether a space goes in front of a text, whether a Metaspace step does it)."""
    normalizer, pre_tokenizer = raw.get("normalizer"), raw.get("pre_tokenizer")
    parts = _flat(normalizer, "normalizers")
    plain = [part for part in parts if part.get("type") == "Replace" and part.get("content") == SPACE]
    prepend = [part for part in parts if part.get("type") == "Prepend" and part.get("prepend") == SPACE]
    if plain and len(plain) + len(prepend) == len(parts) and not pre_tokenizer:
        return bool(prepend), False
    if not parts and isinstance(pre_tokenizer, Mapping) and pre_tokenizer.get("type") == "Metaspace":
        scheme = pre_tokenizer.get(
            "prepend_scheme", "always" if pre_tokenizer.get("add_prefix_space", True) else "never"
        )
        if scheme in ("always", "first", "never") and pre_tokenizer.get("replacement", SPACE) == SPACE:
            return scheme != "never", True
    found = [str(part.get("type"))[:40] for part in [*parts, *_flat(pre_tokenizer, "pretokenizers")]]
    raise UnsupportedError(
        f"a SentencePiece-style tokenizer with the steps {found}, expected Prepend and Replace, or Metaspace", path=path
    )


def _flat(step: object, inner: str) -> list[Mapping[str, Any]]:
    if not isinstance(step, Mapping):
        return []
    nested = step.get(inner)
    return [leaf for item in nested for leaf in _flat(item, inner)] if isinstance(nested, list) else [step]


def _ends(post_processor: object, path: Path) -> tuple[list[int], list[int]] | None:
    """Ids that the post-processor puts around a text, or None if it has no template."""
    for step in _flat(post_processor, "processors"):
        if step.get("type") == "TemplateProcessing":
            single, special = step.get("single"), step.get("special_tokens")
            if not isinstance(single, list) or not isinstance(special, Mapping):
                raise IntegrityError("the post-processor's template is damaged", path=path)
            return _around(single, special, path)
    return None


def _around(single: list[Any], special: Mapping[str, Any], path: Path) -> tuple[list[int], list[int]]:
    sides: tuple[list[int], list[int]] = ([], [])
    behind = 0
    for part in single:
        if isinstance(part, Mapping) and "Sequence" in part:
            behind = 1
            continue
        token = part.get("SpecialToken") if isinstance(part, Mapping) else None
        name = token.get("id") if isinstance(token, Mapping) else None
        entry = special.get(name) if isinstance(name, str) else None
        ids = entry.get("ids") if isinstance(entry, Mapping) else None
        if not isinstance(ids, list) or not ids:
            raise IntegrityError(f"the post-processor's template names {str(name)[:80]!r}, which it lacks", path=path)
        sides[behind].extend(token_id(id_, str(name), path=path) for id_ in ids)
    return sides

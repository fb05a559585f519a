"""A Hugging Face folder's tokenizer files to a `Vocab`.

Sources, best first: for a byte-level BPE, tokenizer.json; for a SentencePiece vocabulary, tokenizer.model, whose scores
are the real ones, as long as tokenizer.json has the same pieces under the same ids; else tokenizer.json alone. Added
tokens, special ids and the chat template come from the files around it. In the end the result is verified against
the original (see `verify`); `pre` turns a difference into a warning.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.tokenizer import patterns, sentencepiece_model, tekken, tiktoken, tok_json, verify
from weightsmith.formats.tokenizer.hf_json_model import Parsed, parse
from weightsmith.formats.tokenizer.pieces import (
    BYTE,
    BYTE_PIECES,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    check,
)
from weightsmith.formats.tokenizer.rebuild import guard
from weightsmith.formats.tokenizer.settings import Settings, optional, read_bytes, read_json
from weightsmith.formats.tokenizer.table import Table
from weightsmith.types import ModelConfig, Vocab

log = logging.getLogger(__name__)

MAX_TOKENS = 1 << 24
SPM_NAMES = ("tokenizer.model", *(f"tokenizer.model.v{version}" for version in ("7", "7m1", "3", "2", "1")))


def from_folder(folder: Path, config: ModelConfig, *, pre: str | None = None) -> Vocab | None:
    """Read the tokenizer in `folder`; None if there is none. `pre` names a pre-tokenizer that is not recognised.

    Raises IntegrityError (damaged, or not this model's), UnsupportedError (a kind that GGUF cannot express, or a
    pre-tokenizer that is not known) and UnsafeInputError (a link that leaves the folder).
    """
    if pre is not None:
        patterns.by_name(pre)
    if not 0 < config.vocab_size <= MAX_TOKENS:
        raise IntegrityError(f"vocab_size is {config.vocab_size}, expected at most {MAX_TOKENS}", path=folder)
    json_path = optional(folder, "tokenizer.json")
    model_path = next((path for name in SPM_NAMES if (path := optional(folder, name))), None)
    if json_path is None and (tekken_path := optional(folder, "tekken.json")):
        return tekken.from_file(tekken_path, config, pre=pre)
    if json_path is None and model_path is not None and tiktoken.is_ranks(model_path):
        return tiktoken.from_file(model_path, config, pre=pre)
    if json_path is None and model_path is None and (tok_path := optional(folder, tok_json.NAME)):
        return tok_json.from_file(tok_path, config, pre=pre)
    if json_path is None and model_path is None:
        _refuse_others(folder)
        return None
    settings = Settings(folder)
    parsed = parse(read_json(json_path), json_path) if json_path else None
    if parsed is not None and parsed.kind == "gpt2":
        return _byte_level(parsed, settings, config, pre)
    model = _read_model(model_path, spare=parsed is not None) if model_path else None
    if parsed is not None and model is not None and not _agree(parsed, model):
        log.warning("%s does not hold the pieces of %s and is ignored", model_path, json_path)
        model = None
    if model is not None and model_path is not None:
        return _from_model(model, model_path, parsed, settings, config, pre)
    if parsed is None:
        raise UnsupportedError("no tokenizer that can be read", path=folder)
    return _from_json(parsed, settings, config, pre)


def _read_model(path: Path, *, spare: bool) -> sentencepiece_model.Model | None:
    """The tokenizer.model at `path`; None if it is of a kind that is not read and there is a tokenizer.json as well."""
    try:
        return sentencepiece_model.read(read_bytes(path), path)
    except UnsupportedError as error:
        if not spare:
            raise
        log.warning("%s; tokenizer.json is used instead", error.message)
        return None


def _refuse_others(folder: Path) -> None:
    """Say so if the folder has a tokenizer, but of a form that is not read."""
    for name in ("vocab.json", "merges.txt"):
        if (folder / name).is_file():
            raise UnsupportedError(
                f"the only tokenizer here is {name}",
                path=folder,
                hint="Use a form of the checkpoint that has a tokenizer.json.",
            )


def _byte_level(parsed: Parsed, settings: Settings, config: ModelConfig, pre: str | None) -> Vocab:
    table = Table(config.vocab_size, spaced=False)
    for text, id_ in parsed.table.items():
        table.put(id_, text, NORMAL, 0.0, path=parsed.path)
    _add_tokens(table, parsed, settings)
    tokens, types, _ = table.close()
    vocab = Vocab(
        "gpt2", tokens, types, merges=parsed.merges, ignore_merges=parsed.ignore_merges, add_space_prefix=False
    )
    vocab.pre = pre or recognise(parsed, vocab)
    _finish(vocab, parsed, settings, config, special={})
    texts = verify.texts_for(vocab)
    expected = verify.original("json", parsed.path, texts)
    verify.demand(vocab, texts, expected, path=parsed.path, forced=pre is not None)
    return vocab


def recognise(parsed: Parsed, vocab: Vocab) -> str:
    """The GGUF name of a byte-level tokenizer.json's pre-tokenizer, by structure; UnsupportedError if none fits."""
    cuts = patterns.steps(parsed.raw.get("pre_tokenizer"))
    own = guard(vocab)
    if own is not None and cuts[-1:] == ["<Split>"] and parsed.raw["pre_tokenizer"]["pretokenizers"][-1] == own:
        cuts.pop()  # the step that `rebuild` adds for bytes without a token
    normalizer = parsed.raw.get("normalizer")
    nfc = normalizer == {"type": "NFC"}
    found = None
    if nfc or not normalizer:
        found = patterns.match(cuts, ignore_merges=parsed.ignore_merges, nfc=nfc)
    if found is None:
        shown = " then ".join(cut[:200] for cut in cuts) or "no cut at all"
        kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
        how = f"normalizer {str(kind)[:40]}, ignore_merges {parsed.ignore_merges}"
        raise UnsupportedError(
            f"the pre-tokenizer is not known: {shown} ({how})",
            path=parsed.path,
            hint=f"Name the one that fits with --pre NAME: {', '.join(patterns.names())}.",
        )
    return found.name


def _from_json(parsed: Parsed, settings: Settings, config: ModelConfig, pre: str | None) -> Vocab:
    """A SentencePiece-style tokenizer.json alone: scores from merge ranks."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(parsed.merges):
        first.setdefault("".join(pair), rank)
    unknown = parsed.unk_token or settings.special("unk")
    table = Table(config.vocab_size, spaced=True)
    last = len(parsed.merges)
    for text, id_ in parsed.table.items():
        if text in BYTE_PIECES:
            table.put(id_, text, BYTE, 0.0, path=parsed.path)
        elif text == unknown:
            table.put(id_, text, UNKNOWN, 0.0, path=parsed.path)
        else:
            # What no merge makes comes last, in the order of ids.
            table.put(id_, text, NORMAL, float(-first[text]) if text in first else -1.0 - last - id_, path=parsed.path)
    _add_tokens(table, parsed, settings)
    vocab = _sentencepiece(table, parsed.add_space_prefix)
    _finish(vocab, parsed, settings, config, special={})
    _verify_json(vocab, parsed, pre)
    return vocab


def _from_model(
    model: sentencepiece_model.Model,
    path: Path,
    parsed: Parsed | None,
    settings: Settings,
    config: ModelConfig,
    pre: str | None,
) -> Vocab:
    """A tokenizer.model, perhaps with a tokenizer.json that agrees with it."""
    as_told = _model_vocab(model, path, parsed, settings, config)
    if parsed is not None:
        _verify_json(as_told, parsed, pre)
        return as_told
    known = set(model.tokens)
    # SentencePiece does not know what the files beside the model added.
    foreign = [
        text
        for text, kind in zip(as_told.tokens, as_told.types, strict=True)
        if kind == USER_DEFINED and text not in known
    ]
    texts = [text for text in verify.texts_for(as_told) if not any(token in text for token in foreign)]
    expected = verify.original("spm", path, texts)
    if USER_DEFINED in model.types and verify.differing(texts, expected, verify.rebuilt(as_told, texts)):
        # llama.cpp puts a space behind every user-defined token, SentencePiece does not: try them as plain pieces.
        plain = replace(
            model,
            tokens=[
                text.replace(" ", SPACE) if kind == USER_DEFINED else text
                for text, kind in zip(model.tokens, model.types, strict=True)
            ],
            types=[NORMAL if kind == USER_DEFINED else kind for kind in model.types],
        )
        as_told = _model_vocab(plain, path, parsed, settings, config)
    verify.demand(as_told, texts, expected, path=path, forced=pre is not None)
    return as_told


def _model_vocab(
    model: sentencepiece_model.Model, path: Path, parsed: Parsed | None, settings: Settings, config: ModelConfig
) -> Vocab:
    table = Table(config.vocab_size, spaced=True)
    for id_, (text, kind, score) in enumerate(zip(model.tokens, model.types, model.scores, strict=True)):
        table.put(id_, text, kind, score, path=path)
    _add_tokens(table, parsed, settings)
    vocab = _sentencepiece(table, model.add_space_prefix)
    _finish(vocab, parsed, settings, config, special=model.special)
    return vocab


def _sentencepiece(table: Table, add_space_prefix: bool) -> Vocab:
    tokens, types, scores = table.close()
    return Vocab("llama", tokens, types, scores=scores, add_space_prefix=add_space_prefix)


def _add_tokens(table: Table, parsed: Parsed | None, settings: Settings) -> None:
    for token in parsed.added if parsed else ():
        table.add(token, path=parsed.path if parsed else settings.path, trusted=True)
    for token in settings.added():
        table.add(token, path=settings.path, trusted=parsed is None)


def _agree(parsed: Parsed, model: sentencepiece_model.Model) -> bool:
    """Whether every piece of the model has the same id in tokenizer.json, as a token or an added token."""
    known = {added.text: added.id for added in parsed.added} | parsed.table
    return all(id_ in (known.get(text), known.get(text.replace(" ", SPACE))) for id_, text in enumerate(model.tokens))


def _verify_json(vocab: Vocab, parsed: Parsed, pre: str | None) -> None:
    texts = verify.texts_for(vocab)
    if parsed.metaspace:
        # Metaspace adds no second space to a text that begins with one; SentencePiece and llama.cpp do.
        texts = [text for text in texts if not text.startswith((" ", SPACE))]
    expected = verify.original("json", parsed.path, texts)
    verify.demand(vocab, texts, expected, path=parsed.path, forced=pre is not None)


def _finish(
    vocab: Vocab,
    parsed: Parsed | None,
    settings: Settings,
    config: ModelConfig,
    *,
    special: dict[str, int | None],
) -> None:
    """Fill in special ids, what is added around a text, and the template."""
    ids = {text: id_ for id_, text in enumerate(vocab.tokens)}
    from_config = {
        "bos": config.bos_token_id,
        "eos": next(iter(config.eos_token_ids), None),
        "pad": config.pad_token_id,
    }
    if parsed is not None and parsed.unk_token in ids:
        special = {"unk": ids[parsed.unk_token], **special}
    for name in ("bos", "eos", "unk", "pad"):
        text = settings.special(name)
        found = ids.get(text) if text is not None else None
        if found is None:
            found = special.get(name) if special.get(name) is not None else from_config.get(name)
        setattr(vocab, f"{name}_id", found)
    if vocab.unk_id is None and UNKNOWN in vocab.types:
        vocab.unk_id = vocab.types.index(UNKNOWN)
    vocab.add_bos, vocab.add_eos = _added_ends(vocab, parsed, settings)
    vocab.chat_template = settings.chat_template()
    try:
        check(vocab)
    except IntegrityError as error:
        error.path = parsed.path if parsed else settings.folder
        raise


def _added_ends(vocab: Vocab, parsed: Parsed | None, settings: Settings) -> tuple[bool, bool]:
    if parsed is not None and parsed.ends is not None:
        front, back = parsed.ends
        if vocab.bos_id is None and len(front) == 1:
            vocab.bos_id = front[0]
        if vocab.eos_id is None and len(back) == 1:
            vocab.eos_id = back[0]
        if (front and front != [vocab.bos_id]) or (back and back != [vocab.eos_id]):
            log.warning(
                "%s: texts get the tokens %s and %s around them; only bos and eos are kept", parsed.path, front, back
            )
        return vocab.bos_id in front, vocab.eos_id in back
    # Llama's own tokenizer class begins every text with bos unless told otherwise.
    llama_class = str(settings.config.get("tokenizer_class", "")).startswith("LlamaTokenizer")
    add_bos = settings.flag("add_bos_token")
    if add_bos is None:
        add_bos = vocab.model == "llama" and (parsed is None or llama_class)
    return add_bos and vocab.bos_id is not None, bool(settings.flag("add_eos_token")) and vocab.eos_id is not None

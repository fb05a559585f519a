"""Proof that a `Vocab` says what the file said: both tokenize the same corpus.

The original file is run by `oracle` in a process of its own. What was rebuilt has to give the same ids for every text;
then the ids llama.cpp would give are compared too, and how often those differ is logged, because that is a property of
the program that will run the file and no fault of the conversion.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.tokenizer import oracle
from weightsmith.formats.tokenizer.alphabet import to_bytes
from weightsmith.formats.tokenizer.corpus import corpus
from weightsmith.formats.tokenizer.encoder import encoder
from weightsmith.formats.tokenizer.pieces import NORMAL, SPACE, USER_DEFINED
from weightsmith.formats.tokenizer.rebuild import build, tokenizer_json
from weightsmith.types import Vocab

log = logging.getLogger(__name__)

WALL_SECONDS = 300
Ids = list[list[int]]


def texts_for(vocab: Vocab) -> list[str]:
    """The corpus, with texts made of this vocabulary's own tokens."""
    return corpus([text for text in (_plain(vocab, id_) for id_ in range(len(vocab.tokens))) if text])


def _plain(vocab: Vocab, id_: int) -> str:
    text, kind = vocab.tokens[id_], vocab.types[id_]
    if kind not in (NORMAL, USER_DEFINED):
        return ""
    if vocab.model == "llama":
        return text.replace(SPACE, " ")
    data = to_bytes(text) if kind == NORMAL else None
    return text if data is None else data.decode("utf-8", "ignore")


def original(kind: Literal["json", "spm"], path: Path, texts: list[str]) -> Ids:
    """Ids of `texts` by the file at `path`; IntegrityError if the libraries cannot use it."""
    command = [sys.executable, "-P", oracle.__file__, kind, str(path)]
    try:
        result = subprocess.run(
            command, input=json.dumps(texts), capture_output=True, text=True, timeout=WALL_SECONDS, check=True
        )
        ids: Ids = json.loads(result.stdout)
    except subprocess.TimeoutExpired as error:
        raise IntegrityError(f"tokenizing a few hundred texts takes more than {WALL_SECONDS} s", path=path) from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines()[-1:] or [f"exit status {error.returncode}"]
        raise IntegrityError(f"the tokenizer cannot be used: {reason[0][:300]}", path=path) from error
    except ValueError as error:
        raise IntegrityError("the tokenizer cannot be used: no ids came back", path=path) from error
    if len(ids) != len(texts):
        raise IntegrityError(f"the tokenizer gave {len(ids)} answers to {len(texts)} texts", path=path)
    return ids


def rebuilt(vocab: Vocab, texts: list[str]) -> Ids:
    """Ids of `texts` by the tokenizer.json that would be written for `vocab`."""
    tokenizer = build(tokenizer_json(vocab))
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def as_llama_cpp(vocab: Vocab, texts: list[str]) -> Ids:
    """Ids of `texts` as llama.cpp gives them."""
    encode: Callable[..., list[int]] = encoder(vocab).encode
    return [encode(text, add_bos=False) for text in texts]


def differing(texts: list[str], expected: Ids, found: Ids) -> list[int]:
    """Indices of the texts with different ids, the shortest text first."""
    indices = [index for index, (one, other) in enumerate(zip(expected, found, strict=True)) if one != other]
    return sorted(indices, key=lambda index: (len(texts[index]), index))


def demand(vocab: Vocab, texts: list[str], expected: Ids, *, path: Path, forced: bool) -> None:
    """Raise UnsupportedError unless `vocab` gives the `expected` ids; a warning instead if `forced`."""
    found = rebuilt(vocab, texts)
    wrong = differing(texts, expected, found)
    if wrong:
        example = wrong[0]
        message = (
            f"rebuilt as {vocab.pre or 'SentencePiece'!r}, {len(wrong)} of {len(texts)} test texts are tokenized "
            f"differently, such as {texts[example][:60]!r}: {found[example][:12]}, expected {expected[example][:12]}"
        )
        if not forced:
            raise UnsupportedError(message, path=path, hint="Pass --pre NAME to accept the difference.")
        log.warning("%s: %s", path, message)
    own = differing(texts, expected, as_llama_cpp(vocab, texts))
    if len(own) > len(wrong):
        log.info("%s: llama.cpp itself tokenizes %d of %d test texts differently", path, len(own), len(texts))

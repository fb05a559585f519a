"""Chats written out by a model's own template.

A template comes with the model, so it is foreign code in the language of Jinja. It runs in Jinja's immutable sandbox,
and that in a process of its own that may use so much time and memory, has no environment and opens no file
(`chat_sandbox`). What templates are given is what transformers gives them: `messages`, `bos_token`, `eos_token`,
`add_generation_prompt` (false), `raise_exception`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.errors import UnsafeInputError, UnsupportedError
from weightsmith.types import Vocab

SECONDS = 60  # of processor time, and of waiting
SANDBOX = Path(__file__).with_name("chat_sandbox.py")


def render(chats: Sequence[Sequence[Mapping[str, Any]]], vocab: Vocab, *, where: str) -> str:
    """All chats, one after the other, as the model's template writes them.

    where: the model, for errors. Raises UnsupportedError (the template refuses a chat or is not valid) and
    UnsafeInputError (it takes more time, memory or text than any template needs).
    """
    request = {
        "template": vocab.chat_template,
        "chats": chats,
        "bos_token": _token(vocab, vocab.bos_id),
        "eos_token": _token(vocab, vocab.eos_id),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(SANDBOX), str(SECONDS)],
            input=json.dumps(request).encode(),
            capture_output=True,
            env={},
            check=False,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UnsafeInputError(f"the chat template ran for {SECONDS} s and was stopped", path=where) from error
    if done.returncode == 0:
        return str(json.loads(done.stdout)["text"])
    reason = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2][:300]
    if done.returncode == 1:
        raise UnsupportedError(f"the chat template cannot write these chats: {reason}", path=where)
    raise UnsafeInputError(f"the chat template was stopped ({done.returncode}): {reason}", path=where)


def _token(vocab: Vocab, id_: int | None) -> str:
    return vocab.tokens[id_] if id_ is not None else ""

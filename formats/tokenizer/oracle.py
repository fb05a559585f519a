"""The original tokenizer, run apart: a script that tokenizes texts with a downloaded file and prints the ids.

    python oracle.py json|spm FILE < texts.json > ids.json

A downloaded tokenizer.json holds regular expressions, and a hostile one could make the engine search for hours, use up
the memory, or abort in native code. So the libraries only ever see the file in this process, which has a limit on
processor time and on address space; its parent also stops it by the clock. It imports nothing of this package.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

CPU_SECONDS = 120
ADDRESS_SPACE = 8 << 30


def limit() -> None:
    """Bound this process."""
    for what, amount in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, ADDRESS_SPACE),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


def ids_by_tokenizers(file: str, texts: list[str]) -> list[list[int]]:
    """Ids without beginning and end, special tokens in the text not parsed."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    tokenizer = Tokenizer.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def ids_by_sentencepiece(file: str, texts: list[str]) -> list[list[int]]:
    """The same by SentencePiece."""
    from sentencepiece import SentencePieceProcessor  # noqa: PLC0415

    processor = SentencePieceProcessor(model_proto=Path(file).read_bytes())
    return [list(processor.encode(text)) for text in texts]


def main() -> None:
    """Read texts, write ids."""
    limit()
    kind, file = sys.argv[1:]
    texts = json.load(sys.stdin)
    ids = ids_by_tokenizers(file, texts) if kind == "json" else ids_by_sentencepiece(file, texts)
    json.dump(ids, sys.stdout)


if __name__ == "__main__":
    main()

"""Tokenizers: Hugging Face's files on one side, the container-independent `Vocab` on the other.

Two ids for one text are two different inputs to the model, and nothing crashes when they differ, so this package
proves its conversions instead of trusting them. `from_folder` recognises a pre-tokenizer by its structure and then
tokenizes a corpus with the original file and with what it rebuilt; `encoder` follows llama.cpp to the letter, its
deviations included, because that is the program which will run the GGUF; `to_files` writes what the model was trained
with. Where those two differ is written beside each entry of `patterns`.

Importing this package loads nothing heavy; the tokenizers library is imported when a tokenizer is first built.
"""

from __future__ import annotations

from weightsmith.formats.tokenizer.encoder import Encoder, encoder
from weightsmith.formats.tokenizer.hf_folder import from_folder
from weightsmith.formats.tokenizer.hf_json import to_files

__all__ = ["Encoder", "encoder", "from_folder", "to_files"]

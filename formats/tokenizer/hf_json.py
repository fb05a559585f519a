"""`Vocab` to the tokenizer files of a Hugging Face folder.

tokenizer.json holds the tokenizer (see `rebuild`); tokenizer_config.json names the special tokens and carries the chat
template, as a JSON string, because a file of its own would lose its line endings when it is read as text; the class
is PreTrainedTokenizerFast, which takes tokenizer.json as it is instead of building its own from the model's type. A
SentencePiece vocabulary also gets its tokenizer.model, which converters and older programs prefer.

Not in a `Vocab` and therefore not written: lstrip, rstrip and single_word of added tokens, further named templates.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from weightsmith.errors import UnsupportedError
from weightsmith.formats.tokenizer import sentencepiece_model
from weightsmith.formats.tokenizer.rebuild import build, tokenizer_json
from weightsmith.types import ModelConfig, Vocab

log = logging.getLogger(__name__)

CLASS = "PreTrainedTokenizerFast"


def to_files(vocab: Vocab, config: ModelConfig) -> dict[str, bytes]:
    """File name to content: tokenizer.json, tokenizer_config.json, special_tokens_map.json, perhaps tokenizer.model.

    Raises IntegrityError if the vocabulary contradicts itself, UnsupportedError for a pre-tokenizer that is not known.
    """
    description = tokenizer_json(vocab)
    build(description)  # what the library refuses must not reach a disk
    special = _special_tokens(vocab)
    settings: dict[str, Any] = {
        "tokenizer_class": CLASS,
        "add_bos_token": vocab.add_bos,
        "add_eos_token": vocab.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        **special,
    }
    if vocab.chat_template is not None:
        settings["chat_template"] = vocab.chat_template
    files = {
        "tokenizer.json": _dump(description),
        "tokenizer_config.json": _dump(settings),
        "special_tokens_map.json": _dump(special),
    }
    if vocab.model == "llama":
        try:
            files["tokenizer.model"] = sentencepiece_model.write(vocab)
        except UnsupportedError as error:
            log.warning("no tokenizer.model was written: %s", error.message)
    return files


def _special_tokens(vocab: Vocab) -> dict[str, str]:
    ids = {"bos": vocab.bos_id, "eos": vocab.eos_id, "unk": vocab.unk_id, "pad": vocab.pad_id}
    return {f"{name}_token": vocab.tokens[id_] for name, id_ in ids.items() if id_ is not None}


def _dump(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

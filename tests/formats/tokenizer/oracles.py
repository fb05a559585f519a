"""Independent judges for tokenizers: llama.cpp itself on a vocabulary-only GGUF, and texts to disagree about."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import gguf
import pytest

from weightsmith.types import ModelConfig, Vocab

POOLS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCXYZ",
    "0123456789",
    " ",
    "  \t\n\r\n",
    ".,;:!?()[]{}<>@#$%^&*-_=+/\\|`~\"'",
    "'s't're've'm'll'd'S'T'RE'LL",
    "中文日本語漢字かなカナ한국어",
    "éèàüöñçßøÅÉÑЖдляФПриветΑβγάשלוםمرحباनमस्तेไทย",
    "\u0301\u0308\u093f\u0e31\u20dd",
    "😀👍🏽👩\u200d👧🇩🇪🏴\U000e0067\U000e007f",
    "\x00\x01\x04\x06\x07\x08\x0b\x0c\x13\x14\x16\x1b\x1c\x1d\x1e\x1f\x7f\x85\xad",
    "\u00a0\u2003\u200b\u200d\u2028\u3000\ufeff\ufffd\u180e",
    "½²Ⅷ①٣৪",
    "\U00040000\U000f0000\U0010ffff\ue000\uf8ff",
    "\u2581Ġ<0x0A>",
)
WORDS = (
    *("def ", "return ", "for i in range(10):", "    ", "\n\n", "\t\t", "the ", " quick", "Hello", " world", "don't"),
    *("I'LL", "we'Ve", "http://x.y/z?a=1", "std::vector<int>", "0x1F", "3.14159", "1234567", " 12", "  ", "   "),
    *(" " * 8, " \n ", "\r\n", "--->", "==", "ing", "tion", "你好", "é", "e\u0301", "</", "[INST]", "<unk", "im_end|>"),
)
# Without marks and without letters whose case is not ASCII: what llama.cpp cuts as the tekken pattern was meant.
PLAIN_POOLS = tuple(pool for index, pool in enumerate(POOLS) if index not in (8, 9, 10, 15))


def texts(n: int, seed: int, extra: tuple[str, ...] = (), pools: tuple[str, ...] = POOLS) -> list[str]:
    """`n` seeded texts of 1 to 12 pieces: words, `extra` (special tokens), and random characters of every kind."""
    rng = random.Random(seed)
    words = [word for word in WORDS + extra if pools is POOLS or word not in ("e\u0301", "é")]
    found = []
    for _ in range(n):
        parts = []
        for _ in range(rng.randint(1, 12)):
            if rng.random() < 0.45:
                parts.append(rng.choice(words))
            else:
                pool = rng.choice(pools)
                parts.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 6))))
        found.append("".join(parts))
    return found


def config(vocab_size: int, **changes: Any) -> ModelConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8}
    rest = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    return ModelConfig(**{"family": "llama", "vocab_size": vocab_size, "dtype": "F32", **sizes, **rest, **changes})


def write_gguf(vocab: Vocab, path: Path) -> Path:
    """A GGUF that holds nothing but `vocab`, by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(vocab.model)
    if vocab.pre:
        writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.model == "llama":
        writer.add_token_scores(vocab.scores)
    else:
        writer.add_token_merges([" ".join(pair) for pair in vocab.merges])
    for name, id_ in (("bos", vocab.bos_id), ("eos", vocab.eos_id), ("unk", vocab.unk_id), ("pad", vocab.pad_id)):
        if id_ is not None:
            getattr(writer, f"add_{name}_token_id")(id_)
    writer.add_add_bos_token(vocab.add_bos)
    writer.add_add_eos_token(vocab.add_eos)
    writer.add_add_space_prefix(vocab.add_space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_vocab(path: Path) -> Vocab:
    """The vocabulary of a GGUF, by the gguf package."""
    fields = gguf.GGUFReader(path).fields

    def get(key: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    model = get("model")
    merges = [(line[: line.index(" ", 1)], line[line.index(" ", 1) + 1 :]) for line in get("merges", [])]
    template = fields.get("tokenizer.chat_template")
    return Vocab(
        model=model,
        tokens=get("tokens"),
        types=[int(kind) for kind in get("token_type")],
        merges=merges,
        scores=[float(score) for score in get("scores", [])] if model == "llama" else [],
        pre=get("pre", "") if model == "gpt2" else "",
        bos_id=get("bos_token_id"),
        eos_id=get("eos_token_id"),
        unk_id=get("unknown_token_id"),
        pad_id=get("padding_token_id"),
        add_bos=get("add_bos_token", model == "llama"),
        add_eos=get("add_eos_token", False),
        add_space_prefix=get("add_space_prefix", True) if model == "llama" else False,
        chat_template=None if template is None else template.contents(),
    )


_silence: list[object] = []  # the library calls it as long as the process lives, so it must not be collected


class LlamaCpp:
    """llama.cpp's tokenizer for one GGUF."""

    def __init__(self, path: Path) -> None:
        self.api = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
        if not _silence:
            _silence.append(self.api.llama_log_callback(lambda *_: None))
        self.api.llama_log_set(_silence[0], ctypes.c_void_p(0))
        params = self.api.llama_model_default_params()
        params.vocab_only = True
        self.model = self.api.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp refuses {path}"
        self.vocab = self.api.llama_model_get_vocab(self.model)

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.api.llama_model_free(self.model)

    def encode(self, text: str, *, special: bool = False, ends: bool = False) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        count = self.api.llama_tokenize(self.vocab, data, len(data), buffer, room, ends, special)
        assert count >= 0
        return list(buffer[:count])


def judge(vocab: Vocab, folder: Path) -> LlamaCpp:
    """llama.cpp on `vocab`."""
    return LlamaCpp(write_gguf(vocab, folder / "vocab.gguf"))

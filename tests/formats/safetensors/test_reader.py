"""The reader: canonical tensors, rows, tied heads, files, and what it must not import or run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.tiny import llama_config, llama_tensors, write_llama
from weightsmith import formats
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UnsupportedError
from weightsmith.formats.archs import llama
from weightsmith.formats.safetensors import SafetensorsReader, open_reader, sniff

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", tokenizer=False)


def rewrite(folder: Path, **changes: Any) -> Path:
    """Replace (array), add (array) or leave out (None) tensors of an F16 checkpoint."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors") | {name.replace("__", "."): v for name, v in changes.items()}
    save_file({name: v for name, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


def reconfigure(folder: Path, **changes: Any) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


def test_formats_finds_it(folder: Path) -> None:
    reader = formats.open_reader(folder)
    assert isinstance(reader, SafetensorsReader)
    assert reader.container == "safetensors"
    assert reader.path == folder


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_rows_are_the_files_bytes(tmp_path: Path, dtype: str) -> None:
    reader = open_reader(write_llama(tmp_path / "model", dtype=dtype, tokenizer=False, seed=3))
    numpy_type = {"F32": np.float32, "F16": np.float16}[dtype]
    expected = llama_tensors(llama_config(), 3)
    assert list(reader.infos()) == list(llama.tensors(reader.config))
    for name, info in reader.infos().items():
        rows = reader.rows(name, 0, info.n_rows)
        assert rows.dtype == np.uint8
        assert rows.shape == (info.n_rows, info.row_bytes)
        assert info.codec == reader.config.dtype == dtype
        values = rows.reshape(-1).view(numpy_type).reshape(info.shape)
        np.testing.assert_array_equal(values, expected[name].astype(numpy_type))
        assert reader.row_unit(name) == 1
    part = reader.rows(Q, 5, 9)
    np.testing.assert_array_equal(part.view(numpy_type), expected[Q][5:9].astype(numpy_type))
    assert reader.rows(Q, 4, 4).shape == (0, 64 * np.dtype(numpy_type).itemsize)


def test_rows_are_fresh_and_writable(folder: Path) -> None:
    reader = open_reader(folder)
    first = reader.rows(Q, 0, 2)
    first[:] = 0
    assert reader.rows(Q, 0, 2).any()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 65), (65, 66)])
def test_rows_out_of_range(folder: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="which has 64"):
        open_reader(folder).rows(Q, start, stop)


def test_rows_from_many_threads(folder: Path) -> None:
    reader = open_reader(folder)
    whole = reader.rows(EMBEDDING, 0, 384)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda k: reader.rows(EMBEDDING, k, k + 3), list(range(0, 384, 3)) * 4))
    assert np.array_equal(np.concatenate(parts[:128]), whole)
    assert np.array_equal(np.concatenate(parts[384:]), whole)


def test_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    reader = open_reader(folder)
    last = max(reader.infos().values(), key=lambda info: info.offset)
    os.truncate(folder / "model.safetensors", last.offset + 2)
    with pytest.raises(IntegrityError, match="became shorter") as caught:
        reader.rows(last.name, 0, last.n_rows)
    assert caught.value.tensor == last.name


def test_close_releases_every_handle(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    reader = open_reader(folder)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()
    reader.close()
    shard = write_llama(folder.parent / "sharded", shards=3, tokenizer=False) / "model-00003-of-00003.safetensors"
    os.truncate(shard, 100)
    with pytest.raises(IntegrityError):
        open_reader(shard.parent)
    assert len(os.listdir("/proc/self/fd")) == before


def test_missing_tensor(folder: Path) -> None:
    reader = open_reader(rewrite(folder, **{Q: None}))
    assert Q not in reader.native_infos()
    with pytest.raises(IntegrityError, match=r"missing, config\.json calls for it") as caught:
        reader.infos()
    assert caught.value.tensor == Q


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x"])
def test_extra_tensor(folder: Path, name: str) -> None:
    with pytest.raises(IntegrityError, match="not part of a llama model") as caught:
        open_reader(rewrite(folder, **{name: np.zeros(4, np.float16)})).infos()
    assert caught.value.tensor == name


def test_wrong_shape(folder: Path) -> None:
    with pytest.raises(IntegrityError, match=r"shape \[96, 32\], config.json calls for \[96, 64\]") as caught:
        open_reader(rewrite(folder, **{"model.layers.0.mlp.up_proj.weight": np.zeros((96, 32), np.float16)})).infos()
    assert caught.value.tensor == "model.layers.0.mlp.up_proj.weight"


def test_tensors_without_weights_are_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    reader = open_reader(rewrite(folder, **{name: np.zeros(8, np.float32)}))
    assert name in reader.native_infos()
    assert name not in reader.infos()


def test_biases(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", tokenizer=False, attention_bias=True)
    rows = {"q": 64, "k": 32, "v": 32, "o": 64}
    biases = {
        f"model.layers.{i}.self_attn.{part}_proj.bias": np.full(n, i, np.float16)
        for i in (0, 1)
        for part, n in rows.items()
    }
    reader = open_reader(rewrite(folder, **biases))
    assert biases.keys() <= reader.infos().keys()


def test_tied(tmp_path: Path) -> None:
    reader = open_reader(write_llama(tmp_path / "model", tokenizer=False, tie_word_embeddings=True))
    assert reader.config.tie_word_embeddings
    assert HEAD not in reader.infos()


def test_tied_with_a_copy_of_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.numpy import load_file

    monkeypatch.setattr("weightsmith.formats.safetensors.reader._SLAB", 1000)
    folder = write_llama(tmp_path / "model", tokenizer=False, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    reader = open_reader(rewrite(folder, **{HEAD: embedding.copy()}))
    assert reader.config.tie_word_embeddings
    assert HEAD not in reader.infos()
    embedding[-1, -1] += 1
    reader = open_reader(rewrite(folder, **{HEAD: embedding}))
    assert not reader.config.tie_word_embeddings
    assert HEAD in reader.infos()
    reader = open_reader(rewrite(folder, **{HEAD: embedding.astype(np.float32)}))
    assert not reader.config.tie_word_embeddings
    assert reader.infos()[HEAD].codec == "F32"
    with pytest.raises(IntegrityError, match="shape"):
        open_reader(rewrite(folder, **{HEAD: embedding[1:]})).infos()


def test_untied_without_a_head(folder: Path) -> None:
    with pytest.raises(IntegrityError, match="tie_word_embeddings is false") as caught:
        open_reader(rewrite(folder, **{HEAD: None})).infos()
    assert caught.value.tensor == HEAD


def test_dtype_is_that_of_the_weights_where_config_has_none(tmp_path: Path) -> None:
    folder = reconfigure(write_llama(tmp_path / "model", dtype="BF16", tokenizer=False), torch_dtype=None)
    assert open_reader(folder).config.dtype == "BF16"


def test_unknown_family_still_shows(folder: Path) -> None:
    reader = open_reader(reconfigure(folder, architectures=["OtherForCausalLM"]))
    assert len(reader.native_infos()) == 21
    assert reader.metadata()["architectures"] == ["OtherForCausalLM"]
    with pytest.raises(UnsupportedError, match="OtherForCausalLM"):
        _ = reader.config
    with pytest.raises(UnsupportedError, match="OtherForCausalLM"):
        reader.infos()


def test_bare_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    assert sniff(path)
    reader = formats.open_reader(path)
    assert reader.infos().keys() == open_reader(folder).infos().keys()
    assert [file.name for file in reader.files()] == ["config.json", "model.safetensors"]
    (folder / "config.json").unlink()
    alone = formats.open_reader(path)
    assert alone.metadata() == {"__metadata__": {"format": "pt"}}
    assert [file.name for file in alone.files()] == ["model.safetensors"]
    assert len(alone.native_infos()) == 21
    with pytest.raises(NotFoundError, match="no such file") as caught:
        alone.infos()
    assert caught.value.path == folder / "config.json"


COMPANIONS = ["LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer.model"]
FOREIGN = ["modeling_x.py", "pytorch_model.bin", "training_args.bin", "README.md", "tokenizer.json.py", "x.pth"]


def test_files(folder: Path) -> None:
    for name in (*COMPANIONS, *FOREIGN):
        (folder / name).write_text(name)
    (folder / "tokenizer_config.json").mkdir()
    assert [file.name for file in open_reader(folder).files()] == ["config.json", "model.safetensors", *COMPANIONS]


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    secret = folder.parent / "secret"
    (folder / name).unlink(missing_ok=True)
    secret.write_text("{}")
    (folder / name).symlink_to(secret)
    with pytest.raises(UnsafeInputError, match="link"):
        open_reader(folder).files()


def test_vocab_asks_the_tokenizer_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("weightsmith.formats.tokenizer")
    seen: list[Any] = []
    module.from_folder = lambda *args, **options: seen.append((args, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    reader = open_reader(folder / "model.safetensors")
    assert reader.vocab(pre="llama-bpe") is None
    assert seen == [((folder, reader.config), {"pre": "llama-bpe"})]


HEAVY = {
    "torch",
    "numba",
    "gguf",
    "tokenizers",
    "sentencepiece",
    "huggingface_hub",
    "transformers",
    "safetensors",
    "jinja2",
}


def test_opening_imports_nothing_heavy_and_nothing_of_the_folder(tmp_path: Path) -> None:
    """A checkpoint that names code to run is read, and its code is not."""
    folder = write_llama(tmp_path / "model")
    reconfigure(folder, auto_map={"AutoConfig": "configuration_x.Config"}, _attn_implementation_internal="x/y")
    (folder / "configuration_x.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    code = (
        "import json, sys; from pathlib import Path; from weightsmith.formats import open_reader\n"
        f"reader = open_reader(Path({str(folder)!r}))\n"
        "reader.config, reader.infos(), reader.metadata(), reader.files(), reader.rows('model.norm.weight', 0, 1)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not HEAVY & loaded
    assert "configuration_x" not in loaded
    assert not (tmp_path / "marker").exists()

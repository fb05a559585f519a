"""A recipe's file type on its way into a GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tiny import write_llama
from weightsmith.errors import UnsupportedError
from weightsmith.formats import gguf as container
from weightsmith.formats import safetensors
from weightsmith.quant import codecs, recipes
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import Plan, Reader, Recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    return write_llama(path / "hf", hidden_size=256, intermediate_size=256, tokenizer=False)


@pytest.fixture(autouse=True)
def every_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "writable", lambda: tuple(BLOCKS))


def zeros(path: Path, reader: Reader, planned: Plan, file_type: int | None) -> Path:
    writer = container.create(path, reader.config, planned.tensors, None, source=reader, file_type=file_type)
    with writer:
        for info in writer.order:
            writer.write(info, 0, np.zeros((info.n_rows, info.row_bytes), np.uint8))
    return path


def written_type(path: Path) -> int:
    with container.open_reader(path) as reader:
        found: int = reader.metadata()["general.file_type"]
        return found


def test_every_type_can_be_asked_for() -> None:
    assert tuple(recipes.FILE_TYPES) == container.TYPES


@pytest.mark.parametrize("name", recipes.FILE_TYPES)
def test_the_file_says_the_type_that_was_asked_for(name: str, folder: Path, tmp_path: Path) -> None:
    reader = safetensors.open_reader(folder)
    planned = container.plan(reader, Recipe(name, imatrix=True))
    assert planned.file_type == recipes.FILE_TYPES[name]
    path = zeros(tmp_path / "a.gguf", reader, planned, planned.file_type)
    assert written_type(path) == recipes.FILE_TYPES[name]
    with container.open_reader(path) as again:
        kept = container.plan(again, Recipe())
        assert kept.file_type is None
        assert written_type(zeros(tmp_path / "b.gguf", again, kept, None)) == recipes.FILE_TYPES[name]


def test_a_type_is_not_carried_over_where_codecs_change(folder: Path, tmp_path: Path) -> None:
    reader = safetensors.open_reader(folder)
    planned = container.plan(reader, Recipe("Q4_K_S"))
    path = zeros(tmp_path / "a.gguf", reader, planned, planned.file_type)
    with container.open_reader(path) as again:
        other = container.plan(again, Recipe("Q4_K_M"))
        assert written_type(zeros(tmp_path / "b.gguf", again, other, None)) == 15  # the guess for mostly Q4_K
        plain = container.plan(again, Recipe("F16"))
        assert written_type(zeros(tmp_path / "c.gguf", again, plain, None)) == 1


def test_a_missing_codec_is_told_when_planning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "writable", lambda: tuple(name for name in BLOCKS if name != "Q5_K"))
    reader = safetensors.open_reader(folder)
    with pytest.raises(UnsupportedError, match="Q4_K_S needs Q5_K, which cannot be written"):
        container.plan(reader, Recipe("Q4_K_S"))
    assert container.plan(reader, Recipe("Q4_K_M")).file_type == 15


def test_counts_of_the_model_reach_the_rules(folder: Path, tmp_path: Path) -> None:
    for kv_heads, codec in ((1, "Q4_K"), (2, "Q3_K")):
        path = write_llama(tmp_path / str(kv_heads), hidden_size=256, num_key_value_heads=kv_heads, tokenizer=False)
        chosen = {i.name: i.codec for i in container.plan(safetensors.open_reader(path), Recipe("Q2_K")).tensors}
        assert chosen["model.layers.0.self_attn.v_proj.weight"] == codec

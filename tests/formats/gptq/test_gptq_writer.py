"""What is written is byte for byte what the description calls for, and reads back exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.gptq.oracle import packed, random_linear, weights
from tests.tiny import llama_config, llama_tensors, write_llama
from weightsmith import formats
from weightsmith.errors import IntegrityError, OutputExistsError, UnsupportedError
from weightsmith.formats.gptq import packed_writer
from weightsmith.formats.gptq.layout import Layout
from weightsmith.formats.gptq.settings import Settings

SHAPES = {name: value.shape for name, value in llama_tensors(llama_config()).items() if "_proj" in name}


def write(
    source: Path, out: Path, settings: Settings, linears: dict[str, dict[str, np.ndarray]], **options: Any
) -> Path:
    reader = formats.open_reader(source)
    layout = Layout(settings)
    packing = packed_writer.Packing(layout, settings.dump(), set(linears))
    writer = packed_writer.create(out, reader.config, packing, source=reader, **options)
    for info in writer.plain:
        writer.write(info, 0, reader.rows(info.name, 0, info.n_rows))
    for name, linear in linears.items():
        writer.put(name, layout.store(linear))
    reader.close()
    return writer.close()


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 32), (2, -1), (8, 16)])
def test_bytes_are_those_of_the_description(tmp_path: Path, bits: int, group: int, checkpoint_format: str) -> None:
    from safetensors.numpy import load_file

    source = write_llama(tmp_path / "source")
    settings = Settings(bits, group, sym=False, checkpoint_format=checkpoint_format)
    linears = {name: random_linear(shape, bits, group, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    out = write(source, tmp_path / "out", settings, linears)
    stored = load_file(out / "model.safetensors")
    for name, linear in linears.items():
        for suffix, value in packed(linear, bits, settings.zero_shift).items():
            found = stored.pop(f"{name.removesuffix('.weight')}.{suffix}")
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found, value, err_msg=f"{name} {suffix}")
    assert set(stored) == {name for name in llama_tensors(llama_config()) if "_proj" not in name}
    reader = formats.open_reader(out)
    assert reader.container == "gptq"
    for name, linear in linears.items():
        found = reader.rows(name, 0, SHAPES[name][0]).view(np.float32)
        np.testing.assert_array_equal(found, weights(linear))
    assert reader.vocab() is not None
    reader.close()


def test_both_configurations_are_written(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    settings = Settings(4, 32, meta={"quantizer": ["weightsmith:0"]})
    linears = {name: random_linear(shape, 4, 32, sym=True) for name, shape in SHAPES.items()}
    out = write(source, tmp_path / "out", settings, linears, split_bytes=20_000)
    raw = json.loads((out / "config.json").read_text())
    assert raw["quantization_config"] == json.loads((out / "quantize_config.json").read_text())
    assert raw["quantization_config"] == settings.dump()
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert (out / "model.safetensors.index.json").exists()
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    formats.open_reader(out).close()


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    linear = random_linear((32, 32), 4, 32)
    old, new = Layout(Settings(4, 32)), Layout(Settings(4, 32, checkpoint_format="gptq_v2"))
    linear["zeros"][3] = 0
    new.store(linear)
    with pytest.raises(UnsupportedError, match="the zero 0"):
        old.store(linear)
    linear = random_linear((32, 32), 4, 32)
    linear["scales"][0] = np.float32(0.1)
    with pytest.raises(IntegrityError, match="no half"):
        old.store(linear)
    with pytest.raises(UnsupportedError, match="multiples of 32"):
        Layout(Settings(3, 32)).parts((40, 64))


def test_nothing_is_left_of_an_unfinished_folder(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    linears = {name: random_linear(shape, 4, 32) for name, shape in SHAPES.items()}
    linears[next(iter(SHAPES))]["zeros"][0] = 0
    reader = formats.open_reader(source)
    layout = Layout(Settings(4, 32))
    writer = packed_writer.create(
        tmp_path / "out", reader.config, packed_writer.Packing(layout, {}, set(linears)), source=reader
    )
    with pytest.raises(IntegrityError, match="never written"):
        writer.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "weightsmith-home") == ["source"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputExistsError):
        packed_writer.create(
            tmp_path / "out",
            reader.config,
            packed_writer.Packing(layout, {}, set(linears)),
            source=reader,
            overwrite=True,
        )
    reader.close()

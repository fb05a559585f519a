"""Mixtral GGUF as llama.cpp sees it: its converter, its quantizer, its decoder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evals.test_engines import gather
from tests.moe import write_mixtral
from tests.peers import test_converter as peer
from tests.quant import test_recipes_llama_cpp as quantizer
from tests.runtime import llama
from weightsmith import formats, jobs
from weightsmith.cli.app import run
from weightsmith.evals import perplexity
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.windows import cut
from weightsmith.formats import archs, gguf
from weightsmith.jobs import Options, Target
from weightsmith.quant import codecs
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import Recipe

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_local_experts": 8}
LETTERS = " ".join(f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst") * 12


def convert(source: Path, target: str, output: Path) -> Path:
    return jobs.convert(source, Target.parse(target), output, Options(threads=2)).path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_converter_writes_the_same(dtype: str, llama_cpp_tree: Path, tmp_path: Path) -> None:
    folder = write_mixtral(tmp_path / "tiny", dtype=dtype, num_key_value_heads=2)
    ours = tmp_path / "ours.gguf"
    assert run(["convert", str(folder), "--to", f"gguf:{dtype}", "-o", str(ours), "-q"]) == 0
    theirs = peer.theirs(llama_cpp_tree, folder, dtype.lower(), tmp_path / "theirs.gguf", pre="llama-bpe")
    peer.compare(ours, theirs)


@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 1}, {"num_local_experts": 8, "head_dim": 32}])
def test_the_decoder_computes_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = convert(write_mixtral(tmp_path / "hf", dtype="F32", **changes), "gguf:F32", tmp_path / "a.gguf")
    tokens = np.random.default_rng(0).integers(0, 384, 64 * 3).tolist()
    ruler = Ruler(ctx=64, threads=1)
    windows = cut(tokens, ruler, bos_id=0)
    with closing(formats.open_reader(tmp_path / "hf")) as source, closing(formats.open_reader(path)) as reader:
        expected = gather("torch", source, windows, ruler)
        assert (gather("torch", reader, windows, ruler) - expected).abs().max() < 1e-5
        assert (gather("llama.cpp", reader, windows, ruler) - expected).abs().max() < 1e-3
    assert expected.std() > 0.3


def test_transformers_computes_the_same_from_the_files(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = convert(write_mixtral(tmp_path / "hf", dtype="F32"), "gguf:F32", tmp_path / "a.gguf")
    folder = convert(path, "safetensors", tmp_path / "back")
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 384, (2, 48)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert type(model).__name__ == "MixtralForCausalLM"
    with torch.inference_mode(), closing(formats.open_reader(path)) as reader:
        from weightsmith.evals import forward

        decoder = forward.load(reader)
        ours = decoder.logits(decoder.hidden(tokens).flatten(0, 1)).unflatten(0, tokens.shape)
        assert (model(tokens).logits - ours).abs().max() < 1e-4


def test_perplexity_is_llama_cpps(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = convert(write_mixtral(tmp_path / "hf"), "gguf:F16", tmp_path / "a.gguf")
    with closing(formats.open_reader(path)) as reader:
        found = [
            perplexity.measure(reader, LETTERS, Ruler(ctx=64, max_windows=4, engine=engine)).perplexity
            for engine in ("torch", "llama.cpp")
        ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] > 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0"])
def test_quantized_files_load_and_generate(kind: str, tmp_path: Path) -> None:
    source = write_mixtral(tmp_path / "hf", **WIDE)
    path = tmp_path / "a.gguf"
    assert run(["quantize", str(source), "--to", f"gguf:{kind}", "-o", str(path), "-q"]) == 0
    model = llama(path, n_ctx=64, n_threads=2)
    made = model.create_completion("The forge", max_tokens=8, temperature=0.0)
    assert made["usage"]["completion_tokens"] >= 1
    assert model.metadata["llama.expert_count"] == "8"
    model.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    write_mixtral(folder / "hf", **WIDE | {"num_hidden_layers": 16, "vocab_size": 384})
    return convert(folder / "hf", "gguf:F16", folder / "f16.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M", "Q3_K_M"])  # all rules: test_large_models_and_experts
def test_the_quantizer_chooses_the_same(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(kind, imatrix=kind == "Q4_0")
    expected = quantizer.theirs(source, tmp_path / "theirs.gguf", recipe)
    monkeypatch.setattr(codecs, "writable", lambda: tuple(BLOCKS))
    assert expected is not None
    with closing(formats.open_reader(source)) as reader:
        planned = gguf.plan(reader, recipe)
        family = archs.by_name(reader.config.family)
    assert {family.gguf_name(info.name): info.codec for info in planned.tensors} == expected[0]
    assert planned.file_type == expected[1]

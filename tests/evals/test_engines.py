"""The engines against each other and against transformers: tiny GGUF files, and a trained model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import dithered
from tests.evals.oracle import oracle
from tests.tiny import LLAMA3_ROPE, write_llama
from weightsmith.cli.app import run
from weightsmith.evals import compare, engines, perplexity, scores
from weightsmith.evals.prose import default_text
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.windows import Windows, cut, tokenize
from weightsmith.formats import gguf, safetensors
from weightsmith.quant import codecs
from weightsmith.quant.blocks import row_nbytes
from weightsmith.types import Reader, Rows, TensorInfo

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "llama3": {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "one key head": {"num_key_value_heads": 1},
}


def as_gguf(reader: Reader, path: Path, codec: str) -> Path:
    """Write `reader`'s model as GGUF with every matrix in `codec` and every vector in F32."""
    infos, planned = reader.infos(), []
    for info in infos.values():
        target = codec if len(info.shape) > 1 else "F32"
        planned.append(TensorInfo(info.name, info.shape, target, info.n_rows * row_nbytes(target, info.row_len)))
    with gguf.create(
        path, reader.config, planned, reader.vocab(), source=reader, overwrite=False, split_bytes=None
    ) as writer:
        for info in planned:
            writer.write(info, 0, codecs.encode(info.codec, decoded(reader, info.name)))
    return path


def decoded(reader: Reader, name: str) -> Rows:
    """A whole canonical tensor as float32 rows."""
    info = reader.infos()[name]
    return codecs.decode(info.codec, reader.rows(name, 0, info.n_rows), info.row_len)


def gather(name: str, reader: Reader, windows: Windows, ruler: Ruler) -> torch.Tensor:
    ticks: list[int] = []
    found = list(engines.by_name(name).logits(reader, windows, ruler, ticks.append))
    assert sum(ticks) == len(windows.tokens) * reader.config.n_layers
    assert [len(part) for part in found] == [
        part.stop - part.start for part in engines.cuts(windows, reader.config.vocab_size, ruler)
    ] * len(windows.tokens)
    return torch.cat(found)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    with closing(safetensors.open_reader(write_llama(tmp_path / "hf", dtype="F32", **CASES[case]))) as source:
        path = as_gguf(source, tmp_path / "tiny.gguf", "F32")
        tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, 64 * 3).tolist()
        for convention in ("llama.cpp", "paper"):
            ruler = Ruler(convention=convention, ctx=64, threads=1, memory=8 * 4 * 384 * 10)
            windows = cut(tokens, ruler, bos_id=0)
            expected = gather("torch", source, windows, ruler)
            with closing(gguf.open_reader(path)) as reader:
                assert (gather("torch", reader, windows, ruler) - expected).abs().max() < 1e-5
                assert (gather("llama.cpp", reader, windows, ruler) - expected).abs().max() < 1e-3
    assert expected.std() > 0.3


@pytest.fixture(scope="module")
def demo_f16(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """The trained model with every matrix as F16, so that llama.cpp rounds no activation to 8 bits."""
    pytest.importorskip("llama_cpp")
    with closing(gguf.open_reader(demo_gguf)) as source:
        path = as_gguf(source, tmp_path_factory.mktemp("demo") / "demo-F16.gguf", "F16")
    with closing(gguf.open_reader(path)) as reader:
        yield reader


def test_the_embedded_text_is_long_enough(demo_gguf: Path) -> None:
    with closing(gguf.open_reader(demo_gguf)) as reader:
        tokens, bos_id = tokenize(reader, default_text(), Ruler())
    assert len(cut(tokens, Ruler(), bos_id=bos_id).tokens) >= 10
    assert len(cut(tokens, Ruler(convention="paper"), bos_id=bos_id).tokens) >= 2


@pytest.mark.slow
def test_a_trained_model_agrees_with_llama_cpp(demo_f16: Reader) -> None:
    prepared = compare.prepare(demo_f16, default_text(), Ruler(max_windows=4))
    found = compare.against(demo_f16, prepared, engine="llama.cpp")
    assert found.candidate.engine == "llama.cpp"
    assert found.original.perplexity < 40
    assert found.ratio == pytest.approx(1, abs=1e-3)
    assert found.kld_mean < 1e-4
    assert found.top1 > 0.99


@pytest.mark.slow
def test_a_trained_model_agrees_with_transformers(demo_f16: Reader) -> None:
    tokens, bos_id = tokenize(demo_f16, default_text(), Ruler())
    windows = cut(tokens, Ruler(max_windows=2), bos_id=bos_id)
    tensors = {name: decoded(demo_f16, name).reshape(info.shape) for name, info in demo_f16.infos().items()}
    model = oracle(demo_f16.config, tensors)
    with torch.inference_mode():
        expected = model(torch.from_numpy(windows.tokens)).logits[:, windows.first : windows.last].flatten(0, 1)
    found = gather("torch", demo_f16, windows, Ruler(max_windows=2))
    pair = scores.token_pair(expected, found, torch.from_numpy(windows.targets.reshape(-1)))
    assert pair.kld.mean() < 1e-6
    assert np.abs(pair.original - pair.candidate).max() < 1e-3


@pytest.fixture(scope="module")
def padded(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The trained model with rows of whole 256s, as K-quants want them."""
    folder = dithered.write(demo_gguf, tmp_path_factory.mktemp("padded") / "model")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_quantized_weights_have_llama_cpps_perplexity(kind: str, padded: Path, tmp_path: Path) -> None:
    """Ours of a quantized file against llama.cpp's of the same weights written out as F32, which leaves it no
    activations to round (`test_decoding` holds that they are the same to the bit)."""
    pytest.importorskip("llama_cpp")
    quantized, plain = tmp_path / "quantized.gguf", tmp_path / "plain.gguf"
    assert run(["quantize", str(padded), "--to", f"gguf:{kind}", "--effort", "fast", "-o", str(quantized), "-q"]) == 0
    assert run(["convert", str(quantized), "--to", "gguf:F32", "-o", str(plain), "-q"]) == 0
    ruler = Ruler(max_windows=3)
    with closing(gguf.open_reader(quantized)) as reader, closing(gguf.open_reader(plain)) as other:
        assert {"Q4_K_M": "Q4_K"}.get(kind, kind) in {info.codec for info in reader.infos().values()}
        ours = perplexity.measure(reader, default_text(), ruler)
        theirs = perplexity.measure(other, default_text(), Ruler(max_windows=3, engine="llama.cpp"))
    plain.unlink()
    assert theirs.perplexity == pytest.approx(ours.perplexity, rel=1e-5)


def built_with_blas(library: ModuleType) -> bool:
    """Whether this llama.cpp multiplies quantized weights as floats, from 32 tokens on, and rounds no activations."""
    return any((Path(str(library.__file__)).parent / "lib").glob("*ggml-blas*"))


@pytest.mark.slow
def test_a_quantized_file_stays_near_llama_cpp(demo_gguf: Path) -> None:
    """Without BLAS llama.cpp rounds activations to 8 bits beside quantized weights: that much and no more."""
    in_floats = built_with_blas(pytest.importorskip("llama_cpp"))
    with closing(gguf.open_reader(demo_gguf)) as reader:
        ours = perplexity.measure(reader, default_text(), Ruler(max_windows=3))
        theirs = perplexity.measure(reader, default_text(), Ruler(max_windows=3, engine="llama.cpp"))
    assert theirs.perplexity == pytest.approx(ours.perplexity, rel=1e-3 if in_floats else 0.02)
    assert in_floats or theirs.perplexity != ours.perplexity

"""One trained model the whole way through the command line: three programs compute the same from what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.runtime import llama
from weightsmith.cli.app import run


@pytest.fixture(scope="module")
def exported(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo model as a safetensors folder, and that folder as F16 GGUF."""
    base = tmp_path_factory.mktemp("exported")
    folder, gguf = base / "model", base / "model-F16.gguf"
    assert run(["convert", str(demo_gguf), "--to", "safetensors", "-o", str(folder), "-q"]) == 0
    assert run(["convert", str(folder), "--to", "gguf:F16", "-o", str(gguf), "-q"]) == 0
    return folder, gguf


@pytest.mark.slow
def test_logits_of_the_exported_files_agree(exported: tuple[Path, Path]) -> None:
    """Ours and transformers on the folder, llama.cpp on the GGUF, 256 tokens of the built-in text.

    transformers and we compute in float32 from the same F16 weights: what is left is the order of sums. llama.cpp
    rounds activations to F16 beside F16 weights, hence the wider bounds. Measured: mean KL below 2e-9 nats and at most
    7e-5 between logits against transformers, 1.3e-6 nats and 0.05 against llama.cpp.
    """
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    from weightsmith import formats
    from weightsmith.evals import forward, scores
    from weightsmith.evals.prose import default_text
    from weightsmith.formats.tokenizer import encoder

    folder, gguf = exported
    reader = formats.open_reader(folder)
    vocab = reader.vocab()
    assert vocab is not None
    ids = encoder(vocab).encode(default_text())[:256]
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        decoder = forward.load(reader)
        ours = decoder.logits(decoder.hidden(tokens)[0])
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        theirs = peer(tokens).logits[0]
    model = llama(gguf, n_ctx=256, n_batch=256, logits_all=True, n_threads=2, flash_attn=False, type_k=0, type_v=0)
    model.eval(ids)
    native = torch.from_numpy(np.array(model.scores[: len(ids)], np.float32))
    model.close()
    targets = tokens[0]
    for name, other, most_kl, most in (("transformers", theirs, 1e-6, 1e-3), ("llama.cpp", native, 1e-4, 0.5)):
        pair = scores.token_pair(other, ours, targets)
        assert pair.kld.mean() < most_kl, name
        assert float((other - ours).abs().max()) < most, name
        assert pair.same_top.mean() > 0.99, name


@pytest.mark.slow
def test_the_exported_tokenizer_is_the_ggufs(exported: tuple[Path, Path]) -> None:
    """The folder as transformers reads it, and the GGUF as llama.cpp does, cut the built-in text alike."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from transformers import AutoTokenizer

    from weightsmith.evals.prose import default_text

    folder, gguf = exported
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    text = default_text()
    expected = model.tokenize(text.encode(), add_bos=False, special=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    model.close()

"""Text that a model writes itself: step by step with kept keys and values, against the whole window at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import write_llama
from weightsmith import formats
from weightsmith.cli.app import run
from weightsmith.errors import ResourceError
from weightsmith.evals.calibration import Options, generate
from weightsmith.evals.forward import load


@pytest.fixture(scope="module", params=["llama", "window", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "m"
    if request.param == "mixtral":
        from tests.moe import write_mixtral

        return write_mixtral(folder)
    return write_llama(folder, **({"model_type": "mistral", "sliding_window": 5} if request.param == "window" else {}))


def test_every_token_is_what_the_whole_window_says(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy all the way, so that each token must be the best allowed one after all before it."""
    monkeypatch.setattr(generate, "GREEDY", 10**6)
    reader = formats.open_reader(model)
    vocab, decoder = reader.vocab(), load(reader)
    assert vocab is not None
    found = generate.tokens(reader, Options(rows=3, ctx=24))
    assert found.shape == (3, 24)
    begun = 1 + vocab.add_bos
    logits = decoder.logits(decoder.hidden(found).flatten(0, 1)).view(3, 24, -1)[:, begun - 1 : -1].clone()
    kinds = torch.tensor(vocab.types + [3] * (logits.shape[-1] - len(vocab.types)))
    logits[:, :, ~torch.isin(kinds, torch.tensor([1, 4, 6]))] = -torch.inf
    chosen = logits.gather(2, found[:, begun:, None])[..., 0]
    assert torch.allclose(chosen, logits.amax(dim=-1), atol=1e-4)  # but for ties within rounding
    assert len(set(map(tuple, found.tolist()))) == 3


def test_what_is_drawn_follows_the_distribution(tmp_path: Path) -> None:
    """The frequencies of the third token against the model's own probabilities for it."""
    reader = formats.open_reader(write_llama(tmp_path / "m", num_hidden_layers=1))
    one = generate.tokens(reader, Options(rows=400, ctx=12, seed=1))
    two = generate.tokens(reader, Options(rows=400, ctx=12, seed=1))
    other = generate.tokens(reader, Options(rows=400, ctx=12, seed=2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    decoder, vocab = load(reader), reader.vocab()
    assert vocab is not None
    logits = decoder.logits(decoder.hidden(one)[:, 8]).double()
    kinds = torch.tensor(vocab.types + [3] * (logits.shape[-1] - len(vocab.types)))
    logits[:, ~torch.isin(kinds, torch.tensor([1, 4, 6]))] = -torch.inf
    surprise = -logits.log_softmax(-1).gather(1, one[:, 9:10]).mean()
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean()
    assert float(surprise) == pytest.approx(float(entropy), rel=0.05)


def test_control_tokens_are_never_written(model: Path) -> None:
    reader = formats.open_reader(model)
    vocab = reader.vocab()
    assert vocab is not None
    found = generate.tokens(reader, Options(rows=8, ctx=40))
    written = found[:, 1 if vocab.add_bos else 0 :].flatten().tolist()
    assert {vocab.types[id_] for id_ in written} <= {1, 4, 6}


def test_a_model_that_does_not_fit_is_refused(model: Path) -> None:
    with pytest.raises(ResourceError, match="all weights in memory"):
        generate.tokens(formats.open_reader(model), Options(rows=2, ctx=16, memory=10_000))


def test_through_the_command_line(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m", hidden_size=64, intermediate_size=128)
    made = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.gguf"
        options = ["--calibrate", "self", "--rows", "6", "--ctx", "32", "-q"]
        assert run(["quantize", str(folder), "--to", "gguf:IQ4_NL", "-o", str(out), *options]) == 0
        made.append(out.read_bytes())
    assert made[0] == made[1]

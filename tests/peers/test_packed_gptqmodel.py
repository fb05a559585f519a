"""Packed checkpoints beside GPTQModel and transformers on a CPU: theirs and ours mean the same weights and logits.

They live in an environment of their own (`benchmarks/peers.sh`); WEIGHTSMITH_PEERS names its Python where it is not in
build/peers.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import CORPUS, write_llama
from weightsmith import formats
from weightsmith.evals import forward
from weightsmith.evals.calibration import Options
from weightsmith.evals.calibration.packed import PackedOptions, quantize_packed
from weightsmith.quant.algorithms.gptq import Method
from weightsmith.quant.algorithms.rtn import Grid
from weightsmith.quant.codecs import decode

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
PEERS = Path(os.environ.get("WEIGHTSMITH_PEERS", ROOT / "build" / "peers" / "bin" / "python"))
TEXT = " ".join(CORPUS[:2] * 12)
CTX = 32
CASES = {  # checkpoint format, grid
    **{f"gptq-{bits}": ("gptq", Grid(bits, 32)) for bits in (2, 3, 4, 8)},
    **{f"gptq_v2-{bits}": ("gptq_v2", Grid(bits, 32, sym=False)) for bits in (2, 3, 4, 8)},
    "gptq_v2-4-sym": ("gptq_v2", Grid(4, 32)),
    "act": ("gptq", Grid(4, 32)),
    "awq": ("awq", Grid(4, 32, sym=False)),
    "awq-sym": ("awq", Grid(4, 32)),
}
ASYM = "gptq-4-asym"  # GPTQModel loads zero points in the first format from itself only
TRANSFORMERS = ("gptq-3", "gptq-4", "gptq-8", "gptq_v2-4", ASYM, "awq")


def peers(script: str, *arguments: str, cwd: Path) -> str:
    """Run a script of benchmarks/ in the peers' environment; skip where there is none."""
    if not PEERS.exists():
        pytest.skip("the peers' environment is absent; `sh benchmarks/peers.sh` makes it")
    env = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    command = [str(PEERS), str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, quantized to every case, and tokens."""
    if not PEERS.exists():
        pytest.skip("the peers' environment is absent; `sh benchmarks/peers.sh` makes it")
    folder = tmp_path_factory.mktemp("packed")
    source = write_llama(folder / "source", dtype="F32", hidden_size=128, intermediate_size=256)
    reader = formats.open_reader(source)
    for name, (container, grid) in (CASES | {ASYM: ("gptq", Grid(4, 32, sym=False))}).items():
        method = Method("act", static_groups=name != "act")
        options = PackedOptions(grid, method, Options(rows=None, ctx=CTX), container, scaled=container == "awq")
        quantize_packed(reader, folder / name, TEXT, options)
    reader.close()
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(2, 384, (2, 24)))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, Any]:
    """What GPTQModel makes of every case."""
    peers("gptqmodel_logits.py", "gptqmodel", "tokens.npy", *CASES, cwd=folder)
    return {name: dict(np.load(folder / f"{name}.npz")) for name in CASES}


@pytest.fixture(scope="module")
def transformed(folder: Path, loaded: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of some of them."""
    assert loaded
    peers("gptqmodel_logits.py", "transformers", "tokens.npy", *TRANSFORMERS, cwd=folder)
    return {name: dict(np.load(folder / f"{name}.npz")) for name in TRANSFORMERS}


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Our own reading, float32 arithmetic."""
    reader = formats.open_reader(path)
    decoder = forward.load(reader)
    with torch.no_grad():
        found = decoder.logits(decoder.hidden(torch.from_numpy(tokens)))
    reader.close()
    return np.asarray(found.reshape(*tokens.shape, -1))


def check_weights(path: Path, theirs: dict[str, Any]) -> None:
    """Every linear of the layers, bit by bit, in halves."""
    reader = formats.open_reader(path)
    names = [name for name in theirs if name.startswith("model.")]
    assert len(names) == 7 * reader.config.n_layers
    for name in names:
        info = reader.infos()[f"{name}.weight"]
        ours = decode(info.codec, reader.rows(info.name, 0, info.n_rows), info.row_len).reshape(info.shape)
        np.testing.assert_array_equal(theirs[name], ours.T.astype(np.float16))
    reader.close()


def check_continuation(path: Path, tokens: np.ndarray, made: np.ndarray, *, slack: float) -> None:
    """Each token that was added is our most likely one, or as likely within the arithmetic's error."""
    assert np.array_equal(made[: len(tokens)], tokens)
    assert len(made) == len(tokens) + 8
    ours = logits(path, made[None])[0]
    for at in range(len(tokens), len(made)):
        assert ours[at - 1, made[at]] >= ours[at - 1].max() - 2 * slack


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_computes_what_we_read(folder: Path, loaded: dict[str, Any], name: str) -> None:
    theirs, tokens = loaded[name], np.load(folder / "tokens.npy")
    assert "error" not in theirs
    check_weights(folder / name, theirs)
    np.testing.assert_allclose(theirs["logits"], logits(folder / name, tokens), rtol=0, atol=0.02)  # half precision
    check_continuation(folder / name, tokens[0], theirs["made"], slack=0.02)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_computes_what_we_read(folder: Path, transformed: dict[str, Any], name: str) -> None:
    """Its 4-bit kernel for processors rounds to bfloat16 on the way; logits have a deviation of 1."""
    theirs, tokens = transformed[name], np.load(folder / "tokens.npy")
    assert "error" not in theirs
    np.testing.assert_allclose(theirs["logits"], logits(folder / name, tokens), rtol=0, atol=0.1)
    check_continuation(folder / name, tokens[0], theirs["made"], slack=0.1)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_gptqmodel_writes_is_read(folder: Path, method: str) -> None:
    tokens = np.random.default_rng(1).integers(2, 384, (16, 64))
    np.save(folder / "rows.npy", tokens)
    out = f"theirs-{method}"
    peers("gptqmodel_quantize.py", "source", out, method, "4", "32", "rows.npy", cwd=folder)
    peers("gptqmodel_logits.py", "gptqmodel", "tokens.npy", out, cwd=folder)
    theirs = dict(np.load(folder / f"{out}.npz"))
    check_weights(folder / out, theirs)
    ours = logits(folder / out, np.load(folder / "tokens.npy"))
    np.testing.assert_allclose(theirs["logits"], ours, rtol=0, atol=0.02)

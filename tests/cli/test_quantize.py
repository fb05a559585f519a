"""`weightsmith quantize` for every file type: what comes out, by importances and effort, and that llama.cpp runs it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.runtime import llama
from tests.tiny import write_llama
from weightsmith.cli.app import run
from weightsmith.formats import imatrix
from weightsmith.formats.imatrix import Entry, Imatrix
from weightsmith.quant.recipes import FILE_TYPES
from weightsmith.types import Packed, TensorInfo

QUANTIZED = [name for name in FILE_TYPES if name not in ("F32", "F16", "BF16", "Q2_K_S")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose rows the 256-weight blocks divide."""
    return write_llama(tmp_path_factory.mktemp("wide") / "wide", hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module")
def matrix(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    names = [f"blk.{i}.{part}.weight" for i in range(2) for part in ("attn_q", "attn_k", "attn_v", "attn_output")]
    names += [f"blk.{i}.{part}.weight" for i in range(2) for part in ("ffn_gate", "ffn_up")]
    entries = {name: Entry(rng.lognormal(0, 2, (1, 256)).astype(np.float32), np.array([512])) for name in names}
    for i in range(2):
        sums = rng.lognormal(0, 2, (1, 512)).astype(np.float32)
        entries[f"blk.{i}.ffn_down.weight"] = Entry(sums, np.array([512]))
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    return imatrix.write(path, Imatrix(entries, ("text",), 1, 512))


def made(wide: Path, out: Path, kind: str, *options: str) -> bytes:
    assert run(["quantize", str(wide), "--to", f"gguf:{kind}", "-o", str(out), "-q", *options]) == 0
    return out.read_bytes()


def notes(path: Path) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    prefix = "weightsmith.provenance."
    fields = gguf.GGUFReader(path).fields
    return {key.removeprefix(prefix): field.contents() for key, field in fields.items() if key.startswith(prefix)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_llama_cpp_runs_it(kind: str, wide: Path, tmp_path: Path) -> None:
    made(wide, tmp_path / "m.gguf", kind)
    model = llama(tmp_path / "m.gguf", n_ctx=64, n_threads=2)
    out = model.create_completion("The smith", max_tokens=8, temperature=0.0)
    assert out["usage"]["completion_tokens"] > 0
    model.close()


def test_importances_decide_and_are_noted(wide: Path, matrix: Path, tmp_path: Path) -> None:
    plain = made(wide, tmp_path / "a.gguf", "Q4_K_S")
    weighted = made(wide, tmp_path / "b.gguf", "Q4_K_S", "--imatrix", str(matrix))
    assert plain != weighted
    assert notes(tmp_path / "b.gguf")["imatrix"] == f"sha256:{imatrix.read(matrix).digest()}"
    assert "imatrix" not in notes(tmp_path / "a.gguf")


def test_q2_k_s_needs_importances(wide: Path, matrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(wide), "--to", "gguf:Q2_K_S", "-o", str(tmp_path / "a.gguf"), "-q"]) == 2
    assert "imatrix" in capsys.readouterr().err
    made(wide, tmp_path / "b.gguf", "Q2_K_S", "--imatrix", str(matrix))


def test_an_imatrix_of_another_model_is_refused(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Imatrix({"blk.9.attn_q.weight": Entry(np.ones((1, 256), np.float32), np.array([1]))}, (), 1, 512)
    path = imatrix.write(tmp_path / "other.gguf", other)
    args = ["quantize", str(wide), "--to", "gguf:Q4_K_M", "-o", str(tmp_path / "m.gguf"), "-q"]
    assert run([*args, "--imatrix", str(path)]) == 3
    wrong = Imatrix({"blk.0.attn_q.weight": Entry(np.ones((1, 64), np.float32), np.array([1]))}, (), 1, 512)
    assert run([*args, "--imatrix", str(imatrix.write(tmp_path / "wrong.gguf", wrong))]) == 2
    assert "blk.0.attn_q.weight" in capsys.readouterr().err
    assert not (tmp_path / "m.gguf").exists()


def test_effort_changes_what_is_found_and_is_noted(wide: Path, tmp_path: Path) -> None:
    fast = made(wide, tmp_path / "a.gguf", "Q4_K_M", "--effort", "fast")
    best = made(wide, tmp_path / "b.gguf", "Q4_K_M", "--effort", "best")
    assert fast != best
    assert json.loads(notes(tmp_path / "b.gguf")["recipe"])["effort"] == "best"


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q6_K", "IQ4_XS"])
def test_the_bytes_do_not_depend_on_threads_or_the_way(kind: str, wide: Path, tmp_path: Path) -> None:
    """One, two or four threads, small slabs, straight from safetensors or through an F16 GGUF: the same tensors."""
    first = made(wide, tmp_path / "1.gguf", kind, "--threads", "1")
    for threads in ("2", "4"):
        assert made(wide, tmp_path / f"{threads}.gguf", kind, "--threads", threads) == first
    assert made(wide, tmp_path / "slabs.gguf", kind, "--max-memory", "200kB") == first
    gguf = pytest.importorskip("gguf")
    assert run(["convert", str(wide), "--to", "gguf:F16", "-o", str(tmp_path / "f16.gguf"), "-q"]) == 0
    made(tmp_path / "f16.gguf", tmp_path / "way.gguf", kind)
    one, two = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / f).tensors} for f in ("1.gguf", "way.gguf")
    )
    assert one == two


def test_no_path_and_no_time_is_in_the_file(wide: Path, tmp_path: Path) -> None:
    data = made(wide, tmp_path / "m.gguf", "Q4_K_M")
    assert str(tmp_path).encode() not in data
    assert str(wide.parent).encode() not in data
    assert set(notes(tmp_path / "m.gguf")) == {"tool", "recipe", "arithmetic"}


@pytest.mark.parametrize("target", ["gguf:Q4_0", "gguf:F16", "safetensors:F16"])
def test_what_was_written_is_read_back(
    target: str, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A writer that loses a byte is found out, and what it wrote is not left behind."""
    verb = "quantize" if target == "gguf:Q4_0" else "convert"
    module = importlib.import_module(f"weightsmith.formats.{target.partition(':')[0]}")
    create = module.create

    def faulty(*args: Any, **options: Any) -> Any:
        writer = create(*args, **options)
        write = writer.write

        def lossy(info: TensorInfo, start: int, rows: Packed) -> None:
            if info.name == "model.layers.1.mlp.down_proj.weight":
                rows = rows.copy()
                rows[-1, -1] ^= 1
            write(info, start, rows)

        monkeypatch.setattr(type(writer), "write", lambda self, *slab: lossy(*slab), raising=True)
        return writer

    monkeypatch.setattr(module, "create", faulty)
    assert run([verb, str(wide), "--to", target, "-o", str(tmp_path / "out"), "-q"]) == 3
    error = capsys.readouterr().err
    assert "model.layers.1.mlp.down_proj.weight" in error
    assert "are not what was written" in error
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".gguf", ".safetensors")]
    assert not (tmp_path / "out").is_file()


def test_a_disk_without_room_is_left_as_it_was(
    wide: Path, tmp_path: Path, told: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("weightsmith.atomic.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    error = told("quantize", str(wide), "--to", "gguf:Q8_0", "-o", str(out / "o.gguf"), code=6)
    assert "are free" in error["error"]["message"]
    assert list(out.iterdir()) == []

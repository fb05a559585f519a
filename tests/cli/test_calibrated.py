"""Calibration through the command line: imatrix files, GGUF types by a text, GPTQ and AWQ checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_llama
from weightsmith.cli.app import run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("wide") / "wide", hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The smith counted 12 nails and 7 hooks; the forge was cold.\n" * 80)
    return path


def result(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> dict[str, Any]:
    assert run([*args, "--json", "-q"]) == code
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def rows(text: Path) -> list[str]:
    return ["--calibrate", str(text), "--rows", "6", "--ctx", "64"]


def test_a_text_and_its_imatrix_give_the_same_weights(
    wide: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = pytest.importorskip("gguf")
    matrix = tmp_path / "imatrix.gguf"
    made = result(capsys, "imatrix", str(wide), "--text", str(text), "--rows", "6", "--ctx", "64", "-o", str(matrix))
    assert made["tensors"] == 14
    common = ["quantize", str(wide), "--to", "gguf:Q4_K_M"]
    result(capsys, *common, "-o", str(tmp_path / "a.gguf"), "--imatrix", str(matrix), "--effort", "fast")
    result(capsys, *common, "-o", str(tmp_path / "b.gguf"), *rows(text), "--effort", "fast")
    result(capsys, *common, "-o", str(tmp_path / "plain.gguf"))
    one, two, plain = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / f).tensors}
        for f in ("a.gguf", "b.gguf", "plain.gguf")
    )
    assert one == two
    assert one != plain
    both = [*common, "-o", str(tmp_path / "c.gguf"), "--imatrix", str(matrix), *rows(text)]
    for dry in ([], ["--dry-run"]):
        refused = result(capsys, *both, *dry, code=2)
        assert "exclude each other" in refused["error"]["message"]


@pytest.mark.slow
def test_feedback_loses_less_than_importances(
    wide: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {}
    for effort in ("fast", "normal"):
        out = tmp_path / f"{effort}.gguf"
        result(capsys, "quantize", str(wide), "--to", "gguf:Q3_K_M", "-o", str(out), *rows(text), "--effort", effort)
        against = ["--against", str(wide), "--text", str(text), "--ctx", "64", "--windows", "4"]
        lost[effort] = result(capsys, "verify", str(out), *against)["kld_mean"]
    assert lost["normal"] < 0.8 * lost["fast"]
    again = tmp_path / "again.gguf"
    result(capsys, "quantize", str(wide), "--to", "gguf:Q3_K_M", "-o", str(again), *rows(text))
    assert again.read_bytes() == (tmp_path / "normal.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.gguf*")) == ["again.gguf", "fast.gguf", "normal.gguf"]


KILL = (
    "import os, sys\nfrom weightsmith.cli.app import main\nfrom weightsmith.evals.calibration.work import Work\n"
    "store = Work.store\n"
    "def stored(self, index, parts):\n"
    "    store(self, index, parts)\n"
    "    if index == int(sys.argv[1]):\n"
    "        os.kill(os.getpid(), 9)\n"
    "Work.store = stored\nmain(sys.argv[2:])\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(
    layer: int, wide: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["quantize", str(wide), "--to", "gguf:IQ4_XS", *rows(text)]
    result(capsys, *common, "-o", str(tmp_path / "whole.gguf"))
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-c", KILL, str(layer), *common, "-o", str(out), "-q"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=env, check=False).returncode == -9
    assert not out.exists()
    assert (tmp_path / "out.gguf.layers" / f"layer-0000{layer}.safetensors").exists()
    result(capsys, *common, "-o", str(out))
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "out.gguf.layers").exists()


@pytest.mark.parametrize("target", ["gptq:4", "gptq:8", "awq"])
def test_packed_checkpoints(
    target: str, wide: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    made = result(capsys, "quantize", str(wide), "--to", target, "--group-size", "64", "-o", str(out), *rows(text))
    assert Path(made["path"]) == out
    shown = result(capsys, "show", str(out))
    assert shown["parameters"] == result(capsys, "show", str(wide))["parameters"]
    assert shown["bpw"] == pytest.approx(made["bpw"], rel=1e-3)
    against = ["--against", str(wide), "--text", str(text), "--ctx", "64", "--windows", "4"]
    loss = result(capsys, "verify", str(out), *against)
    limit = 0.001 if target == "gptq:8" else 0.2
    assert 0 < loss["kld_mean"] < limit
    result(capsys, "convert", str(out), "--to", "gguf:F32", "-o", str(tmp_path / "back.gguf"))
    back = result(capsys, "verify", str(tmp_path / "back.gguf"), *against)
    assert back["kld_mean"] == pytest.approx(loss["kld_mean"], rel=1e-3)


def test_into_the_catalog(wide: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, "pull", str(wide))
    made = result(capsys, "quantize", "wide", "--to", "gptq:4", "--group-size", "64", *rows(text))
    assert made["ref"] == "wide:gptq-4"
    assert result(capsys, "show", "wide:gptq-4")["catalog"]["lineage"] == ["wide:gptq-4", "wide:original"]


def test_what_is_missing_is_told(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x")
    assert "--calibrate" in result(capsys, "quantize", str(wide), "--to", "awq", "-o", out, code=2)["error"]["hint"]
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    told = result(
        capsys, "quantize", str(wide), "--to", "awq", "-o", out, "--calibrate", str(tmp_path / "bad.txt"), code=2
    )
    assert "UTF-8" in told["error"]["message"]


@pytest.mark.parametrize("target", ["gptq:3", "awq"])
def test_a_dry_run_knows_the_exact_size(
    target: str, wide: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["quantize", str(wide), "--to", target, "--group-size", "64"]
    planned = result(capsys, *common, "--dry-run")
    assert planned["dry_run"]
    assert "calibration_seconds" not in planned
    made = result(capsys, *common, "-o", str(tmp_path / "out"), *rows(text), "--effort", "fast")
    for key in ("tensor_bytes", "bpw", "types"):
        assert planned[key] == made[key]
    refused = result(capsys, "quantize", str(wide), "--to", "awq", "--group-size", "48", "--dry-run", code=1)
    assert "multiple" in refused["error"]["message"]


@pytest.mark.parametrize("target", ["gptq:4", "gguf:Q4_K_M"])
def test_a_dry_run_says_what_every_effort_takes(
    target: str, wide: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["quantize", str(wide), "--to", target, "-o", str(tmp_path / "out"), *rows(text), "--dry-run"]
    seconds = result(capsys, *common)["calibration_seconds"]
    assert set(seconds) == {"fast", "normal", "best"}
    assert min(seconds.values()) > 0
    assert run([*common, "-q"]) == 0
    told = capsys.readouterr().out
    assert "Calibrating would take" in told
    assert "best" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["gptq:3", "awq", "gguf:Q3_K_M"])
def test_best_effort_comes_nearer_on_its_own_text(
    target: str, wide: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = []
    for effort in ("normal", "best"):
        out = tmp_path / (f"{effort}.gguf" if target.startswith("gguf") else effort)
        common = ["quantize", str(wide), "--to", target, "-o", str(out), *rows(text), "--effort", effort]
        result(capsys, *common, *([] if target.startswith("gguf") else ["--group-size", "64"]))
        judged = result(capsys, "verify", str(out), "--against", str(wide), "--text", str(text), "--ctx", "64")
        lost.append(judged["kld_mean"])
    assert lost[1] < lost[0]

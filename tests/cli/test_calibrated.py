"""Calibration through the command line: imatrix files, GGUF types by a text, GPTQ and AWQ checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_llama
from weightsmith.cli.app import run


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
    result(capsys, *common, "-o", str(tmp_path / "a.gguf"), "--imatrix", str(matrix))
    result(capsys, *common, "-o", str(tmp_path / "b.gguf"), *rows(text))
    result(capsys, *common, "-o", str(tmp_path / "plain.gguf"))
    one, two, plain = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / f).tensors}
        for f in ("a.gguf", "b.gguf", "plain.gguf")
    )
    assert one == two
    assert one != plain
    refused = result(capsys, *common, "-o", str(tmp_path / "c.gguf"), "--imatrix", str(matrix), *rows(text), code=2)
    assert "exclude each other" in refused["error"]["message"]


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

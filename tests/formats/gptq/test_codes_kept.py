"""GPTQ and AWQ into GGUF: codes are carried over where blocks can hold them, and what is not is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from tests.formats.gptq.oracle import write_folder
from weightsmith import formats
from weightsmith.cli.app import cli
from weightsmith.jobs import Options, Report, Target, convert


def made(tmp_path: Path, type_: str, *, keep_rest: bool = True, **kinds: Any) -> tuple[Report, dict[str, np.ndarray]]:
    folder, expected = write_folder(tmp_path / "m", **kinds)
    options = Options(keep_rest=keep_rest)
    return convert(folder, Target.parse(f"gguf:{type_}"), tmp_path / "out.gguf", options), expected


def errors(report: Report, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest error of every tensor, decoded by the gguf package from canonical rows."""
    reader = formats.open_reader(report.path)
    found = {}
    for name, info in reader.infos().items():
        rows = reader.rows(name, 0, info.n_rows)
        decoded = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[info.codec]).reshape(info.shape)
        found[name] = float(np.abs(decoded - expected[name]).max())
    reader.close()
    return found


@pytest.mark.parametrize(
    ("type_", "kinds"),
    [
        ("Q4_0", {"sym": True}),
        ("Q4_0", {"sym": True, "group": -1}),
        ("Q4_0", {"sym": True, "bits": 3}),
        ("Q4_0", {"sym": True, "checkpoint_format": "gptq_v2"}),
        ("Q8_0", {"sym": True, "bits": 8}),
        ("Q8_0", {"group": 64}),
    ],
)
def test_every_weight_is_the_same(tmp_path: Path, type_: str, kinds: dict[str, Any]) -> None:
    report, expected = made(tmp_path, type_, **kinds)
    assert set(errors(report, expected).values()) == {0.0}
    assert (len(report.codes.taken), report.codes.requantized, report.codes.error) == (14, set(), 0.0)
    assert report.types[type_] == 14  # embedding and head stay F16


def test_zeros_are_rounded_and_it_says_how_far(tmp_path: Path) -> None:
    report, expected = made(tmp_path, "Q4_1")
    found = errors(report, expected)
    assert 0 < max(found.values()) <= report.codes.error < 15 * 0.02 * 2**-11
    assert len(report.codes.taken) == 14


@pytest.mark.parametrize(
    ("type_", "kinds"), [("Q4_0", {"sym": True, "scattered": True}), ("Q4_0", {}), ("Q4_1", {"group": 40})]
)
def test_what_does_not_fit_is_quantized_again_and_named(tmp_path: Path, type_: str, kinds: dict[str, Any]) -> None:
    report, expected = made(tmp_path, type_, **kinds)
    assert (report.codes.taken, len(report.codes.requantized)) == (set(), 14)
    assert max(errors(report, expected).values()) > 0.001


def test_quantize_takes_codes_too(tmp_path: Path) -> None:
    report, expected = made(tmp_path, "Q4_0", keep_rest=False, sym=True)
    found = errors(report, expected)
    assert {name for name, error in found.items() if error} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(report.codes.taken) == 14


def test_other_types_are_searched_as_ever(tmp_path: Path) -> None:
    report, _ = made(tmp_path, "Q5_0", sym=True)
    assert (report.codes.taken, len(report.codes.requantized)) == (set(), 14)


def test_the_command_line_says_it(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path / "m", sym=True)
    out = ["-o", str(tmp_path / "out.gguf")]
    result = CliRunner().invoke(cli, ["convert", str(folder), "--to", "gguf:Q4_0", *out])
    assert result.exit_code == 0, result.output
    assert "codes taken over  of 14 tensors, exactly" in result.output
    result = CliRunner().invoke(cli, ["convert", str(folder), "--to", "gguf:Q4_0", *out, "--force", "--json"])
    assert json.loads(result.stdout)["codes"] == {"taken_over": 14, "largest_error": 0.0, "requantized": []}

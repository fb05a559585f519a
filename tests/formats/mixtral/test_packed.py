"""Mixtral as GPTQ and AWQ: the names that loaders expect, routers as they were, and what is read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.evals.test_calibrate_packed import OPTIONS, TEXT, values
from tests.moe import write_mixtral
from weightsmith import formats
from weightsmith.cli.show import describe
from weightsmith.evals.calibration import packed
from weightsmith.evals.calibration.packed import PackedOptions, quantize_packed
from weightsmith.evals.compare import compare
from weightsmith.evals.ruler import Ruler
from weightsmith.quant.algorithms.rtn import Grid


def quantize(source: Path, out: Path, options: PackedOptions) -> packed.PackedReport:
    reader = formats.open_reader(source)
    try:
        return quantize_packed(reader, out, TEXT, options)
    finally:
        reader.close()


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_what_is_written(form: str, tmp_path: Path) -> None:
    source = write_mixtral(tmp_path / "source", dtype="F32")
    grid = Grid(4, 32, sym=form == "gptq")
    options = PackedOptions(grid, OPTIONS.method, OPTIONS.calibration, form, scaled=form == "awq", codec="F32")
    report = quantize(source, tmp_path / "out", options)
    original, made = formats.open_reader(source), formats.open_reader(report.path)
    assert made.container == form
    stored = made.native_infos()
    expert = "model.layers.1.block_sparse_moe.experts.3.w2"
    assert {f"{expert}.{part}" for part in ("qweight", "qzeros", "scales")} <= set(stored)
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert stored[router].codec == "F32"
    before, after = values(original), values(made)
    np.testing.assert_array_equal(after[router], before[router])
    linears = {name for name in before if ".experts." in name or "_proj." in name}
    assert set(report.losses) == linears
    assert all(0 < loss < 0.1 for loss in report.losses.values())
    assert 0 < np.abs(after[f"{expert}.weight"] - before[f"{expert}.weight"]).max() < 0.2
    settings = json.loads((report.path / "config.json").read_text())["quantization_config"]
    if form == "awq":
        assert settings["modules_to_not_convert"] == ["lm_head", "gate"]
    told = describe(made, tensors=False, metadata=False)["model"]
    assert told["expert_parameters"] == 2 * 4 * 3 * 64 * 96
    assert told["expert_bytes"] == sum(info.nbytes for name, info in stored.items() if ".experts." in name)
    found = compare(original, made, TEXT, Ruler(ctx=32, max_windows=4))
    assert found.kld_mean < 0.5


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_mixtral(tmp_path / "source", dtype="F32")
    whole = quantize(source, tmp_path / "whole", OPTIONS)
    real, calls = packed._quantize_block, []

    def failing(*arguments: object) -> object:
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(packed, "_quantize_block", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", OPTIONS)
    monkeypatch.setattr(packed, "_quantize_block", real)
    again = quantize(source, tmp_path / "out", OPTIONS)
    assert (whole.resumed, again.resumed) == (0, 1)
    for file in sorted(whole.path.glob("*.safetensors")):
        assert file.read_bytes() == (again.path / file.name).read_bytes()

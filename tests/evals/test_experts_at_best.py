"""Mixtures at best effort, end to end: experts make up for what was lost before them, and a stopped run goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.evals.test_calibrate_packed import (
    DRIFT,
    OPTIONS,
    TEXT,
    _KilledError,
    digests,
    quantize,
    stop_after,
)
from tests.evals.test_experts_in_turn import layouts
from tests.formats.grok import grok2
from tests.moe import write_mixtral
from weightsmith import formats
from weightsmith.evals.calibration import Options, calibrate, stream
from weightsmith.evals.calibration.best import Best
from weightsmith.evals.calibration.encoded import EncodedOptions, encode_layers
from weightsmith.evals.calibration.packed import PackedOptions
from weightsmith.evals.calibration.stream import Block
from weightsmith.evals.compare import compare
from weightsmith.evals.ruler import Ruler
from weightsmith.formats.archs import expert_of
from weightsmith.quant.algorithms.rtn import Grid

THREE = replace(DRIFT, grid=Grid(3, 32))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_mixtral(tmp_path / "source", dtype="F32")


def distance(source: Path, out: Path, options: PackedOptions) -> float:
    """Mean KL divergence from `source` of what it is quantized to, on the text it was calibrated on."""
    with closing(formats.open_reader(source)) as original:
        made = quantize(source, out, options).path
        with closing(formats.open_reader(made)) as reader:
            return compare(reader, original, TEXT, Ruler(ctx=32)).kld_mean


def test_experts_bring_it_nearer(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    normal = distance(source, tmp_path / "normal", replace(OPTIONS, grid=Grid(3, 32)))
    best = distance(source, tmp_path / "best", THREE)
    wanted = stream.wanted

    def of_attention(block: Block, names: list[str]) -> object:
        return wanted(replace(block, drifts={}) if expert_of(names[0]) is not None else block, names)

    monkeypatch.setattr("weightsmith.evals.calibration.packed.wanted", of_attention)
    attention = distance(source, tmp_path / "attention", THREE)
    assert best < attention < normal


def test_a_norm_behind_experts_and_a_dense_branch_beside_them(tmp_path: Path) -> None:
    """Grok-2: an expert makes up for what its own inputs lost, the dense branch for nothing."""
    grok2.write_grok2(tmp_path / "grok", dtype="float32")
    widths = {}
    with closing(formats.open_reader(tmp_path / "grok")) as reader:
        tokens = np.random.default_rng(0).integers(0, reader.config.vocab_size, (20, 16))
        for block in calibrate(reader, tokens, Options(rows=20, ctx=16), drift=True):
            for name in block.moments:
                key = name.removeprefix(block.prefix)
                widths[key] = block.drifts[name].width if name in block.drifts else None
                if "experts" in key or "proj" in key:
                    block.weights[key] = block.weights[key] * 1.1
    experts = {width for key, width in widths.items() if "experts" in key}
    assert experts <= {0, None}
    assert 0 in experts
    assert {width for key, width in widths.items() if key.startswith("mlp.")} == {None}


def in_gptq(source: Path, out: Path) -> dict[str, str]:
    return digests(quantize(source, out, DRIFT).path)


def in_blocks(source: Path, out: Path) -> dict[str, bytes]:
    with closing(formats.open_reader(source)) as reader:
        infos = reader.infos()
        options = EncodedOptions(layouts(reader), OPTIONS.calibration, sweeps=1, best=Best())
        made = encode_layers(reader, out, TEXT, options)
        rows = {name: made.rows(name, 0, infos[name].n_rows) for name in infos}
        made.close()
    return {name: packed.tobytes() for name, packed in rows.items() if packed is not None}


@pytest.mark.parametrize("form", [in_gptq, in_blocks])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Callable[[Path, Path], dict[str, object]]
) -> None:
    whole = form(source, tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(_KilledError):
            form(source, tmp_path / "out")
    assert len(list((tmp_path / "out.layers").glob("layer-*"))) == 1
    assert whole
    assert form(source, tmp_path / "out") == whole

"""A checkpoint quantized end to end: what is written is what calibration saw, and a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import CORPUS, write_llama
from weightsmith import formats
from weightsmith.errors import OutputExistsError, UnsupportedError, UsageError
from weightsmith.evals import forward
from weightsmith.evals.calibration import Options, calibrate, packed
from weightsmith.evals.calibration.best import Best
from weightsmith.evals.calibration.packed import PackedOptions, PackedReport, quantize_packed
from weightsmith.evals.calibration.work import Work
from weightsmith.evals.compare import compare
from weightsmith.evals.ruler import Ruler
from weightsmith.quant.algorithms import rtn
from weightsmith.quant.algorithms.gptq import Method
from weightsmith.quant.algorithms.moments import loss_of
from weightsmith.quant.algorithms.rtn import Grid
from weightsmith.quant.codecs import decode
from weightsmith.types import Reader

TEXT = " ".join(CORPUS[:2] * 12)
OPTIONS = PackedOptions(Grid(4, 32), Method(), Options(rows=None, ctx=32))
DRIFT = replace(OPTIONS, best=Best())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source", dtype="F32")


def quantize(source: Path, out: Path, options: PackedOptions = OPTIONS, **rest: Any) -> PackedReport:
    reader = formats.open_reader(source)
    try:
        return quantize_packed(reader, out, TEXT, options, **rest)
    finally:
        reader.close()


def values(reader: Reader) -> dict[str, np.ndarray]:
    return {
        name: decode(info.codec, reader.rows(name, 0, info.n_rows), info.row_len).reshape(info.shape)
        for name, info in reader.infos().items()
    }


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        replace(OPTIONS, grid=Grid(4, 32, sym=False), method=Method("act", static_groups=False)),
        replace(OPTIONS, grid=Grid(3, -1), method=Method("group", static_groups=False, sweeps=0)),
        replace(OPTIONS, grid=Grid(8, 16, sym=False), checkpoint_format="gptq_v2", codec="F32"),
        replace(OPTIONS, grid=Grid(4, 32, sym=False), checkpoint_format="awq"),
        DRIFT,
    ],
    ids=["plain", "scattered", "three bits", "v2", "awq", "drift"],
)
def test_it_loses_less_than_rounding(source: Path, tmp_path: Path, options: PackedOptions) -> None:
    report = quantize(source, tmp_path / "out", options)
    original, made = formats.open_reader(source), formats.open_reader(report.path)
    assert made.container == ("awq" if options.checkpoint_format == "awq" else "gptq")
    assert made.config == replace(original.config, dtype="F16" if options.codec == "F16" else "F32")
    before, after = values(original), values(made)
    for name, value in before.items():
        if "_proj" not in name:
            np.testing.assert_allclose(after[name], value, rtol=0 if options.codec == "F32" else 1e-3, atol=1e-7)
    assert set(report.losses) == {name for name in before if "_proj" in name}
    # The first group's inputs do not depend on what was quantized: both losses can be told from outside.
    block = next(calibrate(original, TEXT, options.calibration))
    for name, moments in block.moments.items():
        w = torch.from_numpy(before[name])
        lost = loss_of(w, torch.from_numpy(after[name]), moments.h)
        rounded = loss_of(w, rtn.quantize(w, options.grid).dequantize(), moments.h)
        assert lost < 0.8 * rounded
        assert report.losses[name] == pytest.approx(lost / loss_of(w, torch.zeros_like(w), moments.h), rel=1e-4)
    found = compare(made, original, TEXT, Ruler(ctx=32))
    assert found.kld_mean < 0.5 if options.grid.bits < 4 else found.kld_mean < 0.05
    original.close()
    made.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "weightsmith-home") == ["out", "source"]


def with_biases(folder: Path) -> Path:
    """Give every linear of a tiny checkpoint a bias."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(3)
    for name, value in list(tensors.items()):
        if "_proj" in name:
            bias = rng.standard_normal(len(value)).astype(np.float32) * np.float32(0.1)
            tensors[name.replace(".weight", ".bias")] = bias
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text()) | {"attention_bias": True, "mlp_bias": True}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("heads", [4, 2])
def test_scales_may_move_first(tmp_path: Path, heads: int) -> None:
    """Norms and biases change with the weights, and all of it reads back as what was calibrated."""
    source = with_biases(write_llama(tmp_path / "biased", dtype="F32", num_key_value_heads=heads))
    options = replace(OPTIONS, scaled=True, codec="F32", checkpoint_format="awq", grid=Grid(4, 32, sym=False))
    out = quantize(source, tmp_path / "out", options).path
    original, made = formats.open_reader(source), formats.open_reader(out)
    before, after = values(original), values(made)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias"):
        moved = after[f"model.layers.0.{name}"] / before[f"model.layers.0.{name}"]
        assert moved.std() > 0.01
    assert (after["model.layers.0.self_attn.q_proj.bias"] == before["model.layers.0.self_attn.q_proj.bias"]).all()
    assert compare(made, original, TEXT, Ruler(ctx=32)).kld_mean < 0.05
    original.close()
    made.close()


def test_a_stopped_run_with_scales_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(OPTIONS, scaled=True)
    whole = quantize(source, tmp_path / "whole", options)
    stop_after(monkeypatch, 1)
    with pytest.raises(_KilledError):
        quantize(source, tmp_path / "out", options)
    monkeypatch.undo()
    report = quantize(source, tmp_path / "out", options)
    assert report.resumed == 1
    assert digests(report.path) == digests(whole.path)


def test_what_earlier_layers_lost_is_made_up_for(source: Path, tmp_path: Path) -> None:
    """On the text it was calibrated on, the whole model comes nearer to the original."""
    original = formats.open_reader(source)
    found = []
    for best in (None, Best()):
        options = replace(OPTIONS, grid=Grid(3, 32), best=best)
        made = formats.open_reader(quantize(source, tmp_path / f"out-{best}", options).path)
        found.append(compare(made, original, TEXT, Ruler(ctx=32)).kld_mean)
        made.close()
    original.close()
    assert found[1] < 0.8 * found[0]
    with pytest.raises(UsageError, match="scales cannot move"):
        replace(OPTIONS, best=Best(), scaled=True)


def test_only_one_process_works_on_an_output(tmp_path: Path) -> None:
    with Work(tmp_path / "w", "a") as one, Work(tmp_path / "w", "a") as other:
        one.begin(1)
        with pytest.raises(OutputExistsError, match="another process"):
            other.begin(1)


def test_the_same_work_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    one = quantize(source, tmp_path / "one")
    other = quantize(source, tmp_path / "other")
    assert digests(one.path) == digests(other.path)


class _KilledError(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    store = Work.store

    def stored(self: Any, index: int, parts: Any) -> None:
        if index == layers:
            raise _KilledError
        store(self, index, parts)

    monkeypatch.setattr(Work, "store", stored)


@pytest.mark.parametrize("options", [OPTIONS, DRIFT], ids=["plain", "drift"])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: PackedOptions
) -> None:
    whole = quantize(source, tmp_path / "whole", options)
    stop_after(monkeypatch, 1)
    with pytest.raises(_KilledError):
        quantize(source, tmp_path / "out", options)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert sorted(file.name for file in (tmp_path / "out.layers").iterdir()) == ["job.json", "layer-00000.safetensors"]
    report = quantize(source, tmp_path / "out", options)
    assert report.resumed == 1
    assert {name.split(".")[2] for name in report.losses} == {"1"}
    assert digests(report.path) == digests(whole.path)
    assert not (tmp_path / "out.layers").exists()


def test_a_run_stopped_at_the_very_end_only_writes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(source, tmp_path / "whole")

    def killed(*_: Any, **__: Any) -> Any:
        raise _KilledError

    monkeypatch.setattr(packed, "_assemble", killed)
    with pytest.raises(_KilledError):
        quantize(source, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(packed, "_quantize", killed)
    report = quantize(source, tmp_path / "out")
    assert report.resumed == 2
    assert digests(report.path) == digests(whole.path)


def test_unknown_families_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "kinds", dict)
    with pytest.raises(UnsupportedError, match="family 'llama' cannot be run"):
        quantize(source, tmp_path / "out")


def test_layers_of_other_work_are_not_taken_over(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 1)
    with pytest.raises(_KilledError):
        quantize(source, tmp_path / "out")
    monkeypatch.undo()
    report = quantize(source, tmp_path / "out", replace(OPTIONS, method=Method(damp=0.02)))
    assert report.resumed == 0
    whole = quantize(source, tmp_path / "whole", replace(OPTIONS, method=Method(damp=0.02)))
    assert digests(report.path) == digests(whole.path)


def test_a_folder_that_is_no_work_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.layers").mkdir()
    (tmp_path / "out.layers" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputExistsError):
        quantize(source, tmp_path / "out")
    assert (tmp_path / "out.layers" / "thesis.txt").read_text() == "precious"


def test_an_existing_output_is_told_before_the_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out.layers").exists()


def test_a_linear_that_cannot_be_packed_is_named_before_the_work(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "odd", intermediate_size=80)
    with pytest.raises(UnsupportedError, match="multiples of 32") as caught:
        quantize(source, tmp_path / "out", replace(OPTIONS, grid=Grid(3, 32)))
    assert caught.value.tensor == "model.layers.0.mlp.gate_proj.weight"
    assert not (tmp_path / "out.layers").exists()


def test_what_does_not_go_together() -> None:
    for changes in (
        {"checkpoint_format": "awq", "grid": Grid(3, 32)},
        {"checkpoint_format": "awq", "method": Method("act", static_groups=False)},
        {"checkpoint_format": "exl9"},
    ):
        with pytest.raises(UsageError):
            replace(OPTIONS, **changes)


def test_settings_say_how_it_was_made(source: Path, tmp_path: Path) -> None:
    out = quantize(source, tmp_path / "out", notes={"source": "tiny"}).path
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {key: found[key] for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")} == {
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    assert found["meta"]["calibration"] == {"rows": None, "ctx": 32, "seed": 0, "pre": None}
    assert found["meta"]["damp_percent"] == 0.01
    reader = formats.open_reader(out)
    assert "tiny" in str(reader.metadata()["__metadata__"])
    reader.close()

"""Grok-2's tensor-parallel files, and the published copies of Grok-1: the same tensors as went in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.grok import grok2
from weightsmith import formats
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError, NotFoundError, UnsupportedError, WeightsmithError
from weightsmith.formats.safetensors import config as hf_config
from weightsmith.types import Reader

torch = pytest.importorskip("torch", reason="torch writes these files")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("grok") / "grok-2"
    return folder, grok2.write_grok2(folder)


@pytest.fixture
def copy(original: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "copy"))


def stored(value: Any) -> np.ndarray:
    return value.contiguous().view(torch.uint8).numpy()


def check(reader: Reader, tensors: dict[str, Any]) -> None:
    assert set(reader.infos()) == set(tensors)
    for name, info in reader.infos().items():
        assert info.shape == tuple(tensors[name].shape)
        rows = reader.rows(name, 0, info.n_rows)
        assert np.array_equal(rows.reshape(-1), stored(tensors[name]).reshape(-1)), name
        if info.n_rows > 3:
            assert np.array_equal(reader.rows(name, 1, 3), rows[1:3])


def test_eight_ranks_make_whole_tensors(original: tuple[Path, dict[str, Any]]) -> None:
    folder, tensors = original
    assert len(list(folder.glob("*-TP-00*.safetensors"))) == 24
    reader = formats.open_reader(folder)
    assert reader.container == "grok2"
    check(reader, tensors)
    assert reader.native_infos()["model.layers.0.block_sparse_moe.experts.3.w2.weight"].shape == (256, 256)
    config, grok = reader.config, reader.config.grok
    assert grok is not None
    assert (config.intermediate_size, grok.dense_size, config.n_experts, config.n_experts_used) == (256, 512, 8, 2)
    assert (grok.router_cap, grok.logit_cap, grok.temperature_length, grok.attention_scale) == (2.0, 5.0, 16, 64**-0.5)
    assert not config.tie_word_embeddings
    assert config.rope_scaling is None


@pytest.mark.parametrize("target", ["safetensors", "gguf"])
def test_conversions_keep_every_byte(target: str, original: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, tensors = original
    out = tmp_path / "out"
    assert run(["convert", str(folder), "--to", target, "-o", str(out), "--quiet"]) == 0
    made, source = formats.open_reader(out), formats.open_reader(folder)
    if target == "safetensors":
        check(made, tensors)
        assert made.config == source.config
        return
    for name, info in made.infos().items():
        rows = made.rows(name, 0, info.n_rows).reshape(-1)
        wide = stored(tensors[name].float()) if info.codec == "F32" else stored(tensors[name])
        assert np.array_equal(rows, wide.reshape(-1)), name
    assert made.config.grok is not None
    assert source.config.grok is not None
    assert (made.config.grok.dense_size, made.config.intermediate_size) == (512, 256)
    assert made.config.grok.logit_cap == source.config.grok.logit_cap


def test_yarn_travels(tmp_path: Path) -> None:
    grok2.write_grok2(tmp_path / "in", rope_type="yarn", num_hidden_layers=1)
    scaling = formats.open_reader(tmp_path / "in").config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.beta_fast) == ("yarn", 16.0, 8.0)
    for target in ("gguf", "safetensors"):
        out = tmp_path / target
        assert run(["convert", str(tmp_path / "in"), "--to", target, "-o", str(out), "--quiet"]) == 0
        assert formats.open_reader(out).config.rope_scaling == scaling


def name(kind: int, rank: str) -> str:
    return f"pytorch_model-{kind:05d}-TP-{rank}.safetensors"


def test_ranks_that_do_not_fit(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    part = copy / name(7, "003")
    kept = part.read_bytes()
    part.unlink()
    with pytest.raises(NotFoundError, match="TP-003"):
        formats.open_reader(copy)
    tensors = load_file(copy / name(7, "002"))
    first = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != first}, part)
    with pytest.raises(IntegrityError, match="3 ranks before it") as caught:
        formats.open_reader(copy)
    assert caught.value.tensor == first
    save_file(tensors | {first: tensors[first][:, :8].contiguous()}, part)
    with pytest.raises(IntegrityError, match="first rank has"):
        formats.open_reader(copy)
    save_file(tensors | {"model.norm.weight": torch.ones(256)}, part)
    with pytest.raises(IntegrityError, match="0 ranks before it"):
        formats.open_reader(copy)
    part.write_bytes(kept)
    common = load_file(copy / name(2, "common"))
    save_file(common | {first: tensors[first]}, copy / name(2, "common"))
    with pytest.raises(IntegrityError, match="whole and in parts"):
        formats.open_reader(copy)
    save_file(common | {"model.extra.weight": torch.ones(2)}, copy / name(2, "common"))
    with pytest.raises(IntegrityError, match="not part of"):
        assert formats.open_reader(copy).infos()


@pytest.mark.parametrize("scheme", ["keyfan", "hpcai"])
def test_published_copies_of_grok_1(scheme: str, tmp_path: Path) -> None:
    tensors = grok2.write_hf(tmp_path / "in", scheme)
    reader = formats.open_reader(tmp_path / "in")
    assert reader.container == "safetensors"
    check(reader, tensors)
    config = reader.config
    assert (config.rope_theta, config.max_position_embeddings, config.tie_word_embeddings) == (10000.0, 8192, True)
    assert config.grok is not None
    assert (config.grok.dense_size, config.grok.attention_scale, config.grok.attention_cap) == (0, 0.125, 30.0)
    assert run(["convert", str(tmp_path / "in"), "--to", "safetensors", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    made = formats.open_reader(tmp_path / "out")
    check(made, tensors)
    assert made.config == config


def test_two_schemes_at_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    grok2.write_hf(tmp_path / "in", "hpcai")
    file = tmp_path / "in" / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(256)}, file)
    with pytest.raises(IntegrityError, match="the same as"):
        assert formats.open_reader(tmp_path / "in").infos()


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("rope_type", "longrope", UnsupportedError),
        ("hidden_act", "silu", UnsupportedError),
        ("sliding_window_size", 512, None),
        ("num_local_experts", 0, IntegrityError),
        ("num_experts_per_tok", 9, IntegrityError),
        ("embedding_multiplier_scale", "x", IntegrityError),
        ("embedding_multiplier_scale", None, IntegrityError),
        ("residual_moe", 1, IntegrityError),
        ("final_logit_softcapping", 1e40, IntegrityError),
        ("quantization_config", {"quant_method": "fp8"}, UnsupportedError),
    ],
)
def test_what_config_json_may_not_say(
    key: str, value: Any, error: type[WeightsmithError] | None, tmp_path: Path
) -> None:
    raw = json.loads(json.dumps(grok2.grok2_config(**{key: value})))
    if error is None:
        assert hf_config.parse(raw, path=tmp_path, dtype="BF16").family == "grok"
        return
    with pytest.raises(error, match=key.partition("_")[0]):
        hf_config.parse(raw, path=tmp_path, dtype="BF16")


def test_extreme_yarn_is_refused(tmp_path: Path) -> None:
    for changes in ({"beta_slow": 9}, {"attn_factor": 2.0}, {"scaling_factor": 0}):
        raw = grok2.grok2_config(rope_type="yarn", **changes)
        with pytest.raises(WeightsmithError):
            hf_config.parse(raw, path=tmp_path, dtype="BF16")

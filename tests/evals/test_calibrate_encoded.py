"""A checkpoint encoded into blocks with feedback: what is written is what calibration saw; a stopped run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import CORPUS, write_llama
from weightsmith import formats
from weightsmith.evals.calibration import Options, calibrate, encoded
from weightsmith.evals.calibration.best import Best
from weightsmith.evals.calibration.encoded import Encoded, EncodedOptions, encode_layers
from weightsmith.evals.calibration.work import Work
from weightsmith.quant import codecs
from weightsmith.quant.algorithms.moments import loss_of
from weightsmith.types import Reader

TEXT = " ".join(CORPUS[:2] * 12)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "source", dtype="F32", hidden_size=256, intermediate_size=256)


def options(reader: Reader, **changes: Any) -> EncodedOptions:
    """Q4_K for queries and keys, Q6_K for values (one group, two layouts), Q8_0 and Q4_0 for others."""
    kinds = {"v_proj": "Q6_K", "o_proj": "Q8_0", "mlp": "Q4_0", "proj": "Q4_K"}
    layouts = {name: next((kind for part, kind in kinds.items() if part in name), "F32") for name in reader.infos()}
    return EncodedOptions(layouts, Options(rows=None, ctx=32), sweeps=1, **changes)


def linears(reader: Reader) -> list[str]:
    return [name for name in reader.infos() if "_proj" in name]


def rows(reader: Reader, made: Encoded) -> dict[str, bytes]:
    found = {}
    for name in linears(reader):
        packed = made.rows(name, 0, reader.infos()[name].n_rows)
        assert packed is not None
        found[name] = packed.tobytes()
    return found


def encode(source: Path, out: Path, **changes: Any) -> dict[str, bytes]:
    reader = formats.open_reader(source)
    made = encode_layers(reader, out, TEXT, options(reader, **changes))
    try:
        return rows(reader, made)
    finally:
        made.close()
        reader.close()


def test_later_linears_see_what_earlier_ones_became(source: Path, tmp_path: Path) -> None:
    reader = formats.open_reader(source)
    chosen = options(reader)
    made = encode_layers(reader, tmp_path / "out", TEXT, chosen)
    assert made.rows("model.norm.weight", 0, 1) is None
    assert set(made.losses) == set(linears(reader))
    values = {}
    for name in linears(reader):
        info, codec = reader.infos()[name], chosen.layouts[name]
        packed = made.rows(name, 0, info.n_rows)
        assert packed is not None
        values[name] = torch.from_numpy(codecs.decode(codec, packed, info.row_len))
        part = made.rows(name, 3, 9)
        np.testing.assert_array_equal(part, packed[3:9])
    # A second pass that puts the same weights in its way must find the very losses that were reported.
    for block in calibrate(reader, TEXT, chosen.calibration):
        for name, moments in block.moments.items():
            key = name.removeprefix(block.prefix)
            w = block.weights[key]
            lost = loss_of(w, values[name], moments.h) / loss_of(w, torch.zeros_like(w), moments.h)
            assert made.losses[name] == pytest.approx(lost, rel=1e-4)
            block.weights[key] = values[name]
    head = made.importances["lm_head.weight"]
    assert head.shape == (256,)
    assert (head > 0).all()
    made.remove()
    made.close()
    assert not (tmp_path / "out.layers").exists()
    reader.close()


class _KilledError(Exception):
    pass


def test_what_earlier_layers_lost_is_made_up_for(source: Path, tmp_path: Path) -> None:
    """Only the first group, before which nothing is lost, is encoded as without it."""
    plain, made = (encode(source, tmp_path / f"out-{best}", best=best) for best in (None, Best()))
    same = {name for name in plain if plain[name] == made[name]}
    assert same == {f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"}


@pytest.mark.parametrize(("layer", "best"), [(0, None), (1, None), (2, None), (1, Best())])
def test_a_stopped_run_goes_on_and_gives_the_same_rows(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int, best: Best | None
) -> None:
    whole = encode(source, tmp_path / "whole", best=best)
    store = Work.store

    def stored(self: Any, index: int, parts: Any) -> None:
        if index == layer:
            raise _KilledError
        store(self, index, parts)

    monkeypatch.setattr(Work, "store", stored)
    with pytest.raises(_KilledError):
        encode(source, tmp_path / "out", best=best)
    monkeypatch.undo()
    assert sorted(file.name for file in (tmp_path / "out.layers").iterdir()) == [
        "job.json",
        *(f"layer-0000{index}.safetensors" for index in range(layer)),
    ]
    assert encode(source, tmp_path / "out", best=best) == whole

    def never(*_: Any, **__: Any) -> Any:
        raise _KilledError

    monkeypatch.setattr(encoded, "passes", never)  # a finished folder is only read
    assert encode(source, tmp_path / "out", best=best) == whole
    with pytest.raises(_KilledError):  # and not for other work
        encode(source, tmp_path / "out", damp=0.02)


def test_tied_embeddings_keep_equal_weights(tmp_path: Path) -> None:
    source = write_llama(
        tmp_path / "tied", dtype="F32", hidden_size=256, intermediate_size=256, tie_word_embeddings=True
    )
    reader = formats.open_reader(source)
    chosen = options(reader)
    chosen = replace(chosen, layouts={name: "Q8_0" if kind != "F32" else kind for name, kind in chosen.layouts.items()})
    made = encode_layers(reader, tmp_path / "out", TEXT, chosen)
    assert made.importances == {}
    assert max(made.losses.values()) < 1e-3
    made.close()
    reader.close()

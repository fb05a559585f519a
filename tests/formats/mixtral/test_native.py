"""Mixtral in Mistral's own forms: each reads as the model that was written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.formats.mixtral.test_containers import stored_bytes
from tests.moe import as_torch, mixtral_config, mixtral_tensors, write_mixtral, write_native
from tests.native import gguf_tensors
from weightsmith import formats, jobs
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, WeightsmithError
from weightsmith.formats.mistral.experts import experts, plain
from weightsmith.formats.safetensors.keys import Keys
from weightsmith.jobs import Options, Target

FORMS = ("safetensors", "pth", "disjoint")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_model(form: str, tmp_path: Path) -> None:
    reader = formats.open_reader(write_native(tmp_path / "native", form=form), allow_pickle=True)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32768}
    published = formats.open_reader(write_mixtral(tmp_path / "hf", dtype="BF16", **ends))
    assert dataclasses.replace(reader.config, name="") == published.config
    assert list(reader.infos()) == list(published.infos())
    written = as_torch(mixtral_tensors(mixtral_config()), "BF16")
    for name, info in reader.infos().items():
        assert info.shape == tuple(written[name].shape)
        whole = reader.rows(name, 0, info.n_rows)
        assert whole.tobytes() == stored_bytes(written[name]), name
        for start, stop in ((0, 1), (info.n_rows // 3, info.n_rows // 2), (info.n_rows - 1, info.n_rows)):
            assert np.array_equal(reader.rows(name, start, stop), whole[start:stop]), name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_gguf(form: str, tmp_path: Path) -> None:
    def convert(source: Path, output: Path) -> dict[str, Any]:
        return gguf_tensors(jobs.convert(source, Target.parse("gguf:Q8_0"), output, Options(allow_pickle=True)).path)

    native = write_native(tmp_path / "native", form=form)
    published = write_mixtral(tmp_path / "hf", dtype="BF16", tokenizer=False)
    assert convert(native, tmp_path / "a.gguf") == convert(published, tmp_path / "b.gguf")


def test_a_transposed_matrix_larger_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightsmith.formats.consolidated import shards

    reader = formats.open_reader(write_native(tmp_path / "native", form="disjoint"), allow_pickle=True)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    whole = reader.rows(name, 0, 64)
    monkeypatch.setattr(shards, "_SLAB", 1000)
    assert np.array_equal(reader.rows(name, 0, 64), whole)
    assert np.array_equal(reader.rows(name, 7, 13), whole[7:13])
    assert reader.row_unit(name) > 1


def test_pickles_are_read_only_with_permission(tmp_path: Path) -> None:
    for form in ("pth", "disjoint"):
        with pytest.raises(UnsafeInputError):
            formats.open_reader(write_native(tmp_path / form, form=form))


def test_a_lost_file_and_a_tensor_in_two_files(tmp_path: Path) -> None:
    import torch

    folder = write_native(tmp_path / "native", form="disjoint")
    third = torch.load(folder / "consolidated.02.pt")
    torch.save(
        {**torch.load(folder / "consolidated.03.pt"), **dict([next(iter(third.items()))])},
        folder / "consolidated.03.pt",
    )
    with pytest.raises(IntegrityError, match="twice"):
        formats.open_reader(folder, allow_pickle=True)
    (folder / "consolidated.03.pt").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        formats.open_reader(folder, allow_pickle=True).infos()
    (folder / "consolidated.01.pt").unlink()
    with pytest.raises(NotFoundError, match=r"consolidated\.01"):
        formats.open_reader(folder, allow_pickle=True)


@pytest.mark.parametrize(
    ("form", "params", "word"),
    [
        ("safetensors", {"moe": {"num_experts": 5, "num_experts_per_tok": 2}}, "gate|experts.4"),
        ("safetensors", {"moe": {"num_experts": 10**9, "num_experts_per_tok": 2}}, "num_experts"),
        ("safetensors", {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}}, "num_shared"),
        ("safetensors", {"moe": [4]}, "moe"),
        ("safetensors", {"moe": None}, "not part|missing"),
        ("disjoint", {"num_local_experts": 3}, "block_sparse_moe"),
        ("disjoint", {"num_local_experts": "4"}, "num_experts"),
        ("disjoint", {"intermediate_size": 95}, "block_sparse_moe"),
        ("disjoint", {"num_attention_heads": 7}, "divisor"),
    ],
)
def test_params_that_do_not_fit(form: str, params: dict[str, Any], word: str, tmp_path: Path) -> None:
    reader = formats.open_reader(write_native(tmp_path / "native", form=form, params=params), allow_pickle=True)
    with pytest.raises(WeightsmithError, match=word):
        reader.infos()


def test_what_params_leave_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = {"rope_theta": None, "sliding_window": "4096", "num_experts_per_tok": None}
    config = formats.open_reader(
        write_native(tmp_path / "a", form="disjoint", params=left_out), allow_pickle=True
    ).config
    assert (config.rope_theta, config.sliding_window, config.n_experts_used) == (1000000.0, 4096, 2)
    folder = write_native(tmp_path / "b", params={"sliding_window": 4096})
    assert formats.open_reader(folder).config.sliding_window == 4096
    assert formats.open_reader(folder).config.max_position_embeddings == 32768
    monkeypatch.setattr("weightsmith.formats.mistral.config._LARGE_MIXTRAL", 64)  # the width of this one
    assert formats.open_reader(folder).config.max_position_embeddings == 65536


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**12) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["num_experts", "x"]), inner),
    max_leaves=4,
)
_KEYS = ("moe", "num_local_experts", "num_experts_per_tok", "hidden_size", "num_attention_heads", "head_dim", "dim")


@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES))
def test_any_params_give_a_count_or_an_error(raw: dict[str, Any]) -> None:
    try:
        count, used = experts(plain(Keys(raw, Path("params.json"))))
    except WeightsmithError:
        return
    assert 0 <= used <= count <= 1024
    assert (used == 0) == (count == 0)

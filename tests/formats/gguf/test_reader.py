from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.formats.gguf.tinymodel import (
    gguf_name,
    interleaved,
    native_weights,
    packed,
    tiny_config,
    tiny_weights,
    write_ours,
)
from weightsmith.errors import IntegrityError, NotFoundError, UsageError
from weightsmith.formats import gguf as container
from weightsmith.formats import open_reader
from weightsmith.types import ModelConfig

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"


def write_theirs(path: Path, config: ModelConfig, weights: dict[str, np.ndarray]) -> Path:
    """Written by the gguf package, rows interleaved by the test's own code."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_name(config.name)
    writer.add_array("some.list", [1, 2, 3])
    for name, value in native_weights(config, weights).items():
        if value.ndim > 1:
            quants = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quants, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("changes", [{}, {"head_dim": 32}, {"attention_bias": True, "mlp_bias": True}])
def test_reads_what_the_gguf_package_writes(changes: dict[str, object], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = tiny_config(bos_token_id=None, eos_token_ids=(), **changes)
    weights = tiny_weights(config)
    with container.open_reader(write_theirs(tmp_path / "a.gguf", config, weights)) as reader:
        assert reader.config == config
        assert reader.metadata()["some.list"] == [1, 2, 3]
        assert list(reader.infos()) == list(weights)
        for name, info in reader.infos().items():
            rows = reader.rows(name, 0, info.n_rows)
            assert rows.shape == (info.n_rows, info.row_bytes)
            value = weights[name].reshape(info.n_rows, -1)
            if info.codec == "Q8_0":
                value = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            np.testing.assert_array_equal(rows, value.view(np.uint8), name)


def test_any_run_of_rows_and_a_fresh_array(tmp_path: Path) -> None:
    config = tiny_config()
    weights = tiny_weights(config)
    with container.open_reader(write_ours(tmp_path / "a.gguf", config)) as reader:
        for name, unit in ((Q, 16), (K, 16), ("model.layers.0.mlp.up_proj.weight", 1), ("model.norm.weight", 1)):
            assert reader.row_unit(name) == unit
        for name in (Q, K, "lm_head.weight"):
            whole = packed(weights[name], "F16")
            for start, stop in ((0, 0), (0, 1), (5, 21), (16, 32), (31, 32), (3, 29)):
                rows = reader.rows(name, start, stop)
                np.testing.assert_array_equal(rows, whole[start:stop])
                rows[:] = 0  # must not show up anywhere
        with pytest.raises(IndexError):
            reader.rows(Q, 0, 65)
        with pytest.raises(NotFoundError, match="absent"):
            reader.rows("absent", 0, 1)


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    config = tiny_config()
    weights = tiny_weights(config)
    with container.open_reader(write_ours(tmp_path / "a.gguf", config)) as reader, ThreadPoolExecutor(8) as pool:
        jobs = [(name, at) for name in (Q, "lm_head.weight") for at in range(0, 64, 2)] * 10
        results = pool.map(lambda job: reader.rows(job[0], job[1], job[1] + 2), jobs)
        for (name, at), rows in zip(jobs, results, strict=True):
            np.testing.assert_array_equal(rows, packed(weights[name], "F16")[at : at + 2])


def test_infos_say_where_the_bytes_lie(tmp_path: Path) -> None:
    config = tiny_config()
    path = write_ours(tmp_path / "a.gguf", config)
    content = path.read_bytes()
    with container.open_reader(path) as reader:
        for name, info in reader.infos().items():
            native = reader.native_infos()[gguf_name(name)]
            assert (native.offset, native.path) == (info.offset, path)
            value = packed(tiny_weights(config)[name], info.codec)
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            value = interleaved(value, heads) if heads else value
            assert content[info.offset : info.offset + info.nbytes] == value.tobytes()


def test_a_file_cut_while_it_is_open(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "a.gguf", tiny_config())
    with container.open_reader(path) as reader:
        reader.infos()
        os.truncate(path, path.stat().st_size - 4096)
        with pytest.raises(IntegrityError, match=r"a\.gguf, tensor 'lm_head.weight': the file became shorter"):
            reader.rows("lm_head.weight", 0, 280)


def test_sniff(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "model", tiny_config())
    assert container.sniff(path)
    assert not container.sniff(tmp_path)
    (tmp_path / "other").write_bytes(b"PK\3\4")
    assert not container.sniff(tmp_path / "other")
    (tmp_path / "zeros.gguf").write_bytes(bytes(64))
    assert container.sniff(tmp_path / "zeros.gguf")
    assert container.sniff(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert not container.sniff(tmp_path)


def test_a_folder_with_one_checkpoint_and_with_two(tmp_path: Path) -> None:
    write_ours(tmp_path / "one.gguf", tiny_config(), split_bytes=40_000)
    with container.open_reader(tmp_path) as reader:
        assert [path.name for path in reader.files()] == sorted(path.name for path in tmp_path.iterdir())
    write_ours(tmp_path / "two.gguf", tiny_config())
    with pytest.raises(UsageError, match="one, two"):
        container.open_reader(tmp_path)


def test_found_by_listing_the_containers(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "a.gguf", tiny_config())
    reader = open_reader(path)
    assert reader.container == "gguf"
    reader.close()


@pytest.mark.slow
def test_demo_model(demo_gguf: Path) -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(demo_gguf).tensors}
    with container.open_reader(demo_gguf) as reader:
        config = reader.config
        assert (config.family, config.n_layers, config.hidden_size) == ("llama", 30, 576)
        assert (config.n_heads, config.n_kv_heads, config.head_dim) == (9, 3, 64)
        assert config.tie_word_embeddings
        assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-5)
        vocab = reader.vocab()
        assert vocab is not None
        assert (vocab.model, vocab.pre, len(vocab.tokens)) == ("gpt2", "smollm", 49152)
        assert set(reader.native_infos()) == set(theirs)
        for name, info in reader.infos().items():
            tensor = theirs[gguf_name(name)]
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert info.codec == tensor.tensor_type.name
            expected = np.asarray(tensor.data).view(np.uint8).reshape(info.n_rows, -1)
            heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
            if not heads:
                np.testing.assert_array_equal(reader.rows(name, 0, info.n_rows), expected)
            elif ".0." in name:
                np.testing.assert_array_equal(interleaved(reader.rows(name, 0, info.n_rows), heads), expected)

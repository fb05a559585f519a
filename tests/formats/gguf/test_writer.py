from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.formats.gguf import rawgguf as raw
from tests.formats.gguf.tinymodel import (
    native_weights,
    packed,
    planned,
    tiny_config,
    tiny_vocab,
    tiny_weights,
    write_ours,
)
from weightsmith.errors import IntegrityError, OutputExistsError, UnsupportedError
from weightsmith.formats import gguf as container
from weightsmith.formats.gguf.metadata import Metadata
from weightsmith.formats.gguf.parse import read_header
from weightsmith.formats.gguf.rope_freqs import divisors
from weightsmith.types import Reader, Recipe, RopeScaling, TensorInfo

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def copy(source: Reader, path: Path, **options: object) -> Path:
    infos = container.plan(source, Recipe()).tensors
    with container.create(path, source.config, infos, source.vocab(), source=source, **options) as writer:  # type: ignore[arg-type]
        for info in writer.order:
            writer.write(info, 0, source.rows(info.name, 0, info.n_rows))
        return writer.close()


@pytest.mark.parametrize("codec", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 32}])
def test_the_gguf_package_reads_what_we_write(codec: str, changes: dict[str, object], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = tiny_config(**changes)
    vocab = tiny_vocab()
    reader = gguf.GGUFReader(write_ours(tmp_path / "a.gguf", config, codec=codec, vocab=vocab))
    expected = native_weights(config, tiny_weights(config))
    assert [tensor.name for tensor in reader.tensors] == list(expected)
    for tensor in reader.tensors:
        value = expected[tensor.name]
        own = codec if value.ndim > 1 else "F32"
        assert tensor.tensor_type.name == own
        assert tuple(reversed(tensor.shape.tolist())) == value.shape
        assert tensor.data_offset % 32 == 0
        assert np.asarray(tensor.data).tobytes() == packed(value, own).tobytes()
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.tokens"] == vocab.tokens
    assert fields["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert fields["tokenizer.ggml.token_type"] == vocab.types
    assert fields["tokenizer.chat_template"] == vocab.chat_template
    assert fields["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[codec]
    assert fields["general.quantization_version"] == 2


def test_bytes_depend_on_the_arguments_only(tmp_path: Path) -> None:
    first = write_ours(tmp_path / "one" / "a.gguf", tiny_config(rope_scaling=LLAMA3), vocab=tiny_vocab())
    second = write_ours(tmp_path / "two" / "b.gguf", tiny_config(rope_scaling=LLAMA3), vocab=tiny_vocab())
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) % 32 == 0
    assert [path.name for path in first.parent.iterdir()] == ["a.gguf"]


def test_round_trip_keeps_tensors_and_metadata(tmp_path: Path) -> None:
    config = tiny_config(rope_scaling=LLAMA3, attention_bias=True)
    path = write_ours(tmp_path / "a.gguf", config, vocab=tiny_vocab(), codec="BF16")
    with container.open_reader(path) as source:
        again = copy(source, tmp_path / "b.gguf")
    assert again.read_bytes() == path.read_bytes()


def source_file(path: Path) -> Path:
    """A model with metadata that this project knows nothing of, among what it does know."""
    config = tiny_config()
    vocab = tiny_vocab()
    strange = raw.key("x.nested", 9, b"\7\0\0\0\2\0\0\0\0\0\0\0\1\0")
    keys = [
        raw.text("general.license", "apache-2.0"),
        raw.text("general.architecture", "llama"),
        raw.u32("general.file_type", 7),
        raw.u32("general.quantization_version", 2),
        raw.u32("llama.context_length", 512),
        raw.u32("llama.embedding_length", 64),
        raw.texts("general.languages", ["en", b"\xff"]),
        raw.u32("llama.block_count", 2),
        raw.u32("llama.feed_forward_length", 96),
        raw.u32("llama.attention.head_count", 4),
        raw.u32("llama.attention.head_count_kv", 2),
        strange,
        raw.f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        raw.text("llama.rope.scaling.type", "none"),
        raw.text("tokenizer.ggml.model", "gpt2"),
        raw.texts("tokenizer.ggml.tokens", vocab.tokens),
        raw.texts("tokenizer.ggml.merges", ["t h"]),
        raw.u32("tokenizer.ggml.eot_token_id", 258),
        raw.key("split.count", 2, b"\0\0"),
    ]
    tensors, data = [], b""
    for name, value in native_weights(config, tiny_weights(config)).items():
        tensors.append(raw.tensor(name, value.shape[::-1], 0, len(data)))
        data += value.astype("<f4").tobytes()
        data += bytes(-len(data) % 32)
    path.write_bytes(raw.gguf(keys, tensors, data))
    return path


def test_foreign_metadata_is_carried_over_in_order(tmp_path: Path) -> None:
    with container.open_reader(source_file(tmp_path / "a.gguf")) as source:
        before = source.metadata()
        after = Metadata(read_header(copy(source, tmp_path / "b.gguf")))
        kept = ["general.license", "general.languages", "x.nested", "tokenizer.ggml.eot_token_id"]
        for key in kept:
            assert after.raw(key) == before.raw(key)
        order = [key for key in after if key in before]
        assert order == [key for key in before if key in after]
        dropped = set(before) - set(after)
        assert dropped == {"llama.rope.scaling.type", "split.count"}
        assert after["general.file_type"] == 0
        added = [key for key in after if key not in before]
        assert "general.size_label" in added
        without = source.vocab()
        assert without is not None
        path = tmp_path / "c.gguf"
        with container.create(
            path, source.config, container.plan(source, Recipe()).tensors, None, source=source
        ) as writer:
            for info in writer.order:
                writer.write(info, 0, source.rows(info.name, 0, info.n_rows))
    none = Metadata(read_header(path))
    assert [key for key in none if key.startswith("tokenizer.")] == ["tokenizer.ggml.model"]


def test_rope_freqs_is_written_and_a_sources_own_bytes_are_kept(tmp_path: Path) -> None:
    config = tiny_config(rope_scaling=LLAMA3)
    path = write_ours(tmp_path / "a.gguf", config)
    vector = divisors(LLAMA3, config.rope_theta, 16)
    nudged = vector.copy()
    blend = int(np.flatnonzero((vector != 1) & (vector != 8))[0])
    nudged[blend] = np.nextafter(vector[blend], np.float32(9))  # as another converter rounds
    content = path.read_bytes()
    assert content.count(vector.tobytes()) == 1
    path.write_bytes(content.replace(vector.tobytes(), nudged.tobytes()))
    with container.open_reader(path) as source:
        assert source.config.rope_scaling == LLAMA3
        assert "rope_freqs.weight" not in source.infos()
        again = copy(source, tmp_path / "b.gguf")
        with container.open_reader(again) as reader:
            assert reader.native_bytes("rope_freqs.weight").tobytes() == nudged.tobytes()
        other = write_ours(tmp_path / "c.gguf", config=replace(config, rope_theta=20000.0), source=source)
    with container.open_reader(other) as reader:
        own = divisors(LLAMA3, 20000.0, 16)
        assert reader.native_bytes("rope_freqs.weight").tobytes() == own.tobytes()


def test_rows_arrive_from_many_threads_in_any_order(tmp_path: Path) -> None:
    config = tiny_config()
    weights = tiny_weights(config)
    expected = write_ours(tmp_path / "a.gguf", config).read_bytes()
    infos = planned(config)
    with container.create(tmp_path / "b.gguf", config, infos, None) as writer:
        assert list(writer.order) == infos
        jobs = []
        for info in writer.order:
            step = writer.row_unit(info)
            jobs += [(info, start, step) for start in range(0, info.n_rows, step)]

        def work(part: list[tuple[TensorInfo, int, int]]) -> None:
            for info, start, step in part:
                writer.write(info, start, packed(weights[info.name], info.codec)[start : start + step])

        jobs.reverse()
        threads = [threading.Thread(target=work, args=(jobs[k::4],)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (tmp_path / "b.gguf").read_bytes() == expected


@pytest.mark.parametrize("left_out", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
@pytest.mark.parametrize("split", [None, 40_000])
def test_a_row_that_never_came_keeps_everything_away(left_out: str, split: int | None, tmp_path: Path) -> None:
    config = tiny_config()
    weights = tiny_weights(config)
    writer = container.create(tmp_path / "a.gguf", config, planned(config), None, split_bytes=split)
    for info in writer.order:
        rows = packed(weights[info.name], info.codec)
        if info.name == left_out:
            writer.write(info, 0, rows[:16])
            writer.write(info, 32, rows[32:])
        else:
            writer.write(info, 0, rows)
    with pytest.raises(IntegrityError, match=f"tensor '{left_out}': rows from 16 on"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_removes_what_was_written(tmp_path: Path) -> None:
    config = tiny_config()
    during = []

    def interrupted() -> None:
        with container.create(tmp_path / "a.gguf", config, planned(config), None):
            during.extend(path.name for path in tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert during == ["a.gguf.part"]
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    infos = {info.name: info for info in planned(config)}
    q, up = infos["model.layers.0.self_attn.q_proj.weight"], infos["model.layers.0.mlp.up_proj.weight"]
    with container.create(tmp_path / "a.gguf", config, list(infos.values()), None) as writer:
        assert (writer.row_unit(q), writer.row_unit(up)) == (16, 1)
        for info, start, shape in ((q, 8, (16, 128)), (q, 0, (8, 128)), (up, 0, (1, 127)), (up, 90, (7, 128))):
            with pytest.raises(ValueError, match="rows"):
                writer.write(info, start, np.zeros(shape, np.uint8))
        with pytest.raises(ValueError, match="rows"):
            writer.write(up, 0, np.zeros((1, 128), np.int8))  # type: ignore[arg-type]
        writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_plans_that_are_not_the_models(tmp_path: Path) -> None:
    config = tiny_config()
    infos = planned(config)
    norm = next(info for info in infos if info.name == "model.norm.weight")
    half = replace(norm, codec="F16", nbytes=128)
    gptq = replace(infos[0], codec="F8_E4M3", nbytes=280 * 64)
    cases: list[tuple[list[TensorInfo], type[Exception], str]] = [
        (infos[:-1], IntegrityError, infos[-1].name),
        ([*infos, replace(norm, name="other")], IntegrityError, "other"),
        ([replace(infos[0], shape=(64, 280)), *infos[1:]], IntegrityError, infos[0].name),
        ([replace(infos[0], nbytes=1), *infos[1:]], IntegrityError, infos[0].name),
        ([info if info is not norm else half for info in infos], UnsupportedError, norm.name),
        ([gptq, *infos[1:]], UnsupportedError, "token_embd.weight"),
    ]
    for plan, kind, named in cases:
        with pytest.raises(kind, match=f"'{named}'"):
            container.create(tmp_path / "a.gguf", config, plan, None)
    with pytest.raises(IntegrityError, match="rope scaling"):
        container.create(tmp_path / "a.gguf", replace(config, rope_scaling=RopeScaling("llama3", 0.0)), infos, None)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_overwritten(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "a.gguf", tiny_config())
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match=r"a\.gguf"):
        container.create(path, tiny_config(), planned(tiny_config()), None)
    assert path.read_bytes() == before
    with container.open_reader(path) as source:
        copy(source, path, overwrite=True)  # onto its own source
    assert path.read_bytes() == before


def test_plan_keeps_codecs_and_widens_vectors(tmp_path: Path) -> None:
    with container.open_reader(write_ours(tmp_path / "a.gguf", tiny_config(), codec="BF16")) as reader:
        chosen = {info.name: info.codec for info in container.plan(reader, Recipe()).tensors}
        assert {codec for name, codec in chosen.items() if "norm" in name} == {"F32"}
        assert {codec for name, codec in chosen.items() if "norm" not in name} == {"BF16"}
        infos = dict(reader.infos())

    class Fake:
        def infos(self) -> dict[str, TensorInfo]:
            return infos

    name = "model.norm.weight"
    infos[name] = replace(infos[name], codec="F16", nbytes=128)
    infos["lm_head.weight"] = replace(infos["lm_head.weight"], codec="F8_E4M3", nbytes=280 * 64)
    chosen = {info.name: info.codec for info in container.plan(Fake(), Recipe()).tensors}  # type: ignore[arg-type]
    assert (chosen[name], chosen["lm_head.weight"]) == ("F32", "F16")
    infos["lm_head.weight"] = replace(infos["lm_head.weight"], codec="I8", nbytes=280 * 64)
    with pytest.raises(UnsupportedError, match="tensor 'lm_head\\.weight'"):
        container.plan(Fake(), Recipe())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", container.TYPES)
def test_plan_for_a_type(kind: str, tmp_path: Path) -> None:
    """What recipes choose is tests/quant/test_recipes' business; here, that a plan can be written and says its type."""
    config = tiny_config(hidden_size=256, intermediate_size=256, head_dim=64)
    with container.open_reader(write_ours(tmp_path / "a.gguf", config)) as reader:
        plan = container.plan(reader, Recipe(kind, imatrix=True))
        pinned = container.plan(reader, Recipe(kind, imatrix=True, overrides=((r"blk\.1\.ffn_up", "F32"),)))
    chosen = {info.name: info for info in plan.tensors}
    assert plan.fallbacks == []
    assert {info.name: info.codec for info in pinned.tensors}["model.layers.1.mlp.up_proj.weight"] == "F32"
    assert chosen["model.norm.weight"].codec == "F32"
    out = tmp_path / "b.gguf"
    with container.create(out, config, plan.tensors, None, file_type=plan.file_type) as writer:
        for info in writer.order:
            writer.write(info, 0, np.zeros((info.n_rows, info.row_bytes), np.uint8))
    metadata = Metadata(read_header(out))
    assert metadata["general.quantization_version"] == 2
    assert metadata["general.file_type"] == plan.file_type


@pytest.mark.slow
def test_demo_model_survives(demo_gguf: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    with container.open_reader(demo_gguf) as source:
        path = copy(source, tmp_path / "copy.gguf")
        before = source.metadata()
        after = Metadata(read_header(path))
        assert {key for key in before if before[key] != after.get(key)} == set()
        with container.open_reader(path) as reader:
            assert reader.config == source.config
            assert reader.vocab() == source.vocab()
    theirs, ours = gguf.GGUFReader(demo_gguf), gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in ours.tensors}
    assert len(found) == len(theirs.tensors)
    for tensor in theirs.tensors:
        assert found[tensor.name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(found[tensor.name].data, tensor.data)

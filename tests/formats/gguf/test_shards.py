from __future__ import annotations

import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.formats.gguf import rawgguf as raw
from tests.formats.gguf.tinymodel import planned, tiny_config, tiny_vocab, write_ours
from tests.runtime import llama
from weightsmith.errors import IntegrityError, NotFoundError, OutputExistsError, UnsafeInputError, UsageError
from weightsmith.formats import gguf as container
from weightsmith.types import RopeScaling

LIMIT = 40_000
CONFIG = tiny_config(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64))


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    write_ours(tmp_path / "model.gguf", CONFIG, vocab=tiny_vocab(), split_bytes=LIMIT)
    return sorted(tmp_path.iterdir())


def test_split_files_are_named_and_bounded(parts: list[Path]) -> None:
    assert len(parts) > 3
    assert [path.name for path in parts] == [f"model-{n + 1:05d}-of-{len(parts):05d}.gguf" for n in range(len(parts))]
    sizes = [path.stat().st_size for path in parts]
    assert max(sizes) <= LIMIT
    # Greedy: no file could have taken the first tensor of the next one.
    with container.open_reader(parts[0]) as reader:
        for this, following in pairwise(parts):
            first = next(info for info in reader.native_infos().values() if info.path == following)
            assert this.stat().st_size + first.nbytes > LIMIT - 200


def test_any_part_opens_all(parts: list[Path], tmp_path: Path) -> None:
    whole = write_ours(tmp_path / "whole" / "a.gguf", CONFIG, vocab=tiny_vocab())
    with container.open_reader(whole) as expected:
        for part in parts:
            with container.open_reader(part) as reader:
                assert reader.files() == parts
                assert reader.config == CONFIG
                assert reader.vocab() == tiny_vocab()
                assert list(reader.native_infos()) == list(expected.native_infos())
                for name, info in reader.infos().items():
                    rows = reader.rows(name, 0, info.n_rows)
                    np.testing.assert_array_equal(rows, expected.rows(name, 0, info.n_rows))


def test_the_gguf_package_reads_each_part(parts: list[Path]) -> None:
    gguf = pytest.importorskip("gguf")
    total = 0
    for number, path in enumerate(parts):
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        assert (fields["split.no"], fields["split.count"]) == (number, len(parts))
        assert reader.fields["split.no"].types[0].name == "UINT16"
        assert reader.fields["split.tensors.count"].types[0].name == "INT32"
        assert ("general.architecture" in fields) is (number == 0)
        total += len(reader.tensors)
    assert total == fields["split.tensors.count"]


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    write_ours(tmp_path / "a.gguf", CONFIG, split_bytes=2000)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert max(sizes) > 2000
    with container.open_reader(tmp_path) as reader:
        for path in reader.files():
            held = [info for info in reader.native_infos().values() if info.path == path]
            assert len(held) == 1 or path.stat().st_size <= 2000


def test_one_file_is_enough(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "a.gguf", CONFIG, split_bytes=10**9)
    assert path.read_bytes() == write_ours(tmp_path / "b.gguf", CONFIG).read_bytes()
    with pytest.raises(UsageError, match="0 bytes"):
        container.create(tmp_path / "c.gguf", CONFIG, planned(CONFIG), None, split_bytes=0)


def test_the_first_part_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        order.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_ours(tmp_path / "a.gguf", CONFIG, split_bytes=LIMIT)
    assert order == sorted(order, reverse=True)
    assert order[-1].startswith("a-00001-of-")


def test_a_failure_between_two_renames_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if "-00002-of-" in target.name:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        write_ours(tmp_path / "a.gguf", CONFIG, split_bytes=LIMIT)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_part_is_in_the_way(parts: list[Path], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in parts}
    with pytest.raises(OutputExistsError, match=r"model-0000\d-of-"):
        write_ours(tmp_path / "model.gguf", CONFIG, vocab=tiny_vocab(), split_bytes=LIMIT)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_missing_part(parts: list[Path]) -> None:
    parts[2].unlink()
    for part in (parts[0], parts[3]):
        with pytest.raises(NotFoundError) as caught:
            container.open_reader(part)
        assert parts[2].name in str(caught.value)
        assert part.name in str(caught.value)


def test_renamed_part(parts: list[Path], tmp_path: Path) -> None:
    for name in ("alone.gguf", f"model-00002-of-{len(parts):05d}.gguf", "model-00001-of-00009.gguf"):
        os.replace(parts[0], tmp_path / name)
        with pytest.raises(IntegrityError, match=name) as caught:
            container.open_reader(tmp_path / name)
        assert "split.no" in str(caught.value)
        os.replace(tmp_path / name, parts[0])


def test_two_parts_changed_places(parts: list[Path]) -> None:
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(third)
    parts[2].write_bytes(second)
    with pytest.raises(IntegrityError, match=rf"{parts[1].name}: key 'split.no': is 2, expected 1"):
        container.open_reader(parts[0])


def part(path: Path, number: int, count: int, total: int, tensors: list[bytes]) -> None:
    keys = [
        raw.key("split.no", 2, struct.pack("<H", number)),
        raw.key("split.count", 2, struct.pack("<H", count)),
        raw.key("split.tensors.count", 5, struct.pack("<i", total)),
    ]
    path.write_bytes(raw.gguf(keys, tensors, bytes(32) if tensors else b""))


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    part(first, 0, 2, 2, [raw.tensor("a", [4])])
    part(second, 1, 2, 2, [raw.tensor("b", [4])])
    with container.open_reader(second) as reader:
        assert list(reader.native_infos()) == ["a", "b"]
    part(second, 1, 2, 2, [raw.tensor("a", [4])])
    with pytest.raises(IntegrityError, match=r"m-00002-of-00002\.gguf, tensor 'a': is in m-00001"):
        container.open_reader(first)
    part(second, 1, 3, 2, [raw.tensor("b", [4])])
    with pytest.raises(IntegrityError, match=r"m-00002-of-00002\.gguf: key 'split.count': is 3"):
        container.open_reader(first)
    part(second, 1, 2, 3, [raw.tensor("b", [4])])
    with pytest.raises(IntegrityError, match=r"m-00002-of-00002\.gguf: key 'split.tensors.count': is 3"):
        container.open_reader(first)
    second.write_bytes(raw.gguf([], [raw.tensor("b", [4])], bytes(32)))
    with pytest.raises(IntegrityError, match=r"m-00002-of-00002\.gguf: key 'split.no': is None"):
        container.open_reader(first)
    with pytest.raises(IntegrityError, match="part 2 of 2"):
        container.open_reader(second)


def test_a_first_part_without_tensors(tmp_path: Path) -> None:
    part(tmp_path / "m-00001-of-00002.gguf", 0, 2, 1, [])
    part(tmp_path / "m-00002-of-00002.gguf", 1, 2, 1, [raw.tensor("b", [4])])
    with container.open_reader(tmp_path / "m-00001-of-00002.gguf") as reader:
        assert list(reader.native_infos()) == ["b"]


def test_a_part_that_is_a_link_out_of_the_folder(parts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.gguf"
    os.replace(parts[1], outside)
    parts[1].symlink_to(outside)
    with pytest.raises(UnsafeInputError, match="leaves its folder"):
        container.open_reader(parts[0])


def test_llama_cpp_loads_one_file_and_many(parts: list[Path], tmp_path: Path) -> None:
    whole = write_ours(tmp_path / "whole" / "a.gguf", CONFIG, vocab=tiny_vocab())
    logits = []
    for path in (whole, parts[0]):
        model = llama(path, n_ctx=32, logits_all=True, n_threads=1)
        tokens = model.tokenize(b"the thread", add_bos=True)
        assert tokens[:2] == [256, 259]
        model.eval(tokens)
        logits.append(np.array(model.scores[: len(tokens)]))
        model.close()
    assert logits[0].shape[1] == 280
    assert np.isfinite(logits[0]).all()
    np.testing.assert_array_equal(logits[0], logits[1])

"""The writer: what it writes is what was given, in place only when whole, and transformers loads it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.tiny import LLAMA3_ROPE, write_llama
from weightsmith.errors import (
    IntegrityError,
    OutputExistsError,
    ResourceError,
    UnsafeInputError,
    UnsupportedError,
    WeightsmithError,
)
from weightsmith.formats import safetensors
from weightsmith.formats.safetensors import create, open_reader, plan
from weightsmith.types import ModelConfig, Recipe, TensorInfo, Vocab

Copy = Callable[..., Path]
NORM = "model.norm.weight"


@pytest.fixture
def source(tmp_path: Path) -> safetensors.SafetensorsReader:
    return open_reader(write_llama(tmp_path / "source"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder, read with the safetensors package alone."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(path).items():
            found[name] = (str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tied", [False, True])
def test_copy_is_the_same(tmp_path: Path, copy_checkpoint: Copy, dtype: str, tied: bool) -> None:
    source = open_reader(write_llama(tmp_path / "source", dtype=dtype, tie_word_embeddings=tied, tokenizer=False))
    folder = copy_checkpoint(source, tmp_path / "copy")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert tensors(folder) == tensors(tmp_path / "source")
    again = open_reader(folder)
    assert again.config == source.config
    assert again.metadata()["__metadata__"] == {"format": "pt"}
    assert list(again.native_infos()) == list(source.infos())


def test_bytes_are_the_same_every_time(source: Any, tmp_path: Path, copy_checkpoint: Copy) -> None:
    first = copy_checkpoint(source, tmp_path / "first", slab=1, split_bytes=20_000)
    second = copy_checkpoint(source, tmp_path / "second", slab=1000, split_bytes=20_000)
    assert contents(first) == contents(second)
    whole = (copy_checkpoint(source, tmp_path / "third") / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    assert length % 8 == 0
    header = whole[8 : 8 + length]
    assert header.startswith(
        b'{"__metadata__":{"format":"pt"},"model.embed_tokens.weight":{"dtype":"F16","shape":[384,64],"data_offsets":[0,49152]},'
    )
    assert hashlib.sha256(header).hexdigest() == "78d3fcb5545c93e60326c7b495f9de569e961833b329484ece7b0a0afb32e011"


def test_shards(source: Any, tmp_path: Path, copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint(source, tmp_path / "out", split_bytes=60_000)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == [f"model-0000{k}-of-0000{len(shards)}.safetensors" for k in range(1, len(shards) + 1)]
    assert len(shards) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(info.nbytes for info in source.infos().values())}
    assert index["weight_map"].keys() == source.infos().keys()
    order = [index["weight_map"][name] for name in source.infos()]
    assert order == sorted(order)
    for name in shards:
        held = [info.nbytes for info in source.infos().values() if index["weight_map"][info.name] == name]
        assert sum(held) <= 60_000
    assert tensors(folder) == tensors(tmp_path / "source")
    assert open_reader(folder).infos().keys() == source.infos().keys()


def test_a_tensor_larger_than_a_shard_has_its_own(source: Any, tmp_path: Path, copy_checkpoint: Copy) -> None:
    folder = copy_checkpoint(source, tmp_path / "out", split_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == 21
    assert tensors(folder) == tensors(tmp_path / "source")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "split"),
    [
        ({}, None),
        ({"tie_word_embeddings": True, "dtype": "BF16"}, None),
        ({"dtype": "F32", "rope_scaling": LLAMA3_ROPE}, 40_000),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8, "head_dim": 32}, None),
    ],
)
def test_transformers_loads_it(
    tmp_path: Path, copy_checkpoint: Copy, changes: dict[str, Any], split: int | None
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    original = write_llama(tmp_path / "source", tokenizer=False, **changes)
    folder = copy_checkpoint(open_reader(original), tmp_path / "out", split_bytes=split)
    theirs = AutoModelForCausalLM.from_pretrained(original, local_files_only=True)
    ours = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert type(ours) is type(theirs)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.slow
def test_we_read_what_transformers_saves(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    original = write_llama(tmp_path / "source", tokenizer=False, rope_scaling=LLAMA3_ROPE)
    model = AutoModelForCausalLM.from_pretrained(original, local_files_only=True)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    reader = open_reader(tmp_path / "saved")
    assert reader.config == open_reader(original).config
    assert len(reader.files()) > 4
    for name, value in model.state_dict().items():
        info = reader.infos()[name]
        assert reader.rows(name, 0, info.n_rows).tobytes() == value.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_companions_are_copied_byte_for_byte(source: Any, tmp_path: Path, copy_checkpoint: Copy) -> None:
    extra = {"chat_template.jinja": b"{{ x }}\r\n", "LICENSE": b"terms\xff", "generation_config.json": b"{}"}
    for name, content in extra.items():
        (tmp_path / "source" / name).write_bytes(content)
    for name in ("modeling_x.py", "pytorch_model.bin", "README.md", "x.pth"):
        (tmp_path / "source" / name).write_bytes(b"never")
    before = contents(tmp_path / "source")
    after = contents(copy_checkpoint(source, tmp_path / "out", source=source))
    copied = {*extra, "tokenizer.json", "tokenizer_config.json"}
    assert after.keys() == copied | {"config.json", "model.safetensors"}
    assert {name: after[name] for name in copied} == {name: before[name] for name in copied}


def test_companion_that_leaves_the_folder_is_refused(source: Any, tmp_path: Path, copy_checkpoint: Copy) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source" / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeInputError, match="link"):
        copy_checkpoint(source, tmp_path / "out", source=source)
    assert not list(tmp_path.glob("out*"))


def fake_tokenizer(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> list[Any]:
    module = ModuleType("weightsmith.formats.tokenizer")
    seen: list[Any] = []

    def to_files(vocab: Vocab, config: ModelConfig) -> dict[str, bytes]:
        seen.append((vocab, config))
        return files

    module.to_files = to_files  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_tokenizer_is_made_from_the_vocab(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_tokenizer(monkeypatch, {"tokenizer.json": b"made"})
    vocab = Vocab("gpt2", ["a"], [1])
    writer = create(tmp_path / "out", source.config, plan(source, Recipe()).tensors, vocab, source=None)
    assert (tmp_path / "out.part" / "tokenizer.json").read_bytes() == b"made"
    assert seen == [(vocab, source.config)]
    writer.abort()
    fake_tokenizer(monkeypatch, {"../escape": b""})
    with pytest.raises(UnsafeInputError):
        create(tmp_path / "out", source.config, plan(source, Recipe()).tensors, vocab)


def begin(source: Any, path: Path, **options: Any) -> safetensors.SafetensorsWriter:
    return create(path, source.config, plan(source, Recipe()).tensors, None, **options)


def fill(writer: safetensors.SafetensorsWriter, source: Any, *, skip: str = "") -> None:
    for info in writer.order:
        if info.name != skip:
            writer.write(info, 0, source.rows(info.name, 0, info.n_rows))


def test_any_order_from_any_thread(source: Any, tmp_path: Path) -> None:
    writer = begin(source, tmp_path / "out", split_bytes=60_000)
    assert writer.row_unit(writer.order[0]) == 1
    jobs = [(info, row) for info in writer.order for row in range(info.n_rows)]
    random.Random(1).shuffle(jobs)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: writer.write(job[0], job[1], source.rows(job[0].name, job[1], job[1] + 1)), jobs))
    assert writer.close() == tmp_path / "out"
    assert tensors(tmp_path / "out") == tensors(tmp_path / "source")


def test_nothing_is_visible_before_close(source: Any, tmp_path: Path) -> None:
    writer = begin(source, tmp_path / "out")
    fill(writer, source)
    assert not (tmp_path / "out").exists()
    writer.close()
    assert not list(tmp_path.glob("out.*"))


def test_a_missing_row_is_noticed(source: Any, tmp_path: Path) -> None:
    writer = begin(source, tmp_path / "out")
    fill(writer, source, skip="lm_head.weight")
    info = writer.order[-1]
    writer.write(info, 0, source.rows(info.name, 0, 100))
    writer.write(info, 101, source.rows(info.name, 101, 384))
    with pytest.raises(IntegrityError, match="1 of 384 rows were never written") as caught:
        writer.close()
    assert caught.value.tensor == "lm_head.weight"
    assert not list(tmp_path.glob("out*"))


def test_an_exception_leaves_nothing(source: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), begin(source, tmp_path / "out"):
        raise RuntimeError
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("start", "rows"),
    [
        (0, np.zeros((1, 127), np.uint8)),
        (0, np.zeros((1, 128), np.int8)),
        (0, np.zeros(128, np.uint8)),
        (-1, np.zeros((1, 128), np.uint8)),
        (384, np.zeros((1, 128), np.uint8)),
        (383, np.zeros((2, 128), np.uint8)),
    ],
)
def test_rows_that_do_not_fit(source: Any, tmp_path: Path, start: int, rows: Any) -> None:
    writer = begin(source, tmp_path / "out")
    with pytest.raises(WeightsmithError, match="does not fit") as caught:
        writer.write(writer.order[0], start, rows)
    assert caught.value.tensor == "model.embed_tokens.weight"
    writer.abort()


def test_a_strided_slab_is_written_as_it_reads(source: Any, tmp_path: Path) -> None:
    writer = begin(source, tmp_path / "out")
    fill(writer, source)
    info = writer.order[0]
    wide = np.random.default_rng(0).integers(0, 255, (384, 256), np.uint8)
    writer.write(info, 0, wide[:, ::2])
    writer.close()
    assert np.array_equal(open_reader(tmp_path / "out").rows(info.name, 0, 384), wide[:, ::2])


def test_plans_that_are_not_the_model(source: Any, tmp_path: Path) -> None:
    planned = plan(source, Recipe()).tensors
    path = tmp_path / "out"
    with pytest.raises(IntegrityError, match="leaves it out") as caught:
        create(path, source.config, planned[1:], None)
    assert caught.value.tensor == planned[0].name
    for bad in (TensorInfo("x", (4,), "F16", 8), TensorInfo(NORM, (32,), "F16", 64), planned[0]):
        with pytest.raises(IntegrityError, match="not the model's") as caught:
            create(path, source.config, [*(p for p in planned if p.name != NORM), bad], None)
        assert caught.value.tensor == bad.name
    with pytest.raises(UnsupportedError, match="Q8_0 cannot be stored") as refused:
        create(path, source.config, [TensorInfo(planned[0].name, planned[0].shape, "Q8_0", 1), *planned[1:]], None)
    assert refused.value.tensor == planned[0].name
    assert not list(tmp_path.glob("out*"))


def test_overwrite(source: Any, tmp_path: Path, copy_checkpoint: Copy) -> None:
    other = open_reader(write_llama(tmp_path / "other", seed=9, tokenizer=False))
    out = copy_checkpoint(source, tmp_path / "out", split_bytes=60_000)
    with pytest.raises(OutputExistsError, match="already exists"):
        copy_checkpoint(other, out)
    assert tensors(out) == tensors(tmp_path / "source")
    copy_checkpoint(other, out, overwrite=True)
    assert tensors(out) == tensors(tmp_path / "other")
    assert not list(tmp_path.glob("out.*"))


def test_a_failed_overwrite_keeps_the_old(source: Any, tmp_path: Path, copy_checkpoint: Copy) -> None:
    out = copy_checkpoint(source, tmp_path / "out")
    before = contents(out)
    writer = begin(source, out, overwrite=True)
    with pytest.raises(IntegrityError):
        writer.close()
    assert contents(out) == before


def test_overwrite_spares_what_is_no_checkpoint(source: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    (home / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="no checkpoint"):
        begin(source, home, overwrite=True)
    assert contents(home) == {"config.json": b"{}", "thesis.txt": b"years of work"}


def test_a_checkpoint_may_replace_itself(source: Any, tmp_path: Path, copy_checkpoint: Copy) -> None:
    expected = tensors(tmp_path / "source")
    tokenizer = (tmp_path / "source" / "tokenizer.json").read_bytes()
    copy_checkpoint(source, tmp_path / "source", source=source, overwrite=True, split_bytes=60_000)
    assert tensors(tmp_path / "source") == expected
    assert (tmp_path / "source" / "tokenizer.json").read_bytes() == tokenizer
    assert not (tmp_path / "source" / "model.safetensors").exists()


def test_two_writers_of_one_output(source: Any, tmp_path: Path) -> None:
    writer = begin(source, tmp_path / "out")
    with pytest.raises(OutputExistsError, match="another process"):
        begin(source, tmp_path / "out")
    fill(writer, source)
    writer.close()
    assert tensors(tmp_path / "out") == tensors(tmp_path / "source")


def test_disk_full_while_writing(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run() -> None:
        with begin(source, tmp_path / "out") as writer:
            monkeypatch.setattr(os, "pwrite", full)
            fill(writer, source)

    with pytest.raises(ResourceError, match="disk is full"):
        run()
    assert not list(tmp_path.glob("out*"))


def test_too_little_space_is_told_before(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="are free"):
        begin(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from weightsmith.formats.safetensors import create, open_reader, plan
    from weightsmith.types import Recipe
    source = open_reader(Path(sys.argv[1]))
    tensors = plan(source, Recipe()).tensors
    writer = create(Path(sys.argv[2]), source.config, tensors, None, source=source, split_bytes=60_000)
    for info in writer.order[:9]:
        writer.write(info, 0, source.rows(info.name, 0, info.n_rows))
    os.kill(os.getpid(), signal.SIGKILL)
""")


def test_a_killed_run_leaves_a_part_that_the_next_takes_over(
    source: Any, tmp_path: Path, copy_checkpoint: Copy
) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(source.path), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("out*")] == ["out.part"]
    (tmp_path / "out.part" / "stray").mkdir()
    copy_checkpoint(source, out, source=source)
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    assert not (out / "stray").exists()
    assert tensors(out) == tensors(tmp_path / "source")

"""Sharded weights: the index is held against the parts, and leads nowhere else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_llama
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, WeightsmithError
from weightsmith.formats.safetensors import open_reader, sniff

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", shards=3, tokenizer=False)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the index's weight_map."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder: Path, kind: type[WeightsmithError], *says: str) -> None:
    with pytest.raises(kind) as caught:
        open_reader(folder)
    for text in says:
        assert text in str(caught.value)


def test_shards_are_read_as_one(sharded: Path, tmp_path: Path) -> None:
    single = open_reader(write_llama(tmp_path / "single", tokenizer=False))
    reader = open_reader(sharded)
    assert list(reader.infos()) == list(single.infos())
    for name, info in reader.infos().items():
        assert reader.rows(name, 0, info.n_rows).tobytes() == single.rows(name, 0, info.n_rows).tobytes()
    shards = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert [path.name for path in reader.files()] == ["config.json", INDEX, *shards]


def test_total_size_is_only_informative(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    for metadata in ({"total_size": 1}, {}, {"total_size": "many"}):
        (sharded / INDEX).write_text(json.dumps(index | {"metadata": metadata}))
        assert open_reader(sharded).infos()


def test_missing_shard_is_named_with_the_way_out(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert sniff(sharded)
    refused(
        sharded, NotFoundError, "1 of 3 weight files", "'model-00002-of-00003.safetensors'", "Pull the checkpoint again"
    )
    for path in sharded.glob("*.safetensors"):
        path.unlink()
    assert sniff(sharded)
    refused(sharded, NotFoundError, "3 of 3 weight files")


def test_name_that_no_file_system_takes(sharded: Path) -> None:
    edit(sharded, lambda names: names.update({NORM: "x" * 300 + ".safetensors"}))
    refused(sharded, UnsafeInputError, "xxx", "255 bytes")


def test_truncated_shard_is_named(sharded: Path) -> None:
    path = sharded / "model-00003-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    refused(sharded, IntegrityError, str(path), "truncated", "Pull the checkpoint again")


def test_tensor_missing_in_the_parts(sharded: Path) -> None:
    edit(sharded, lambda names: names.update({"model.extra.weight": names[NORM]}))
    refused(sharded, IntegrityError, "'model.extra.weight'", "does not hold it")


def test_tensor_missing_in_the_index(sharded: Path) -> None:
    edit(sharded, lambda names: names.pop(NORM))
    refused(sharded, IntegrityError, NORM, "not listed")


def test_tensor_in_another_shard(sharded: Path) -> None:
    def move(names: dict[str, str]) -> None:
        names[NORM] = next(file for file in names.values() if file != names[NORM])

    edit(sharded, move)
    refused(sharded, IntegrityError, NORM, "but stored in")


def test_tensor_in_two_shards(sharded: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({NORM: torch.ones(64)}, sharded / "again.safetensors")
    edit(sharded, lambda names: names.update({"x": "again.safetensors"}))
    refused(sharded, IntegrityError, NORM, "stored twice")


BAD_NAMES = [
    "../outside.safetensors",
    "/etc/outside.safetensors",
    "a/../../outside.safetensors",
    "./x.safetensors",
    "..\\outside.safetensors",
    "C:x.safetensors",
    "//server/x.safetensors",
    "x\0.safetensors",
    "x\n.safetensors",
    "nul.safetensors",
    "x.safetensors ",
    "a//b.safetensors",
    "e\u0301.safetensors",
    "",
    ".",
    3,
    None,
    ["x.safetensors"],
    {"x": 1},
    "pytorch_model.bin",
    "config.json",
    "deep/" * 300 + "x.safetensors",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:40])
def test_name_that_leads_elsewhere(sharded: Path, name: Any) -> None:
    (sharded.parent / "outside.safetensors").write_bytes((sharded / "model-00001-of-00003.safetensors").read_bytes())
    edit(sharded, lambda names: names.update({NORM: name}))
    refused(sharded, UnsafeInputError, INDEX)


def test_link_that_leads_elsewhere(sharded: Path) -> None:
    path = sharded / "model-00001-of-00003.safetensors"
    path.rename(sharded.parent / "outside.safetensors")
    path.symlink_to(sharded.parent / "outside.safetensors")
    refused(sharded, UnsafeInputError, path.name, "link")


def test_link_to_itself(sharded: Path) -> None:
    (sharded / "loop.safetensors").symlink_to("loop.safetensors")
    edit(sharded, lambda names: names.update({NORM: "loop.safetensors"}))
    with pytest.raises((UnsafeInputError, NotFoundError), match=r"loop\.safetensors"):
        open_reader(sharded)


def test_links_of_the_hub_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    """The hub's cache keeps a snapshot as links into its blobs."""
    repo = tmp_path / "models--org--name"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / f"{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number}")
    assert open_reader(snapshot).infos()


def test_names_that_only_differ_by_case(sharded: Path) -> None:
    (sharded / "Model-00001-of-00003.safetensors").write_bytes(b"")
    edit(sharded, lambda names: names.update({"x": "Model-00001-of-00003.safetensors"}))
    refused(sharded, UnsafeInputError, "upper and lower case")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "occurs twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_damaged_index(sharded: Path, text: str, says: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, IntegrityError, INDEX, says)


def test_parts_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, NotFoundError, "3 weight files", INDEX)


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not sniff(tmp_path)
    refused(tmp_path, NotFoundError, "model.safetensors")


def test_the_single_file_comes_first(sharded: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", seed=5, tokenizer=False)
    (sharded / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    reader = open_reader(sharded)
    assert [path.name for path in reader.files()] == ["config.json", "model.safetensors"]
    assert reader.rows(NORM, 0, 1).tobytes() == open_reader(other).rows(NORM, 0, 1).tobytes()


def test_one_file_of_another_name(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", tokenizer=False)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert sniff(folder)
    assert open_reader(folder).infos()
    assert open_reader(folder / "weights.safetensors").infos()

"""Taking in what lies on disk already: no copy, no move, no link out of the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.craft import STRING, gguf, kv
from tests.loopback.pull import take
from weightsmith.catalog import Catalog
from weightsmith.errors import NotFoundError, OutputExistsError, UnsafeInputError, UnsupportedError, UsageError
from weightsmith.sources import fetch, parse

GGUF = gguf([kv("general.architecture", STRING, "llama")], [], b"")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "home")


def test_folder_is_taken_in_without_its_other_files(
    tmp_path: Path, llama_files: dict[str, bytes], catalog: Catalog
) -> None:
    folder = tmp_path / "My Llama"
    folder.mkdir()
    for name, data in {**llama_files, "notes.txt": b"private", "train.py": b"x", "x.bin": b"p"}.items():
        (folder / name).write_bytes(data)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    entry = take(catalog, str(folder))
    assert entry.ref == "my-llama:original"
    assert {file.path for file in entry.files} == set(llama_files)
    assert entry.origin["path"] == str(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    if "hardlink" in entry.origin["taken"]:
        assert (entry.folder / "model.safetensors").samefile(folder / "model.safetensors")
        assert catalog.remove(entry.ref).freed < 10_000, "the user still holds the weights"
        assert (folder / "model.safetensors").is_file()


def test_file(tmp_path: Path, catalog: Catalog) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(GGUF)
    (tmp_path / "link.gguf").symlink_to(path)
    entry = take(catalog, str(path))
    assert (entry.ref, entry.container, entry.path.name) == ("tiny:original", "gguf", "tiny.gguf")
    linked = take(catalog, str(tmp_path / "link.gguf"), name="other")
    assert not linked.path.is_symlink()
    assert linked.path.read_bytes() == GGUF
    assert take(catalog, str(path)) == entry
    path.unlink()
    path.write_bytes(GGUF + b"\0" * 32)
    with pytest.raises(OutputExistsError):
        take(catalog, str(path))


def test_links_out_of_the_folder_are_refused(tmp_path: Path, llama_files: dict[str, bytes], catalog: Catalog) -> None:
    folder, secret = tmp_path / "m", tmp_path / "secret"
    folder.mkdir()
    for name, data in llama_files.items():
        (folder / name).write_bytes(data)
    secret.write_bytes(llama_files["tokenizer_config.json"])
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(UnsafeInputError):
        take(catalog, str(folder))
    assert catalog.entries() == []


def test_hub_cache_snapshot(tmp_path: Path, llama_files: dict[str, bytes], catalog: Catalog) -> None:
    """The files of a snapshot are links into the cache; they are followed."""
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for name, data in llama_files.items():
        (repo / "blobs" / f"b-{name}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/b-{name}")
    entry = take(catalog, str(snapshot), name="cached")
    assert {file.path for file in entry.files} == set(llama_files)
    assert not any(path.is_symlink() for path in entry.folder.iterdir())


def test_what_is_no_checkpoint(tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(NotFoundError):
        take(catalog, str(tmp_path / "absent"))
    (tmp_path / "text.gguf").write_text("no")
    with pytest.raises(UnsupportedError):
        take(catalog, str(tmp_path / "text.gguf"))
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises((UnsupportedError, UnsafeInputError)):
        take(catalog, str(tmp_path / "pipe.gguf"))
    with pytest.raises(UsageError):
        fetch(parse(str(tmp_path / "text.gguf")), tmp_path, include=["*"])
    with pytest.raises(UsageError):
        fetch(parse(str(tmp_path / "text.gguf")), tmp_path, revision="x")
    assert not list((tmp_path / "home" / "staging").glob("[!.]*"))

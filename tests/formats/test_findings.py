"""Keys by which other programs would fetch or run code: found wherever they stand, and not where they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import craft
from tests.craft import STRING, kv
from tests.formats.pytorch.bins import write_pickled
from tests.tiny import write_llama
from weightsmith.formats import findings as module
from weightsmith.formats import open_reader
from weightsmith.formats.findings import Finding, findings


def found(path: Path) -> list[Finding]:
    reader = open_reader(path)
    try:
        return findings(reader)
    finally:
        reader.close()


def test_an_ordinary_checkpoint_has_none(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"do_sample": true, "auto_mapping": 1, "my_model_file": 2}')
    assert found(folder) == []


@pytest.mark.parametrize(
    "key",
    [
        *("auto_map", "custom_pipelines", "trust_remote_code", "model_file", "kernel_config"),
        *("_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
        *("attn_implementation", "_experts_implementation", "_experts_implementation_internal"),
    ],
)
def test_each_key_at_any_depth(tmp_path: Path, key: str) -> None:
    folder = write_llama(tmp_path / "tiny")
    for name, lead, raw in (
        ("config.json", "", {key: "org/code"}),
        ("generation_config.json", "a.b.", {"a": {"b": {key: "org/code"}}}),
        ("processor_config.json", "list.1.", {"list": [0, {key: "org/code"}]}),
    ):
        old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(old | raw))
        assert Finding(name, lead + key, '"org/code"') in found(folder)
    assert len(found(folder)) == 3


def test_gguf_keys(tmp_path: Path) -> None:
    keys = [kv("general.architecture", STRING, "llama"), kv("llama.auto_map", STRING, "x"), kv("auto_mapx", STRING, "")]
    (tmp_path / "m.gguf").write_bytes(craft.gguf(keys, [], b""))
    assert found(tmp_path / "m.gguf") == [Finding("m.gguf", "llama.auto_map", '"x"')]


def test_programs_and_what_cannot_be_looked_through(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "tiny")
    (folder / "modeling_x.py").write_text("raise SystemExit\n")
    (folder / "double.json").write_text('{"auto_map": 1, "auto_map": 2}')
    (folder / "array.json").write_text('["auto_map"]')
    (folder / "deep.json").write_text('{"a":' * 100_000)
    (tmp_path / "outside.json").write_text('{"auto_map": "secret"}')
    (folder / "link.json").symlink_to(tmp_path / "outside.json")
    told = {one.file: one for one in found(folder)}
    assert set(told) == {"modeling_x.py", "double.json", "array.json", "deep.json", "link.json"}
    assert told["modeling_x.py"].value == "a program"
    assert all("cannot be looked through" in told[name].value for name in told if name.endswith(".json"))
    assert "secret" not in str(told["link.json"])


def test_weights_that_may_not_be_opened_are_no_obstacle(tmp_path: Path, told: Callable[..., dict[str, Any]]) -> None:
    """What is in the catalog by --allow-pickle is pulled again without it, and told all the same."""
    folder = write_pickled(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {}}))
    wanted = [{"file": "config.json", "key": "auto_map", "value": "{}"}]
    assert told("pull", str(folder), "--allow-pickle")["findings"] == wanted
    assert told("pull", str(folder))["findings"] == wanted


def test_neither_number_nor_length_is_without_bounds(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "tiny")
    (folder / "many.json").write_text(json.dumps({str(n): {"auto_map": "x" * 10_000} for n in range(1000)}))
    assert len(found(folder)) == module.MAX_FOUND
    assert max(len(one.value) for one in found(folder)) < 300

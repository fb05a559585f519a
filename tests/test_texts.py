"""Texts by name: records of every form, chats by the model's template in its sandbox, datasets of a loopback hub."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loopback.hub import Hub
from tests.tiny import write_llama
from weightsmith import texts
from weightsmith.cli.app import run
from weightsmith.errors import NotFoundError, UnsafeInputError, UnsupportedError, UsageError, WeightsmithError
from weightsmith.sources import dataset
from weightsmith.texts import chat
from weightsmith.types import Vocab

CHAT = [{"role": "user", "content": "Hä?"}, {"role": "assistant", "content": "Ja <b>."}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield server
    server.close()


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def vocab(template: str | None) -> Vocab:
    tokens = ["<s>", "</s>", "a"]
    return Vocab("gpt2", tokens, [3, 3, 1], bos_id=0, eos_id=1, chat_template=template)


def model(template: str | None) -> Any:
    return SimpleNamespace(path=Path("model"), vocab=lambda pre=None: vocab(template))


def test_plain_text_is_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\xc3\xa4")
    found = texts.load(path)
    assert found.render(model(None)) == "one\r\ntwoä"
    assert (found.name, found.special) == ("a.txt", False)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("row", [{"text": "a"}, {"content": "a", "id": 3}, {"id": 3, "text": "a", "content": "b"}])
def test_records_of_text(row: dict[str, Any], tmp_path: Path) -> None:
    assert texts.load(lines(tmp_path / "a.jsonl", [row, row])).plain == "a\n\na"


def test_the_named_field_wins_and_is_part_of_the_digest(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "a", "story": "b"}])
    assert texts.load(path, field="story").plain == "b"
    assert texts.load(path, field="story").sha256 != texts.load(path).sha256


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": 3}\n', "line 2, 'text' is a int"),
        ('{"story": "a"}\n', "line 1 has none of messages"),
        ('{"text": "a"}\n{"story": "a"}\n', "line 2 has no 'text'"),
        ('{"text": \n', "line 1 is not JSON"),
        ("[1]\n", "line 1 is a list"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"messages": [{"role": "user"}]}\n', "without a role or without text"),
        ('{"messages": []}\n', "expected text or a list of messages"),
        ("\n\n", "no records"),
    ],
)
def test_records_that_are_neither(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        texts.load(tmp_path / "a.jsonl")


@given(data=st.binary(max_size=200))
def test_any_bytes_are_records_or_a_plain_error(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    with suppress(WeightsmithError):
        texts.load(path)


def test_only_the_beginning_of_a_large_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_BYTES", 100)
    path = lines(tmp_path / "a.jsonl", [{"text": f"{i:08}"} for i in range(50)])
    assert texts.load(path).plain == "\n\n".join(f"{i:08}" for i in range(4))


def test_parquet_is_read_as_lines_are(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "c.parquet")
    assert texts.load(tmp_path / "a.parquet").plain == "a\n\nb"
    assert texts.load(tmp_path / "c.parquet").chats == [CHAT]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match="not readable as parquet"):
        texts.load(tmp_path / "b.parquet")


def test_parquet_without_its_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnsupportedError, match="pyarrow"):
        texts.load(tmp_path / "a.parquet")


def test_chats_are_written_by_the_template(tmp_path: Path) -> None:
    old = {"conversations": [{"from": "human", "value": "Hä?"}, {"from": "gpt", "value": "Ja <b>."}]}
    for row in ({"messages": CHAT}, old):
        found = texts.load(lines(tmp_path / "a.jsonl", [row, row]))
        assert found.special
        assert found.render(model(TEMPLATE)) == "<s><|user|>Hä?</s><|assistant|>Ja <b>.</s>" * 2
    with pytest.raises(UnsupportedError, match="no chat template"):
        found.render(model(None))


def test_templates_agree_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=__import__("tokenizers").Tokenizer(__import__("tokenizers").models.BPE()),
        bos_token="<s>",
        eos_token="</s>",
    )
    template = (
        "{%- for m in messages %}\n  {%- if m['role'] == 'system' %}{% continue %}{% endif %}\n"
        "    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>' + '\\n' }}\n"
        "{% endfor %}{{ messages[0] | tojson }}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    wanted = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert chat.render([CHAT], vocab(template), where="m") == wanted


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ messages.__class__.__mro__ }}", UnsupportedError),
        ("{{ ''.__class__.__base__.__subclasses__() }}", UnsupportedError),
        ("{% for m in messages %}{% set _ = messages.append(m) %}{% endfor %}", UnsupportedError),
        ("{{ raise_exception('roles must alternate') }}", UnsupportedError),
        ("{% include '/etc/passwd' %}", UnsupportedError),
        ("{{ 1 / 0 }}", UnsupportedError),
        ("{% if", UnsupportedError),
        ("{{ 'a' * (10 ** 11) }}", UnsafeInputError),
        ("{% for a in range(99999) %}{{ 'aaaaaaaaaa' * 999 }}{% endfor %}", UnsafeInputError),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", UnsafeInputError),
    ],
)
def test_hostile_templates(template: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 3)
    with pytest.raises(error):
        chat.render([CHAT], vocab(template), where="m")


def test_a_dataset_by_its_name(hub: Hub, tmp_path: Path) -> None:
    files = {"README.md": b"#", "data/test.jsonl": b'{"text": "no"}\n', "data/train.jsonl": b'{"text": "yes"}\n' * 9}
    commit = hub.add("datasets/org/prose", files)
    home = tmp_path / "home"
    path, where = dataset.fetch("hf://datasets/org/prose", home=home)
    assert where == f"hf://datasets/org/prose@{commit}/data/train.jsonl"
    assert texts.load(path, name=where).plain == "\n\n".join(["yes"] * 9)
    named, _ = dataset.fetch("hf://datasets/org/prose@main/data/test.jsonl", home=home)
    assert named.read_bytes() == files["data/test.jsonl"]
    hub.close()
    again, same = dataset.fetch("hf://datasets/org/prose", home=home, offline=True)
    assert (again.read_bytes(), same) == (files["data/train.jsonl"], where)


def test_datasets_that_cannot_be(hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets/org/prose", {"a.bin": b"x"})
    cases = {
        "hf://datasets/org/prose": NotFoundError,
        "hf://datasets/org/prose/b.jsonl": NotFoundError,
        "hf://datasets/org/prose/a.bin": UsageError,
        "hf://datasets/org/none": NotFoundError,
        "hf://datasets/org": UsageError,
        "hf://datasets/org/prose/../x.txt": UnsafeInputError,
    }
    for name, error in cases.items():
        with pytest.raises(error):
            dataset.fetch(name, home=tmp_path / "home")


def test_a_damaged_dataset_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets/org/prose", {"a.txt": b"right" * 40})
    hub.faults.corrupt["a.txt"] = b"wrong" * 40
    with pytest.raises(WeightsmithError) as caught:
        dataset.fetch("hf://datasets/org/prose", home=tmp_path / "home")
    assert caught.value.exit_code == 3


def test_quantize_by_records(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_llama(tmp_path / "tiny", hidden_size=64, intermediate_size=128)
    rows = [{"text": "The smith counted 12 nails and 7 hooks; the forge was cold. " * 4} for _ in range(40)]
    path = lines(tmp_path / "a.jsonl", rows)
    hub.add("datasets/org/prose", {"a.jsonl": path.read_bytes()})
    made = []
    for name in (str(path), "hf://datasets/org/prose"):
        out = tmp_path / "m.gguf"
        options = ["--calibrate", name, "--rows", "4", "--ctx", "32", "--force", "-q"]
        assert run(["quantize", str(folder), "--to", "gguf:IQ4_NL", "-o", str(out), *options]) == 0
        made.append(out.read_bytes())
    assert made[0] == made[1]
    assert run(["quantize", str(folder), "--to", "gguf:IQ4_NL", "-o", "x", "--calibrate", "nowhere.txt"]) == 7
    assert "no such file" in capsys.readouterr().err

"""verify and eval as a user runs them: every container by one ruler, several candidates, gates, drift, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.native import byte_ranks, write_meta, write_mistral, write_ranks, write_tekken
from tests.tiny import write_llama
from weightsmith import formats, jobs
from weightsmith.cli.app import run
from weightsmith.formats.tokenizer import patterns

# What each container that can be written is asked for, and the most that it may lose (nats).
TARGETS = {
    "safetensors": ("safetensors", 0.0),
    "gguf": ("gguf:F16", 0.0),
    "gptq": ("gptq:8", 1e-3),
    "awq": ("awq", 0.2),
    "bnb": ("nf4", 0.2),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The smith counted 12 nails and 7 hooks; the forge was cold.\n" * 80)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("made") / "tiny", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def made(original: Path, text: Path) -> dict[str, Path]:
    """The same model in every container that can be written, and as Q8_0 and Q4_0."""
    found = {}
    rows = ["--calibrate", str(text), "--rows", "4", "--ctx", "64", "--group-size", "64"]
    for name, (target, _) in TARGETS.items():
        found[name] = original.parent / f"made-{name}"
        calibrated = rows if name in ("gptq", "awq") else []
        verb = "quantize" if calibrated or name == "bnb" else "convert"
        assert run([verb, str(original), "--to", target, "-o", str(found[name]), "-q", *calibrated]) == 0
    for kind in ("Q8_0", "Q4_0"):
        found[kind] = original.parent / f"{kind}.gguf"
        assert run(["quantize", str(original), "--to", f"gguf:{kind}", "-o", str(found[kind]), "-q"]) == 0
    return found


def result(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert run([*args, "--json", "-q"]) == code
    return json.loads(capsys.readouterr().out)


def ruler(original: Path, text: Path) -> list[str]:
    return ["--against", str(original), "--text", str(text), "--ctx", "64", "--windows", "6"]


def test_every_container_by_one_ruler(
    original: Path, text: Path, made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(TARGETS) == {*formats.targets(), *jobs.PACKED}
    names = list(TARGETS)
    found = result(capsys, "verify", *(str(made[name]) for name in names), *ruler(original, text))
    for name, one in zip(names, found, strict=True):
        most = TARGETS[name][1]
        assert 0 <= one["kld_mean"] <= most, name
        assert one["candidate_size"]["container"] == name
        assert one["candidate"]["tokens_sha256"] == found[0]["candidate"]["tokens_sha256"]
        if not most:
            assert (one["kld_max"], one["ratio"], one["top1"]) == (0, 1, 1)
            assert one["drift"]["layers"] == [0, 0]
        measured = result(capsys, "eval", str(made[name]), *ruler(original, text)[2:])
        assert measured["perplexity"] == pytest.approx(one["candidate"]["perplexity"], rel=1e-6)
    packed = found[names.index("gptq")]["candidate_size"]
    assert packed["type"] == "8 bit"
    assert packed["bpw"] == result(capsys, "show", str(made["gptq"]))["bpw"]


@pytest.mark.parametrize("form", ["meta", "mistral"])
def test_originals_in_their_vendors_form(
    form: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = byte_ranks()
    if form == "meta":
        folder = write_meta(tmp_path / "native", vocab_size=len(tokens) + 256, rope_theta=500000.0)
        write_ranks(folder / "tokenizer.model", tokens)
    else:
        folder = write_mistral(tmp_path / "native", vocab_size=len(tokens) - 3 + 24)
        write_tekken(folder / "tekken.json", tokens, pattern=patterns.by_name("tekken").trained[0])
    out = str(tmp_path / "made.gguf")
    result(capsys, "convert", str(folder), "--to", "gguf", "-o", out, "--allow-pickle")
    found = result(capsys, "verify", out, *ruler(folder, text), "--allow-pickle")
    assert (found["kld_max"], found["ratio"], found["drift"]["final"]) == (0, 1, 0)
    assert found["original_size"]["container"] == form
    measured = result(capsys, "eval", str(folder), *ruler(folder, text)[2:], "--allow-pickle")
    assert measured["perplexity"] == found["original"]["perplexity"]


def test_one_candidate_is_an_object_and_several_are_a_list(
    original: Path, text: Path, made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ruler(original, text)
    one = result(capsys, "verify", str(made["Q4_0"]), *options, "--drift")
    assert {"kld_mean", "ratio", "candidate", "original", "gates", "passed", "seconds"} <= set(one)
    assert len(one["drift"]["own"]) == len(one["drift"]["layers"]) == 2
    assert one["drift"]["own"][0] > one["noise"]["drift"]["layers"][0] > 0
    several = result(capsys, "verify", str(made["Q8_0"]), str(made["Q4_0"]), *options)
    assert [one["candidate_path"] for one in several] == [str(made["Q8_0"]), str(made["Q4_0"])]
    assert several[1]["kld_mean"] == pytest.approx(one["kld_mean"], rel=1e-4)
    assert several[1]["drift"]["own"] is None
    assert several[0]["kld_mean"] < several[1]["kld_mean"]


def test_gates_hold_for_each_candidate(
    original: Path, text: Path, made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(made["gguf"]), str(made["Q4_0"])]
    found = result(capsys, "verify", *pair, *ruler(original, text), "--max-kld", "1e-5", code=5)
    assert [one["passed"] for one in found] == [True, False]
    assert run(["verify", *pair, *ruler(original, text), "--max-kld", "1e-5", "-q"]) == 5
    shown = capsys.readouterr()
    assert "Q4_0.gguf: mean KL divergence" in shown.err
    lines = {line.split()[0]: line.split()[-1] for line in shown.out.splitlines() if line.strip()}
    assert (lines["made-gguf"], lines["Q4_0.gguf"]) == ("met", "missed")


def test_what_people_see(original: Path, text: Path, made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(made["Q4_0"]), *ruler(original, text), "--drift", "-q"]) == 0
    shown = capsys.readouterr().out
    for words in ("noise floor", "gguf Q4_0", "bits per weight", "KL divergence, 99 %", "drift of the last", "norm"):
        assert words in shown
    assert run(["verify", str(made["Q4_0"]), str(made["Q8_0"]), *ruler(original, text), "-q"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in shown.splitlines()}
    assert {"original", "Q4_0.gguf", "Q8_0.gguf", "noise floor"} <= set(rows)


def test_the_original_comes_from_the_catalog(original: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, "pull", str(original))
    other = write_llama(original.parent / "other", seed=1)
    result(capsys, "pull", str(other))
    for name in ("tiny", "other"):
        result(capsys, "convert", name, "--to", "gguf")
    result(capsys, "quantize", "tiny:original", "--to", "gguf:Q8_0")
    options = ["--text", str(text), "--ctx", "64", "--windows", "4"]
    found = result(capsys, "verify", "tiny:f16", "tiny:q8_0", *options)
    assert found[0]["original_path"] == found[1]["original_path"]
    refused = result(capsys, "verify", "tiny:f16", "other:f16", *options, code=2)
    assert "different originals" in refused["error"]["message"]
    assert run(["verify"]) == 2


def test_a_report_is_written(
    original: Path, text: Path, made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.html"
    options = [*ruler(original, text), "--report", str(report)]
    found = result(capsys, "verify", str(made["Q8_0"]), str(made["gptq"]), *options)
    page = report.read_text()
    for one in found:
        assert f"{one['kld_mean']:.5f}" in page
        assert f"{one['candidate_size']['nbytes']:,}" in page
    assert found[0]["original"]["text_sha256"] in page
    assert str(original.parent) not in page
    told = result(capsys, "verify", str(made["Q8_0"]), *options, code=2)
    assert told["error"]["kind"] == "OutputExistsError"
    result(capsys, "verify", str(made["Q8_0"]), str(made["gptq"]), *options, "--force")
    assert report.read_text() == page

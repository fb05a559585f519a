"""`weightsmith build` as CI runs it: what is made, what is left alone, why, and what happens when something fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.tiny import write_llama
from weightsmith.cli.app import run

from .conftest import Build, change

ROOT = Path(__file__).parent.parent.parent
ORIGINALS = {"a:original", "b:original", "c:original"}
TARGETS = {"a:q8", "a:q4", "b:q8", "b:q4", "c:f16", "c:q4"}
Told = Callable[..., dict[str, Any]]


def plan(told: Told, *args: str) -> dict[str, list[str]]:
    """What a dry run would do: reasons by reference, of the jobs that would run."""
    return {job["ref"]: job["reasons"] for job in told("build", "--dry-run", *args)["jobs"] if job["runs"]}


def test_everything_is_made_once(here: Path, build: Build, told: Told) -> None:
    assert plan(told) == {ref: ["missing"] for ref in ORIGINALS | TARGETS}
    assert told("list")["models"] == [], "a dry run does nothing"
    assert build() == dict.fromkeys(ORIGINALS | TARGETS, "made")
    first = {model["ref"]: model for model in told("list")["models"]}
    assert first.keys() == ORIGINALS | TARGETS | {"c:prod"}
    assert first["c:prod"]["alias_of"] == "q4"
    assert first["c:q4"]["licence"] == "llama3", "inherited"
    assert plan(told) == {}
    assert build() == dict.fromkeys(ORIGINALS | TARGETS, "there")
    assert {model["ref"]: model for model in told("list")["models"]} == first


def test_nothing_to_do_loads_no_engine(here: Path, build: Build) -> None:
    build()
    code = (
        "import sys, json\nfrom weightsmith.cli.app import run\ncode = run(['build', '-q'])\n"
        "heavy = {'torch', 'numba', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "print(json.dumps([code, sorted(heavy)]), file=sys.stderr)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stderr.strip().splitlines()[-1]) == [0, []]


def test_a_changed_recipe_rebuilds_what_uses_it(here: Path, build: Build, told: Told) -> None:
    build()
    change(here, "q8: {target", "q8: {pure: true, target")
    reason = ["recipe changed: pure none -> true"]
    assert plan(told) == {"a:q8": reason, "b:q8": reason}
    assert {ref for ref, status in build().items() if status == "made"} == {"a:q8", "b:q8"}
    change(here, "effort: fast", "effort: normal")
    assert plan(told)["a:q4"] == ["recipe changed: effort fast -> normal"]
    assert plan(told).keys() == {"a:q4", "b:q4", "c:q4"}


def test_what_was_made_by_hand_counts(here: Path, build: Build, told: Told) -> None:
    build("a:original")
    told("quantize", "a", "--to", "gguf:Q8_0", "--tag", "q8")
    assert plan(told, "a") == {"a:q8": ["gate small: not judged yet"], "a:q4": ["missing"]}
    assert build("a") == {"a:original": "there", "a:q8": "there", "a:q4": "made"}


def test_names_choose_and_bring_what_they_need(here: Path, build: Build, told: Told) -> None:
    assert build("prod").keys() == {"c:original", "c:f16", "c:q4"}
    assert build("a").keys() == {"a:original", "a:q8", "a:q4"}
    assert build("b:q8").keys() == {"b:original", "b:q8"}
    assert "Did you mean laptop?" in told("build", "labtop", code=7)["error"]["hint"]


def test_a_changed_source_rebuilds_its_family_alone(here: Path, build: Build, told: Told) -> None:
    build()
    before = told("path", "c:prod")["path"]
    write_llama(here / "c", seed=7)
    found = plan(told)
    assert found.keys() == {"c:original", "c:f16", "c:q4"}
    assert found["c:original"] == ["source changed: other files, sizes or times"]
    assert found["c:q4"] == ["c:f16 comes first"]
    old = Path(before).read_bytes()
    assert {ref for ref, status in build().items() if status == "made"} == found.keys()
    assert Path(told("path", "c:prod")["path"]).read_bytes() != old
    os.utime(here / "a" / "config.json", (1, 1))
    assert {ref for ref, status in build().items() if status == "made"} == {"a:original"}, "same bytes: no more work"


def test_versions_are_part_of_a_derivation(
    here: Path, build: Build, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightsmith.builds import state

    build("a")
    monkeypatch.setattr(state, "__version__", "99.0")
    assert [reason[0].split(" ")[0] for reason in plan(told, "a").values()] == ["weightsmith"] * 2
    assert plan(told, "a", "--any-version") == {}
    now = state.ARITHMETIC_VERSION
    monkeypatch.setattr(state, "ARITHMETIC_VERSION", now + 1)
    assert plan(told, "a:q8", "--any-version") == {"a:q8": [f"arithmetic version {now} -> {now + 1}"]}


def test_a_missed_gate_leaves_the_alias(here: Path, build: Build, told: Told, capsys: Any) -> None:
    build("prod")
    stands = told("show", "c:prod")["catalog"]["digest"]
    change(here, "effort: fast", "effort: normal")
    change(here, "max_kld: 0.5", "max_kld: 1.0e-9")
    assert build("prod", code=5)["c:q4"] == "gate"
    assert told("show", "c:prod")["catalog"]["digest"] == stands
    shown = told("show", "c:q4")["catalog"]
    assert shown["digest"] != stands
    assert "is above 1e-09" in shown["gates"]["close"]
    assert [item["kind"] for item in shown["evaluations"]] == ["measurement", "gate"]
    (alias,) = told("tag", "c")["aliases"]
    assert alias["held_back"][0].startswith("c:q4 failed close on ")
    assert build("prod", code=5)["c:q4"] == "gate", "and again, from the evidence"
    assert len(told("show", "c:q4")["catalog"]["evaluations"]) == 2
    assert "failed close" in told("build", "prod", "--dry-run")["jobs"][-1]["missed"][0]
    assert run(["tag", "c:q4", "prod", "-q"]) == 5
    assert "does not move" in capsys.readouterr().err
    # The limit alone is changed: judged by the same measurement, and the alias moves.
    change(here, "max_kld: 1.0e-9", "max_kld: 0.6")
    assert told("build", "prod", "--dry-run")["jobs"][-1]["reasons"] == ["gate close: new limits"]
    build("prod")
    assert told("show", "c:prod")["catalog"]["digest"] != stands
    kinds = [item["kind"] for item in told("show", "c:q4")["catalog"]["evaluations"]]
    assert kinds == ["measurement", "gate", "gate"]


def test_results_of_one_model_share_the_pass_over_it(
    here: Path, build: Build, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And measure what `verify` measures of each alone."""
    from weightsmith.evals import compare

    change(here, "gate: small", "gate: close")
    prepared: list[Any] = []
    prepare = compare.prepare
    monkeypatch.setattr(compare, "prepare", lambda *args: prepared.append(args) or prepare(*args))
    build("laptop")
    assert len(prepared) == 2, "one for each of two models, with two results each"
    for ref in ("a:q8", "a:q4"):
        alone = told("verify", ref, "--text", "eval.txt", "--ctx", "64", "--windows", "2")
        kept = told("show", ref)["catalog"]["evaluations"][0]
        assert kept["kld_mean"] == pytest.approx(alone["kld_mean"], rel=1e-4)
        assert kept["ratio"] == pytest.approx(alone["ratio"], rel=1e-6)


def test_gates_on_size_and_licence(here: Path, build: Build, told: Told) -> None:
    change(here, "max_bytes: 200kB, licences: [MIT, apache-2.0]", "max_bytes: 100kB, licences: [MIT]")
    found = build("laptop", code=5)
    assert {ref for ref, status in found.items() if status == "gate"} == {"a:q8", "b:q8", "b:q4"}
    outcomes = {job["ref"]: job["missed"] for job in told("build", "laptop", code=5)["jobs"]}
    assert outcomes["b:q8"] == [
        "small: 128480 bytes are more than 100000",
        "small: licence Apache-2.0 is not one of MIT",
    ]


def test_one_failure_does_not_stop_the_others(here: Path, build: Build, told: Told) -> None:
    (here / "c" / "model.safetensors").write_bytes(b"\x00" * 64)
    change(here, "max_bytes: 200kB", "max_bytes: 100kB")
    found = told("build", "--junit", "out.xml", "--summary", "out.json", "--summary", "out.json", code=3)
    status = {job["ref"]: job["status"] for job in found["jobs"]}
    assert status["c:original"] == "failed"
    assert (status["c:f16"], status["c:q4"]) == ("blocked", "blocked")
    assert (status["a:q8"], status["a:q4"]) == ("gate", "made")
    assert found["exit_code"] == 3, "an error counts more than a missed gate"
    suite = ElementTree.parse(here / "out.xml").getroot()[0]
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "9",
        "failures": "2",
        "errors": "1",
        "skipped": "2",
    }
    cases = {f"{case.get('classname')}:{case.get('name')}": case for case in suite}
    assert cases["a:q8"].find("failure") is not None
    assert cases["c:original"].find("error") is not None
    assert cases["c:q4"].find("skipped") is not None
    assert json.loads((here / "out.json").read_text()) == found


def test_markdown_is_added_to_what_is_there(here: Path, build: Build) -> None:
    (here / "page").write_text("before\n")
    build("a:q8", "--summary", "page")
    lines = (here / "page").read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1].startswith("| a:q8 | made | ")


def test_junit_holds_what_xml_forbids() -> None:
    from weightsmith.builds import report
    from weightsmith.builds.unit import Outcome

    error = {"kind": "X", "message": "a\x00b <&> \ud800", "hint": None, "path": "p", "tensor": None, "exit_code": 1}
    text = report.junit([Outcome("a:b", "failed", error=error)])
    case = ElementTree.fromstring(text.encode("utf-8"))[0][0]
    found = case.find("error")
    assert found is not None
    assert found.get("message") == "a\ufffdb <&> \ufffd"


@pytest.mark.slow
def test_jobs_in_processes_of_their_own(here: Path, build: Build, told: Told) -> None:
    (here / "b" / "model.safetensors").write_bytes(b"\x00" * 64)
    found = build("--jobs", "3", code=3)
    assert found == {
        **dict.fromkeys(["a:original", "a:q8", "a:q4", "c:original", "c:f16", "c:q4"], "made"),
        "b:original": "failed",
        "b:q8": "blocked",
        "b:q4": "blocked",
    }
    assert plan(told, "a") == plan(told, "c") == {}


# Kills or interrupts itself after so many slabs of a conversion.
STOP = (
    "import os, sys, threading\nfrom weightsmith import transcode\nfrom weightsmith.cli.app import main\n"
    "left, signum, args = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]\n"
    "recode, lock, done = transcode.recode, threading.Lock(), 0\n"
    "def counted(*slab):\n"
    "    global done\n"
    "    with lock:\n"
    "        done += 1\n"
    "        if done > left:\n"
    "            os.kill(os.getpid(), signum)\n"
    "    return recode(*slab)\n"
    "transcode.recode = counted\n"
    "main(args)\n"
)


def stopped(after: int, signum: int, *args: str) -> subprocess.CompletedProcess[str]:
    """`weightsmith build ARGS` in a process that stops itself."""
    command = [sys.executable, "-c", STOP, str(after), str(int(signum)), "build", *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, preexec_fn=heed)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_a_stopped_build_goes_on(
    signum: int, code: int, here: Path, build: Build, told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = ("--max-memory", "100kB", "--threads", "1")
    done = stopped(60, signum, *small, "--junit", "stopped.xml", "laptop")
    assert done.returncode == code, done.stderr
    if signum == signal.SIGTERM:
        suite = ElementTree.parse(here / "stopped.xml").getroot()[0]
        assert int(suite.get("skipped", "0")) > 0
    left = plan(told, "laptop")
    assert "a:original" not in left
    assert left.keys() & {"a:q8", "a:q4", "b:q8", "b:q4"}
    home = tmp_path / "weightsmith-home"
    assert list((home / "work").glob("*/*.journal")), "the tensors that were finished"
    from weightsmith import transcode

    calls: list[str] = []
    recode = transcode.recode
    monkeypatch.setattr(transcode, "recode", lambda *slab: calls.append("") or recode(*slab))
    found = build("laptop", *small)
    assert {ref for ref, status in found.items() if status == "made"} == left.keys()
    resumed = len(calls)
    assert list((home / "work").iterdir()) == []
    digests = {model["ref"]: model["digest"] for model in told("list")["models"]}
    calls.clear()
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(tmp_path / "other"))
    build("laptop", *small)
    assert resumed < len(calls) - 40, "finished slabs were not made again"
    assert {model["ref"]: model["digest"] for model in told("list")["models"]} == digests


def test_what_is_damaged_is_made_again(here: Path, build: Build, told: Told) -> None:
    build("a")
    before = told("show", "a:q8")["catalog"]["digest"]
    Path(told("path", "a:q8")["path"]).unlink()
    Path(told("path", "a:q4")["path"]).with_name("weightsmith.json").write_text("{")
    original = Path(told("path", "a:original")["path"]) / "config.json"
    original.unlink()
    found = plan(told, "a")
    assert found["a:original"] == ["damaged: config.json is gone"]
    assert found.keys() == {"a:original", "a:q8", "a:q4"}
    assert build("a") == dict.fromkeys(found, "made")
    assert told("show", "a:q8")["catalog"]["digest"] == before


def test_a_kill_between_the_result_and_its_gate(here: Path, build: Build, told: Told) -> None:
    build("prod")
    record = Path(told("path", "c:q4")["path"]).with_name("weightsmith.json")
    kept = json.loads(record.read_text())
    record.write_text(json.dumps(kept | {"evaluations": []}))
    assert told("build", "prod", "--dry-run")["jobs"][-1]["reasons"] == ["gate close: not measured yet"]
    assert build("prod")["c:q4"] == "there"
    assert len(told("show", "c:q4")["catalog"]["evaluations"]) == 2


def test_calibration_text_and_imatrix_are_known_by_their_bytes(here: Path, build: Build, told: Told) -> None:
    (here / "calib.txt").write_text((here / "eval.txt").read_text() * 2)
    change(here, "effort: fast}", "calibrate: calib.txt, rows: 2, ctx: 16}")
    build("a:q4")
    assert plan(told, "a:q4") == {}
    (here / "calib.txt").rename(here / "moved.txt")
    change(here, "calib.txt", "moved.txt")
    assert plan(told, "a:q4") == {}, "the path does not matter"
    (here / "moved.txt").write_text("Another text, about as long.\n" * 200)
    assert plan(told, "a:q4")["a:q4"][0].startswith("recipe changed: calibration text ")
    told("imatrix", "a", "--text", "eval.txt", "-o", "m.gguf", "--rows", "2", "--ctx", "16")
    change(here, "calibrate: moved.txt, rows: 2, ctx: 16}", "imatrix: m.gguf}")
    build("a:q4")
    assert plan(told, "a:q4") == {}
    change(here, "imatrix: m.gguf}", "calibrate: self, rows: 2, ctx: 16}")
    assert any("calibration" in reason for reason in plan(told, "a:q4")["a:q4"])
    build("a:q4")
    assert plan(told, "a:q4") == {}


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ("recipe: f16}", "recipe: f15}", 14, "no recipe 'f15'. Did you mean f16?"),
        ("model: c,", "model: cc,", 14, "no model 'cc' in the registry or the catalog"),
        ("gate: close", "gate: closed", 15, "Did you mean close?"),
        ("{from: plain", "{model: c, from: plain", 15, "either `model` or `from`"),
        ("{from: plain,", "{", 15, "either `model` or `from`"),
        ("{from: plain", "{from: prod", 15, "goes round in circles: prod -> prod"),
        ("{from: plain", "{from: nowhere", 15, "no build 'nowhere'"),
        ("gguf:Q4_0", "gguf:Q4_9", 7, "gguf has no type 'Q4_9'"),
        ("gguf:Q4_0", "gptq:4", 7, "needs a text to calibrate on"),
        ("effort: fast", "rows: 4", 7, "does nothing without `calibrate`"),
        ("effort: fast", "calibrate: absent.txt", 7, "no such file"),
        ("effort: fast", "calibrate: hf://datasets/o/n@main", 7, "pinned to a commit"),
        ("effort: fast", "tensor_types: {attn_v: Q9}", 7, "unknown type 'Q9'"),
        ("text: eval.txt", "text: absent.txt", 10, "no such file"),
        ("recipe: f16}", "recipe: [f16, q8], tag: x}", 14, "one tag cannot serve several recipes"),
        ("recipe: f16}", "recipe: f16, tag: q4}", 15, "is made by plain already"),
        ("gate: small}", "gate: small, alias: prod}", 13, "to be the alias of a:q8 and of a:q4"),
        ("alias: prod}", "alias: f16}", 15, "to be an alias and a result"),
    ],
)
def test_faults_of_a_plan_name_the_line(before: str, after: str, line: int, words: str, here: Path, told: Told) -> None:
    change(here, before, after)
    error = told("build", "--dry-run", code=7 if "no such file" in words else 2)["error"]
    assert words in error["message"]
    assert error["path"] == f"{here / 'registry.yaml'}:{line}"


def test_without_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no registry.yaml here" in told("build", code=7)["error"]["message"]


def test_a_registry_given_by_name_needs_not_be_here(
    here: Path, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build("a:q8", "--registry", str(here / "registry.yaml")) == {"a:original": "made", "a:q8": "made"}


def test_two_builds_at_once_do_the_work_once(here: Path, told: Told) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "weightsmith", "build", "--json", "-q", "laptop"]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    made: list[str] = []
    for process in both:
        out, _ = process.communicate()
        assert process.returncode == 0, out
        made += [job["ref"] for job in json.loads(out)["jobs"] if job["status"] == "made"]
    assert sorted(made) == ["a:original", "a:q4", "a:q8", "b:original", "b:q4", "b:q8"]

"""The CI examples: files that parse, steps that are complete, and a command line that this version understands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from weightsmith.builds import plan
from weightsmith.cli.app import cli

CI = Path(__file__).parent.parent.parent / "examples" / "ci"


def steps(name: str) -> list[dict[str, Any]]:
    data = yaml.safe_load((CI / name).read_text())
    found: list[dict[str, Any]] = data["runs"]["steps"] if "runs" in data else data["jobs"]["build"]["steps"]
    return found


@pytest.mark.parametrize("name", ["action.yml", "workflow.yml"])
def test_every_step_is_complete(name: str) -> None:
    for step in steps(name):
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert re.fullmatch(r"\./\.github/actions/\w+|actions/[\w/-]+@v\d+", step["uses"])
        elif name == "action.yml":
            assert step["shell"] == "bash"
        # An input inside a script could be a command: it goes through the environment.
        assert "${{" not in step.get("run", "")
        for variable in re.findall(r"\$([A-Z]+)\b", step.get("run", "")):
            assert variable in step["env"] or variable.startswith("GITHUB"), variable


def test_the_action_restores_builds_and_keeps() -> None:
    names = [step["name"] for step in steps("action.yml")]
    assert names.index("Restore the catalog") < names.index("Build") < names.index("Keep the catalog")
    by_name = {step["name"]: step for step in steps("action.yml")}
    for name in ("Tidy", "Keep the catalog"):
        assert by_name[name]["if"] == "always()", "also after a missed gate"
    data = yaml.safe_load((CI / "action.yml").read_text())
    used = set(re.findall(r"inputs\.([\w-]+)", (CI / "action.yml").read_text()))
    assert used == data["inputs"].keys()


def test_the_workflow_gives_what_the_action_needs() -> None:
    wanted = yaml.safe_load((CI / "action.yml").read_text())["inputs"]
    (call,) = [step for step in steps("workflow.yml") if step["uses"].startswith("./")]
    assert call["with"].keys() <= wanted.keys()
    assert {name for name, given in wanted.items() if given.get("required")} <= call["with"].keys()
    (upload,) = [step for step in steps("workflow.yml") if "upload-artifact" in step["uses"]]
    assert upload["with"]["path"] == wanted["junit"]["default"]


def test_the_commands_exist() -> None:
    scripts = "\n".join(step.get("run", "") for step in steps("action.yml"))
    lines = re.findall(r"^\s*weightsmith (\w+)(.*)$", scripts, re.MULTILINE)
    assert [verb for verb, _ in lines] == ["build", "gc", "tag", "du"]
    context = click.Context(cli)
    for verb, rest in lines:
        command = cli.get_command(context, verb)
        assert command is not None
        known = {option for param in command.params for option in param.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= known


@pytest.mark.parametrize(("builds", "names"), [("", []), ("nightly smollm2:q6", ["nightly", "smollm2:q6"])])
def test_the_build_step_passes_names_on(builds: str, names: list[str], tmp_path: Path) -> None:
    """Run by bash as the runner does, with a `weightsmith` that only says how it was called."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    stub = tmp_path / "weightsmith"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 5\n')
    stub.chmod(0o755)
    (step,) = [step for step in steps("action.yml") if step.get("name") == "Build"]
    env = {"BUILDS": builds, "REGISTRY": "a b.yaml", "JUNIT": "j.xml", "GITHUB_STEP_SUMMARY": "s.md"}
    env["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = [bash, "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    given = ["build", *names, "--registry", "a b.yaml", "--junit", "j.xml", "--summary", "s.md"]
    assert (done.returncode, done.stdout.splitlines()) == (5, given)


@pytest.mark.parametrize("file", [CI / "registry.yaml", CI.parent.parent / "registry.yaml"], ids=["ci", "shipped"])
def test_the_registries_can_be_built(file: Path, tmp_path: Path) -> None:
    jobs = plan.read(file, home=tmp_path)
    assert {job.target is None for job in jobs} == {True, False}
    assert any(job.gates for job in jobs)
    if file.parent == CI:
        assert [job.aliases for job in jobs if job.aliases] == [("prod",)]

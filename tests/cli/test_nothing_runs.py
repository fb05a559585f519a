"""A downloaded folder's programs are never run: code beside the weights, and keys that name it, whatever the verb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback.hub import Hub
from tests.loopback.pull import ROOT
from tests.tiny import write_llama


def test_no_verb_runs_or_keeps_what_lies_beside_the_weights(tmp_path: Path) -> None:
    marker, folder = tmp_path / "marker", write_llama(tmp_path / "tiny")
    program = f"open({str(marker)!r}, 'a').write(__name__)\n"
    for name in ("configuration_x.py", "modeling_x.py", "__init__.py", "sitecustomize.py", "setup.py", "numpy.py"):
        (folder / name).write_text(program)
    (folder / "run.sh").write_text(f"touch {marker}\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "configuration_x.Config"}, "custom_pipelines": {"x": {"impl": "modeling_x"}}}
    (folder / "config.json").write_text(json.dumps(config | {"_attn_implementation_internal": "org/kernel"}))
    env = os.environ | {"PYTHONPATH": str(ROOT), "WEIGHTSMITH_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    steps = (
        ["show", "."],
        ["pull", "."],
        ["show", "tiny"],
        ["convert", "tiny", "--to", "gguf"],
        ["convert", ".", "--to", "safetensors", "-o", str(tmp_path / "copy")],
        ["quantize", "tiny", "--to", "gguf:Q8_0"],
        ["link", "tiny", "--into", str(tmp_path / "linked")],
        ["export", "tiny", "-o", str(tmp_path / "tiny.tar")],
        ["import", str(tmp_path / "tiny.tar")],
        ["verify", "--integrity"],
        ["diff", "tiny", "."],
        ["lineage", "tiny"],
        ["provenance", "tiny:q8_0", "--format", "cyclonedx", "-o", str(tmp_path / "bom.json")],
    )
    program = "import sys\nfrom weightsmith.cli.app import run\nfor args in %r:\n    assert run(args) == 0, args\n"
    command = [sys.executable, "-P", "-c", program % (list(steps),)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    kept = [path.name for top in ("home", "copy", "linked") for path in (tmp_path / top).rglob("*")]
    assert [name for name in kept if name.endswith((".py", ".sh"))] == []
    assert b"open(" not in (tmp_path / "tiny.tar").read_bytes()
    warned = [line for line in done.stderr.splitlines() if "other programs may run or fetch code" in line]
    assert len(warned) == 1, "the pull says it once"
    for key in ("auto_map", "custom_pipelines", "_attn_implementation_internal"):
        assert f"config.json: {key} = " in warned[0]
        assert f"  config.json: {key} = " in done.stdout
    assert "  modeling_x.py: a program" in done.stdout, "show says what lies in a folder of somebody's own"


@pytest.mark.slow
def test_findings_of_a_pull_from_the_hub(tmp_path: Path) -> None:
    """R19: told by pull and show, as text and as JSON; what they name is not fetched, and programs never are."""
    folder = write_llama(tmp_path / "made")
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoConfig": "org/other--x.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    hub = Hub()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add("org/tiny", {**files, "modeling_x.py": b"raise SystemExit", "x.sh": b"exit", "sub/y.py": b"z"})
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "WEIGHTSMITH_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": hub.endpoint,
    }
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def call(*args: str) -> tuple[dict[str, object], str]:
        command = [sys.executable, "-m", "weightsmith", *args, "--json"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
        return json.loads(done.stdout), done.stderr

    try:
        wanted = [{"file": "config.json", "key": "auto_map", "value": '{"AutoConfig": "org/other--x.Config"}'}]
        got, said = call("pull", "hf://org/tiny", "--include", "*", "--name", "tiny")
        assert got["findings"] == wanted
        assert "auto_map" in said
        assert call("show", "tiny")[0]["findings"] == wanted
    finally:
        hub.close()
    assert not [request.path for request in hub.log if request.path.endswith((".py", ".sh")) or "other" in request.path]
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix in (".py", ".sh")]


@pytest.mark.slow
def test_templates_are_not_rendered(tmp_path: Path) -> None:
    """R17: a template that never ends, and no verb that takes it for more than a text so much as loads jinja2."""
    folder = write_llama(tmp_path / "tiny")
    endless = "{% for a in range(10 ** 9) %}{% for b in range(10 ** 9) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(endless)
    (tmp_path / "text.txt").write_text("The forge was cold and the smith was late. " * 60)
    steps = (
        ["pull", "./tiny"],
        ["convert", "tiny", "--to", "gguf"],
        ["quantize", "tiny", "--to", "gguf:Q8_0"],
        ["quantize", "tiny", "--to", "gguf:Q4_0", "--calibrate", "text.txt", "--rows", "2", "--ctx", "16"],
        ["eval", "tiny:q8_0", "--text", "text.txt", "--ctx", "32", "--windows", "2"],
        ["verify", "tiny:q8_0", "--text", "text.txt", "--ctx", "32", "--windows", "2", "--max-ppl-ratio", "2"],
        ["show", "tiny:q8_0"],
        ["audit", "tiny:q8_0", "--against", "tiny"],
        ["provenance", "tiny:q8_0", "--format", "cyclonedx", "-o", "bom.json"],
    )
    program = "import sys\nfrom weightsmith.cli.app import run\nfor args in %r:\n    assert run(args) == 0, args\n"
    program += "assert 'jinja2' not in sys.modules\n"
    env = os.environ | {"PYTHONPATH": str(ROOT), "WEIGHTSMITH_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", program % (list(steps),)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr

"""A downloaded folder's programs are never run: code beside the weights, and keys that name it, whatever the verb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
        ["pull", "."],
        ["show", "tiny"],
        ["convert", "tiny", "--to", "gguf"],
        ["convert", ".", "--to", "safetensors", "-o", str(tmp_path / "copy")],
        ["quantize", "tiny", "--to", "gguf:Q8_0"],
        ["link", "tiny", "--into", str(tmp_path / "linked")],
        ["export", "tiny", "-o", str(tmp_path / "tiny.tar")],
        ["import", str(tmp_path / "tiny.tar")],
        ["verify", "--integrity"],
    )
    program = "import sys\nfrom weightsmith.cli.app import run\nfor args in %r:\n    assert run(args) == 0, args\n"
    command = [sys.executable, "-P", "-c", program % (list(steps),)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    kept = [path.name for top in ("home", "copy", "linked") for path in (tmp_path / top).rglob("*")]
    assert [name for name in kept if name.endswith((".py", ".sh"))] == []
    assert b"open(" not in (tmp_path / "tiny.tar").read_bytes()

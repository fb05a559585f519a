"""A kill between any two writes leaves a store that opens and is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_killed_before_every_change(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.oci.killing", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    changes = json.loads(done.stdout)
    assert min(changes.values()) > 5, "the changes were counted"

"""Run a verb, or huggingface_hub itself, in a process of its own: the library reads its environment when imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.loopback.hub import Hub

ROOT = Path(__file__).resolve().parents[2]


def environment(home: Path, hub: Hub, **more: str) -> dict[str, str]:
    """The environment of a user at `home` whose hub is `hub`; without Xet storage, which it does not have.

    more: further variables; an empty one is taken away.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT), **more}
    return {name: value for name, value in env.items() if value}


def run_verb(home: Path, hub: Hub, *args: str, **more: str) -> dict[str, Any]:
    """Run `weightsmith ARGS --json`; its result with "code" and "said" (all that was written). more: environment."""
    command = [sys.executable, "-m", "weightsmith", *args, "--json"]
    env = environment(home, hub, **more)
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    try:
        told: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise AssertionError(f"no answer; stderr:\n{done.stderr}") from error
    return {**told, "code": done.returncode, "said": done.stdout + done.stderr}


def run_client(home: Path, hub: Hub, code: str, **more: str) -> Any:
    """The value of the expression `code`, in which `hf` is huggingface_hub and `api` its client."""
    env = environment(home, hub, **more)
    code = f"import json, huggingface_hub as hf\napi = hf.HfApi()\nprint(json.dumps({code}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

"""Run verbs in another process that stays, so that each costs no start: huggingface_hub reads its environment once.

A request is a line of JSON (arguments, environment, folder), the answer a line with exit code, stdout and stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Verbs:
    """The process. `hf_home` is its Hugging Face cache."""

    def __init__(self, hf_home: Path) -> None:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WEIGHTSMITH_"))}
        env |= {"HF_HOME": str(hf_home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.loopback.verbs"]
        self.child = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, *args: str, cwd: Path, **env: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, JSON result and stderr of one verb; `env` holds for it alone."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps({"args": [*args, "--json"], "env": env, "cwd": str(cwd)}) + "\n")
        self.child.stdin.flush()
        answer = json.loads(self.child.stdout.readline())
        return answer["code"], json.loads(answer["out"]) if answer["out"] else {}, answer["err"]

    def close(self) -> None:
        """End it."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(timeout=30)


def main() -> None:
    """Answer requests until there are no more."""
    from weightsmith.cli.app import run
    from weightsmith.sources import download

    download.WAITS = (0, 0)
    answers, before = sys.stdout, dict(os.environ)
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.clear()
        os.environ.update(before | asked["env"])
        os.chdir(asked["cwd"])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(asked["args"])
        answers.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

"""Run the installed wheel outside the checkout: every package and data file must have come along.

Usage: python tests/wheel_check.py PATH_TO_WEIGHTSMITH VENV_WITH_DEPENDENCIES
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path


def modules(checkout: Path) -> list[Path]:
    """Every module and page template of the checkout, as its path inside the installed package."""
    inside = [path.relative_to(checkout / "weightsmith") for path in (checkout / "weightsmith").rglob("*.py")]
    roots = [
        path.relative_to(checkout)
        for name in ("formats", "quant", "evals")
        for pattern in ("*.py", "*.html")
        for path in (checkout / name).rglob(pattern)
    ]
    return sorted(inside + roots)


def main(command: str, venv: str) -> None:
    checkout = Path(__file__).resolve().parent.parent
    purelib = sysconfig.get_path("purelib", vars={"base": str(Path(venv).resolve())})
    with tempfile.TemporaryDirectory() as folder:
        # The wheel was installed alone; its dependencies are borrowed, the checkout is not on the path.
        env = os.environ | {"WEIGHTSMITH_HOME": str(Path(folder) / "home"), "PYTHONPATH": purelib}
        wheel_site = Path(command).resolve().parent.parent
        probe = (
            "import sys, json; sys.path = [p for p in sys.path if p]; "
            f"sys.path.insert(0, {sysconfig.get_path('purelib', vars={'base': str(wheel_site)})!r}); "
            "import weightsmith, importlib; "
            "names = ['cli.app','sources','formats.archs.llama','formats.gguf','formats.safetensors',"
            "'formats.tokenizer','quant.codecs','quant.recipes','evals.forward','evals.engines']; "
            "[importlib.import_module('weightsmith.' + n) for n in names]; "
            "from weightsmith.sources.registry import load; from weightsmith.evals.prose import default_text; "
            "from weightsmith.cli.app import run; code = run(['list', '--json']); "
            "print(json.dumps([weightsmith.__file__, len(load().entries), len(default_text()), code]))"
        )
        done = subprocess.run(
            [str(Path(command).resolve().parent / "python"), "-c", probe],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"the wheel does not work outside the checkout:\n{done.stderr}")
        file, models, text, code = json.loads(done.stdout.strip().splitlines()[-1])
        if Path(file).is_relative_to(checkout) and "build/wheel" not in file:
            sys.exit(f"the checkout was imported instead of the wheel: {file}")
        absent = [path for path in modules(checkout) if not (Path(file).parent / path).exists()]
        if absent:
            sys.exit(f"missing from the wheel: {', '.join(map(str, absent))}; see `packages` in pyproject.toml")
        if not models or not text or code:
            sys.exit(f"data is missing from the wheel: {models} models, {text} characters of text, exit {code}")
        help_text = subprocess.run(
            [str(Path(command).resolve()), "--help"], cwd=folder, env=env, capture_output=True, text=True, check=True
        )
        sys.stdout.write(f"wheel: imported from {Path(file).parent}, {models} registry entries, --help answers\n")
        if "quantize" not in help_text.stdout:
            sys.exit("the command of the wheel lists no verbs")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

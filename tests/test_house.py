"""The house rules that a machine can check: imports run one way, files and functions stay small, verbs stay light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("weightsmith", "formats", "quant", "evals")
# A module may import its own layer and those before it.
LAYERS = (
    ("weightsmith._version", "weightsmith.errors", "weightsmith.types", "weightsmith.progress"),
    ("weightsmith.atomic", "weightsmith.safename", "weightsmith.suggest", "weightsmith.sizes"),
    ("weightsmith.quant",),
    ("weightsmith.formats",),
    ("weightsmith.evals",),
    (
        *(
            "weightsmith.catalog",
            "weightsmith.store",
            "weightsmith.inventory",
            "weightsmith.oci",
            "weightsmith.locate",
            "weightsmith.sources",
            "weightsmith.pull",
            "weightsmith.push",
            "weightsmith.lock",
            "weightsmith.derive",
            "weightsmith.texts",
            "weightsmith.aliases",
            "weightsmith.family",
            "weightsmith.usage",
            "weightsmith.difference",
            "weightsmith.links",
            "weightsmith.index",
            "weightsmith.integrity",
            "weightsmith.bundle",
            "weightsmith.builds",
            "weightsmith.provenance",
            "weightsmith.rebuild",
            "weightsmith.audit",
            "weightsmith.droppable",
            "weightsmith.update",
        ),
        *("weightsmith.calibrated", "weightsmith.journal", "weightsmith.estimates", "weightsmith.transcode"),
        *("weightsmith.orders", "weightsmith.jobs"),
    ),
    ("weightsmith.cli", "weightsmith.__main__"),
)
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "weightsmith" else ["weightsmith", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int | None:
    for level, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    return None


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("weightsmith.")}


def test_every_module_has_a_layer() -> None:
    modules = [module_name(path) for path in FILES]
    assert [name for name in modules if name != "weightsmith" and layer_of(name) is None] == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    own = layer_of(module_name(path))
    if own is None:
        return
    upward = [name for name in imports_of(path) if (layer_of(name) or 0) > own]
    assert upward == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    assert path.stem not in FORBIDDEN_NAMES
    text = path.read_text()
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 100, node.name


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_file_is_executable_in_disguise() -> None:
    """Nothing below the command line prints, exits or evaluates."""
    for path in FILES:
        if "cli" in path.parts or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"print", "eval", "exec", "exit", "compile"}, f"{path}: {node.func.id}"


def test_root_packages_refuse_their_bare_names() -> None:
    for name in ("formats", "quant", "evals"):
        result = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert f"import weightsmith.{name}" in result.stderr


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["list"], ["show", "--help"], ["quantize", "--help"]])
def test_light_verbs_import_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys, json\nfrom weightsmith.cli.app import run\n"
        f"code = run({args!r})\n"
        "heavy = {'torch', 'numba', 'gguf', 'tokenizers', 'huggingface_hub', 'transformers', 'sentencepiece'}\n"
        "print(json.dumps([code, sorted(heavy & set(sys.modules))]), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(result.stderr.strip().splitlines()[-1]) == [0, []]

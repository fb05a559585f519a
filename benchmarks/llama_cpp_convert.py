"""Run llama.cpp's own convert_hf_to_gguf, told the pre-tokenizer, so that tokenizers it has no fingerprint of pass.

Usage: python benchmarks/llama_cpp_convert.py TREE PRE ARGUMENTS...   (TREE: see tests/assets.py)
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    tree, pre, *arguments = sys.argv[1:]
    sys.path[:0] = [tree, str(Path(tree) / "gguf-py")]
    from conversion import base  # type: ignore[import-not-found]

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    script = str(Path(tree) / "convert_hf_to_gguf.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

"""The same bytes whatever instructions the kernels are compiled for, from any number of threads.

Three x86 targets beside the machine's own (`test_k_bytes`, `test_tails`): SSE2 alone, AVX2 with FMA, AVX-512.
Each compiles all codecs in a process and a cache of its own, so nothing comes from another target.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quant import test_tails
from tests.quant.kquants import ggml
from tests.quant.kquants.test_k_bytes import DIGESTS

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, sys
from tests.quant import test_tails
from tests.quant.kquants.test_k_bytes import digest
by_threads = [{codec: digest(codec, threads) for codec in sys.argv[1:]} for threads in (1, 2, 4)]
print(json.dumps([*by_threads, test_tails.digest()]))
"""
NEEDS = {"generic": "", "haswell": "avx2", "skylake-avx512": "avx512f"}


def has(feature: str) -> bool:
    import llvmlite.binding as llvm

    return not feature or bool(llvm.get_host_cpu_features().get(feature, False))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the targets named here are x86 ones")
@pytest.mark.parametrize("target", NEEDS)
def test_processors_and_threads_do_not_matter(target: str, tmp_path: Path) -> None:
    if not has(NEEDS[target]):
        pytest.skip(f"this processor has no {NEEDS[target]}")
    env = {"NUMBA_CPU_NAME": target, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *ggml.CODECS],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [*[DIGESTS] * 3, test_tails.DIGEST]

"""Compilation: light imports, the same bytes on every processor, caches that are stale, read-only or absent."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.quant import oracle
from weightsmith.quant import codecs

ROOT = Path(__file__).parents[2]
HEAVY = ("numba", "llvmlite", "torch", "gguf", "tokenizers")
SCRIPT = """
import hashlib, platform, sys
import numpy as np
from tests.quant import oracle
from weightsmith.quant import codecs
for codec in sorted(set(codecs.writable()) - codecs.SEARCHED):  # the others have tests of their own
    digest = hashlib.sha256()
    samples = [oracle.weights(kind, (128, 1024), 1) for kind in oracle.KINDS]
    samples += [oracle.edges(32 * 64, *form).reshape(-1, 1024) for form in ((8, 8.5), (16, 16.5), (15, 0.5), (31, 0.5))]
    for rows in samples:
        packed = codecs.encode(codec, rows)
        digest.update(packed.tobytes())
        digest.update(codecs.decode(codec, packed, 1024).tobytes())
    asm = ""
    if hasattr(codecs._module(codec), "_encode"):
        asm = "".join(codecs._module(codec)._encode._compiled.inspect_asm().values())
    print(codec, digest.hexdigest(), "wide" if "%ymm" in asm or "%zmm" in asm else "narrow", "vfmadd" in asm)
"""


def run(code: str, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "work",
    [
        "import weightsmith.quant.blocks",
        "import weightsmith.quant.recipes as r; from weightsmith.types import Recipe; "
        "r.assign({'a.weight': (32, 32)}, Recipe('Q4_0'), tied=False, traits=r.Traits(1))",
        "import weightsmith.quant.codecs as c; c.writable()",
        "import numpy, weightsmith.quant.codecs as c; c.check_finite('Q8_0', numpy.zeros((1, 34), numpy.uint8))",
        "import numpy, weightsmith.quant.codecs as c; c.decode('F32', c.encode('F32', numpy.ones((1, 3), 'f4')), 3)",
    ],
)
def test_light_work_imports_nothing_heavy(work: str) -> None:
    out = run(f"{work}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])")
    assert out.strip() == "[]"


@pytest.mark.slow
def test_same_bytes_on_a_generic_processor(tmp_path: Path) -> None:
    # fresh caches: assembly cannot be inspected in code that comes from a cache
    native = run(SCRIPT, NUMBA_CACHE_DIR=str(tmp_path / "native"))
    generic = run(SCRIPT, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path / "generic"))
    lines = generic.split("\n")[:-1]
    assert len(lines) == len(set(codecs.writable()) - codecs.SEARCHED)
    assert [line.split()[:2] for line in lines] == [line.split()[:2] for line in native.split("\n")[:-1]]
    assert not any("wide" in line for line in lines)
    assert "True" not in native + generic, "a fused multiply-add was generated"


def test_every_codec_file_offers_both_directions() -> None:
    for codec in sorted(set(codecs.writable()) - codecs.SEARCHED):  # the others have tests of their own
        module = codecs._module(codec)
        assert callable(module.encode)
        assert callable(module.decode)


def test_half_conversion_of_any_float() -> None:
    from numba import njit

    from weightsmith.quant.kernels import half_bits, half_value

    words = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint32)
    words[:8] = (0x7F800000, 0xFF800000, 0x7FC00000, 0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x80000001)

    @njit
    def both(x, half, back):  # type: ignore[no-untyped-def]
        for i in range(x.size):
            half[i] = half_bits(x[i])
            back[i] = half_value(half_bits(x[i]))

    floats, half, back = words.view(np.float32), np.empty(words.size, np.int32), np.empty(words.size, np.float32)
    both(floats, half, back)
    with np.errstate(over="ignore"):
        peer = floats.astype(np.float16)
    number = ~np.isnan(floats)
    assert np.array_equal(half[number], peer.view(np.uint16)[number])
    assert np.isnan(half.astype(np.uint16).view(np.float16)[~number]).all()
    assert np.array_equal(back, peer.astype(np.float32), equal_nan=True)


def copy_of_the_code(folder: Path) -> Path:
    for name in ("weightsmith", "quant"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "cli"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


FIRST_CALL = """
import numpy as np
from weightsmith.quant import codecs
print(codecs.encode("Q8_0", np.full((1, 32), 127, "f4"))[0, 2], codecs._module("Q8_0").__file__)
"""


def test_a_read_only_package_is_cached_in_the_users_folder(tmp_path: Path) -> None:
    code = copy_of_the_code(tmp_path / "code")
    (code / "quant" / "codecs" / "__pycache__").write_text("in the way, even for root")
    home = tmp_path / "home"
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "NUMBA_CACHE_DIR": ""}
    assert run(FIRST_CALL, cwd=code, **env).split()[0] == "127"
    assert list(home.rglob("q8_0._encode-*.nbi"))


def test_without_any_cache_folder_it_still_works(tmp_path: Path) -> None:
    code = copy_of_the_code(tmp_path / "code")
    (code / "quant" / "codecs" / "__pycache__").write_text("in the way")
    (tmp_path / "home").write_text("in the way")
    env = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / "x"), "NUMBA_CACHE_DIR": ""}
    assert run(FIRST_CALL, cwd=code, **env).split() == ["127", str(code / "quant" / "codecs" / "q8_0.py")]


def test_an_edit_of_an_inlined_function_is_not_hidden_by_the_cache(tmp_path: Path) -> None:
    code = copy_of_the_code(tmp_path / "code")
    env = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert run(FIRST_CALL, cwd=code, **env).split()[0] == "127"
    path = code / "quant" / "kernels.py"
    text, count = re.subn(r"return value if abs\(value\)", "return value * 0 if abs(value)", path.read_text())
    assert count == 1
    path.write_text(text)
    assert run(FIRST_CALL, cwd=code, **env).split()[0] == "0"


def test_other_array_types_are_refused() -> None:
    from weightsmith.quant.codecs import q8_0

    packed = np.empty((1, 34), np.uint8)
    q8_0._encode(oracle.weights("normal", (1, 32)), packed)
    with pytest.raises(TypeError):
        q8_0._encode(np.zeros((1, 32)), packed)

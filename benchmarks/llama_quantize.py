"""llama.cpp's own quantizer as a process of its own, through llama-cpp-python, as `llama-quantize` calls it.

Usage: python -m benchmarks.llama_quantize IN.gguf OUT.gguf TYPE THREADS [IMATRIX]
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp


def main(source: str, target: str, kind: str, threads: str, imatrix: str | None = None) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = int(threads)
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if imatrix:
        kept = _measured(Path(imatrix))
        params.imatrix = ctypes.cast(kept, type(params.imatrix))
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    sys.exit(code)


def _measured(path: Path) -> ctypes.Array:  # type: ignore[type-arg]
    """The imatrix as the array of (name, values, count) that the library takes, ended by an empty entry."""
    from weightsmith.formats import imatrix

    entries = imatrix.read(path)
    found = (llama_cpp.llama_model_imatrix_data * (len(entries.entries) + 1))()
    _keep.append(found)
    for slot, (name, entry) in zip(found, entries.entries.items(), strict=False):
        values = entries.importance(name, entry.sums.shape[1])
        _keep.append(values)
        slot.name = name.encode()
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        slot.size = values.size
    return found


_keep: list[object] = []  # what the library points at, alive to the end

if __name__ == "__main__":
    main(*sys.argv[1:])

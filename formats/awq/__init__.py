"""AWQ checkpoints as AutoAWQ writes them ("gemm"): a safetensors folder with 4-bit linears, packed along out.

`layout` knows their settings, tensors and weights; the folder itself is read by `formats.packed` and written by
`formats.gptq.packed_writer`. The activation-aware scaling is already part of the stored weights and norms, so
reading needs nothing of it. Weights are handed out as F32, which holds them exactly; nothing is transcoded into this
container (so it has no `plan`): its codes come from `weightsmith.evals.calibration`.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.formats.awq.layout import Layout, parse
from weightsmith.formats.gptq.columns import ByColumns
from weightsmith.formats.packed.reader import PackedReader
from weightsmith.formats.packed.settings import method_of

NAME = "awq"


def sniff(path: Path) -> bool:
    """True for a folder of config.json and safetensors weights whose configuration names AWQ."""
    return method_of(path) == NAME


def open_reader(path: Path) -> PackedReader:
    """Open a folder; reads and checks headers only. See `PackedReader` for what it raises."""
    return PackedReader(path, NAME, lambda raw, where: ByColumns(Layout(parse(raw, path=where))))

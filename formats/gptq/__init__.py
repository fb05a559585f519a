"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them: a safetensors folder with packed linears.

| module | what it knows |
|---|---|
| settings | quantization_config and quantize_config.json |
| layout | the tensors of one packed linear, and the weights they stand for |
| columns | such linears as `formats.packed` reads them (`formats.awq` uses it too) |
| packed_writer | writing a folder of them, whatever their layout |

Reading hands out the weights as F32, which holds them exactly, computed slab by slab from the packed words. Nothing is
transcoded into this container (so it has no `plan`): its codes come from `weightsmith.evals.calibration`.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.formats.gptq.columns import ByColumns
from weightsmith.formats.gptq.layout import Layout
from weightsmith.formats.gptq.settings import parse
from weightsmith.formats.packed.reader import PackedReader
from weightsmith.formats.packed.settings import method_of

NAME = "gptq"


def sniff(path: Path) -> bool:
    """True for a folder of config.json and safetensors weights whose configuration names GPTQ."""
    return method_of(path) == NAME


def open_reader(path: Path) -> PackedReader:
    """Open a folder; reads and checks headers only. See `PackedReader` for what it raises."""
    return PackedReader(path, NAME, lambda raw, where: ByColumns(Layout(parse(raw, path=where))))

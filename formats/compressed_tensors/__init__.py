"""compressed-tensors checkpoints, as llm-compressor writes them: a safetensors folder with packed linears.

| module | what it knows |
|---|---|
| settings | quantization_config: which ways of packing there are |
| integers | pack-quantized: integers of 1 to 8 bits in words |
| fours | nvfp4- and mxfp4-pack-quantized: two 4-bit floats a byte |

int-quantized, float-quantized, naive-quantized and mxfp8-quantized store weights one by one (`formats.packed.scaled`).
Which linear is packed how is read off its tensors, whose names, types and shapes leave no choice: the patterns in the
settings are regular expressions from outside, and are never run.

Weights are handed out as F32: an exact step times a scale, rounded once. Quantized activations are not imitated.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.formats.compressed_tensors.scheme import CompressedTensors
from weightsmith.formats.compressed_tensors.settings import parse
from weightsmith.formats.packed.reader import PackedReader
from weightsmith.formats.packed.settings import method_of

NAME = "compressed-tensors"


def sniff(path: Path) -> bool:
    """True for a folder of config.json and safetensors weights whose configuration names compressed-tensors."""
    return method_of(path) in (NAME, "compressed_tensors")


def open_reader(path: Path) -> PackedReader:
    """Open a folder; reads and checks headers only. See `PackedReader` for what it raises."""
    return PackedReader(path, NAME, lambda raw, where: CompressedTensors(parse(raw, path=where)))

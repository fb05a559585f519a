"""bitsandbytes checkpoints: a safetensors folder with NF4 or FP4 linears (written too), or with LLM.int8's.

| module | what it knows |
|---|---|
| settings | quantization_config, and how it is written |
| state | the JSON that goes with every 4-bit linear |
| linears | the stored tensors of one linear, and the weights they stand for |
| writer | the protocol of `weightsmith.types` |

4-bit weights are handed out in the type that bitsandbytes itself dequantizes them to (the quant_state's), rounded as it
does; 8-bit ones as F32. Quantizing to NF4 or FP4 needs no calibration: it is the same arithmetic as bitsandbytes', so a
checkpoint written here is what transformers would have made on the fly, and loads in it.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.errors import UnsupportedError, UsageError
from weightsmith.formats.bnb.linears import Bitsandbytes
from weightsmith.formats.bnb.settings import DOUBLED, TYPES, check
from weightsmith.formats.bnb.writer import BnbWriter, create, parts_of
from weightsmith.formats.packed.parts import FLOATS
from weightsmith.formats.packed.reader import PackedReader
from weightsmith.formats.packed.settings import method_of
from weightsmith.quant.blocks import BLOCKS, row_nbytes
from weightsmith.types import Plan, Reader, Recipe, TensorInfo

__all__ = ["ALIASES", "NAME", "TYPES", "BnbWriter", "create", "open_reader", "plan", "sniff"]

NAME = "bnb"
ALIASES = {kind.lower(): kind for kind in TYPES}  # `--to nf4`


def sniff(path: Path) -> bool:
    """True for a folder of config.json and safetensors weights whose configuration names bitsandbytes."""
    return method_of(path) == "bitsandbytes"


def open_reader(path: Path) -> PackedReader:
    """Open a folder; reads and checks headers only. See `PackedReader` for what it raises."""
    return PackedReader(path, NAME, lambda raw, where: Bitsandbytes(check(raw, path=where)))


def plan(reader: Reader, recipe: Recipe) -> Plan:
    """Every linear of the layers in 4 bits; the rest keeps its float type, as transformers leaves it.

    A linear whose rows are no multiple of a block is left alone too, and told. Raises UsageError for choices that NF4
    does not have, UnsupportedError for a mixture of experts: its experts would not be loaded as 4 bits.
    """
    if recipe.imatrix or recipe.overrides or recipe.output_type or recipe.embedding_type:
        raise UsageError(
            "bitsandbytes has one type for all linears, and no use for importances",
            hint="Leave --imatrix, --calibrate, --tensor-type, --output-type and --embedding-type out.",
        )
    kind = recipe.type or TYPES[0]
    codec = kind.removesuffix(DOUBLED)
    dtype = reader.config.dtype if reader.config.dtype in FLOATS else "F16"
    tensors, fallbacks = [], []
    for info in reader.infos().values():
        plain = info.codec if info.codec in FLOATS and len(info.shape) == 1 else dtype
        wanted = codec if _is_linear(info) else plain
        got = wanted if info.row_len % BLOCKS[wanted].weights == 0 else plain
        if got != wanted:
            fallbacks.append((info.name, wanted, got))
        tensors.append(TensorInfo(info.name, info.shape, got, info.n_rows * row_nbytes(got, info.row_len)))
    stored, _ = parts_of(tensors, dtype, double=kind.endswith(DOUBLED))
    return Plan(tensors, fallbacks, TYPES.index(kind), sum(info.nbytes for info in stored))


def _is_linear(info: TensorInfo) -> bool:
    if len(info.shape) != 2 or not info.name.startswith("model.layers."):
        return False
    if not info.name.endswith("_proj.weight"):
        raise UnsupportedError(
            "experts cannot be written for bitsandbytes: transformers loads fused ones in full precision",
            tensor=info.name,
            hint="A GGUF type quantizes them: --to gguf:Q4_K_M.",
        )
    return True

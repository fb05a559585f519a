"""Calibration as the command line asks for it: GGUF types with error feedback, or importances alone; GPTQ and AWQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.formats.imatrix import Imatrix
from weightsmith.texts import Text
from weightsmith.types import Plan, Reader, TensorInfo

if TYPE_CHECKING:
    from weightsmith.evals.calibration.encoded import Encoded
    from weightsmith.evals.calibration.packed import PackedOptions

# Containers that are made by calibration, and their types (bits).
PACKED = {"gptq": ("2", "3", "4", "8"), "awq": ("4",)}
_SWEEPS = {"fast": 0, "normal": 2, "best": 4}
_BLOCK_SWEEPS = {"normal": 4, "best": 12}


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text and how it is used. rows: windows of `ctx` tokens drawn from it. group_size and sym: of GPTQ and AWQ.

    text: None lets the model write its own (`evals.calibration.generate`).
    """

    text: Text | None
    rows: int = 128
    ctx: int = 512
    seed: int = 0
    group_size: int = 128
    sym: bool = True
    device: str = "cpu"
    memory: int | None = None
    threads: int | None = None

    def record(self) -> dict[str, Any]:
        """What decides the result, as plain values: the text by its digest, never by its path."""
        kept = {"rows": self.rows, "ctx": self.ctx, "seed": self.seed, "group_size": self.group_size, "sym": self.sym}
        return {"text": f"sha256:{self.text.sha256}" if self.text is not None else "self", **kept}

    def read(self, reader: Reader, pre: str | None) -> str:
        """The text as `reader`'s model gets it; raises what rendering and writing raise."""
        if self.text is not None:
            return self.text.render(reader, pre=pre)
        from weightsmith.evals.calibration.generate import write  # noqa: PLC0415  (loads torch)

        return write(reader, _options(self, pre))


def importances(reader: Reader, calibration: Calibration, *, pre: str | None = None, output: bool = False) -> Imatrix:
    """Measure an imatrix of the whole model, layer by layer. output: of the output matrix too."""
    from weightsmith.evals.calibration import imatrix  # noqa: PLC0415  (loads torch)

    text, name = calibration.read(reader, pre), calibration.text.name if calibration.text is not None else "self"
    return imatrix(reader, text, _options(calibration, pre), output=output, dataset=name)


def packed(  # noqa: PLR0913  (every choice, all by keyword)
    reader: Reader,
    out: Path,
    container: str,
    bits: int,
    calibration: Calibration,
    *,
    effort: str,
    overwrite: bool,
    notes: Mapping[str, str],
    pre: str | None = None,
    split_bytes: int | None = None,
) -> Path:
    """Quantize with GPTQ's error feedback and write a GPTQ or AWQ checkpoint; finished layers survive a stop."""
    from weightsmith.evals.calibration.packed import quantize_packed  # noqa: PLC0415  (loads torch)

    options = _packed_options(container, bits, calibration, effort)
    options = replace(options, calibration=_options(calibration, pre), split_bytes=split_bytes)
    text = calibration.read(reader, pre)
    return quantize_packed(reader, out, text, options, overwrite=overwrite, notes=notes).path


def packed_plan(reader: Reader, container: str, bits: int, calibration: Calibration) -> list[TensorInfo]:
    """The tensors that `packed` would store, from headers alone; the text is not read."""
    from weightsmith.evals.calibration.packed import plan_packed  # noqa: PLC0415  (loads torch)

    return plan_packed(reader, _packed_options(container, bits, calibration, "normal"))


def _packed_options(container: str, bits: int, calibration: Calibration, effort: str) -> PackedOptions:
    from weightsmith.evals.calibration.packed import PackedOptions  # noqa: PLC0415  (loads torch)
    from weightsmith.quant.algorithms.gptq import Method  # noqa: PLC0415
    from weightsmith.quant.algorithms.rtn import Grid  # noqa: PLC0415

    # GPTQModel, which most runtimes load through, takes zeros of its own choosing only in the second form.
    form = "gptq_v2" if container == "gptq" and not calibration.sym else container
    return PackedOptions(
        grid=Grid(bits, calibration.group_size, calibration.sym),
        method=Method(sweeps=_SWEEPS[effort]),
        checkpoint_format=form,
        scaled=effort != "fast",
    )


def encoded(
    reader: Reader, out: Path, plan: Plan, calibration: Calibration, *, effort: str, pre: str | None = None
) -> Encoded:
    """Encode the layers' linears as planned, with error feedback; finished layers survive a stop."""
    from weightsmith.evals.calibration.encoded import EncodedOptions, encode_layers  # noqa: PLC0415  (loads torch)

    options = EncodedOptions(
        layouts={info.name: info.codec for info in plan.tensors},
        calibration=_options(calibration, pre),
        sweeps=_BLOCK_SWEEPS[effort],
        effort=effort,
    )
    return encode_layers(reader, out, calibration.read(reader, pre), options)


def _options(calibration: Calibration, pre: str | None) -> Any:
    from weightsmith.evals.calibration import Options  # noqa: PLC0415

    return Options(
        rows=calibration.rows,
        ctx=calibration.ctx,
        seed=calibration.seed,
        device=calibration.device,
        memory=calibration.memory or 1 << 30,
        threads=calibration.threads,
        pre=pre,
        special=calibration.text is not None and calibration.text.special,
    )

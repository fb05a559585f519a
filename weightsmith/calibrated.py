"""Calibration as the command line asks for it: importances for GGUF types, GPTQ and AWQ checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.formats.imatrix import Imatrix
from weightsmith.texts import Text
from weightsmith.types import Reader

# Containers that are made by calibration, and their types (bits).
PACKED = {"gptq": ("2", "3", "4", "8"), "awq": ("4",)}
_SWEEPS = {"fast": 0, "normal": 2, "best": 4}


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
    from weightsmith.evals.calibration.packed import PackedOptions, quantize_packed  # noqa: PLC0415  (loads torch)
    from weightsmith.quant.algorithms.gptq import Method  # noqa: PLC0415
    from weightsmith.quant.algorithms.rtn import Grid  # noqa: PLC0415

    options = PackedOptions(
        grid=Grid(bits, calibration.group_size, calibration.sym),
        method=Method(sweeps=_SWEEPS[effort]),
        calibration=_options(calibration, pre),
        checkpoint_format=container,
        scaled=effort != "fast",
        split_bytes=split_bytes,
    )
    text = calibration.read(reader, pre)
    return quantize_packed(reader, out, text, options, overwrite=overwrite, notes=notes).path


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

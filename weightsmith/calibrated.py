"""Calibration as the command line asks for it: GGUF types with error feedback, or importances alone; GPTQ and AWQ."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.errors import IntegrityError, UsageError
from weightsmith.formats import archs
from weightsmith.formats.imatrix import Imatrix, read
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import Plan, Reader, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from weightsmith.evals.calibration.best import Best
    from weightsmith.evals.calibration.encoded import Encoded, EncodedOptions
    from weightsmith.evals.calibration.packed import PackedOptions
    from weightsmith.texts import Text

log = logging.getLogger(__name__)

# Containers that are made by calibration, and their types (bits).
PACKED = {"gptq": ("2", "3", "4", "8"), "awq": ("4",)}
_SWEEPS = {"fast": 0, "normal": 2, "best": 4}
_BLOCK_SWEEPS = {"normal": 4, "best": 6}


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


def refuse_both(path: Path | None, calibration: Calibration | None) -> None:
    """UsageError if there is an imatrix and a text to measure another on."""
    if path is not None and calibration is not None:
        raise UsageError("an imatrix and a text to calibrate on exclude each other", hint="Leave one out.")


def matrix(reader: Reader, path: Path | None, calibration: Calibration | None, pre: str | None) -> Imatrix | None:
    """The importances to quantize by: from the file `path`, measured now, or none."""
    refuse_both(path, calibration)
    if path is not None:
        return read(path)
    return importances(reader, calibration, pre=pre) if calibration is not None else None


def by_tensor(matrix: Imatrix, reader: Reader, planned: Plan) -> dict[str, NDArray[np.float32]]:
    """Importance of every input channel, float32 [in] by canonical name; a tensor that was not measured has none.

    Raises IntegrityError if `matrix` has none of the planned tensors.
    """
    family = archs.by_name(reader.config.family)
    found, missing = {}, []
    for info in planned.tensors:
        if BLOCKS[info.codec].weights == 1:
            continue
        name = family.gguf_name(info.name)
        if name in matrix.entries:
            found[info.name] = _importance(matrix, name, info, reader.config.n_experts)
        else:
            missing.append(name)
    if not found:
        raise IntegrityError("the imatrix has none of this model's tensors", path=reader.path)
    if missing:
        log.info("not in the imatrix, so importances were estimated: %s", ", ".join(missing))
    return found


def _importance(matrix: Imatrix, name: str, info: TensorInfo, n_experts: int) -> NDArray[np.float32]:
    """Importance of the input channels of `info`, of which the imatrix calls `name` it or the stack it belongs to."""
    expert = archs.expert_of(info.name)
    if expert is None:
        return matrix.importance(name, info.row_len)
    rows = matrix.importance(name, info.row_len, matrices=n_experts).reshape(n_experts, -1)
    found: NDArray[np.float32] = rows[expert]
    return found


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
        # Feedback into gptq is no better for it (docs/LOG.md); at best the original's scales would have to move, too.
        scaled=container == "awq" and effort == "normal",
        best=_best(calibration) if effort == "best" else None,
    )


def packed_costs(reader: Reader, container: str, bits: int, calibration: Calibration) -> dict[str, float]:
    """Seconds that `packed` would calibrate here, by effort, from one layer that is measured for each; its errors."""
    from weightsmith.evals.calibration.packed import cost  # noqa: PLC0415  (loads torch)

    found = {}
    for effort in _SWEEPS:
        options = _packed_options(container, bits, calibration, effort)
        options = replace(options, calibration=_options(calibration, None))
        found[effort] = cost(reader, options).seconds(calibration.rows)
    return found


def encoded_costs(reader: Reader, plan: Plan, calibration: Calibration) -> dict[str, float]:
    """Seconds that importances ("fast") and `encoded` would take here, by effort, as `packed_costs` tells them."""
    from weightsmith.evals.calibration import cost, encoded  # noqa: PLC0415  (loads torch)

    found = {"fast": cost.measure(reader, _options(calibration, None), lambda _: None, full=False, sequential=False)}
    for effort in _BLOCK_SWEEPS:
        found[effort] = encoded.cost(reader, _encoded_options(plan, calibration, effort, None))
    return {effort: one.seconds(calibration.rows) for effort, one in found.items()}


def _encoded_options(plan: Plan, calibration: Calibration, effort: str, pre: str | None) -> EncodedOptions:
    from weightsmith.evals.calibration.encoded import EncodedOptions  # noqa: PLC0415  (loads torch)

    return EncodedOptions(
        layouts={info.name: info.codec for info in plan.tensors},
        calibration=_options(calibration, pre),
        sweeps=_BLOCK_SWEEPS[effort],
        effort=effort,
        best=_best(calibration) if effort == "best" else None,
    )


def encoded(
    reader: Reader, out: Path, plan: Plan, calibration: Calibration, *, effort: str, pre: str | None = None
) -> Encoded:
    """Encode the layers' linears as planned, with error feedback; finished layers survive a stop."""
    from weightsmith.evals.calibration.encoded import encode_layers  # noqa: PLC0415  (loads torch)

    options = _encoded_options(plan, calibration, effort, pre)
    return encode_layers(reader, out, calibration.read(reader, pre), options)


def _best(calibration: Calibration) -> Best:
    from weightsmith.evals.calibration.best import Best  # noqa: PLC0415  (loads torch)
    from weightsmith.evals.calibration.distil import Settings  # noqa: PLC0415

    return Best(distilled=Settings(seed=calibration.seed))


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

"""`weightsmith imatrix`: how strongly each input channel is used, measured on a text."""

from __future__ import annotations

import time
from pathlib import Path

import click

from weightsmith.cli.options import (
    calibration_options,
    calibration_text,
    common,
    pickle_option,
    source_argument,
    torch_device,
)
from weightsmith.cli.output import emit, fields


@click.command("imatrix")
@source_argument()
@click.option(
    "--text",
    "text",
    required=True,
    help="Text to measure on: a file of text or .jsonl, hf://datasets/ORG/NAME[/FILE], or self.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to write.")
@calibration_options
@click.option("--process-output", is_flag=True, help="Measure the output matrix too.")
@click.option("--force", is_flag=True, help="Replace what already stands there.")
@pickle_option
@common
def command(
    source: str,
    text: str,
    output: Path,
    field: str | None,
    rows: int,
    ctx: int,
    device: str,
    process_output: bool,
    force: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Measure an importance matrix of SOURCE and write it as GGUF, as llama-imatrix does.

    Layers are loaded one at a time, so a model larger than memory can be measured.
    """
    from weightsmith import formats
    from weightsmith.atomic import refuse_existing
    from weightsmith.calibrated import Calibration, importances
    from weightsmith.catalog import Catalog
    from weightsmith.formats import imatrix
    from weightsmith.locate import locate

    refuse_existing(output, overwrite=force)
    reader = formats.open_reader(locate(source, Catalog()).path, allow_pickle=allow_pickle)
    begun = time.monotonic()
    try:
        calibration = Calibration(calibration_text(text, field), rows=rows, ctx=ctx, device=torch_device(device))
        found = importances(reader, calibration, output=process_output)
    finally:
        reader.close()
    path = imatrix.write(output, found, overwrite=force)
    seconds = time.monotonic() - begun
    result = {"path": str(path), "tensors": len(found.entries), "digest": found.digest(), "seconds": round(seconds, 2)}
    shown = {"made": path, "tensors": len(found.entries), "digest": found.digest(), "seconds": f"{seconds:.1f}"}
    emit(result, fields(shown), as_json=as_json)

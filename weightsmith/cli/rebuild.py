"""`weightsmith rebuild`: make an entry again and see whether the same bytes come out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from weightsmith.cli.options import Size, calibration_text, common, pickle_option, source_argument, torch_device
from weightsmith.cli.output import emit, table


@click.command("rebuild")
@source_argument("model")
@click.option("--check", is_flag=True, help="Compare, and change nothing in the catalog. Required.")
@click.option("--calibrate", metavar="TEXT", help="The text it was calibrated on, if it was.")
@click.option("--field", help="Field of the text in a .jsonl or .parquet file; found by itself as a rule.")
@click.option(
    "--imatrix", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The imatrix, if it had one."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda, for calibration.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads; all cores by default.")
@click.option("--max-memory", type=Size(), help="Most memory for tensors under way, for instance 512MB.")
@pickle_option
@common
def command(
    model: str,
    check: bool,
    calibrate: str | None,
    field: str | None,
    imatrix: Path | None,
    device: str,
    threads: int | None,
    max_memory: int | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Make MODEL again from its parent in the catalog, by the recorded recipe, and compare the SHA-256 of every file.

    A calibration text or imatrix is recorded by its digest only: pass the same one again. Exits 3 if anything differs,
    1 if another arithmetic version made it, 7 if its parent is gone.
    """
    from weightsmith import rebuild
    from weightsmith.calibrated import Calibration
    from weightsmith.catalog import Catalog
    from weightsmith.errors import UsageError
    from weightsmith.locate import locate

    if not check:
        raise UsageError("rebuild compares: pass --check", hint="To make it anew: quantize or convert with --force.")
    catalog = Catalog()
    entry = locate(model, catalog).entry
    if entry is None:
        raise UsageError(f"{model!r} is not in the catalog, so its recipe is not known", hint="`audit` takes any file.")
    calibration = None
    if calibrate is not None or "calibration" in (entry.recipe or {}):
        text = calibration_text(calibrate, field) if calibrate is not None else None
        calibration = Calibration(text, device=torch_device(device), memory=max_memory, threads=threads)
    brought = rebuild.Brought(calibration, imatrix, threads, max_memory, allow_pickle)
    found = rebuild.check(catalog, entry, brought)
    equal = all(one.equal for one in found)
    rows = [(one.path, "equal" if one.equal else f"differs: {one.where}", (one.rebuilt or "")[:12]) for one in found]
    said = "The same bytes came out again." if equal else "It is not what its record says that it was made from."
    result = {"ref": entry.ref, "equal": equal, "files": [asdict(one) | {"equal": one.equal} for one in found]}
    emit(result, f"{table(rows, ['file', 'made again', 'sha256'])}\n\n{said}", as_json=as_json)
    if not equal:
        raise click.exceptions.Exit(3)

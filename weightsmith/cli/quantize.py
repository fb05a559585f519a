"""`weightsmith quantize`: a smaller file, straight from any readable checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from weightsmith.cli.options import (
    Size,
    calibration_options,
    calibration_text,
    common,
    output_options,
    pickle_option,
    source_argument,
    torch_device,
)


@click.command("quantize")
@source_argument()
@click.option("--to", "to", required=True, metavar="CONTAINER:TYPE", help="gguf:Q4_K_M, gptq:4, awq, nf4, ...")
@output_options
@click.option(
    "--tensor-type",
    "tensor_types",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="Type of matching tensors; first match wins.",
)
@click.option("--pure", is_flag=True, help="The same type for every matrix, output and embeddings too.")
@click.option("--output-type", metavar="TYPE", help="Type of the output matrix.")
@click.option("--embedding-type", metavar="TYPE", help="Type of the token embedding.")
@click.option(
    "--imatrix",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Importances of the input channels, from llama-imatrix or from here.",
)
@click.option(
    "--calibrate",
    metavar="TEXT",
    help="Text to calibrate on: a file of text or .jsonl, hf://datasets/ORG/NAME[/FILE], or self.",
)
@calibration_options
@click.option("--group-size", type=int, default=128, show_default=True, help="Columns per scale of gptq and awq.")
@click.option("--sym/--asym", default=True, show_default=True, help="Zeros in the middle, for gptq and awq.")
@click.option(
    "--effort",
    type=click.Choice(["fast", "normal", "best"]),
    default="normal",
    show_default=True,
    help="How hard to search for scales; with a text to calibrate on, best also makes up for what earlier layers lost "
    "and moves scales by the original's logits, and fast calibrates GGUF types by importances alone.",
)
@click.option("--strict", is_flag=True, help="Fail where a tensor's rows do not fit the type.")
@click.option("--split", "split_bytes", type=Size(), help="Most bytes per file, for instance 5GB.")
@click.option("--pre", help="Name of the pre-tokenizer, where it is not recognised.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads; all cores by default.")
@click.option("--max-memory", type=Size(), help="Most memory for tensors under way, for instance 512MB.")
@click.option(
    "--dry-run", is_flag=True, help="Print the exact size, every type and what calibrating takes, write nothing."
)
@pickle_option
@common
def command(
    source: str,
    to: str,
    output: Path | None,
    tag: str | None,
    force: bool,
    tensor_types: tuple[str, ...],
    pure: bool,
    output_type: str | None,
    embedding_type: str | None,
    imatrix: Path | None,
    calibrate: str | None,
    field: str | None,
    rows: int,
    ctx: int,
    device: str,
    group_size: int,
    sym: bool,
    effort: str,
    strict: bool,
    split_bytes: int | None,
    pre: str | None,
    threads: int | None,
    max_memory: int | None,
    dry_run: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Quantize SOURCE.

    One pass: no full-precision file in between. Norms and biases stay F32. GGUF types work weight-only (which columns
    matter is estimated from their tails), by an imatrix, or with error feedback by a text to calibrate on; gptq:BITS
    and awq need the text.
    """
    from weightsmith import jobs
    from weightsmith.calibrated import PACKED, Calibration
    from weightsmith.cli.produce import produce
    from weightsmith.errors import UsageError
    from weightsmith.types import Recipe

    target = jobs.Target.parse(to)
    if target.type is None:
        raise UsageError("quantize needs a type", hint="For instance --to gguf:Q4_0.")
    calibration = None
    if calibrate is not None or (dry_run and target.container in PACKED):
        calibration = Calibration(
            calibration_text(calibrate, field) if calibrate is not None else None,
            rows=rows,
            ctx=ctx,
            group_size=group_size,
            sym=sym,
            device=torch_device(device),
            memory=max_memory,
            threads=threads,
        )
    options = jobs.Options(
        pre=pre,
        split_bytes=split_bytes,
        threads=threads,
        memory=max_memory,
        allow_pickle=allow_pickle,
        overwrite=force,
        strict=strict,
        imatrix=imatrix,
        calibration=calibration,
        effort=effort,
        recipe=Recipe(
            pure=pure,
            overrides=tuple(jobs.parse_override(text) for text in tensor_types),
            output_type=output_type.upper() if output_type else None,
            embedding_type=embedding_type.upper() if embedding_type else None,
        ),
    )
    produce(source, target, options, output=output, tag=tag, dry_run=dry_run, as_json=as_json)

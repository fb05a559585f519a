"""`weightsmith convert`: one container to another, streaming."""

from __future__ import annotations

from pathlib import Path

import click

from weightsmith.cli.options import Size, common, output_options, pickle_option, source_argument


@click.command("convert")
@source_argument()
@click.option("--to", "to", required=True, metavar="CONTAINER[:TYPE]", help="safetensors, gguf, gguf:BF16, ...")
@output_options
@click.option("--split", "split_bytes", type=Size(), help="Most bytes per file, for instance 5GB.")
@click.option("--pre", help="Name of the pre-tokenizer, where it is not recognised.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads; all cores by default.")
@click.option("--max-memory", type=Size(), help="Most memory for tensors under way, for instance 512MB.")
@click.option("--dry-run", is_flag=True, help="Print sizes and types, write nothing.")
@pickle_option
@common
def command(
    source: str,
    to: str,
    output: Path | None,
    tag: str | None,
    force: bool,
    split_bytes: int | None,
    pre: str | None,
    threads: int | None,
    max_memory: int | None,
    dry_run: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Convert SOURCE to another container, with its configuration and tokenizer.

    Without a type nothing is lost: every tensor keeps its precision (block-quantized ones become F16 in safetensors).
    From GPTQ, AWQ and their kin, gguf:Q4_0, gguf:Q4_1 and gguf:Q8_0 take the codes over as they are where they fit, and
    leave the rest in its precision.
    Memory does not grow with the model.
    """
    from weightsmith import jobs
    from weightsmith.cli.produce import produce

    target = jobs.Target.parse(to)
    options = jobs.Options(
        pre=pre,
        split_bytes=split_bytes,
        threads=threads,
        memory=max_memory,
        allow_pickle=allow_pickle,
        overwrite=force,
        keep_rest=target.is_blocks,
    )
    produce(source, target, options, output=output, tag=tag, dry_run=dry_run, as_json=as_json)

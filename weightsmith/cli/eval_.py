"""`weightsmith eval`: perplexity of one model."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click

from weightsmith.cli.options import (
    common,
    evaluation_options,
    evaluation_text,
    pickle_option,
    source_argument,
    torch_device,
)
from weightsmith.cli.output import emit, fields


@click.command("eval")
@source_argument()
@evaluation_options
@click.option(
    "--engine",
    type=click.Choice(["torch", "llama.cpp"]),
    default="torch",
    show_default=True,
    help="Our decoder, layer by layer, or llama.cpp for GGUF.",
)
@pickle_option
@common
def command(
    source: str,
    text: Path | None,
    ctx: int | None,
    convention: str,
    windows: int | None,
    threads: int | None,
    device: str,
    graph: str | None,
    engine: str,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Measure the perplexity of SOURCE on a text.

    Layers are loaded one at a time, so a model larger than memory can be measured.
    """
    from weightsmith import formats
    from weightsmith.catalog import Catalog
    from weightsmith.evals import perplexity
    from weightsmith.evals.ruler import Ruler
    from weightsmith.locate import locate

    ruler = Ruler(
        convention=convention,
        ctx=ctx,
        engine=engine,
        device="cpu" if engine == "llama.cpp" else torch_device(device),
        threads=threads,
        max_windows=windows,
        graph=graph,
    )
    reader = formats.open_reader(locate(source, Catalog()).path, allow_pickle=allow_pickle)
    begun = time.monotonic()
    try:
        measured = perplexity.measure(reader, evaluation_text(text), ruler)
    finally:
        reader.close()
    seconds = time.monotonic() - begun
    shown = {
        "perplexity": f"{measured.perplexity:.4f} +- {measured.stderr:.4f}",
        "tokens": f"{measured.tokens} scored in {measured.windows} windows of {measured.ctx} ({measured.convention})",
        "engine": measured.engine,
        "seconds": f"{seconds:.1f}",
    }
    emit(asdict(measured) | {"seconds": round(seconds, 2)}, fields(shown), as_json=as_json)

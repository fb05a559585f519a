"""Options and arguments that several verbs share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from weightsmith.texts import Text

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 5GB, 512MiB, 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The size in bytes; a usage error for anything else."""
        from weightsmith.errors import UsageError
        from weightsmith.sizes import parse_size

        try:
            return parse_size(value)
        except UsageError as error:
            self.fail(error.message, param, ctx)


def _begin(ctx: click.Context, _param: click.Parameter, quiet: bool) -> bool:
    """Set up logs and progress before a verb runs."""
    from weightsmith.progress import set_quiet

    set_quiet(quiet)
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", force=True)
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "filelock", "numba", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return quiet


def common(function: F) -> F:
    """--json and --quiet, which every verb has."""
    function = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)
    return click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_begin, is_eager=True, help="No progress, no notes."
    )(function)


def _complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    """Catalog names, registry names and files that begin with what was typed."""
    from click.shell_completion import CompletionItem

    from weightsmith.catalog import Catalog
    from weightsmith.sources.registry import load

    catalog = Catalog()
    names = [entry.ref for entry in catalog.summaries()] + list(load(home=catalog.home).entries)
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def source_argument(name: str = "source", *, many: bool = False, required: bool = True) -> Callable[[F], F]:
    """A SOURCE, or one or more of them as a tuple."""
    metavar = f"{name.upper().removesuffix('S')}..." if many else name.upper()
    metavar = metavar if required else f"[{metavar}]"
    return click.argument(name, metavar=metavar, shell_complete=_complete, nargs=-1 if many else 1, required=required)


def pickle_option(function: F) -> F:
    """--allow-pickle, for the verbs that read weights."""
    return click.option(
        "--allow-pickle",
        is_flag=True,
        help="Read pickled weights (.bin, .pth). They are parsed, never executed, but think twice whom you trust.",
    )(function)


def calibration_options(function: F) -> F:
    """--field, --rows, --ctx, --device: how a text is used for calibration."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda, for calibration."),
        click.option("--ctx", type=click.IntRange(4), default=512, show_default=True, help="Tokens per row."),
        click.option("--rows", type=click.IntRange(1), default=128, show_default=True, help="Rows of the text to use."),
        click.option("--field", help="Field of the text in a .jsonl or .parquet file; found by itself as a rule."),
    ):
        function = option(function)
    return function


def output_options(function: F) -> F:
    """-o, --name, --tag, --force: where a result goes."""
    for option in (
        click.option("--force", is_flag=True, help="Replace what already stands there."),
        click.option("--tag", help="Tag in the catalog; the type by default."),
        click.option("-o", "--output", type=click.Path(path_type=Path), help="Write here and leave the catalog alone."),
    ):
        function = option(function)
    return function


def evaluation_options(function: F) -> F:
    """--text, --ctx, --convention, --windows, --threads, --device, --graph: how perplexity is measured."""
    for option in (
        click.option(
            "--graph",
            metavar="NAME",
            help="Whose computation to follow where programs differ, for Grok: xai, sglang, llamacpp or hpcai.",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads; all cores by default."),
        click.option("--windows", type=click.IntRange(1), help="Use at most so many windows of the text."),
        click.option(
            "--convention",
            type=click.Choice(["llama.cpp", "paper"]),
            default="llama.cpp",
            show_default=True,
            help="Windows as llama-perplexity takes them, or as the GPTQ and AWQ papers do.",
        ),
        click.option("--ctx", type=click.IntRange(2), help="Tokens per window; 512, or 2048 for the paper convention."),
        click.option(
            "--text",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Text to measure on; a short built-in one by default.",
        ),
    ):
        function = option(function)
    return function


def evaluation_text(path: Path | None) -> str:
    """The text to measure on: a UTF-8 file, or the built-in prose."""
    if path is None:
        from weightsmith.evals.prose import default_text

        return default_text()
    from weightsmith import texts

    return texts.decode(path.read_bytes(), path)


def calibration_text(named: str, field: str | None) -> Text | None:
    """The text of --calibrate or --text, None for the model's own; see `weightsmith.texts`."""
    from weightsmith import texts
    from weightsmith.catalog import Catalog

    return texts.find(named, home=Catalog().home, field=field)


def torch_device(name: str) -> str:
    """The device that "auto" stands for: a CUDA device where there is one, else the CPU."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

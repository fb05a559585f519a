"""The `weightsmith` command: finds its verbs by listing this folder and imports only the one that runs.

Every failure is told once, here: a message on stderr (with --json also an object on stdout), an exit code from the
error's class, no traceback.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
from pathlib import Path
from typing import Any

import click

from weightsmith._version import __version__
from weightsmith.errors import DISK_HINT, InterruptedRunError, QualityGateError, ResourceError, WeightsmithError

_NOT_VERBS = {"app", "integrity", "options", "output", "produce", "verified"}

EPILOG = """Exit codes: 0 ok, 1 failure, 2 usage, 3 integrity, 4 unsafe input refused, 5 quality gate failed,
6 not enough disk or memory, 7 not found or no access, 8 a name stands for another repository or owner than it did,
130 interrupted."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Verbs(click.Group):
    """A group whose commands are the modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every verb, by name."""
        folder = str(Path(__file__).parent)
        names = [module.name.strip("_") for module in pkgutil.iter_modules([folder])]
        return sorted(name for name in names if name not in _NOT_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb; None for an unknown one."""
        if cmd_name not in self.list_commands(ctx):
            return None
        # `list` and `eval` would shadow builtins inside the package, so their files end in an underscore.
        for module in (cmd_name, f"{cmd_name}_"):
            if (Path(__file__).parent / f"{module}.py").exists():
                command: click.Command = importlib.import_module(f"weightsmith.cli.{module}").command
                return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with a suggestion for a mistyped verb."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None


@click.command(cls=Verbs, epilog=EPILOG, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="weightsmith")
def cli() -> None:
    """Pull, convert, quantize, verify and catalog open model weights.

    A SOURCE is a catalog name (name or name:tag), a path, a name from registry.yaml, or a URL: hf://org/repo[@revision],
    pypi://package[==version], https://...
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _interrupt)
    code = run(sys.argv[1:] if args is None else args)
    gc.freeze()  # or the interpreter searches all that numba and torch have made for garbage on its way out
    sys.exit(code)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def run(args: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        code = cli.main(args=args, prog_name="weightsmith", standalone_mode=False)
        sys.stdout.flush()
        if isinstance(code, int):  # of click.exceptions.Exit: a verb that has told its result and why it failed
            return code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _tell(InterruptedRunError("interrupted", hint="Nothing unfinished is visible; run it again."), args)
    except WeightsmithError as error:
        return _tell(error, args)
    except MemoryError:
        return _tell(ResourceError("out of memory", hint="Close other programs or use a smaller model."), args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; not our failure
        return 0
    except OSError as error:
        return _tell(_from_os(error), args)
    return 0


def _from_os(error: OSError) -> WeightsmithError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError("the disk is full", path=error.filename, hint=DISK_HINT)
    return WeightsmithError(error.strerror or str(error), path=error.filename)


def _tell(error: WeightsmithError, args: list[str]) -> int:
    click.echo(f"error: {error}", err=True)
    # A missed gate has already printed its whole result.
    if "--json" in args and not isinstance(error, QualityGateError):
        with contextlib.suppress(BrokenPipeError):
            click.echo(json.dumps({"error": error.told()}, indent=2))
    return error.exit_code

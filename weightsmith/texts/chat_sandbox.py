"""The process that runs a chat template: a request as JSON on stdin, the text as JSON on stdout. See `chat`.

Exit 0 with the text, 1 with a line on stderr when the template refuses, 2 when it wants too much. It is run by path
with `python -I`, so it imports nothing of this project.
"""

import contextlib
import json
import sys

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

with contextlib.suppress(ImportError):  # Windows: the parent's own clock is left
    import resource

MAX_TEXT = 256 << 20
MAX_MEMORY = 2 << 30


class RefusedError(Exception):
    """A template called raise_exception."""


def _refuse(message: object) -> None:
    raise RefusedError(str(message))


def _limit(seconds: int) -> None:
    if "resource" not in globals():
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    except (OSError, ValueError):
        return


def main() -> int:
    """Render the request's chats one after the other."""
    request = json.loads(sys.stdin.buffer.read())
    _limit(int(sys.argv[1]))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    tokens = {name: request[name] for name in ("bos_token", "eos_token")}
    pieces, size = [], 0
    try:
        template = environment.from_string(request["template"])
        for messages in request["chats"]:
            for piece in template.generate(messages=messages, add_generation_prompt=False, tools=None, **tokens):
                size += len(piece)
                if size > MAX_TEXT:
                    sys.stderr.write("it wrote more than 256 MB\n")
                    return 2
                pieces.append(piece)
    except (jinja2.TemplateError, RefusedError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}".replace("\n", " ") + "\n")
        return 1
    except (MemoryError, RecursionError) as error:
        sys.stderr.write(f"{type(error).__name__}\n")
        return 2
    sys.stdout.write(json.dumps({"text": "".join(pieces)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

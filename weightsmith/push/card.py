"""The model card that a pushed entry gets: README.md with front matter, made of what the catalog knows and no more.

    license, license_name     the recorded licence, as the hub spells it, else "other" with its name
    base_model                the nearest ancestor that was pulled from a repository; base_model_relation: quantized
    library_name, tags        by the container

The body says what it was made from (commit, digest), by which recipe, with which calibration text; the hash of every
file; what was measured of it; and how to run and check it. It is a function of records: no time, no path, no host but
the hub's, no name of a machine. It claims nothing that was not measured or hashed.

Names and texts of records may come from somebody's bundle: what is printed from them is cut, and cannot end a cell, a
code span or the front matter. Scalars of the front matter are JSON strings, which YAML 1.2 reads as they are.

Ref: huggingface.co/docs/hub/model-cards (metadata), modelcard.md of hub-docs.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightsmith._version import __version__
from weightsmith.errors import UsageError
from weightsmith.provenance.sources import commit_of, purl
from weightsmith.sources.source import check_repo
from weightsmith.store import Entry

_HUB = "https://huggingface.co"
_LIBRARY = {"gguf": "gguf", "meta": None, "mistral": "mistral-common", "grok1": None, "grok2": None}
_TAGS = {"bnb": "bitsandbytes", "compressed_tensors": "compressed-tensors"}
_FULL = {"F64", "F32", "F16", "BF16"}
# Identifiers that the hub takes for `license`; everything else is "other" with a name.
_LICENCES = {
    *("apache-2.0", "mit", "openrail", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0"),
    *("isc", "unlicense", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "unknown"),
}
_MEASURES = (
    ("kld_mean", "mean KL divergence, nats per token", "kld_stderr"),
    ("kld_99", "99th percentile of KL divergence, nats", None),
    ("ratio", "perplexity ratio to the original", "ratio_stderr"),
    ("perplexity", "perplexity", None),
    ("original_perplexity", "perplexity of the original", None),
    ("top1", "same top token, share", "top1_stderr"),
    ("tokens", "tokens scored", None),
)


def card(entry: Entry, chain: Sequence[Entry], *, repo: str, endpoint: str) -> str:
    """The README.md of `entry` for `repo` on the hub at `endpoint`. chain: its ancestors, nearest first."""
    blocks = [
        _front(entry, chain, endpoint),
        f"# {_text(repo.rpartition('/')[2])}",
        _made(entry, chain, endpoint),
        _about(entry),
        "## Files\n\n" + _rows(("file", "bytes", "SHA-256"), _files(entry)),
        "## Measured\n\n" + _measured(entry),
        "## How to run it\n\n" + _run(entry, repo),
        "## How to check it\n\n" + _check(entry, chain, repo, endpoint),
    ]
    return "\n\n".join(blocks) + "\n"


def _front(entry: Entry, chain: Sequence[Entry], endpoint: str) -> str:
    found: dict[str, Any] = {}
    licence = entry.licence
    if licence and licence.casefold() in _LICENCES:
        found["license"] = licence.casefold()
    elif licence:
        found |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.casefold()).strip("-")[:80]}
        texts = [file.path for file in entry.files if re.fullmatch(r"LICEN[CS]E(\.txt|\.md)?", file.path)]
        found |= {"license_link": texts[0]} if texts else {}
    base = next((one for one in chain if _on(one, endpoint)), None)
    if base is not None:
        found["base_model"] = str(base.origin["repo"])
        if entry.container == "gguf" or entry.type not in _FULL:
            found["base_model_relation"] = "quantized"
    library = _LIBRARY.get(entry.container, "transformers")
    found |= {"library_name": library} if library else {}
    found |= {"pipeline_tag": "text-generation"}
    tags = [_TAGS.get(entry.container, entry.container), entry.type.lower(), "weightsmith"]
    found["tags"] = [tag for tag in dict.fromkeys(tags) if re.fullmatch(r"[a-z0-9][a-z0-9._-]*", tag)]
    lines = [f"{key}: {json.dumps(value)}" for key, value in found.items() if not isinstance(value, list)]
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in found["tags"])]
    return "\n".join(["---", *lines, "---"])


def _on(entry: Entry, endpoint: str) -> bool:
    """Whether `entry` was pulled from a repository that is known where this card is read."""
    origin = entry.origin
    if origin.get("kind") != "hf" or origin.get("endpoint") not in (None, _HUB, endpoint):
        return False
    try:
        check_repo(str(origin.get("repo")), entry.ref)
    except UsageError:
        return False
    return True


def _made(entry: Entry, chain: Sequence[Entry], endpoint: str) -> str:
    root = chain[-1] if chain else entry
    where = _place(root, endpoint)
    if entry.parent is None:
        return f"A copy of {where or 'a checkpoint that has no public address'}, kept and pushed by weightsmith."
    source = where if chain and root.parent is None and where is not None else "another checkpoint"
    digest = f" (digest {_code(root.digest)})" if chain else ""
    return f"Made by weightsmith from {source}{digest}. This card says what was done, and what was measured of it."


def _place(root: Entry, endpoint: str) -> str | None:
    """Where the world finds the original, as Markdown; never a path or a host of somebody's own."""
    commit, repo = commit_of(root), root.origin.get("repo")
    if _on(root, endpoint) and commit is not None:
        at = root.origin.get("endpoint") or _HUB
        return f"[{_text(str(repo))}]({at}/{repo}/tree/{commit}) at commit {_code(commit)}"
    return _code(found) if (found := purl(root)) is not None else None


def _about(entry: Entry) -> str:
    recipe = entry.recipe or {}
    rows: list[tuple[str, Any]] = [("format", entry.container), ("type", entry.type), ("bytes", f"{entry.nbytes:,}")]
    rows += [("digest", entry.digest), ("made from digest", entry.parent)]
    rows += [("weightsmith", recipe.get("version")), ("arithmetic version", recipe.get("arithmetic"))]
    rows += [(name, value) for name, value in recipe.items() if name not in ("tool", "version", "arithmetic")]
    flat: list[tuple[str, Any]] = []
    for name, value in rows:
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        flat += [(f"{name} {key}".strip().replace("_", " "), one) for key, one in inner]
    cells = [(_text(name), _code(_plain(value))) for name, value in flat if value is not None]
    return _rows(("", ""), cells) + f"\n\nWritten by weightsmith {__version__}."


def _files(entry: Entry) -> list[tuple[str, str, str]]:
    files = sorted(entry.files, key=lambda file: file.path)
    return [(_code(file.path), f"{file.size:,}", _code(file.sha256)) for file in files]


def _measured(entry: Entry) -> str:
    found = [item for item in entry.evaluations if item.get("kind") == "measurement"]
    if not found:
        return "Nothing was measured of these files."
    item = found[-1]
    rows = []
    for name, said, error in _MEASURES:
        value, spread = item.get(name), item.get(error or "")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            more = f" +- {spread:.2g}" if isinstance(spread, (int, float)) else ""
            rows.append((said, f"{value:,}" if isinstance(value, int) else f"{value:.6g}{more}"))
    key = item.get("key")
    how = key if isinstance(key, dict) else {}
    names = {"against": "original", "text": "text", "ctx": "tokens per window", "convention": "windows as in"}
    rows += [(said, _code(_plain(how[name]))) for name, said in names.items() if how.get(name) is not None]
    return _rows(("measure", "value"), rows) + "\n\nOn that text alone; other texts give other numbers."


def _run(entry: Entry, repo: str) -> str:
    ggufs = sorted(file.path for file in entry.files if file.path.endswith(".gguf"))
    if entry.container == "gguf" and ggufs:
        lines = [f"llama-cli --hf-repo {repo} --hf-file {shlex.quote(ggufs[0])}"]
    elif _LIBRARY.get(entry.container, "transformers") == "transformers":
        lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{repo}")']
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{repo}")']
    else:
        lines = [f"weightsmith pull hf://{repo}"]
    return _block(lines)


def _check(entry: Entry, chain: Sequence[Entry], repo: str, endpoint: str) -> str:
    ggufs = sorted(file.path for file in entry.files if file.path.endswith(".gguf"))
    include = f" --include {shlex.quote(ggufs[0] if len(ggufs) == 1 else '*.gguf')}" if ggufs else ""
    lines = [f"weightsmith pull hf://{repo}{include}"]
    if entry.parent is not None:
        original = f"hf://{chain[-1].origin['repo']}" if chain and _on(chain[-1], endpoint) else "ORIGINAL"
        lines += [f"weightsmith audit {shlex.quote(ggufs[0] if ggufs else 'FOLDER')} --against {original}"]
    said = (
        "The first checks every hash that the hub lists, the second whether rounding explains every weight. They say\n"
        "which files these are, and what they can have been made from. Whether the model is any good no hash says."
    )
    return f"{_block(lines)}\n\n{said}"


def _block(lines: Iterable[str]) -> str:
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _text(value: str) -> str:
    """`value` as text that is no Markdown and ends no cell."""
    shown = "".join(c for c in value if c.isprintable())[:300].replace("`", "'")
    return re.sub(r"([\\*\[\]<>|#&])", r"\\\1", shown)


def _code(value: str) -> str:
    """`value` as a code span."""
    shown = "".join(c for c in value if c.isprintable())[:600].replace("`", "'").replace("|", "/")
    return f"`{shown}`"

"""How the catalog's verbs behave when it is large: synthetic entries, each verb a whole process.

    python -m benchmarks.catalog_size [--entries 10000] [--tags 4] [--times 5]

Every model has an original (two shards, a tokenizer, an origin) and tags made from it, with records as `pull` and
`quantize` write them; weights are the smallest file that opens, since
none of these verbs reads more than a header. The first `list` of an untouched
catalog reads every record; it is timed by itself, with the index removed before each run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import machine, median, repeat, run_checked
from weightsmith import formats, index, oci, store

_TYPES = ("q4_k_m", "q8_0", "q6_k", "q5_k_m", "q3_k_m", "q2_k", "iq4_xs")


def fill(home: Path, entries: int, tags: int, gguf: bytes) -> None:
    """Write `entries` entries below `home`, `tags` to a model."""
    for number in range(entries // tags):
        name = f"model-{number:05d}"
        original = _original(home, name, gguf)
        _keep(original, gguf)
        for position in range(tags - 1):
            _keep(_derived(original, _TYPES[position % len(_TYPES)], position, gguf), gguf)
    with store.locked(home / "models" / ".lock"):
        oci.sync(home)


def _original(home: Path, name: str, gguf: bytes) -> store.Entry:
    files = (
        store.File("config.json", 651, _sha(name, "config")),
        store.File("model.gguf", len(gguf), hashlib.sha256(gguf).hexdigest()),
        store.File("tokenizer.json", 17_210_000, _sha(name, "tokenizer")),
        store.File("tokenizer_config.json", 51_000, _sha(name, "settings")),
    )
    commit = _sha(name, "commit")[:40]
    origin = {"kind": "hf", "source": f"hf://org/{name}@{commit}", "repo": f"org/{name}", "commit": commit}
    origin |= {"revision": "main", "endpoint": "https://huggingface.co", "licence": "apache-2.0", "gated": False}
    origin |= {"asked": [f"hf://org/{name}", ""]}
    return store.Entry(
        name=name,
        tag="original",
        folder=home / "models" / name / "original",
        container="gguf",
        type="BF16",
        files=files,
        digest=store.digest_of(files),
        created="2026-11-24T10:00:00+00:00",
        origin=origin,
        licence="apache-2.0",
    )


def _derived(original: store.Entry, kind: str, position: int, gguf: bytes) -> store.Entry:
    tag = f"{kind}{position // len(_TYPES) or ''}"
    files = (
        store.File(f"{original.name}-{tag}.gguf", len(gguf), hashlib.sha256(gguf).hexdigest()),
        store.File("note.txt", 1, _sha(original.name, tag)),
    )
    gate = {"kind": "gate", "gate": "close", "passed": True, "missed": [], "aliases": ["prod"], "when": "2026-11-24"}
    return replace(
        original,
        tag=tag,
        folder=original.folder.with_name(tag),
        type=kind.upper(),
        files=files,
        digest=store.digest_of(files),
        origin={},
        parent=original.digest,
        parent_ref=original.ref,
        recipe={"tool": "weightsmith", "version": "0.1", "target": f"gguf:{kind.upper()}", "effort": "normal"},
        evaluations=(gate, gate | {"gate": "small"}),
    )


def _keep(entry: store.Entry, gguf: bytes) -> None:
    entry.folder.mkdir(parents=True)
    for file in entry.files:
        (entry.folder / file.path).write_bytes(gguf if file.path.endswith(".gguf") else b"")
        os.truncate(entry.folder / file.path, file.size)
    (entry.folder / store.RECORD).write_text(store.record_text(entry))


def _sha(*words: str) -> str:
    return hashlib.sha256("/".join(words).encode()).hexdigest()


def _tiny_gguf(folder: Path) -> bytes:
    """The smallest file that `show` opens."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    formats.open_reader(folder / "tiny.gguf").close()
    return (folder / "tiny.gguf").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--tags", type=int, default=4)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="catalog-") as name:
        home, log = Path(name) / "home", Path(name) / "log"
        fill(home, options.entries, options.tags, _tiny_gguf(Path(name)))
        env = {"WEIGHTSMITH_HOME": str(home)}
        last = f"model-{options.entries // options.tags - 1:05d}"
        verbs = {
            "--version": ["--version"],
            "list": ["list"],
            "list --json": ["list", "--json"],
            "list --tree": ["list", "--tree"],
            "list 'model-000*' --sort size": ["list", "model-000*", "--sort", "size"],
            "list, no index": ["list"],
            "show": ["show", f"{last}:q8_0"],
            "lineage": ["lineage", f"{last}:q8_0"],
            "tag MODEL prod": ["tag", f"{last}:q8_0", "prod"],
            "tag": ["tag"],
            "du": ["du"],
            f"du {last}": ["du", last],
        }

        def contestant(title: str):  # type: ignore[no-untyped-def]
            def go():  # type: ignore[no-untyped-def]
                if title == "list, no index":
                    (home / "models" / index.NAME).unlink()
                return run_checked([sys.executable, "-m", "weightsmith", *verbs[title]], log, env=env)

            return go

        runs = repeat(options.times, {title: contestant(title) for title in verbs}, lambda: None)
    count = f"{options.entries} entries, {options.entries // options.tags} models"
    print(f"{machine()}; {count}; {options.times} runs each, interleaved; medians\n")
    print("| verb | seconds | of all cores | peak RSS MB |\n|---|---|---|---|")
    for title, all_runs in runs.items():
        middle = median(all_runs)
        print(f"| {title} | {middle.seconds:.2f} | {middle.cpu:.2f} | {middle.peak_rss / 1e6:.0f} |")


if __name__ == "__main__":
    main()

"""`weightsmith diff`: what differs between two checkpoints."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from weightsmith.cli.options import common, pickle_option, source_argument
from weightsmith.cli.output import emit, table

if TYPE_CHECKING:
    from weightsmith.difference import Difference


@click.command("diff")
@source_argument("a")
@source_argument("b")
@click.option("--headers", is_flag=True, help="Compare shapes and types only, do not read the weights.")
@click.option(
    "--all", "every", is_flag=True, help="One line for every tensor, not one for the same tensor of all layers."
)
@click.option("--exit-code", is_flag=True, help="Exit with 1 if anything differs.")
@pickle_option
@common
def command(a: str, b: str, headers: bool, every: bool, exit_code: bool, allow_pickle: bool, as_json: bool) -> None:
    """Compare A and B: configuration, tokenizer, chat template, and tensors by shape, type and bytes.

    Works across containers: an F16 GGUF equals the F16 safetensors that it was made from.
    """
    from weightsmith import formats
    from weightsmith.catalog import Catalog
    from weightsmith.difference import difference
    from weightsmith.locate import locate

    catalog = Catalog()
    one = formats.open_reader(locate(a, catalog).path, allow_pickle=allow_pickle)
    try:
        two = formats.open_reader(locate(b, catalog).path, allow_pickle=allow_pickle)
        try:
            found = difference(one, two, hashes=not headers)
        finally:
            two.close()
    finally:
        one.close()
    result = {"equal": found.equal, "same_tensors": found.same_tensors, "same_values": found.same_values}
    result["not_read"] = found.unhashed
    emit(result | {"changes": [asdict(change) for change in found.changes]}, _text(found, every), as_json=as_json)
    if exit_code and not found.equal:
        raise click.exceptions.Exit(1)


def _text(found: Difference, every: bool) -> str:
    told: Counter[tuple[str, str, str, str]] = Counter()
    for change in found.changes:
        name = change.name if every else re.sub(r"\.\d+\.", ".*.", change.name)
        left, right = ("-" if side is None else str(side) for side in (change.a, change.b))
        if not every and left.startswith("sha256") and change.what == "tensor":
            left = right = "other bytes"
        told[change.what, name, left, right] += 1
    rows = [(what, name, count if count > 1 else "", a, b) for (what, name, a, b), count in told.items()]
    same = f"{found.same_tensors} tensors are the same in shape, type and bytes."
    if found.same_values:
        same += f" {found.same_values} hold the same values in another float type."
    if found.unhashed:
        same = f"{found.unhashed} tensors are the same in shape and type; their bytes were not read."
    return f"{table(rows, ['what', 'name', 'count', 'a', 'b'])}\n\n{same}" if rows else f"Nothing differs. {same}"

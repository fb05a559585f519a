"""`weightsmith show`: what a checkpoint is, from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import click

from weightsmith.cli.options import common, pickle_option, source_argument
from weightsmith.cli.output import count_text, emit, fields, size_text, table
from weightsmith.errors import WeightsmithError
from weightsmith.types import Reader


@click.command("show")
@source_argument()
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--metadata", is_flag=True, help="List every metadata key.")
@pickle_option
@common
def command(source: str, tensors: bool, metadata: bool, allow_pickle: bool, as_json: bool) -> None:
    """Show what SOURCE holds: model, types, sizes, bits per weight, lineage.

    Reads headers only, works on any readable file, in the catalog or not.
    """
    from weightsmith import formats, oci
    from weightsmith.aliases import evidence, held_back
    from weightsmith.catalog import Catalog
    from weightsmith.family import template_change
    from weightsmith.locate import locate

    catalog = Catalog()
    located = locate(source, catalog)
    reader = formats.open_reader(located.path, allow_pickle=allow_pickle)
    try:
        result = describe(reader, tensors=tensors, metadata=metadata)
    finally:
        reader.close()
    if located.entry is not None:
        chain = catalog.lineage(located.entry.ref)
        result["catalog"] = {
            "ref": located.entry.ref,
            "digest": located.entry.digest,
            "origin": located.entry.origin,
            "lineage": [entry.ref for entry in chain],
            "chat_template_change": template_change(chain[0], chain[1] if len(chain) > 1 else None),
            "licence": located.entry.licence,
            "alias_of": located.entry.alias_of,
            "evaluations": list(located.entry.evaluations),
            "gates": dict(evidence(located.entry)),
            "attached": [asdict(one) for one in oci.attached(catalog.home, located.entry)],
            "held_back": held_back(catalog, located.entry) if located.entry.alias_of else [],
        }
    emit(result, _text(result), as_json=as_json)


def describe(reader: Reader, *, tensors: bool, metadata: bool) -> dict[str, Any]:
    """Everything `show` knows about an open checkpoint, as plain values."""
    from weightsmith.formats.findings import findings

    infos = list(reader.native_infos().values())
    nbytes, weights = sum(info.nbytes for info in infos), _parameters(reader)
    result: dict[str, Any] = {
        "path": str(reader.path),
        "container": reader.container,
        "files": len(reader.files()),
        "tensors": len(infos),
        "parameters": weights,
        "tensor_bytes": nbytes,
        "file_bytes": sum(file.stat().st_size for file in reader.files()),
        "bpw": round(8 * nbytes / max(1, weights), 4),
        "types": _types(infos),
        "model": _model(reader),
        "chat_template": _template(reader),
        "findings": [asdict(one) for one in findings(reader)],
    }
    if tensors:
        result["tensor_list"] = [
            {"name": info.name, "shape": list(info.shape), "type": info.codec, "bytes": info.nbytes} for info in infos
        ]
    if metadata:
        result["metadata"] = {key: _short(value) for key, value in reader.metadata().items()}
    return result


def _template(reader: Reader) -> dict[str, Any] | None:
    from weightsmith.formats.tokenizer.template import template_of, template_sha256

    try:
        template = template_of(reader)
    except WeightsmithError as error:
        return {"sha256": None, "unreadable": error.message}
    return None if template is None else {"sha256": template_sha256(template), "characters": len(template)}


def _parameters(reader: Reader) -> int:
    """Weights of the model; of a packed container that is not the number of stored words."""
    try:
        return sum(info.n_weights for info in reader.infos().values())
    except WeightsmithError:
        return sum(info.n_weights for info in reader.native_infos().values())


def _types(infos: list[Any]) -> dict[str, dict[str, int]]:
    count, nbytes, weights = Counter[str](), Counter[str](), Counter[str]()
    for info in infos:
        count[info.codec] += 1
        nbytes[info.codec] += info.nbytes
        weights[info.codec] += info.n_weights
    return {name: {"tensors": count[name], "weights": weights[name], "bytes": nbytes[name]} for name in sorted(count)}


def _model(reader: Reader) -> dict[str, Any]:
    """The configuration, or why there is none: `show` also serves files of families that cannot be converted."""
    try:
        config = reader.config
    except WeightsmithError as error:
        return {"unsupported": error.message}
    names = ["family", "name", "hidden_size", "intermediate_size", "n_layers", "n_heads", "n_kv_heads", "head_dim"]
    names += ["vocab_size", "max_position_embeddings", "rope_theta", "tie_word_embeddings", "sliding_window", "dtype"]
    model = {name: getattr(config, name) for name in names}
    if config.n_experts:
        model["experts"] = f"{config.n_experts_used} of {config.n_experts} for each token"
        model |= _experts(reader, config.n_experts_used / config.n_experts)
    if config.rope_scaling is not None:
        model["rope_scaling"] = f"{config.rope_scaling.kind}, factor {config.rope_scaling.factor:g}"
    return model


def _experts(reader: Reader, used: float) -> dict[str, Any]:
    """What lies in experts, and how much of the model a token passes through; nothing if tensors and keys disagree."""
    from weightsmith.formats.archs import expert_of

    try:
        infos = reader.infos().values()
    except WeightsmithError:
        return {}
    inside = [info for info in infos if expert_of(info.name) is not None]
    # Packed linears are handed out as floats; what they take lies under the experts' names. A stack has no such name.
    stored = [info for info in reader.native_infos().values() if expert_of(info.name) is not None]
    weights = sum(info.n_weights for info in inside)
    active = sum(info.n_weights for info in infos) - round(weights * (1 - used))
    return {
        "expert_parameters": weights,
        "expert_bytes": sum(info.nbytes for info in stored or inside),
        "active_parameters": active,
    }


def _short(value: Any) -> Any:
    """Long arrays and texts cut, so that a vocabulary does not flood the terminal."""
    if isinstance(value, str) and len(value) > 200:
        return value[:200] + f"... ({len(value)} characters)"
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ndarray":
        return (
            list(value)
            if len(value) <= 8
            else f"[{', '.join(repr(v) for v in list(value[:4]))}, ... {len(value)} values]"
        )
    return value


def _template_text(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return found.get("unreadable") or f"sha256 {found['sha256']}, {found['characters']} characters"


def _counted(types: Iterable[str]) -> str:
    """How many statements of each type hang there."""
    short = (kind.removeprefix("application/").removeprefix("vnd.").removesuffix("+json") for kind in types)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(short).items()))


def _text(result: dict[str, Any]) -> str:
    model = dict(result["model"])
    for name, text in (
        ("expert_parameters", count_text),
        ("active_parameters", count_text),
        ("expert_bytes", size_text),
    ):
        if name in model:
            model[name] = text(model[name])
    head = {
        "path": result["path"],
        "container": f"{result['container']}, {result['files']} file(s), {size_text(result['file_bytes'])}",
        "parameters": f"{count_text(result['parameters'])} in {result['tensors']} tensors",
        "bits per weight": f"{result['bpw']:.3f}",
        "chat template": _template_text(result["chat_template"]),
    }
    blocks = [fields(head | {name.replace("_", " "): value for name, value in model.items()})]
    if "catalog" in result:
        known = result["catalog"]
        origin = ", ".join(f"{key} {value}" for key, value in known["origin"].items() if value is not None)
        blocks.append(
            fields(
                {
                    "catalog": known["ref"],
                    "digest": known["digest"],
                    "origin": origin,
                    "lineage": " <- ".join(known["lineage"]),
                    "changed": known["chat_template_change"],
                    "licence": known["licence"],
                    "alias of": known["alias_of"],
                    **{f"gate {name}": found for name, found in known["gates"].items()},
                    "held back": "; ".join(known["held_back"]),
                    "attached": _counted(one["artifact_type"] for one in known["attached"]),
                }
            )
        )
    if result["findings"]:
        told = [f"{one['file']}: {one['key'] and one['key'] + ' = '}{one['value']}" for one in result["findings"]]
        blocks.append("\n  ".join(["Other programs may run or fetch code by these; weightsmith does not:", *told]))
    rows = [
        (name, n["tensors"], count_text(n["weights"]), size_text(n["bytes"])) for name, n in result["types"].items()
    ]
    blocks.append(table(rows, ["type", "tensors", "weights", "bytes"]))
    if "tensor_list" in result:
        rows = [(t["name"], "x".join(map(str, t["shape"])), t["type"], t["bytes"]) for t in result["tensor_list"]]
        blocks.append(table(rows, ["tensor", "shape", "type", "bytes"]))
    if "metadata" in result:
        blocks.append(fields({key: repr(value) for key, value in result["metadata"].items()}))
    return "\n\n".join(blocks)

"""Where a safetensors folder says how it is quantized: quantization_config of config.json, or an older file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightsmith.errors import WeightsmithError
from weightsmith.formats.safetensors.config import CONFIG_NAME, MAX_CONFIG, read_raw
from weightsmith.formats.safetensors.index import is_checkpoint
from weightsmith.formats.safetensors.strictjson import read_object
from weightsmith.safename import resolve_inside

OLD_NAME = "quantize_config.json"
KEY = "quantization_config"
EARLIER_KEY = "compression_config"  # of compressed-tensors, before its settings moved under KEY


def settings_of(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The quantization settings of a folder and the file they stand in, None if there are none."""
    path = resolve_inside(folder, CONFIG_NAME)
    raw = read_raw(path)
    for key in (KEY, EARLIER_KEY):
        found = raw.get(key)
        if isinstance(found, dict):
            return found, path
    if not (folder / OLD_NAME).exists():
        return None
    path = resolve_inside(folder, OLD_NAME)
    return read_object(path, limit=MAX_CONFIG), path


def method_of(path: Path) -> str | None:
    """The quant_method of a safetensors folder: "gptq" where quantize_config.json names none, None if it has none."""
    if not path.is_dir() or not is_checkpoint(path):
        return None
    try:
        found = settings_of(path)
    except WeightsmithError:
        return None  # whoever opens it will say what is wrong
    if found is None:
        return None
    raw, where = found
    method = raw.get("quant_method") or ("gptq" if where.name == OLD_NAME else None)
    return method.lower() if isinstance(method, str) else None

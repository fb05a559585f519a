"""llama.cpp with a model's weights as they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest


def llama(path: Path, **options: Any) -> Any:
    """A `llama_cpp.Llama` that repacks no weights: for AMX that crashes it (ggml-org/llama.cpp issue 20824). Skips the
    test where llama-cpp-python is not installed."""
    module = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    default = module.llama_model_default_params

    def plain() -> Any:
        params = default()
        params.use_extra_bufts = False
        return params

    with mock.patch.object(module.llama_cpp, "llama_model_default_params", plain):
        return module.Llama(str(path), verbose=False, **options)

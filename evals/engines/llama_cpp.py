"""The engine that most GGUF files meet in the end: llama.cpp itself, through llama-cpp-python's low-level calls.

Float rounding is kept close to the torch engine's: float32 KV cache, no flash attention, CPU only. What remains is
llama.cpp's own arithmetic: with quantized weights, unless it was built with BLAS, it rounds activations to 8 bits in
every matrix product, which moves a perplexity by up to 2 %. F32 and F16 files agree to rounding.

One window at a time, logits only where they are scored. llama.cpp maps the file, so its whole size may count as memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import IntegrityError, ResourceError, UnsupportedError, UsageError
from weightsmith.evals.engines import Tick, cuts
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.windows import Windows
from weightsmith.types import Reader

NAME = "llama.cpp"

_quiet: list[object] = []  # the log callback must outlive every call into the library


def _library() -> ModuleType:
    try:
        import llama_cpp  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise UnsupportedError(
            "the llama.cpp engine is not installed", hint="Install it with: pip install weightsmith[llama]"
        ) from error
    if not _quiet:
        _quiet.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
        llama_cpp.llama_log_set(_quiet[0], None)
    library: ModuleType = llama_cpp
    return library


def _open(library: Any, reader: Reader, ctx: int, ruler: Ruler, stack: ExitStack) -> tuple[Any, Any]:
    """Load the model and make a context of one sequence, both freed with `stack`."""
    params = library.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # weights repacked for AMX crash it (its issue 20824), and compute otherwise
    model = library.llama_model_load_from_file(str(reader.files()[0]).encode(), params)
    if not model:
        raise UnsupportedError("llama.cpp cannot load this file", path=reader.path)
    stack.callback(library.llama_model_free, model)
    wanted = library.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = ctx
    wanted.n_ubatch = min(ctx, 512)
    wanted.n_seq_max = 1
    wanted.type_k = wanted.type_v = library.GGML_TYPE_F32
    wanted.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
    wanted.offload_kqv = False
    if ruler.threads is not None:
        wanted.n_threads = wanted.n_threads_batch = ruler.threads
    context = library.llama_init_from_model(model, wanted)
    if not context:
        raise ResourceError(f"llama.cpp cannot make a context of {ctx} tokens", path=reader.path)
    stack.callback(library.llama_free, context)
    return model, context


def _batch(library: Any, windows: Windows, stack: ExitStack) -> Any:
    """A batch for one window: positions, one sequence, and logits asked for where they are scored."""
    ctx = windows.tokens.shape[1]
    batch = library.llama_batch_init(ctx, 0, 1)
    stack.callback(library.llama_batch_free, batch)
    batch.n_tokens = ctx
    for position in range(ctx):
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = windows.first <= position < windows.last
    return batch


def logits(reader: Reader, windows: Windows, ruler: Ruler, tick: Tick) -> Iterator[Tensor]:
    """Logits of all scored predictions; see `weightsmith.evals.engines`.

    Raises UsageError (no GGUF, or a device other than the CPU), UnsupportedError (not installed, or the file does not
    load), ResourceError (no memory for the context), IntegrityError (evaluation fails).
    """
    if reader.container != "gguf":
        raise UsageError(f"the llama.cpp engine runs GGUF files, and this is {reader.container}", path=reader.path)
    if ruler.graph is not None:
        raise UsageError("the llama.cpp engine follows its own graph", hint="Leave --graph out.")
    if ruler.device != "cpu":
        raise UsageError(f"the llama.cpp engine runs on the CPU here, not on {ruler.device!r}")
    library = _library()
    n_layers, vocab_size = reader.config.n_layers, reader.config.vocab_size
    count = windows.last - windows.first
    with ExitStack() as stack:
        model, context = _open(library, reader, windows.tokens.shape[1], ruler, stack)
        found = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        if found != vocab_size:
            raise IntegrityError(f"llama.cpp sees {found} tokens, expected {vocab_size}", path=reader.path)
        batch = _batch(library, windows, stack)
        pieces = cuts(windows, vocab_size, ruler)
        for window in windows.tokens:
            ids = window.astype(np.int32)
            ctypes.memmove(batch.token, ids.ctypes.data, ids.nbytes)
            library.llama_memory_clear(library.llama_get_memory(context), True)
            status = library.llama_decode(context, batch)
            if status:
                raise IntegrityError(f"llama.cpp failed to evaluate a window (status {status})", path=reader.path)
            # The rows are llama.cpp's own buffer, overwritten by the next window.
            every = np.ctypeslib.as_array(library.llama_get_logits(context), shape=(count, vocab_size))
            tick(n_layers)
            for piece in pieces:
                yield torch.from_numpy(every[piece].copy())

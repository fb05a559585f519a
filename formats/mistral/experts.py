"""Mixtral's experts in Mistral's original forms.

| form | experts and router of layers.N |
|---|---|
| mistral-inference, 8x22B | feed_forward.experts.E.{w1,w2,w3}.weight, feed_forward.gate.weight |
| first 8x7B, consolidated.00.pt to 07.pt | block_sparse_moe.{w1,w2,w3}, block_sparse_moe.gate.weight |

In the second form each file holds other tensors, whole ones, and a tensor holds the matrices of all experts as rows,
[n_experts * ffn, hidden]. w1 and w3 are (out, in) like everything else, but w2 is stored the other way round: the rows
of an expert are its inputs. params.json has Hugging Face's keys there. All of it is brought to the first form here.

Ref: mistral_inference/moe.py; convert_mixtral_weights_to_hf.py of transformers 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.consolidated.shards import Joined
from weightsmith.formats.safetensors.keys import Keys
from weightsmith.types import ModelConfig, TensorInfo

MAX_EXPERTS = 1024
STACKED = "num_local_experts"  # a key that only the first 8x7B has
_KEYS = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
}
_STACK = re.compile(r"(layers\.\d{1,4})\.block_sparse_moe\.(w[123]|gate\.weight)")


def plain(params: Keys) -> Keys:
    """`params` under Mistral's own keys, whichever they came with."""
    if STACKED not in params.raw:
        return params
    raw = {_KEYS.get(key, key): value for key, value in params.raw.items() if key not in _KEYS.values()}
    raw["moe"] = {"num_experts": raw[STACKED], "num_experts_per_tok": raw.get("num_experts_per_tok", 2)}
    found = Keys(raw, params.path)
    if raw.get("head_dim") is None:
        dim, heads = found.count("dim"), found.count("n_heads")
        if dim % heads:
            raise params.fault("num_attention_heads", heads, f"a divisor of hidden_size, {dim}")
        found = Keys({**raw, "head_dim": dim // heads}, params.path)
    return found


def experts(params: Keys) -> tuple[int, int]:
    """Experts of a layer, and how many of them a token passes through; 0 of 0 in a dense model.

    Raises UnsupportedError for a mixture of another kind than Mixtral's.
    """
    if not params.has("moe"):
        return 0, 0
    raw = params.raw["moe"]
    if not isinstance(raw, dict):
        raise params.fault("moe", raw, "an object")
    other = sorted(raw.keys() - {"num_experts", "num_experts_per_tok"})
    if other:
        text = f"moe.{str(other[0])[:40]} in {params.path.name}: a mixture of experts of another kind than Mixtral's"
        raise UnsupportedError(text, path=params.path, hint="Try the Hugging Face form of the model.")
    inner = Keys(raw, params.path)
    count = inner.count("num_experts", limit=MAX_EXPERTS)
    return count, inner.count("num_experts_per_tok", limit=count)


def unstack(tensors: Mapping[str, Joined], config: ModelConfig) -> dict[str, Joined]:
    """`tensors` by native name, every stack replaced by its experts' matrices under the names of mistral-inference.

    Raises IntegrityError for a stack of another shape than the model's.
    """
    found: dict[str, Joined] = {}
    for name, joined in tensors.items():
        match = _STACK.fullmatch(name)
        for own, part in [(name, joined)] if match is None else _parts(match, joined, config):
            if own in found:
                raise IntegrityError("is stored twice, by itself and in a stack", path=part.info.path, tensor=own)
            found[own] = part
    return found


def _parts(match: re.Match[str], joined: Joined, config: ModelConfig) -> Iterator[tuple[str, Joined]]:
    info = joined.info
    if match[2] == "gate.weight":
        yield f"{match[1]}.feed_forward.gate.weight", joined
        return
    hidden, ffn, count = config.hidden_size, config.intermediate_size, config.n_experts
    if info.shape != (count * ffn, hidden):
        expected = [count * ffn, hidden]
        raise IntegrityError(f"shape {list(info.shape)}, expected {expected}", path=info.path, tensor=info.name)
    size = info.nbytes // count
    for expert in range(count):
        block = TensorInfo(info.name, (ffn, hidden), info.codec, size, info.path, info.offset + expert * size)
        turned = match[2] == "w2"
        own = replace(block, shape=(hidden, ffn)) if turned else block
        yield f"{match[1]}.feed_forward.experts.{expert}.{match[2]}.weight", Joined(own, (block,), transposed=turned)

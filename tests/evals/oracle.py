"""The same model in transformers: the independent word on what logits should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tests.moe import stacked
from weightsmith.types import ModelConfig


def oracle(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Any:
    """A transformers model over canonical float32 tensors, eager attention, float32."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    rope_parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope_parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope_parameters |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": rope_parameters,
        "attn_implementation": "eager",
    }
    if config.family == "mistral":
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=config.sliding_window))
    elif config.family == "mixtral":
        experts = {"num_local_experts": config.n_experts, "num_experts_per_tok": config.n_experts_used}
        model = MixtralForCausalLM(MixtralConfig(**common, **experts, sliding_window=config.sliding_window))
        tensors = {
            name: value.numpy()
            for name, value in stacked({k: torch.from_numpy(v) for k, v in tensors.items()}, config.n_experts).items()
        }
    else:
        model = LlamaForCausalLM(LlamaConfig(**common, attention_bias=config.attention_bias, mlp_bias=config.mlp_bias))
    state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model.eval()

"""Rotary position embedding in its half-split form: element i of a head turns against i + d/2.

Angle of pair i at position p is p * f_i with f_i = theta^(-2i/d). "linear" scaling divides every f_i by `factor`.
"llama3" looks at the wavelength w = 2 pi / f_i against the trained length L: w < L/high keeps f_i, w > L/low divides it
by `factor`, and between the two it blends with s = (L/w - low) / (high - low): (1 - s) f_i / factor + s f_i.
"yarn" divides by `factor` what turns less than beta_slow times within L, keeps what turns more than beta_fast times,
and blends by pair number between the two pairs where that is so. Its stretching of cosines is a matter of the program
that runs the model (`grok`).

Angles are computed in float64 and stored as float32 cosines and sines: in float32, the product p * f_i alone is off by
1e-4 rad at position 2048. Ref: transformers modeling_rope_utils.py; RoFormer, arXiv 2104.09864;
YaRN, arXiv 2309.00071.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weightsmith.evals.forward.weights import Place
from weightsmith.types import ModelConfig, RopeScaling


def frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair, float64 [head_dim / 2]."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    freq = config.rope_theta ** (-pairs / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    if scaling.kind == "yarn":
        blend = _yarn_blend(config, scaling)
        return blend * freq / scaling.factor + (1 - blend) * freq
    turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)  # L / w
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * freq / scaling.factor + blend * freq


def _yarn_blend(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """How much of the factor each pair gets, from 0 for the fastest to 1 for the slowest, float64 [head_dim / 2]."""
    length, dim = scaling.original_max_position_embeddings, config.head_dim
    low, high = (
        dim * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        for beta in (scaling.beta_fast, scaling.beta_slow)
    )
    low, high = max(0, math.floor(low)), min(dim - 1, math.ceil(high))
    return ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(0.001, high - low)).clamp(0.0, 1.0)


def tables(config: ModelConfig, length: int, place: Place) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for positions [0, length), each [length, head_dim].

    The first half of the sines is negative, so that `rotate` needs no negation.
    """
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies(config)
    cos, sin = angles.cos(), angles.sin()
    both = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return both[0].to(place.device, place.dtype), both[1].to(place.device, place.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the heads x [B, heads, T, head_dim] by the tables of `tables`; a new tensor of the same shape."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, dims=-1), sin)

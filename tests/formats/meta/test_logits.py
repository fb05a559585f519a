"""The model as the vendors' own code computes it, with complex numbers on neighbouring pairs and per-rank matmuls.

Written from the equations, it shares nothing with the reader: no name map, no joining of ranks, no moving of rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.native import write_meta, write_mistral
from weightsmith import formats
from weightsmith.evals import forward

torch = pytest.importorskip("torch", reason="torch writes these files")

TOKENS = np.random.default_rng(1).integers(0, 384, (2, 24))


def turned(x: Any, theta: float) -> Any:
    """x [B, T, heads, dim]: each pair of neighbours as one complex number, turned by its position."""
    dim = x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[1]), theta ** (-torch.arange(0, dim, 2) / dim))
    pairs = torch.view_as_complex(x.unflatten(-1, (dim // 2, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def rms(x: Any, weight: Any) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def attention(rank: dict[str, Any], x: Any, prefix: str, dim: int, theta: float) -> Any:
    """One rank's share of the attention's output: its heads, its columns of wo."""
    q, k, v = ((x @ rank[f"{prefix}.{name}.weight"].T).unflatten(-1, (-1, dim)) for name in ("wq", "wk", "wv"))
    q, k = turned(q, theta), turned(k, theta)
    k, v = (side.repeat_interleave(q.shape[2] // k.shape[2], 2) for side in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / dim**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", scores, v).flatten(2) @ rank[f"{prefix}.wo.weight"].T


def logits(ranks: list[dict[str, Any]], *, dim: int, theta: float, columns: bool) -> Any:
    ranks = [{name: value.float() for name, value in rank.items()} for rank in ranks]
    tokens = torch.from_numpy(TOKENS)
    if columns:
        x = torch.cat([rank["tok_embeddings.weight"][tokens] for rank in ranks], -1)
    else:
        size = ranks[0]["tok_embeddings.weight"].shape[0]
        one_hot = torch.nn.functional.one_hot(tokens, size * len(ranks)).float()
        x = sum(one_hot[..., n * size : (n + 1) * size] @ rank["tok_embeddings.weight"] for n, rank in enumerate(ranks))
    for layer in range(2):
        p = f"layers.{layer}"
        normed = rms(x, ranks[0][f"{p}.attention_norm.weight"])
        x = x + sum(attention(rank, normed, f"{p}.attention", dim, theta) for rank in ranks)
        normed = rms(x, ranks[0][f"{p}.ffn_norm.weight"])
        for rank in ranks:
            gate, up = (normed @ rank[f"{p}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
            x = x + (torch.nn.functional.silu(gate) * up) @ rank[f"{p}.feed_forward.w2.weight"].T
    x = rms(x, ranks[0]["norm.weight"])
    return torch.cat([x @ rank["output.weight"].T for rank in ranks], -1)


def ours(folder: Path) -> Any:
    decoder = forward.load(formats.open_reader(folder, allow_pickle=True))
    tokens = torch.from_numpy(TOKENS)
    return decoder.logits(decoder.hidden(tokens).flatten(0, 1)).unflatten(0, tokens.shape)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_meta(ranks: int, columns: bool, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta", ranks=ranks, embedding_axis=int(columns), dtype="F32")
    files = [torch.load(folder / f"consolidated.{rank:02d}.pth") for rank in range(ranks)]
    expected = logits(files, dim=16, theta=10000.0, columns=columns)
    assert expected.std() > 0.5
    assert (ours(folder) - expected).abs().max() < 1e-4


def test_mistral(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path / "native", form="pth", dtype="F32")
    expected = logits([torch.load(folder / "consolidated.00.pth")], dim=24, theta=1e6, columns=False)
    assert expected.std() > 0.5
    assert (ours(folder) - expected).abs().max() < 1e-4

"""Grok's graph by each program's rules, against the equations said one position at a time, and against llama.cpp."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.grok import grok1, grok2
from tests.formats.grok.test_tokenizers import tok_json
from weightsmith import formats
from weightsmith.cli.app import run
from weightsmith.errors import UsageError
from weightsmith.evals import engines, forward
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.windows import Windows
from weightsmith.types import Reader

torch = pytest.importorskip("torch", reason="the decoder is torch's")

TOKENS = np.random.default_rng(1).integers(0, 192, (2, 40))


def rms(x: Any, weight: Any) -> Any:
    return x / torch.sqrt((x * x).mean() + 1e-5) * weight


def cap(x: Any, at: float) -> Any:
    return at * torch.tanh(x / at)


def turned(x: Any, position: int, raw: dict[str, Any], *, stretched: bool) -> Any:
    """One head at one position, pair by pair; YaRN from its paper's definition of wavelengths."""
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = raw.get("rope_theta", 10000.0) ** (-i / half)
        stretch = 1.0
        if raw.get("rope_type") == "yarn":
            low, high = (
                len(x)
                * math.log(raw["original_max_position_embeddings"] / (raw[key] * 2 * math.pi))
                / (2 * math.log(raw["rope_theta"]))
                for key in ("beta_fast", "beta_slow")
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), len(x) - 1)
            ramp = min(1.0, max(0.0, (i - low) / (high - low)))
            angle = ramp * angle / raw["scaling_factor"] + (1 - ramp) * angle
            stretch = 1 + 0.1 * math.log(raw["scaling_factor"]) if stretched else 1.0
        c, s = math.cos(angle * position) * stretch, math.sin(angle * position) * stretch
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def gelu(x: Any, graph: str) -> Any:
    if graph == "hpcai":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference(tensors: dict[str, Any], raw: dict[str, Any], graph: str, tokens: list[int]) -> Any:
    """Logits [T, V] in float64."""
    w = {name: value.double() for name, value in tensors.items()}
    heads, keys = raw["num_attention_heads"], raw["num_key_value_heads"]
    dim = raw.get("head_dim") or raw["hidden_size"] // heads
    scale = raw.get("attn_output_multiplier", dim**-0.5)
    states = [w["model.embed_tokens.weight"][t] * raw["embedding_multiplier_scale"] for t in tokens]
    for layer in range(raw["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        qs, ks, vs = [], [], []
        for at, x in enumerate(states):
            n = rms(x, w[p + "pre_attn_norm.weight"])
            q, k, v = (w[f"{p}self_attn.{name}_proj.weight"] @ n for name in "qkv")
            stretched = graph == "llamacpp"
            qs.append([turned(one, at, raw, stretched=stretched) for one in q.split(dim)])
            ks.append([turned(one, at, raw, stretched=stretched) for one in k.split(dim)])
            vs.append(v.split(dim))
        for at, x in enumerate(states):
            mixed = []
            for head in range(heads):
                own = head // (heads // keys)
                scores = torch.stack([cap(qs[at][head] @ ks[j][own] * scale, 30.0) for j in range(at + 1)])
                length = raw.get("attn_temperature_len", 0)
                if graph == "sglang" and length and at > length:
                    scores = scores * math.log2(at) / math.log2(length)
                mixed.append(sum(share * vs[j][own] for j, share in enumerate(scores.softmax(0))))
            after = rms(w[p + "self_attn.o_proj.weight"] @ torch.cat(mixed), w[p + "post_attn_norm.weight"])
            middle = x + after
            n = rms(middle, w[p + "pre_moe_norm.weight"])
            y = experts(w, p + "block_sparse_moe.", n, raw, graph)
            if raw.get("residual_moe"):
                gate, up, down = (w[f"{p}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
                y = (y + down @ (gelu(gate @ n, graph) * (up @ n))) / math.sqrt(2)
            states[at] = middle + rms(y, w[p + "post_moe_norm.weight"])
    head_ = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    found = torch.stack([head_ @ rms(x, w["model.norm.weight"]) * raw["output_multiplier_scale"] for x in states])
    final = raw.get("final_logit_softcapping")
    return cap(found, final) if final else found


def experts(w: dict[str, Any], p: str, n: Any, raw: dict[str, Any], graph: str) -> Any:
    scores = w[p + "gate.weight"] @ n
    if graph == "sglang" and raw.get("router_logit_softcapping"):
        scores = cap(scores, raw["router_logit_softcapping"])
    shares = scores.softmax(0)
    best = shares.argsort(descending=True)[:2].tolist()
    total = sum(shares[e] for e in best) if graph == "llamacpp" else 1.0
    found = 0
    for e in best:
        w1, w2, w3 = (w[f"{p}experts.{e}.{name}.weight"] for name in ("w1", "w2", "w3"))
        found = found + shares[e] / total * (w2 @ (gelu(w1 @ n, graph) * (w3 @ n)))
    return found


def ours(reader: Reader, graph: str = "", tokens: np.ndarray = TOKENS) -> Any:
    decoder = forward.load(reader, graph=graph or None)
    ids = torch.from_numpy(tokens)
    return decoder.logits(decoder.hidden(ids).flatten(0, 1)).unflatten(0, ids.shape)


def theirs(path: Path) -> Any:
    with closing(formats.open_reader(path)) as reader:
        windows = Windows(TOKENS, 0, TOKENS.shape[1], "")
        pieces = list(engines.by_name("llama.cpp").logits(reader, windows, Ruler(threads=1), lambda _: None))
        return torch.cat(pieces).unflatten(0, TOKENS.shape)


FORMS: dict[str, dict[str, Any]] = {"grok-2": {}, "grok-2 yarn": {"rope_type": "yarn"}}


@pytest.mark.parametrize("graph", ["xai", "sglang", "llamacpp", "hpcai"])
@pytest.mark.parametrize("form", ["grok-1", *FORMS])
def test_each_graph_by_its_equations(form: str, graph: str, tmp_path: Path) -> None:
    if form == "grok-1":
        tensors = grok2.write_hf(tmp_path / "in", "keyfan", dtype="float32", num_hidden_layers=1)
        raw = grok2.grok1_config("keyfan", num_hidden_layers=1, rope_theta=10000.0)
    else:
        tensors = grok2.write_grok2(tmp_path / "in", dtype="float32", num_hidden_layers=1, **FORMS[form])
        raw = grok2.grok2_config(num_hidden_layers=1, **FORMS[form])
    tokens = TOKENS[:1, :28]
    expected = reference(tensors, raw, graph, tokens[0].tolist())
    found = ours(formats.open_reader(tmp_path / "in"), graph, tokens)[0]
    assert expected.std() > 0.3
    assert (found - expected).abs().max() < 1e-4


def test_what_the_graphs_differ_in(tmp_path: Path) -> None:
    """With a dense branch every rule shows; without one the experts' share does not, and a vendor is the default."""
    grok2.write_grok2(tmp_path / "two", dtype="float32", rope_type="yarn")
    grok2.write_hf(tmp_path / "one", "hpcai", dtype="float32")
    two, one = (formats.open_reader(tmp_path / name) for name in ("two", "one"))
    logits = {graph: ours(two, graph) for graph in ("", "xai", "sglang", "llamacpp", "hpcai")}
    assert torch.equal(logits[""], logits["sglang"])
    for graph in ("xai", "llamacpp", "hpcai"):
        assert (logits[graph] - logits["sglang"]).abs().max() > 1e-3
    plain = {graph: ours(one, graph) for graph in ("", "xai", "llamacpp")}
    assert torch.equal(plain[""], plain["xai"])
    assert (plain["xai"] - plain["llamacpp"]).abs().max() < 1e-3
    with pytest.raises(UsageError, match="has no graph 'jax'"):
        ours(one, "jax")


@pytest.mark.parametrize("form", ["grok-1", *FORMS])
def test_llama_cpp_computes_the_same(form: str, tmp_path: Path) -> None:
    """llama.cpp looks GELU up in a table of half precision (2**-11 of a value), which norms and layers carry on.

    Measured on these models: 3e-4 of the logits' standard deviation in the mean.
    """
    pytest.importorskip("llama_cpp")
    if form == "grok-1":
        grok1.write_grok1(tmp_path / "in")
    else:
        grok2.write_grok2(tmp_path / "in", dtype="float32", **FORMS[form])
    path = tmp_path / "tiny.gguf"
    assert run(["convert", str(tmp_path / "in"), "--to", "gguf:F32", "-o", str(path), "--quiet", "--allow-pickle"]) == 0
    expected = theirs(path)
    found = {graph: off(ours(formats.open_reader(path), graph), expected) for graph in ("llamacpp", "xai", "sglang")}
    assert expected.std() > 0.3
    assert found["llamacpp"] < 2e-3
    if form != "grok-1":
        assert min(found["xai"], found["sglang"]) > 2e-2  # the rules matter, and only one's are llama.cpp's


def off(found: Any, expected: Any) -> float:
    """Root mean square of the difference, in standard deviations of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_quantized_files_load_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    """Here activations are rounded to 8 bits as well, so only the likeness is asked for."""
    pytest.importorskip("llama_cpp")
    for form in ("grok-1", "grok-2"):
        source, path = tmp_path / form, tmp_path / f"{form}.gguf"
        if form == "grok-1":
            grok1.write_grok1(source)
        else:
            grok2.write_grok2(source)
        command = ["quantize", str(source), "--to", f"gguf:{kind}", "-o", str(path), "--quiet", "--allow-pickle"]
        assert run(command) == 0
        expected = ours(
            formats.open_reader(source, allow_pickle=True) if form == "grok-1" else formats.open_reader(source),
            "llamacpp",
        )
        assert off(theirs(path), expected) < {"Q8_0": 0.2, "Q4_K_M": 0.6}[kind]


def test_the_graph_is_the_users_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one a file is measured by its vendor's rules; llama.cpp's are asked for by name and meet its figure."""
    pytest.importorskip("llama_cpp")
    raw = tok_json()
    grok2.write_grok2(tmp_path / "in", dtype="float32", vocab_size=raw["vocab_size"])
    (tmp_path / "in" / "tokenizer.tok.json").write_text(json.dumps(raw))
    path, text = tmp_path / "tiny.gguf", tmp_path / "text.txt"
    text.write_text("The smith tempers the blade twice. " * 40)
    assert run(["convert", str(tmp_path / "in"), "--to", "gguf:F32", "-o", str(path), "--quiet"]) == 0
    found = {}
    for name in ([], ["--graph", "llamacpp"], ["--engine", "llama.cpp"]):
        capsys.readouterr()
        assert run(["eval", str(path), "--text", str(text), "--ctx", "64", "--json", *name]) == 0
        result = json.loads(capsys.readouterr().out)
        found[result["engine"]] = result["perplexity"]
    assert found["torch:llamacpp"] == pytest.approx(found["llama.cpp"], rel=1e-3)
    assert abs(found["torch"] / found["llama.cpp"] - 1) > 5e-3
    command = ["eval", str(path), "--text", str(text), "--ctx", "64"]
    assert run([*command, "--graph", "jax"]) == 2
    assert run([*command, "--engine", "llama.cpp", "--graph", "xai"]) == 2
    assert "Leave --graph out" in capsys.readouterr().err

"""Which tensor gets which codec: tables, fallbacks, overrides, errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from weightsmith.errors import UnsupportedError, UsageError
from weightsmith.quant import codecs, recipes
from weightsmith.quant.blocks import BLOCKS, row_nbytes
from weightsmith.quant.recipes import Traits
from weightsmith.types import Recipe

Rules = Sequence[tuple[str, str]]
TINY = {
    "model.embed_tokens.weight": (96, 256),
    "model.layers.0.input_layernorm.weight": (256,),
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.self_attn.q_proj.bias": (256,),
    "model.layers.0.mlp.down_proj.weight": (256, 512),
    "model.norm.weight": (256,),
    "lm_head.weight": (96, 256),
}
TIED = {name: shape for name, shape in TINY.items() if name != "lm_head.weight"}
FLOATS = ("F32", "F16", "BF16")
ONE_LAYER = Traits(1)
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def assigned_by(
    shapes: Mapping[str, tuple[int, ...]],
    file_type: str,
    *,
    tied: bool = False,
    overrides: Rules = (),
    traits: Traits = ONE_LAYER,
    **options: Any,
) -> dict[str, recipes.Assigned]:
    return recipes.choose(shapes, Recipe(file_type, overrides=tuple(overrides), **options), tied=tied, traits=traits)


def assign(shapes: Mapping[str, tuple[int, ...]], file_type: str, **options: Any) -> dict[str, str]:
    return {name: got.codec for name, got in assigned_by(shapes, file_type, **options).items()}


def fallbacks(shapes: Mapping[str, tuple[int, ...]], file_type: str, **options: Any) -> list[tuple[str, str, str]]:
    found = assigned_by(shapes, file_type, **options)
    return [(name, got.wanted, got.codec) for name, got in found.items() if got.wanted != got.codec]


def output_of(file_type: str) -> str:
    return file_type if file_type in (*FLOATS, "Q8_0") else "Q6_K"


@pytest.mark.parametrize("file_type", recipes.FILE_TYPES)
def test_untied(file_type: str) -> None:
    base = recipes.base_codec(file_type)
    assigned = assign(TINY, file_type)
    down = assigned.pop("model.layers.0.mlp.down_proj.weight")
    assert assigned == {
        "model.embed_tokens.weight": base,
        "model.layers.0.input_layernorm.weight": "F32",
        "model.layers.0.self_attn.q_proj.weight": base,
        "model.layers.0.self_attn.q_proj.bias": "F32",
        "model.norm.weight": "F32",
        "lm_head.weight": output_of(file_type),
    }
    assert BLOCKS[down].bpw >= BLOCKS[base].bpw


@pytest.mark.parametrize("file_type", recipes.FILE_TYPES)
def test_tied(file_type: str) -> None:
    assigned = assign(TIED, file_type, tied=True)
    assert assigned["model.embed_tokens.weight"] == output_of(file_type)
    assert assigned["model.layers.0.self_attn.q_proj.weight"] == recipes.base_codec(file_type)
    assert list(assigned) == list(TIED)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("file_type", "codec"), [("Q4_0", "Q4_0"), ("Q2_K_S", "Q2_K"), ("Q5_K", "Q5_K")])
def test_pure(file_type: str, codec: str, tied: bool) -> None:
    assigned = assign(TINY, file_type, tied=tied, pure=True)
    assert {codec for name, codec in assigned.items() if recipes.is_matrix(name, TINY[name])} == {codec}


def test_file_types_have_the_ids_of_llama_cpp_and_known_codecs() -> None:
    assert {recipes.base_codec(name) for name in recipes.FILE_TYPES} <= set(BLOCKS)
    assert {recipes.FILE_TYPES[alias] == recipes.FILE_TYPES[name] for alias, name in ALIASES.items()} == {True}
    gguf = pytest.importorskip("gguf")
    for name, number in recipes.FILE_TYPES.items():
        peer = "ALL_F32" if name == "F32" else f"MOSTLY_{ALIASES.get(name, name)}"
        assert gguf.LlamaFileType[peer] == number
        assert recipes.file_type_id(name) == number


def llama(layers: int = 32, *, hidden: int = 4096, ffn: int = 14336, kv: int = 1024, vocab: int = 128256) -> Any:
    parts = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {f"model.layers.{i}.{part}.weight": shape for i in range(layers) for part, shape in parts.items()}
    ends = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    return {**ends, **shapes, "lm_head.weight": (vocab, hidden)}


# The table of llama.cpp's tools/quantize/README.md for Llama 3.1 8B.
@pytest.mark.parametrize(
    ("file_type", "bpw"),
    [
        ("Q2_K", 3.1593),
        ("Q3_K_M", 3.9960),
        ("Q4_K_S", 4.6672),
        ("Q4_K_M", 4.8944),
        ("Q5_K_M", 5.7036),
        ("Q6_K", 6.5633),
        ("Q8_0", 8.5008),
    ],
)
def test_published_sizes_of_a_real_model(file_type: str, bpw: float) -> None:
    shapes = llama()
    assigned = assign(shapes, file_type, traits=Traits(32, gqa=4))
    weights = nbytes = 0
    for name, shape in shapes.items():
        rows = shape[0] if len(shape) > 1 else 1
        weights += rows * shape[-1]
        nbytes += rows * row_nbytes(assigned[name], shape[-1])
    assert round(8 * nbytes / weights, 4) == bpw


def test_canonical_and_gguf_names_mean_the_same() -> None:
    shapes = llama(16)
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "lm_head": "output"}
    parts |= {f"{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")} | {"embed_tokens": "token_embd"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "norm": "output_norm"}

    def gguf_name(name: str) -> str:
        layer = f"blk.{name.split('.')[2]}." if "layers" in name else ""
        return f"{layer}{parts[name.split('.')[-2]]}.weight"

    native = {gguf_name(name): shape for name, shape in shapes.items()}
    assert len(native) == len(shapes)
    for file_type in recipes.FILE_TYPES:
        canonical = assign(shapes, file_type, traits=Traits(16, gqa=4))
        assert {gguf_name(name): codec for name, codec in canonical.items()} == assign(
            native, file_type, traits=Traits(16, gqa=4)
        )


def test_layers_count_in_their_own_order_whatever_the_order_of_the_tensors() -> None:
    shapes = llama(32)
    expected = assign(shapes, "Q4_K_M", traits=Traits(32, gqa=4))
    backwards = dict(reversed(shapes.items()))
    assert assign(backwards, "Q4_K_M", traits=Traits(32, gqa=4)) == expected
    better = [i for i in range(32) if expected[f"model.layers.{i}.self_attn.v_proj.weight"] == "Q6_K"]
    assert better == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


@pytest.mark.parametrize("form", ["block_sparse_moe.experts.{e}.w2.weight", "mlp.experts.{e}.down_proj.weight"])
def test_experts_share_their_layers_codec(form: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{form.format(e=e)}": (256, 256) for i in range(8) for e in range(4)
    }
    assigned = assign(shapes, "Q4_K_S", traits=Traits(8, n_experts=4))
    assert {name for name, codec in assigned.items() if codec == "Q5_K"} == {n for n in shapes if ".0." in n[:15]}


@pytest.mark.parametrize("file_type", ["Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS"])
def test_an_imatrix_changes_the_first_layers(file_type: str) -> None:
    shapes = llama(16)
    blind = assign(shapes, file_type, traits=Traits(16))
    measured = assign(shapes, file_type, traits=Traits(16), imatrix=True)
    changed = {name: measured[name] for name in shapes if blind[name] != measured[name]}
    codec = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}.get(file_type, file_type)
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight": codec for i in (0, 1)}


def test_output_and_embedding_types() -> None:
    asked = assign(TINY, "Q4_K_M", output_type="Q8_0", embedding_type="Q5_0", overrides=[("q_proj|lm_head", "Q4_1")])
    assert asked["lm_head.weight"] == "Q8_0"
    assert asked["model.embed_tokens.weight"] == "Q5_0"
    assert asked["model.layers.0.self_attn.q_proj.weight"] == "Q4_1"
    for options in ({}, {"pure": True}):
        assert assign(TIED, "Q4_K_M", tied=True, output_type="Q8_0", **options)["model.embed_tokens.weight"] == "Q8_0"
    both = assign(TIED, "F16", tied=True, output_type="Q8_0", embedding_type="Q5_0")
    assert both["model.embed_tokens.weight"] == "Q5_0"
    assert assign(TINY, "F16", output_type="Q8_0")["model.embed_tokens.weight"] == "F16"
    pattern = assign(TIED, "Q4_K_M", tied=True, output_type="Q8_0", overrides=[("embed", "Q5_1")])
    assert pattern["model.embed_tokens.weight"] == "Q5_1"
    with pytest.raises(UsageError, match="no matrix is left"):
        assign(TINY, "Q4_K_M", output_type="Q8_0", overrides=[("lm_head", "Q4_1")])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.3.block_sparse_moe.gate.weight", (8, 64)),
        ("model.layers.3.mlp.gate.weight", (8, 64)),
        ("model.layers.3.self_attn.q_norm.weight", (4, 64)),
        ("model.layers.3.self_attn.q_proj.bias", (1, 64)),
        ("model.layers.3.anything.weight", (64,)),
        ("model.layers.3.scale.weight", ()),
    ],
)
def test_what_stays_f32(name: str, shape: tuple[int, ...]) -> None:
    assert assign({name: shape}, "Q4_0", tied=False) == {name: "F32"}
    with pytest.raises(UsageError, match="no matrix is left"):
        assign({name: shape}, "Q4_0", tied=False, overrides=[(".", "Q8_0")])


def test_what_does_not() -> None:
    shapes = {"model.layers.0.mlp.gate_proj.weight": (8, 32), "experts.w1.weight": (8, 16, 32)}
    assert set(assign(shapes, "Q5_1", tied=False).values()) == {"Q5_1"}


@pytest.mark.parametrize(
    ("file_type", "got"),
    [
        ("Q2_K", "Q4_0"),
        ("Q3_K_S", "Q4_0"),
        ("Q4_K_S", "Q5_0"),
        ("Q5_K_S", "Q5_1"),
        ("Q6_K", "Q8_0"),
        ("IQ4_XS", "IQ4_NL"),
        ("Q4_0", "Q4_0"),
        ("IQ4_NL", "IQ4_NL"),
        ("BF16", "BF16"),
    ],
)
def test_rows_that_do_not_divide_fall_back_visibly(file_type: str, got: str) -> None:
    base = recipes.base_codec(file_type)
    last = "F16" if base not in FLOATS else base
    shapes = {"blk.0.attn_q.weight": (8, 96), "blk.0.ffn_up.weight": (8, 100), "blk.0.ffn_gate.weight": (8, 256)}
    assert list(assigned_by(shapes, file_type).values()) == [
        recipes.Assigned(got, base),
        recipes.Assigned(last, base),
        recipes.Assigned(base, base),
    ]


def test_fallbacks_know_a_tied_model_and_overrides() -> None:
    shapes = {"model.embed_tokens.weight": (96, 96), "a.weight": (4, 40), "b.weight": (4, 40)}
    rules = [("^a", "F32"), ("^b", "Q5_0")]
    assigned = assign(shapes, "Q4_1", tied=True, overrides=rules)
    assert assigned == {"model.embed_tokens.weight": "Q8_0", "a.weight": "F32", "b.weight": "F16"}
    found = fallbacks(shapes, "Q4_1", tied=True, overrides=rules)
    assert found == [("model.embed_tokens.weight", "Q6_K", "Q8_0"), ("b.weight", "Q5_0", "F16")]
    assert fallbacks(TINY, "Q4_K_M") == []


def test_first_matching_override_wins_anywhere_in_the_name_even_over_pure() -> None:
    rules = [("down_proj", "Q8_0"), (r"layers\.0\.", "F16"), ("lm_head", "Q5_0")]
    for pure in (False, True):
        assigned = assign(TINY, "Q4_0", tied=False, pure=pure, overrides=rules)
        assert assigned["model.layers.0.mlp.down_proj.weight"] == "Q8_0"
        assert assigned["model.layers.0.self_attn.q_proj.weight"] == "F16"
        assert assigned["lm_head.weight"] == "Q5_0"
        assert assigned["model.layers.0.input_layernorm.weight"] == "F32"


def test_errors() -> None:
    with pytest.raises(UnsupportedError, match="unknown file type 'Q4_K_L'") as caught:
        assign(TINY, "Q4_K_L")
    assert all(name in str(caught.value) for name in recipes.FILE_TYPES)
    with pytest.raises(UsageError, match="no regular expression"):
        assign(TINY, "Q4_0", overrides=[("(", "Q8_0")])


def made(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]] = TINY) -> dict[str, recipes.Assigned]:
    return recipes.assign(shapes, recipe, tied=False, traits=Traits(1))


@pytest.mark.parametrize(
    "recipe",
    [Recipe("Q4_0", overrides=(("a", "Q8_K"),)), Recipe("Q4_0", output_type="Q8_K"), Recipe("F16", embedding_type="x")],
)
def test_codecs_that_are_asked_for_must_be_writable(recipe: Recipe) -> None:
    with pytest.raises(UnsupportedError, match="cannot be written, but was asked for"):
        made(recipe)


def test_a_type_can_be_made_as_soon_as_its_codecs_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tuple(name for name in BLOCKS if name != "Q6_K")
    monkeypatch.setattr(codecs, "writable", lambda: missing)
    with pytest.raises(UnsupportedError, match="Q4_K_M needs Q6_K, which cannot be written") as caught:
        made(Recipe("Q4_K_M"))
    assert caught.value.tensor == "model.layers.0.mlp.down_proj.weight"
    assert made(Recipe("Q8_0"))["lm_head.weight"].codec == "Q8_0"
    narrow = {name: (*shape[:-1], 96) for name, shape in TINY.items()}
    assert made(Recipe("Q4_K_M"), narrow)["lm_head.weight"] == recipes.Assigned("Q8_0", "Q6_K")
    monkeypatch.setattr(codecs, "writable", lambda: tuple(BLOCKS))
    assert made(Recipe("Q4_K_M"))["lm_head.weight"].codec == "Q6_K"


def test_q2_k_s_needs_an_imatrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "writable", lambda: tuple(BLOCKS))
    with pytest.raises(UsageError, match="imatrix") as caught:
        made(Recipe("Q2_K_S"))
    assert caught.value.tensor == "model.layers.0.self_attn.q_proj.weight"
    assert made(Recipe("Q2_K_S", imatrix=True))["model.layers.0.self_attn.q_proj.weight"].codec == "Q2_K"
    assert made(Recipe("Q2_K"))["model.layers.0.self_attn.q_proj.weight"].codec == "Q2_K"
    # not where nothing that matters is Q2_K
    assert made(Recipe("Q2_K_S"), {"model.embed_tokens.weight": (96, 256), "blk.0.ffn_up.weight": (8, 32)})


def test_patterns_are_found_in_aliases_too() -> None:
    aliases = {name: "blk.0.ffn_down.weight" if "down_proj" in name else name for name in TINY}
    recipe = Recipe("Q4_0", overrides=(("ffn_down", "Q8_0"),))
    chosen = recipes.choose(TINY, recipe, tied=False, traits=Traits(1), aliases=aliases)
    assert chosen["model.layers.0.mlp.down_proj.weight"].codec == "Q8_0"

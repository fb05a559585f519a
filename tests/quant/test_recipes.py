"""Which tensor gets which codec: tables, fallbacks, overrides, errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from weightsmith.errors import UnsupportedError, UsageError
from weightsmith.quant import codecs, recipes
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import Recipe

Rules = Sequence[tuple[str, str]]
TINY = {
    "model.embed_tokens.weight": (96, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "model.layers.0.mlp.down_proj.weight": (64, 160),
    "model.norm.weight": (64,),
    "lm_head.weight": (96, 64),
}
TIED = {name: shape for name, shape in TINY.items() if name != "lm_head.weight"}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def assigned_by(
    shapes: Mapping[str, tuple[int, ...]], file_type: str, *, tied: bool, pure: bool, overrides: Rules
) -> dict[str, recipes.Assigned]:
    return recipes.assign(shapes, Recipe(file_type, pure=pure, overrides=tuple(overrides)), tied=tied)


def assign(
    shapes: Mapping[str, tuple[int, ...]], file_type: str, *, tied: bool, pure: bool = False, overrides: Rules = ()
) -> dict[str, str]:
    found = assigned_by(shapes, file_type, tied=tied, pure=pure, overrides=overrides)
    return {name: got.codec for name, got in found.items()}


def fallbacks(
    shapes: Mapping[str, tuple[int, ...]], file_type: str, *, tied: bool = False, overrides: Rules = ()
) -> list[tuple[str, str, str]]:
    found = assigned_by(shapes, file_type, tied=tied, pure=False, overrides=overrides)
    return [(name, got.wanted, got.codec) for name, got in found.items() if got.wanted != got.codec]


@pytest.mark.parametrize("file_type", recipes.FILE_TYPES)
def test_untied(file_type: str) -> None:
    head = recipes.OUTPUT_CODEC if file_type in QUANTIZED else file_type
    assert assign(TINY, file_type, tied=False) == {
        "model.embed_tokens.weight": file_type,
        "model.layers.0.input_layernorm.weight": "F32",
        "model.layers.0.self_attn.q_proj.weight": file_type,
        "model.layers.0.self_attn.q_proj.bias": "F32",
        "model.layers.0.mlp.down_proj.weight": file_type,
        "model.norm.weight": "F32",
        "lm_head.weight": head,
    }


@pytest.mark.parametrize("file_type", recipes.FILE_TYPES)
def test_tied(file_type: str) -> None:
    assigned = assign(TIED, file_type, tied=True)
    assert assigned["model.embed_tokens.weight"] == (recipes.OUTPUT_CODEC if file_type in QUANTIZED else file_type)
    assert assigned["model.layers.0.mlp.down_proj.weight"] == file_type
    assert list(assigned) == list(TIED)


@pytest.mark.parametrize("tied", [True, False])
def test_pure(tied: bool) -> None:
    assigned = assign(TINY, "Q4_0", tied=tied, pure=True)
    assert {codec for name, codec in assigned.items() if recipes.is_matrix(name, TINY[name])} == {"Q4_0"}


def test_the_output_codec_can_be_written_and_is_no_worse_than_the_types_it_serves() -> None:
    assert recipes.OUTPUT_CODEC in codecs.writable()
    assert all(BLOCKS[recipes.OUTPUT_CODEC].bpw >= BLOCKS[name].bpw for name in QUANTIZED if name != "Q8_0")


def test_file_types_are_codecs_that_can_be_written_under_their_ggml_ids() -> None:
    assert set(recipes.FILE_TYPES) <= set(codecs.writable())
    gguf = pytest.importorskip("gguf")
    for name, number in recipes.FILE_TYPES.items():
        peer = f"ALL_{name}" if name == "F32" else f"MOSTLY_{name}"
        assert gguf.LlamaFileType[peer] == number
        assert recipes.file_type_id(name) == number


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


def test_rows_that_do_not_divide_fall_back_visibly() -> None:
    shapes = {**TINY, "model.layers.0.mlp.down_proj.weight": (64, 100), "lm_head.weight": (96, 48)}
    assigned = assign(shapes, "Q4_0", tied=False)
    assert assigned["model.layers.0.mlp.down_proj.weight"] == "F16"
    assert assigned["lm_head.weight"] == "F16"
    assert fallbacks(shapes, "Q4_0") == [
        ("model.layers.0.mlp.down_proj.weight", "Q4_0", "F16"),
        ("lm_head.weight", recipes.OUTPUT_CODEC, "F16"),
    ]
    assert fallbacks(TINY, "Q4_0") == []
    assert fallbacks(shapes, "BF16") == []


def test_fallbacks_know_a_tied_model_and_overrides() -> None:
    shapes = {"model.embed_tokens.weight": (96, 40), "a.weight": (4, 40), "b.weight": (4, 64)}
    rules = [("^a", "F32"), ("^b", "Q5_0")]
    assigned = assign(shapes, "Q4_1", tied=True, overrides=rules)
    assert assigned == {"model.embed_tokens.weight": "F16", "a.weight": "F32", "b.weight": "Q5_0"}
    found = fallbacks(shapes, "Q4_1", tied=True, overrides=rules)
    assert found == [("model.embed_tokens.weight", recipes.OUTPUT_CODEC, "F16")]


def test_first_matching_override_wins_anywhere_in_the_name_even_over_pure() -> None:
    rules = [("down_proj", "Q8_0"), (r"layers\.0\.", "F16"), ("lm_head", "Q5_0")]
    for pure in (False, True):
        assigned = assign(TINY, "Q4_0", tied=False, pure=pure, overrides=rules)
        assert assigned["model.layers.0.mlp.down_proj.weight"] == "Q8_0"
        assert assigned["model.layers.0.self_attn.q_proj.weight"] == "F16"
        assert assigned["lm_head.weight"] == "Q5_0"
        assert assigned["model.layers.0.input_layernorm.weight"] == "F32"


def test_errors() -> None:
    with pytest.raises(UnsupportedError, match="unknown file type 'Q4_K_M'") as caught:
        assign(TINY, "Q4_K_M", tied=False)
    assert all(name in str(caught.value) for name in recipes.FILE_TYPES)
    with pytest.raises(UsageError, match="no regular expression"):
        assign(TINY, "Q4_0", tied=False, overrides=[("(", "Q8_0")])
    with pytest.raises(UnsupportedError, match="cannot be written"):
        assign(TINY, "Q4_0", tied=False, overrides=[("a", "Q8_K")])


def test_patterns_are_found_in_aliases_too() -> None:
    aliases = {name: "blk.0.ffn_down.weight" if "down_proj" in name else name for name in TINY}
    recipe = Recipe("Q4_0", overrides=(("ffn_down", "Q8_0"),))
    assert (
        recipes.assign(TINY, recipe, tied=False, aliases=aliases)["model.layers.0.mlp.down_proj.weight"].codec == "Q8_0"
    )

"""Folders of pytorch_model*.bin: the same tensors, GGUF bytes and results as the same model in safetensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import moe
from tests.formats.grok import grok2
from tests.formats.pickles.crafted import sparse, state_dict, storage, tensor
from tests.formats.pytorch.bins import INDEX, load, pickled, save, shard_name, write_pickled
from tests.native import in_one_storage, write_meta, write_mistral
from tests.tiny import write_llama
from weightsmith import formats
from weightsmith.cli.app import run
from weightsmith.errors import NotFoundError, UnsafeInputError, UnsupportedError
from weightsmith.types import Reader

torch = pytest.importorskip("torch", reason="torch writes these files")


def check_same(one: Reader, other: Reader) -> None:
    """Equal models: configuration, vocabulary, every byte of every tensor."""
    assert one.config == other.config
    assert one.vocab() == other.vocab()
    assert list(one.infos()) == list(other.infos())
    for name, info in one.infos().items():
        twin = other.infos()[name]
        assert (info.shape, info.codec, info.nbytes) == (twin.shape, twin.codec, twin.nbytes), name
        assert np.array_equal(one.rows(name, 0, info.n_rows), other.rows(name, 0, info.n_rows)), name


def both(plain: Path, made: Path) -> tuple[Reader, Reader]:
    return formats.open_reader(plain), formats.open_reader(made, allow_pickle=True)


def made_by(verb: str, source: Path, target: str, out: Path, *options: str) -> dict[str, bytes]:
    """What a verb writes, by name."""
    assert run([verb, str(source), "--to", target, "-o", str(out), "-q", *options]) == 0
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "shards"), [("F16", 1), ("BF16", 3), ("F32", 2)])
def test_the_same_bytes_as_from_safetensors(dtype: str, shards: int, tmp_path: Path) -> None:
    plain = write_llama(tmp_path / "a" / "tiny", dtype=dtype, shards=shards)
    made = pickled(plain, tmp_path / "b" / "tiny", shards=shards)
    check_same(*both(plain, made))
    for number, (verb, target) in enumerate(
        [("convert", "safetensors"), ("convert", "gguf"), ("quantize", "gguf:Q4_0"), ("quantize", "nf4")]
    ):
        name = f"out{number}" + (".gguf" if "gguf" in target else "")
        want = made_by(verb, plain, target, tmp_path / "a" / name)
        assert made_by(verb, made, target, tmp_path / "b" / name, "--allow-pickle") == want
        assert want


@pytest.mark.parametrize("scheme", ["keyfan", "hpcai"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_published_copies_of_grok_1(scheme: str, shards: int, tmp_path: Path) -> None:
    plain, made = tmp_path / "a" / "grok-1", tmp_path / "b" / "grok-1"
    grok2.write_hf(plain, scheme)
    check_same(*both(plain, pickled(plain, made, shards=shards)))
    want = made_by("convert", plain, "gguf", tmp_path / "a" / "out.gguf")
    assert made_by("convert", made, "gguf", tmp_path / "b" / "out.gguf", "--allow-pickle") == want


def test_mistral_and_mixtral(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 24, "sliding_window": 8}
    plain = write_llama(tmp_path / "mistral", **mistral)
    check_same(*both(plain, pickled(plain, tmp_path / "mistral-bin", shards=2)))
    for stack in (False, True):
        plain = moe.write_mixtral(tmp_path / f"mixtral-{stack}", stacks=stack)
        check_same(*both(plain, pickled(plain, tmp_path / f"mixtral-bin-{stack}", shards=3)))


def test_views_into_shared_storages(tmp_path: Path) -> None:
    plain = write_llama(tmp_path / "plain", dtype="BF16")
    check_same(*both(plain, pickled(plain, tmp_path / "bin", change=in_one_storage)))
    check_same(*both(plain, pickled(plain, tmp_path / "shards", shards=2, change=in_one_storage)))

    def parameters(tensors: dict[str, Any]) -> dict[str, Any]:
        found = {name: torch.nn.Parameter(value) for name, value in tensors.items()}
        return found | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}

    check_same(*both(plain, pickled(plain, tmp_path / "parameters", change=parameters)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding(tied: bool, tmp_path: Path) -> None:
    """Two names of one storage: tied if config.json says so, else two tensors of the same values."""
    plain = write_llama(tmp_path / "plain", tie_word_embeddings=True)

    def shared(tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    made = pickled(plain, tmp_path / "bin", change=shared)
    settings = json.loads((made / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (made / "config.json").write_text(json.dumps(settings))
    one, other = both(plain, made)
    assert ("lm_head.weight" in other.infos()) != tied
    assert "lm_head.weight" in other.native_infos()
    if tied:
        check_same(one, other)
    else:
        rows = [other.rows(name, 0, 384) for name in ("lm_head.weight", "model.embed_tokens.weight")]
        assert np.array_equal(*rows)


@pytest.mark.parametrize("copied", [True, False])
def test_a_head_under_a_published_name_of_the_embedding(copied: bool, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    grok2.write_hf(plain, "keyfan")

    def with_head(tensors: dict[str, Any]) -> dict[str, Any]:
        embedding = tensors["transformer.in_out_embed.weight"]
        return tensors | {"lm_head.weight": embedding.clone() if copied else -embedding}

    one, other = both(plain, pickled(plain, tmp_path / "bin", change=with_head))
    assert other.config.tie_word_embeddings == copied
    if copied:
        check_same(one, other)


def test_a_matrix_that_was_saved_turned_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    plain = write_llama(tmp_path / "plain")
    made = pickled(plain, tmp_path / "bin", change=lambda all_: all_ | {name: all_[name].t().contiguous().t()})
    with pytest.raises(UnsupportedError, match="one after another") as caught:
        formats.open_reader(made, allow_pickle=True)
    assert caught.value.tensor == name
    assert run(["show", str(made), "--allow-pickle"]) == 1
    assert name in capsys.readouterr().err


def test_packed_weights_in_pickles_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_pickled(tmp_path / "bin")
    (made / "quantize_config.json").write_text('{"bits": 4, "group_size": 128, "desc_act": false, "sym": true}')
    assert run(["show", str(made), "--allow-pickle"]) == 1
    assert "quantize_config.json" in capsys.readouterr().err


def test_only_with_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_pickled(tmp_path / "bin")
    out = str(tmp_path / "out")
    verbs = [["show"], ["convert", "--to", "safetensors", "-o", out], ["quantize", "--to", "gguf:Q8_0", "-o", out]]
    verbs += [["eval"], ["verify", "--against", str(made)], ["pull"], ["diff", str(made)]]
    for source in (made, made / "pytorch_model.bin"):
        for verb, *rest in verbs:
            assert run([verb, str(source), *rest, "-q"]) == 4, verb
            assert "--allow-pickle" in capsys.readouterr().err
    assert not Path(out).exists()


def test_shown_measured_verified_and_pulled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_llama(tmp_path / "plain", dtype="F32")
    made = pickled(plain, tmp_path / "tiny", shards=2)
    text = tmp_path / "text.txt"
    text.write_text("The smith counted 12 nails and 7 hooks; the forge was cold.\n" * 20)

    def result(*args: str) -> dict[str, Any]:
        assert run([*args, "--json", "-q"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    shown = result("show", str(made), "--allow-pickle")
    assert (shown["container"], shown["model"]["family"]) == ("pytorch", "llama")
    assert shown["parameters"] == result("show", str(plain))["parameters"]
    options = ["--text", str(text), "--ctx", "64", "--windows", "2"]
    measured = [result("eval", str(source), "--allow-pickle", *options)["perplexity"] for source in (plain, made)]
    assert measured[0] == measured[1]
    same = result("verify", str(made), "--against", str(plain), "--allow-pickle", *options)
    assert same["kld_mean"] == 0
    pulled = result("pull", str(made), "--allow-pickle")
    wanted = {"config.json", INDEX, shard_name(1, 2), shard_name(2, 2), "tokenizer.json", "tokenizer_config.json"}
    assert {file["path"] for file in pulled["files"]} == wanted
    assert result("convert", "tiny", "--to", "gguf", "--allow-pickle")["ref"] == "tiny:f32"


def test_bytes_decide_and_not_names(tmp_path: Path) -> None:
    plain = write_llama(tmp_path / "plain")
    made = pickled(plain, tmp_path / "bin")
    weights = (plain / "model.safetensors").read_bytes()
    (made / "pytorch_model.bin").rename(made / "weights.safetensors.txt")
    (made / "pytorch_model.bin").write_bytes(weights)
    check_same(formats.open_reader(plain), formats.open_reader(made))  # no pickle, no permission
    with pytest.raises(UnsafeInputError, match="pickled"):
        formats.open_reader(made / "weights.safetensors.txt")
    check_same(*both(plain, made / "weights.safetensors.txt"))
    (plain / "model.safetensors").write_bytes((made / "weights.safetensors.txt").read_bytes())
    for allow in (False, True):
        with pytest.raises(UnsafeInputError, match="called safetensors"):
            formats.open_reader(plain, allow_pickle=allow)
    assert run(["show", str(plain)]) == 4


def test_which_form_is_read(tmp_path: Path) -> None:
    """One that is no pickle, then Hugging Face's before the vendor's."""
    made = write_pickled(tmp_path / "bin")

    def container(**options: Any) -> str:
        return formats.open_reader(made, **options).container

    write_meta(made)
    assert container(allow_pickle=True) == "pytorch"
    for file in made.glob("consolidated*"):
        file.unlink()
    write_mistral(made)
    assert container() == "mistral"
    save_file = made / "model.safetensors"
    save_file.write_bytes((tmp_path / "bin-plain" / "model.safetensors").read_bytes())
    assert container() == "safetensors"
    (made / "config.json").unlink()
    save_file.unlink()
    (made / "consolidated.safetensors").unlink()
    torch.save({"w": torch.ones(2)}, made / "consolidated.00.pth")
    assert container(allow_pickle=True) == "mistral"


def test_a_file_without_its_index_or_configuration(tmp_path: Path) -> None:
    made = write_pickled(tmp_path / "bin", shards=2)
    (made / INDEX).unlink()
    with pytest.raises(NotFoundError, match=f"no {INDEX}"):
        formats.open_reader(made, allow_pickle=True)
    (made / shard_name(2, 2)).unlink()
    assert formats.open_reader(made, allow_pickle=True).native_infos()
    tensors = load(tmp_path / "bin-plain")
    save(made, tensors)
    (made / "config.json").unlink()
    reader = formats.open_reader(made / "pytorch_model.bin", allow_pickle=True)
    assert set(reader.native_infos()) == set(tensors)
    with pytest.raises(NotFoundError, match=r"config\.json|no such file"):
        assert reader.config
    with pytest.raises(UnsupportedError, match=r"config\.json"):
        formats.open_reader(made, allow_pickle=True)


def test_grok_1_at_its_real_size(tmp_path: Path) -> None:
    """hpcai-tech's names and shapes in 19 files, holes for weights: all found, behind 4 GB too, and read at once."""
    size = {"hidden_size": 6144, "intermediate_size": 32768, "num_hidden_layers": 64, "num_attention_heads": 48}
    config = grok2.grok1_config("hpcai", num_key_value_heads=8, vocab_size=131072, **size)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {
        grok2.renamed(f"{name}.weight", "hpcai"): shape
        for name, shape in grok2.grok_shapes(config | {"num_local_experts": 8, "residual_moe": False}).items()
        if name != "lm_head"
    }
    names, weight_map = list(shapes), {}
    for number in range(19):
        part = names[number * len(names) // 19 : (number + 1) * len(names) // 19]
        items, members = [], {}
        for key, name in enumerate(part):
            count = math.prod(shapes[name])
            view = storage(str(key), count, "BFloat16Storage")
            strides = (shapes[name][-1], 1)[-len(shapes[name]) :]
            items.append((name, tensor(of=view, size=shapes[name], stride=strides)))
            members[f"data/{key}"] = bytes([number, key % 251] * count) if "norm" in name else 2 * count
        sparse(tmp_path / shard_name(number + 1, 19), {"data.pkl": state_dict(*items), **members})
        weight_map |= dict.fromkeys(part, shard_name(number + 1, 19))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    reader = formats.open_reader(tmp_path, allow_pickle=True)
    infos = reader.infos()
    assert len(infos) == len(names) == 2 + 64 * (4 + 4 + 1 + 8 * 3)
    assert sum(info.n_weights for info in infos.values()) == 315_684_820_992
    last = infos["model.norm.weight"]
    assert last.offset > 1 << 34
    key = list(weight_map.values()).count(shard_name(19, 19)) - 1
    assert reader.rows("model.norm.weight", 0, 1)[0, :2].tolist() == [18, key % 251]
    assert not reader.rows("model.layers.63.block_sparse_moe.experts.7.w2.weight", 6143, 6144).any()
    reader.close()

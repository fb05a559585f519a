"""Pickles that would run something are refused, nothing is imported or called, and no mutation crashes the reader."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.pickles.crafted import archive, hostile, read, state_dict, tensor, unlisted
from weightsmith.errors import IntegrityError, UnsafeInputError, UnsupportedError, WeightsmithError
from weightsmith.formats.pickles import machine

ROOT = Path(__file__).parent.parent.parent.parent
SIX = bytes(24)
# These are damage or another kind of content; they hold nothing that could run.
NOT_CODE = {
    "deep marks", "deep tuples", "doubling tuples", "doubling lists", "a memo at the far end",
    "a text longer than the file", "too many steps",
}  # fmt: skip
SOUND = archive(
    state_dict(("a", tensor()), ("b", tensor(size=(3,), stride=(1,), offset=3))), {"0": SIX}, byteorder=b"little"
)
WATCH = """
import json, os, sys
from pathlib import Path
from weightsmith.errors import WeightsmithError
from weightsmith.formats.pickles import read_tensors
seen = []
watched = ("import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
watched += ("pickle.find_class",)
sys.addaudithook(lambda event, args: seen.append(event) if event in watched else None)
class Finder:
    def find_spec(self, name, path=None, target=None):
        seen.append("find " + name)
sys.meta_path.insert(0, Finder())
modules = set(sys.modules)
ends = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    handle = os.open(path, os.O_RDONLY)
    try:
        ends[path.name] = sorted(read_tensors(handle, path.stat().st_size, path=path))
    except WeightsmithError as error:
        ends[path.name] = type(error).__name__
    os.close(handle)
seen += sorted(set(sys.modules) - modules)
print(json.dumps([seen, ends]))
"""


@pytest.mark.parametrize("case", hostile())
def test_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(archive(hostile()[case], {"0": SIX}))
    kinds = (IntegrityError, UnsupportedError, UnsafeInputError) if case in NOT_CODE else UnsafeInputError
    begun = time.monotonic()
    with pytest.raises(kinds) as caught:
        read(path)
    assert time.monotonic() - begun < 10
    assert caught.value.exit_code in (1, 3, 4)
    assert len(str(caught.value)) < 1000


def test_every_opcode_outside_the_list_is_refused(tmp_path: Path) -> None:
    cases = unlisted(machine.LISTED)
    assert len(cases) > 25
    path = tmp_path / "x.pth"
    for name, data in cases.items():
        path.write_bytes(archive(data, {"0": SIX}))
        with pytest.raises(UnsafeInputError) as caught:
            read(path)
        assert caught.value.exit_code == 4, name


def test_nothing_is_imported_or_called(tmp_path: Path) -> None:
    every = [*hostile().values(), *unlisted(machine.LISTED).values()]
    assert len(every) > 75
    for index, data in enumerate(every):
        (tmp_path / f"{index:03d}").write_bytes(archive(data, {"0": SIX}))
    (tmp_path / "sound").write_bytes(SOUND)
    result = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seen, ends = json.loads(result.stdout)
    assert seen == []
    assert ends.pop("sound") == ["a", "b"]
    assert len(ends) == len(every)
    assert set(ends.values()) <= {"UnsafeInputError", "IntegrityError", "UnsupportedError"}


def test_the_watch_sees_what_it_watches_for(tmp_path: Path) -> None:
    """The same script with torch's own way of reading would notice."""
    code = WATCH.replace("ends = {}", "ends = {}\nimport colorsys\nexec('1')")
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seen, _ = json.loads(result.stdout)
    assert {"find colorsys", "exec", "colorsys"} <= set(seen)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(archive(b"\x80\x02" + b"}" * (7 << 20) + b"."))
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom weightsmith.errors import IntegrityError\n"
        "from weightsmith.formats.pickles import read_tensors\npath = Path(sys.argv[1])\n"
        "try:\n    read_tensors(os.open(path, 0), path.stat().st_size, path=path)\nexcept IntegrityError:\n"
        "    sys.stdout.write(Path('/proc/self/status').read_text())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak = next(line for line in result.stdout.splitlines() if line.startswith("VmHWM:"))
    assert int(peak.split()[1]) < 300_000  # KiB


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_mutated_files_end_in_an_error_of_ours_or_in_sound_ranges(data: st.DataObject) -> None:
    content = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    check_ends(bytes(content))


@settings(max_examples=1500, deadline=None)
@given(
    st.lists(
        st.sampled_from([*(bytes([n]) for n in range(256)), *state_dict(("w", tensor())).split(b"t")]), max_size=40
    )
)
def test_strung_together_opcodes_end_in_an_error_of_ours_or_in_tensors(pieces: list[bytes]) -> None:
    check_ends(archive(b"\x80\x02" + b"".join(pieces) + b".", {"0": SIX}))


def check_ends(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            found = read(Path(file.name))
        except WeightsmithError:
            return
    for info in found.values():
        assert 0 <= info.offset <= info.offset + info.nbytes <= len(content)

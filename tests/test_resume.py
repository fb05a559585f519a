"""A quantization that is killed or interrupted goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import write_llama
from weightsmith.cli.app import run
from weightsmith.journal import Done, Journal, journal_path
from weightsmith.quant.checksum import checksum
from weightsmith.quant.loss import Loss

ROOT = Path(__file__).parent.parent

# Kills or interrupts itself after so many slabs; `--max-memory` makes the slabs small, so that there are many.
RUN = (
    "import os, sys, threading\nfrom weightsmith import transcode\nfrom weightsmith.cli.app import main\n"
    "left, signum, args = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]\n"
    "recode, lock, done = transcode.recode, threading.Lock(), 0\n"
    "def counted(*slab):\n"
    "    global done\n"
    "    with lock:\n"
    "        done += 1\n"
    "        if done > left:\n"
    "            os.kill(os.getpid(), signum)\n"
    "    return recode(*slab)\n"
    "transcode.recode = counted\n"
    "main(args)\n"
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny")


def quantize(folder: Path, out: Path) -> list[str]:
    return ["quantize", str(folder), "--to", "gguf:Q4_0", "-o", str(out), "--max-memory", "100kB", "--threads", "2"]


def stopped(args: list[str], after: int, signum: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(after), str(int(signum)), *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_killed_at_ten_moments(tiny: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.gguf", tmp_path / "out" / "m.gguf"
    assert run([*quantize(tiny, whole), "-q"]) == 0
    moments = random.Random(0).sample(range(1, 40), 10)
    for moment in moments:
        killed = stopped(quantize(tiny, out), moment, signal.SIGKILL)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists()
        assert journal_path(out).exists()
        assert run([*quantize(tiny, out), "-q"]) == 0
        assert sha256(out) == sha256(whole)
        assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]
        out.unlink()


def test_killed_again_and_again_still_advances(tiny: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.gguf", tmp_path / "m.gguf"
    assert run([*quantize(tiny, whole), "-q"]) == 0
    known = []
    for _ in range(30):
        done = stopped(quantize(tiny, out), 12, signal.SIGKILL)
        if done.returncode == 0:
            break
        known.append(len(journal_path(out).read_text().splitlines()))
    assert known == sorted(known)
    assert len(known) > 1
    assert sha256(out) == sha256(whole)


def test_an_interrupted_run_says_that_it_can_go_on(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    done = stopped(quantize(tiny, out), 20, signal.SIGINT)
    assert done.returncode == 130
    assert "the same command goes on" in done.stderr
    assert sorted(path.name for path in tmp_path.glob("m.gguf*")) == ["m.gguf.journal", "m.gguf.part"]
    assert run([*quantize(tiny, out), "-q"]) == 0


def test_other_options_begin_anew(tiny: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "m.gguf", tmp_path / "fresh.gguf"
    assert stopped(quantize(tiny, out), 20, signal.SIGKILL).returncode == -signal.SIGKILL
    assert run([*quantize(tiny, out), "--pure", "-q"]) == 0
    assert run([*quantize(tiny, fresh), "--pure", "-q"]) == 0
    assert sha256(out) == sha256(fresh)


def test_another_source_begins_anew(tiny: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "m.gguf", tmp_path / "fresh.gguf"
    assert stopped(quantize(tiny, out), 20, signal.SIGKILL).returncode == -signal.SIGKILL
    write_llama(tiny, seed=1)
    assert run([*quantize(tiny, out), "-q"]) == 0
    assert run([*quantize(tiny, fresh), "-q"]) == 0
    assert sha256(out) == sha256(fresh)


def test_what_does_not_hash_is_done_again(tiny: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "m.gguf", tmp_path / "fresh.gguf"
    assert run([*quantize(tiny, fresh), "-q"]) == 0
    assert stopped(quantize(tiny, out), 25, signal.SIGKILL).returncode == -signal.SIGKILL
    part = out.with_name("m.gguf.part")
    data = bytearray(part.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)  # pages that never reached the disk
    part.write_bytes(data)
    with journal_path(out).open("a") as file:
        file.write('["model.norm')  # a line torn by the kill
    assert run([*quantize(tiny, out), "-q"]) == 0
    assert sha256(out) == sha256(fresh)


def test_a_resumed_run_reports_the_same_errors(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, whole = tmp_path / "m.gguf", tmp_path / "whole.gguf"
    assert run([*quantize(tiny, whole), "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)["tensors"]
    assert stopped(quantize(tiny, out), 20, signal.SIGKILL).returncode == -signal.SIGKILL
    assert run([*quantize(tiny, out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == wanted
    assert sum(tensor["error"] is not None for tensor in wanted) > 5


def test_in_the_catalog(tiny: Path) -> None:
    home = Path(os.environ["WEIGHTSMITH_HOME"])
    assert run(["pull", str(tiny), "-q"]) == 0
    args = ["quantize", "tiny", "--to", "gguf:Q4_0", "--max-memory", "100kB"]
    assert stopped(args, 20, signal.SIGKILL).returncode == -signal.SIGKILL
    (journal,) = (home / "work").rglob("*.journal")
    assert len(journal.read_text().splitlines()) > 5
    assert run([*args, "-q"]) == 0
    assert list((home / "work").iterdir()) == []
    (made,) = (home / "models").rglob("*.gguf")
    assert run(["quantize", "tiny", "--to", "gguf:Q4_0", "--tag", "again", "-q"]) == 0
    (again,) = (path for path in (home / "models").rglob("*.gguf") if path != made)
    assert sha256(made) == sha256(again)


def test_the_journal_itself(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    total = checksum(np.arange(64, dtype=np.uint8).reshape(2, 32))
    journal = Journal(out, {"a": 1})
    journal.add(("t", 0, 2), total, Loss(0.25, 4.0))
    journal.close()
    again = Journal(out, {"a": 1})
    assert again.known == {("t", 0, 2): Done(total, Loss(0.25, 4.0))}
    again.close()
    other = Journal(out, {"a": 2})
    assert other.known == {}
    other.remove()
    assert not journal_path(out).exists()

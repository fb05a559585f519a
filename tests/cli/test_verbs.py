"""Each verb as a user runs it: results on stdout, JSON on request, the catalog as it grows, exit codes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_llama
from weightsmith.cli.app import run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The smith counted 12 nails and 7 hooks; the forge was cold.\n" * 80)
    return path


def result(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> dict[str, Any]:
    assert run([*args, "--json", "-q"]) == code
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def test_the_whole_way(tiny: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pulled = result(capsys, "pull", str(tiny))
    assert pulled["ref"] == "tiny:original"
    assert {file["path"] for file in pulled["files"]} >= {"config.json", "model.safetensors", "tokenizer.json"}
    made = result(capsys, "convert", "tiny", "--to", "gguf")
    assert (made["ref"], made["types"]) == ("tiny:f16", {"F16": 16, "F32": 5})
    assert result(capsys, "quantize", "tiny:original", "--to", "gguf:q8_0")["ref"] == "tiny:q8_0"
    back = result(capsys, "convert", "tiny:f16", "--to", "safetensors")
    assert back["ref"] == "tiny:safetensors"
    listed = result(capsys, "list")["models"]
    assert {m["ref"]: m["parent"] for m in listed} == {
        "tiny:original": None,
        "tiny:f16": "tiny:original",
        "tiny:q8_0": "tiny:original",
        "tiny:safetensors": "tiny:f16",
    }
    shown = result(capsys, "show", "tiny:safetensors")
    assert shown["catalog"]["lineage"] == ["tiny:safetensors", "tiny:f16", "tiny:original"]
    assert Path(result(capsys, "path", "tiny:q8_0")["path"]).suffix == ".gguf"
    same = result(capsys, "verify", "tiny:f16", "--text", str(text), "--ctx", "64", "--max-ppl-ratio", "1.001")
    assert same["passed"]
    assert same["ratio"] == pytest.approx(1, abs=1e-5)
    assert same["kld_mean"] < 1e-6
    loss = result(capsys, "verify", "tiny:q8_0", "--text", str(text), "--ctx", "64", "--max-kld", "1e-9", code=5)
    assert not loss["passed"]
    assert loss["kld_mean"] > 1e-9
    measured = result(capsys, "eval", "tiny:q8_0", "--text", str(text), "--ctx", "64")
    assert measured["perplexity"] == pytest.approx(loss["candidate"]["perplexity"], rel=1e-6)


def test_a_model_with_children_is_kept(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, "pull", str(tiny))
    result(capsys, "convert", "tiny", "--to", "gguf")
    assert result(capsys, "rm", "tiny:original", code=2)["error"]["exit_code"] == 2
    assert result(capsys, "rm", "tiny:f16")["removed"] == "tiny:f16"
    assert result(capsys, "rm", "tiny:original")["removed"] == "tiny:original"
    assert result(capsys, "list")["models"] == []
    assert (tiny / "model.safetensors").exists(), "the user's own file stays"


def test_pulling_again_changes_nothing(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = result(capsys, "pull", str(tiny))
    assert result(capsys, "pull", str(tiny)) == first
    other = write_llama(tiny.parent / "other", seed=1)
    assert result(capsys, "pull", str(other), "--name", "tiny", code=2)["error"]["kind"] == "OutputExistsError"
    assert result(capsys, "pull", str(other), "--name", "tiny", "--force")["ref"] == "tiny:original"


def test_a_url_is_recorded_without_its_query(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from weightsmith import pull as pulling
    from weightsmith.catalog import Catalog
    from weightsmith.sources import Fetched, FetchedFile

    model = tmp_path / "m.gguf"
    assert run(["convert", str(write_llama(tmp_path / "tiny")), "--to", "gguf", "-o", str(model), "-q"]) == 0

    def fetch(source: Any, into: Path, **_: Any) -> Fetched:
        data = model.read_bytes()
        (into / "m.gguf").write_bytes(data)
        import hashlib

        return Fetched(into, (FetchedFile("m.gguf", len(data), hashlib.sha256(data).hexdigest()),), {"kind": "url"})

    monkeypatch.setattr(pulling, "fetch", fetch)
    entry = pulling.pull(Catalog(), "https://example.org/m.gguf?signature=SECRET")
    assert "SECRET" not in (entry.folder / "weightsmith.json").read_text()


def test_output_goes_where_it_is_told(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "made.gguf"
    assert result(capsys, "quantize", str(tiny), "--to", "gguf:Q4_0", "-o", str(out))["path"] == str(out)
    assert result(capsys, "list")["models"] == []
    refused = result(capsys, "quantize", str(tiny), "--to", "gguf:Q4_0", "-o", str(out), code=2)
    assert str(out) in refused["error"]["path"]
    result(capsys, "quantize", str(tiny), "--to", "gguf:Q4_0", "-o", str(out), "--force")


def test_a_plan_is_exact(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = result(capsys, "quantize", str(tiny), "--to", "gguf:Q5_1", "--dry-run")
    made = result(capsys, "quantize", str(tiny), "--to", "gguf:Q5_1", "-o", str(tmp_path / "m.gguf"))
    assert planned["dry_run"]
    assert (planned["tensor_bytes"], planned["types"]) == (made["tensor_bytes"], made["types"])
    shown = result(capsys, "show", str(tmp_path / "m.gguf"))
    assert shown["tensor_bytes"] == made["tensor_bytes"]


def test_rows_that_do_not_fit_are_told_and_refused_when_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = write_llama(tmp_path / "odd", intermediate_size=80)
    made = result(capsys, "quantize", str(odd), "--to", "gguf:Q4_0", "-o", str(tmp_path / "m.gguf"))
    assert {(f["wanted"], f["got"]) for f in made["fallbacks"]} == {("Q4_0", "F16"), ("Q6_K", "Q8_0")}
    strict = result(
        capsys, "quantize", str(odd), "--to", "gguf:Q4_0", "-o", str(tmp_path / "n.gguf"), "--strict", code=1
    )
    assert "down_proj" in strict["error"]["tensor"]
    assert not (tmp_path / "n.gguf").exists()


def test_types_by_pattern(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "m.gguf")
    result(capsys, "quantize", str(tiny), "--to", "gguf:Q4_0", "-o", out, "--tensor-type", "ffn_down=q8_0", "--pure")
    types = {t["name"]: t["type"] for t in result(capsys, "show", out, "--tensors")["tensor_list"]}
    assert types["blk.1.ffn_down.weight"] == "Q8_0"
    assert types["output.weight"] == "Q4_0"


def test_split_files(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, "convert", str(tiny), "--to", "gguf", "-o", str(tmp_path / "m.gguf"), "--split", "90kB")
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    whole = result(capsys, "convert", str(parts[0]), "--to", "gguf", "-o", str(tmp_path / "whole.gguf"))
    assert whole["tensor_bytes"] == sum(
        t["bytes"] for t in result(capsys, "show", str(parts[0]), "--tensors")["tensor_list"]
    )


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_there_and_back_is_byte_identical(dtype: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder = write_llama(tmp_path / "tiny", dtype=dtype, tie_word_embeddings=dtype == "BF16")
    one, back, two = tmp_path / "one.gguf", tmp_path / "back", tmp_path / "two.gguf"
    assert run(["convert", str(folder), "--to", "gguf", "-o", str(one), "-q"]) == 0
    assert run(["convert", str(one), "--to", "safetensors", "-o", str(back), "-q"]) == 0
    assert run(["convert", str(back), "--to", "gguf", "-o", str(two), "-q"]) == 0
    first, second = ({t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors} for path in (one, two))
    assert first == second


@pytest.mark.parametrize("threads", ["1", "3"])
def test_the_bytes_do_not_depend_on_threads(threads: str, tiny: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one.gguf", tmp_path / "many.gguf"
    assert run(["quantize", str(tiny), "--to", "gguf:Q4_0", "-o", str(one), "-q"]) == 0
    assert run(["quantize", str(tiny), "--to", "gguf:Q4_0", "-o", str(many), "-q", "--threads", threads]) == 0
    assert one.read_bytes() == many.read_bytes()


# ------------------------------------------------------------------ usage, help, completion


def test_every_verb_has_json_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    from weightsmith.cli.app import cli

    for verb in cli.list_commands(None):  # type: ignore[arg-type]
        assert run([verb, "--help"]) == 0
        assert "--json" in capsys.readouterr().out, verb


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ([], 2),
        (["nonsense"], 2),
        (["convert", "x"], 2),
        (["convert", "./absent", "--to", "gguf", "-o", "out"], 7),
        (["show", "no-such-model"], 7),
        (["show", "~no-such-user/model"], 7),
        (["show", "x/" + "y" * 300], 7),
        (["pull", "llama-9000"], 7),
        (["pull", "ftp://host/file"], 2),
        (["quantize", "smollm2-135m", "--to", "gguf:Q4_0"], 7),
        (["rm", "no-such-model"], 7),
        (["eval", "no-such-model"], 7),
        (["verify", "no-such-model"], 7),
    ],
)
def test_exit_codes(args: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == code
    assert "Traceback" not in capsys.readouterr().err


def test_unknown_targets_name_the_known_ones(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(tiny), "--to", "onnx"]) == 2
    assert "gguf, safetensors" in capsys.readouterr().err
    assert run(["convert", str(tiny), "--to", "gguf:Q9_9"]) == 2
    assert "Q8_0" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tiny: Path) -> None:
    assert run(["pull", str(tiny), "-q"]) == 0
    env = os.environ | {"_WEIGHTSMITH_COMPLETE": f"{shell}_complete", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "weightsmith"]

    def complete(words: str, index: int) -> str:
        asked = {"COMP_WORDS": words, "COMP_CWORD": words.rsplit(maxsplit=1)[-1] if shell == "fish" else str(index)}
        done = subprocess.run(command, env=env | asked, capture_output=True, text=True, check=True)
        return done.stdout

    assert "quantize" in complete("weightsmith quan", 1)
    assert "tiny:original" in complete("weightsmith show tin", 2)
    assert "smollm2-135m" in complete("weightsmith pull smol", 2)


# ------------------------------------------------------------------ progress, interruption, full disks


def test_a_log_gets_plain_lines(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert run(["convert", str(tiny), "--to", "gguf", "-o", str(tmp_path / "m.gguf")]) == 0


def test_a_terminal_gets_a_bar_with_bytes_per_second(tiny: Path, tmp_path: Path) -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    command = [sys.executable, "-m", "weightsmith", "convert", str(tiny), "--to", "gguf"]
    command += ["-o", str(tmp_path / "m.gguf")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=slave) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
    os.close(master)
    assert process.returncode == 0
    assert b"m.gguf" in shown
    assert b"B/s" in shown


def slow_conversion(folder: Path, out: Path, home: Path) -> subprocess.Popen[str]:
    """A conversion that stops for a while inside its first slabs, so that it can be interrupted there."""
    code = (
        "import sys, time\nfrom weightsmith import transcode\nfrom weightsmith.cli.app import main\n"
        "move = transcode._move\n"
        "def slow(*args):\n    done = move(*args)\n    print('moved', flush=True)\n"
        "    time.sleep(0.3)\n    return done\n"
        "transcode._move = slow\n"
        f"main(['convert', {str(folder)!r}, '--to', 'gguf', '-o', {str(out)!r}])\n"
    )
    env = os.environ | {"WEIGHTSMITH_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interrupted_run_leaves_nothing(signum: int, code: int, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.gguf"
    process = slow_conversion(tiny, out, tmp_path / "home")
    assert process.stdout is not None
    assert process.stdout.readline() == "moved\n"
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list(out.parent.iterdir()) == []


def test_a_killed_run_leaves_no_output_and_the_next_one_succeeds(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.gguf"
    process = slow_conversion(tiny, out, tmp_path / "home")
    assert process.stdout is not None
    assert process.stdout.readline() == "moved\n"
    process.kill()
    process.communicate(timeout=60)
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf.part"]
    assert run(["convert", str(tiny), "--to", "gguf", "-o", str(out), "-q"]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]
    assert run(["show", str(out)]) == 0


def test_a_killed_run_in_the_catalog_is_cleaned_up(tiny: Path, tmp_path: Path) -> None:
    home = Path(os.environ["WEIGHTSMITH_HOME"])
    assert run(["pull", str(tiny), "-q"]) == 0
    code = (
        "import os\nfrom weightsmith import transcode\nfrom weightsmith.cli.app import main\n"
        "transcode._move = lambda *args: os.kill(os.getpid(), 9)\n"
        "main(['convert', 'tiny', '--to', 'gguf'])\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == -9
    assert [p for p in home.rglob("*.gguf") if "models" in p.parts] == []
    assert run(["convert", "tiny", "--to", "gguf", "-q"]) == 0
    assert list((home / "staging").glob("*/files")) == []


def test_a_full_disk_is_told_before_and_during(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno
    import shutil

    out = tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert run(["convert", str(tiny), "--to", "gguf", "-o", str(out / "m.gguf"), "-q"]) == 6
        assert "1000" not in capsys.readouterr().out
    real = os.pwrite

    def full(handle: int, data: Any, offset: int) -> int:
        if offset > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for target in ("gguf", "safetensors"):
            assert run(["convert", str(tiny), "--to", target, "-o", str(out / "m"), "-q"]) == 6
            assert str(out / "m") in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_a_read_only_folder_is_a_plain_error(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run(["convert", str(tiny), "--to", "gguf", "-o", str(tmp_path / "file" / "m.gguf"), "-q"]) != 0
    assert "file" in capsys.readouterr().err

"""Run commands as a user would and say what they took: seconds by the wall and of all cores, peak resident memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# A process that is started from a large one inherits that one's peak in its own count, so a small one starts it.
_LAUNCHER = """
import json, os, subprocess, sys, time
begun = time.perf_counter()
process = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - begun
rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(sys.argv[1], "w") as file:
    json.dump([seconds, rss, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime], file)
"""


@dataclass(frozen=True)
class Run:
    """Wall seconds, peak resident bytes, exit code and seconds on all cores of one finished command."""

    seconds: float
    peak_rss: int
    code: int = 0
    cpu: float = 0.0


def run(command: Sequence[str], log: Path, *, env: dict[str, str] | None = None) -> Run:
    """Run one command to its end, its output into `log`; its peak memory is the kernel's own count."""
    report = log.with_name(log.name + ".run")
    with open(log, "w") as sink:
        launch = [sys.executable, "-S", "-c", _LAUNCHER, str(report), *command]
        subprocess.run(launch, env=os.environ | (env or {}), stdout=sink, stderr=subprocess.STDOUT, check=True)
    return Run(*json.loads(report.read_text()))


def run_checked(command: Sequence[str], log: Path, *, env: dict[str, str] | None = None) -> Run:
    """As `run`; a command that fails ends the benchmark with what it said."""
    done = run(command, log, env=env)
    if done.code:
        sys.exit(f"failed: {' '.join(command)}\n{log.read_text()}")
    return done


def settle(*paths: Path) -> None:
    """Write dirty pages out and read the inputs once, so that every contestant starts from the same page cache."""
    os.sync()
    for path in paths:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            with open(file, "rb", buffering=0) as source:
                while source.read(1 << 24):
                    pass


def repeat(times: int, contestants: dict[str, Callable[[], Run]], before: Callable[[], None]) -> dict[str, list[Run]]:
    """Run every contestant `times` times, interleaved so that a drift of the machine meets all of them."""
    results: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(times):
        for name, contestant in contestants.items():
            before()
            results[name].append(contestant())
    return results


def median(runs: Sequence[Run]) -> Run:
    """Median seconds and largest peak."""
    seconds, cpu = (statistics.median(values) for values in ([r.seconds for r in runs], [r.cpu for r in runs]))
    return Run(seconds, max(r.peak_rss for r in runs), cpu=cpu)


def machine() -> str:
    """Processor, cores and memory, for the head of a table."""
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")),
            model,
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GB"

"""Running the jobs of a plan: in order of need, several at a time on request, none held up by another's failure.

With `workers` above 1 each job has a process of its own, so that memory, threads and a crash are its own too; the cores
are shared out. A job whose parent failed is not tried ("blocked"). A stop (Ctrl-C, SIGTERM) is passed on, and the next
run goes on where this one was.

Exit code of the whole: 130 if it was interrupted; else that of the first job in the plan that failed other than by a
gate; else 5 if a gate was missed; else 0.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess

from weightsmith.builds.gates import Originals
from weightsmith.builds.plan import Job
from weightsmith.builds.unit import Outcome, Settings, make
from weightsmith.errors import InterruptedRunError, QualityGateError
from weightsmith.transcode import default_threads

Told = Callable[[Outcome], None]


def run(jobs: Sequence[Job], settings: Settings, *, workers: int = 1, tell: Told = lambda _: None) -> list[Outcome]:
    """Do every job of `jobs` (parents first) and return what became of each, in that order.

    tell: called with each outcome when it is known. An interrupt ends the run; what was not done is "interrupted".
    """
    outcomes: dict[str, Outcome] = {}
    try:
        with _pool(workers, settings) as pool:
            _work_off(jobs, outcomes, pool, tell)
    except (KeyboardInterrupt, InterruptedRunError):
        for job in jobs:
            outcomes.setdefault(job.ref, Outcome(job.ref, "interrupted", job.builds))
    return [outcomes[job.ref] for job in jobs]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """The exit code of a run; the rule is in the module's text."""
    if any(outcome.status == "interrupted" for outcome in outcomes):
        return InterruptedRunError.exit_code
    for outcome in outcomes:
        if outcome.status == "failed":
            return int(outcome.error["exit_code"]) if outcome.error else 1
    return QualityGateError.exit_code if any(outcome.status == "gate" for outcome in outcomes) else 0


def _work_off(jobs: Sequence[Job], outcomes: dict[str, Outcome], pool: _Pool, tell: Told) -> None:
    def done(outcome: Outcome) -> None:
        outcomes[outcome.ref] = outcome
        tell(outcome)

    waiting = list(jobs)
    refs = {job.ref for job in jobs}
    while waiting or pool.busy:
        for job in list(waiting):
            parent = outcomes.get(job.parent) if job.parent is not None else None
            if job.parent in refs and parent is None:
                continue
            if parent is not None and parent.status not in ("made", "there"):
                waiting.remove(job)
                done(Outcome(job.ref, "blocked", job.builds, reasons=[f"{job.parent} {_went(parent)}"]))
            elif pool.is_free:
                waiting.remove(job)
                pool.start(job)
        for outcome in pool.finished():
            done(outcome)


def _went(outcome: Outcome) -> str:
    return {"gate": "did not pass its gate", "blocked": "was not made"}.get(outcome.status, "failed")


class _Pool:
    """Up to `workers` jobs at a time; with one worker they run right here."""

    def __init__(self, workers: int, settings: Settings) -> None:
        self.workers, self.settings = workers, settings
        self.running: dict[Connection, tuple[Job, SpawnProcess]] = {}
        self.here: list[Outcome] = []
        self.originals = Originals(device=settings.device, threads=settings.threads)
        self.context: SpawnContext = multiprocessing.get_context("spawn")
        if workers > 1 and settings.threads is None:
            self.settings = replace(settings, threads=max(1, default_threads() // workers))

    @property
    def busy(self) -> bool:
        """Whether something runs, or its outcome was not fetched yet."""
        return bool(self.running or self.here)

    @property
    def is_free(self) -> bool:
        """Whether another job may start."""
        return not self.here if self.workers == 1 else len(self.running) < self.workers

    def start(self, job: Job) -> None:
        """Begin `job`."""
        if self.workers == 1:
            self.here.append(make(job, self.settings, self.originals))
            return
        reader, writer = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_child, args=(writer, job, self.settings))
        process.start()
        writer.close()
        self.running[reader] = (job, process)

    def finished(self) -> Iterator[Outcome]:
        """Wait for at least one outcome, where something runs."""
        if self.workers == 1:
            yield from self.here
            self.here.clear()
            return
        for reader in wait(list(self.running)) if self.running else []:
            assert isinstance(reader, Connection)
            job, process = self.running[reader]
            try:
                outcome = reader.recv()
            except EOFError:
                outcome = None
            process.join()
            del self.running[reader]
            if outcome is None and process.exitcode == InterruptedRunError.exit_code:
                raise InterruptedRunError("interrupted")
            yield outcome or _died(job, process.exitcode)

    def stop(self) -> None:
        """Interrupt what runs and wait until it has kept what it has."""
        self.originals.close()
        for _, process in self.running.values():
            process.terminate()
        for _, process in self.running.values():
            process.join()


@contextmanager
def _pool(workers: int, settings: Settings) -> Iterator[_Pool]:
    pool = _Pool(workers, settings)
    try:
        yield pool
    finally:
        pool.stop()


def _child(writer: Connection, job: Job, settings: Settings) -> None:
    """A job in a process of its own: SIGTERM and SIGINT become an interrupt, as on the command line."""
    import signal  # noqa: PLC0415  (only the children set handlers)
    import sys  # noqa: PLC0415

    from weightsmith.progress import set_quiet  # noqa: PLC0415

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    set_quiet(True)
    try:
        writer.send(make(job, settings, Originals(device=settings.device, threads=settings.threads)))
    except (KeyboardInterrupt, InterruptedRunError):
        sys.exit(InterruptedRunError.exit_code)


def _died(job: Job, code: int | None) -> Outcome:
    message = f"its process ended with code {code}"
    hint = "Was it killed, or is memory short? --jobs 1 needs less." if code is not None and code < 0 else None
    error = {"kind": "ResourceError", "exit_code": 6, "message": message, "hint": hint, "path": None, "tensor": None}
    return Outcome(job.ref, "failed", job.builds, error=error)

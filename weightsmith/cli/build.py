"""`weightsmith build`: make what registry.yaml asks for and is missing or stale."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightsmith.cli.options import Size, common
from weightsmith.cli.output import emit, size_text, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsmith.builds.plan import Job
    from weightsmith.builds.unit import Settings

log = logging.getLogger(__name__)


@click.command("build")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--registry",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The registry.yaml to build from; the one in this folder by default.",
)
@click.option("--dry-run", is_flag=True, help="Say what would run and why, do nothing.")
@click.option("--jobs", "workers", type=click.IntRange(1), default=1, show_default=True, help="Jobs at a time.")
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), help="Write JUnit XML here.")
@click.option(
    "--summary",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a summary here: JSON if the name ends in .json, else Markdown, added to what stands there.",
)
@click.option("--threads", type=click.IntRange(1), help="Worker threads of a job; the cores, shared out, by default.")
@click.option("--max-memory", type=Size(), help="Most memory for the tensors that a job has under way.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda, for calibration and gates.")
@click.option("--offline", is_flag=True, help="Pull only what is already on this machine.")
@click.option("--any-version", is_flag=True, help="Keep what another version of weightsmith made by the same recipe.")
@common
def command(
    names: tuple[str, ...],
    registry: Path | None,
    dry_run: bool,
    workers: int,
    junit: Path | None,
    summary: Path | None,
    threads: int | None,
    max_memory: int | None,
    device: str,
    offline: bool,
    any_version: bool,
    as_json: bool,
) -> None:
    """Make the builds of registry.yaml, or those named (a build, a model, or name:tag), and what they need.

    What is there and was made from the same source by the same recipe is kept. A result is held against its gates, and
    its aliases move when it passes. One failure does not stop what does not depend on it. Exit code: that of the first
    job that failed; 5 if only gates were missed; 130 if interrupted (the next run goes on).
    """
    from weightsmith.builds import plan, report, run
    from weightsmith.builds.unit import Outcome, Settings
    from weightsmith.catalog import Catalog

    catalog = Catalog()
    known = [entry.name for entry in catalog.summaries() if entry.tag == plan.ORIGINAL]
    jobs = plan.chosen(plan.read(registry, home=catalog.home, known=known), names)
    settings = Settings(catalog.home, threads, max_memory, device, offline, any_version)
    if dry_run:
        _show_plan(jobs, settings, as_json)
        return

    def tell(outcome: Outcome) -> None:
        level = logging.INFO if outcome.status in ("there", "made") else logging.WARNING
        log.log(
            level, "%s: %s (%s)", outcome.ref, report.WORDS[outcome.status], report.reason(outcome) or "nothing to do"
        )

    outcomes = run.run(jobs, settings, workers=workers, tell=tell)
    report.write(outcomes, junit_file=junit, summary_file=summary)
    result = report.summary(outcomes)
    rows = [
        (o.ref, report.WORDS[o.status], size_text(o.nbytes) if o.nbytes else "", f"{o.seconds:.1f}", report.reason(o))
        for o in outcomes
    ]
    text = table(rows, ["model", "result", "size", "seconds", "why"]) if rows else "registry.yaml has no builds."
    emit(result, text, as_json=as_json)
    if result["exit_code"]:
        raise click.exceptions.Exit(result["exit_code"])


def _show_plan(jobs: Sequence[Job], settings: Settings, as_json: bool) -> None:
    from weightsmith.builds.unit import standing, why

    pending: set[str] = set()
    found, rows = [], []
    for job in jobs:
        reasons = why(job, settings, frozenset(pending))
        if reasons:
            pending.add(job.ref)
        how = f"{job.parent} by {job.recipe_name} ({job.target})" if job.target else "pull"
        missed = [] if reasons else standing(job, settings)
        found.append({"ref": job.ref, "how": how, "runs": bool(reasons), "reasons": reasons, "missed": missed})
        rows.append((job.ref, how, "; ".join(reasons or missed) or "up to date"))
    text = table(rows, ["model", "how", "why"]) if rows else "registry.yaml has no builds."
    emit({"dry_run": True, "jobs": found}, text, as_json=as_json)

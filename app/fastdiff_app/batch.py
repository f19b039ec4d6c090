"""`fastdiff batch`: outputs for a whole file of jobs; kill it and start it again, nothing is lost.

Under torchrun each rank works by itself and the first one reports; started on several machines over one shared folder,
each start does a share of the work. With `--ray` a Ray cluster hands the work out instead: RAY_ADDRESS's, or one of
this machine.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from fastdiff_app import images
from fastdiff_app.console import err, out
from fastdiff_app.engine import read_plan, student_course
from fastdiff_app.failures import ExitCode, Failure, is_installed, one_line
from fastdiff_app.generate import USUAL_GUIDANCE, USUAL_STEPS

if TYPE_CHECKING:
    from fastdiff_pipelines.batch import BatchJob, Item, Jobs, Progress, Stop, Summary

LINE_EVERY_S = 2.0


@dataclass(frozen=True)
class Run:
    """How a file of jobs is run; see `fastdiff_pipelines.batch.BatchJob` for what its settings mean.

    Attributes:
        progress: "bar", "json" (a line on stdout every other second) or "none".
        ray: let a Ray cluster hand the work out.
        student: a few-step student to draw with.
    """

    jobs: Path
    folder: Path
    model: str | None = None
    plan: str | None = None
    compile: bool | None = None
    format: str = "png"
    dtype: str = "auto"
    seed: int = 0
    batch: int = 8
    workers: int | None = None
    attempts: int = 3
    lease_s: float = 60.0
    verify: str = "size"
    progress: str = "bar"
    ray: bool = False
    student: str | None = None

    def __post_init__(self) -> None:
        if self.progress not in ("bar", "json", "none"):
            raise Failure(ExitCode.USAGE, f"--progress must be bar, json or none, not {self.progress}")
        if self.ray and not is_installed("ray"):
            raise Failure(ExitCode.MISSING, 'ray is not installed; run: pip install "fastdiff[ray]"')


def defaults(
    steps: int | None,
    guidance: float | None,
    size: str | None,
    negative: str,
    frames: int | None,
    student: str | None = None,
    model: str | None = None,
) -> "Item":
    """What holds for lines that do not say otherwise, or `Failure`; steps and guidance are the student's, or usual."""
    from fastdiff_pipelines.batch import Item

    usual = (USUAL_STEPS, USUAL_GUIDANCE) if student is None else student_course(student, model)
    steps, guidance = usual[0] if steps is None else steps, usual[1] if guidance is None else guidance
    height, width = images.parse_size(size) or (None, None)
    try:
        return Item("-", negative, None, height, width, steps, guidance, frames)
    except ValueError as error:
        raise Failure(ExitCode.USAGE, one_line(error)) from error


def batch(run: Run, defaults: "Item") -> None:
    """Makes everything the file asks for that is not there yet.

    Raises:
        Failure: nothing could be done; or PARTLY when some lines gave no output, INTERRUPTED when it was stopped.
    """
    from fastdiff_pipelines.batch import JobError, read_jobs

    try:
        jobs = read_jobs(run.jobs, defaults)
        for problem in jobs.problems:
            err.print(problem, markup=False, style="red")
        if not jobs.items:
            raise Failure(ExitCode.INPUT, f"no line of {run.jobs} asks for something possible")
        job = _job(run, jobs)
        way = _on_ray if run.ray else _ranked if _world() > 1 else _whole
        summary = way(job, run)
    except JobError as error:
        raise Failure(ExitCode(error.code), str(error)) from error
    _report(job, jobs, summary, run)


def _job(run: Run, jobs: "Jobs") -> "BatchJob":
    from fastdiff_pipelines.batch import BatchJob

    try:
        return BatchJob(
            jobs.items,
            run.folder,
            model=run.model,
            plan=read_plan(run.plan, run.compile, run.student),
            dtype=run.dtype,
            format=run.format,
            seed=run.seed,
            batch=run.batch,
            workers=run.workers,
            attempts=run.attempts,
            lease_s=run.lease_s,
            verify=run.verify,
        )
    except ValueError as error:
        raise Failure(ExitCode.USAGE, one_line(error)) from error


def _whole(job: "BatchJob", run: Run) -> "Summary":
    with _stoppable() as stop, _shown(run.progress) as show:
        return job.run(show, lambda line: err.print(line, markup=False, style="yellow"), stop)


def _on_ray(job: "BatchJob", run: Run) -> "Summary":
    from fastdiff_pipelines.batch.on_ray import run_on_ray

    with _shown(run.progress) as show:
        return run_on_ray(job, on_progress=show)


def _world() -> int:
    """How many ranks torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _ranked(job: "BatchJob", run: Run) -> "Summary":
    rank, place = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    devices = job.settings.devices
    with _stoppable() as stop, _shown(run.progress if rank == 0 else "none") as show:
        return job.run_here(None, show, stop, devices[place % len(devices)], closes=rank == 0)


@contextmanager
def _stoppable() -> "Iterator[Stop]":
    """Counts Ctrl-C and SIGTERM for the length of a block: once finishes the running batches, twice gives them up."""
    from fastdiff_pipelines.batch import Stop

    stop = Stop()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(one) for one in signals]

    def ask(*_: object) -> None:
        stop.ask()
        more = "finishing the running batches; once more gives them up" if stop.asked == 1 else "giving up"
        err.print(more, style="yellow")

    for one in signals:
        signal.signal(one, ask)
    try:
        yield stop
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)


@contextmanager
def _shown(kind: str) -> "Iterator[Callable[[Progress], None]]":
    """Gives what shows a job's progress."""
    if kind == "none":
        yield lambda progress: None
    elif kind == "json":
        yield _lines()
    else:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Bars(*columns, console=err, transient=not err.is_terminal) as bars:
            bar = bars.add_task("starting", total=None)

            def show(now: "Progress") -> None:
                finished = now.done + now.skipped + now.failed
                bars.update(bar, total=now.total, completed=finished, description=_words(now))

            yield show


def _lines() -> "Callable[[Progress], None]":
    last, settled = 0.0, -1

    def show(now: "Progress") -> None:
        nonlocal last, settled
        finished = now.done + now.skipped + now.failed
        ended = finished == now.total and finished > settled
        if ended or time.monotonic() - last >= LINE_EVERY_S:
            last, settled = time.monotonic(), finished
            out.print(json.dumps(now.row()), markup=False)

    return show


def _words(now: "Progress") -> str:
    if now.per_second is None:
        return "starting"
    pace = f"{now.per_second:.2f}/s" if now.per_second >= 0.1 else f"{1 / now.per_second:.1f} s each"
    failed = f" · {now.failed} failed" if now.failed else ""
    return f"{pace} · {_duration(now.left_s or 0.0)} left{failed}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _report(job: "BatchJob", jobs: "Jobs", summary: "Summary", run: Run) -> None:
    asked = dict(zip(job.ids(), jobs.lines, strict=True))
    for name, line in summary.failed.items():
        err.print(f"{run.jobs}:{asked[name]}: {line['error']}: {line['message']}", markup=False, style="red")
    failed = len(summary.failed) + len(jobs.problems)
    again = f", {summary.aliases} asked for twice" if summary.aliases else ""
    left = f", {summary.left} still to do" if summary.left else ""
    err.print(
        f"{run.folder}: {summary.done} made, {summary.skipped} there already, {failed} failed{again}{left}"
        f" in {_duration(summary.seconds)}; see {run.folder / 'index.html'}",
        markup=False,
    )
    if summary.left:
        raise Failure(ExitCode.INTERRUPTED, f"stopped; the same command makes the {summary.left} that are left")
    if failed:
        raise Failure(ExitCode.PARTLY, f"{failed} of the lines of {run.jobs} gave no output")

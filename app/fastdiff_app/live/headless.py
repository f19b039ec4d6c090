"""Live sessions without a page: `fastdiff stream --source`, and `fastdiff replay`."""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff_app import outputs
from fastdiff_app.console import err
from fastdiff_app.failures import ExitCode, Failure, one_line, require_torch


@dataclass(frozen=True)
class LiveJob:
    """Everything `fastdiff stream --source` was asked for.

    Attributes:
        settings: keyword arguments of `fastdiff_pipelines.Settings`.
        fps: at which files and folders are played, and sinks are told; live sources come as they come.
        json: where the ledger goes.
        record: where the recording goes.
        frames: how many of the source's frames are taken at most.
        compile, strict: of the plan.
    """

    source: str
    sink: str
    settings: dict[str, Any]
    model: str | None = None
    plan: str | None = None
    size: tuple[int, int] | None = None
    fps: float = 30.0
    target_ms: float | None = None
    seconds: float | None = None
    json: Path | None = None
    record: Path | None = None
    frames: int | None = None
    compile: bool | None = None
    strict: bool = False


def stream(
    source: str,
    sink: str,
    prompt: str | None,
    fps: float,
    seconds: float | None,
    target_ms: float | None,
    json: Path | None,
    record: Path | None,
    common: dict[str, Any],
) -> None:
    """`fastdiff stream --source`; `common` is what it shares with the other ways to stream, by its options' names."""
    names = ("steps", "strength", "guidance", "guidance_scale", "sampler", "noise", "seed")
    settings = {"prompt": prompt or "", "negative_prompt": common["negative"]} | {one: common[one] for one in names}
    model, plan, size = (common[name] for name in ("model", "plan", "size"))
    others = {"frames": common["most_frames"], "compile": common["compile"], "strict": common["strict"]}
    run(LiveJob(source, sink, settings, model, plan, size, fps, target_ms, seconds, json, record, **others))


def run(job: LiveJob) -> dict[str, Any]:
    """Runs until the source ends; gives the ledger."""
    require_torch()
    if not 0 < job.fps <= 240:
        raise Failure(ExitCode.USAGE, f"--fps must be above 0 and at most 240, not {job.fps}")
    for path, suffix in ((job.json, ".json"), (job.record, ".fdrec")):
        if path is not None:
            outputs.check_writable(path, (suffix,))
    from fastdiff_app.live.model import NO_REPLAY, LiveModel
    from fastdiff_app.live.sinks import sink
    from fastdiff_app.live.sources import frames
    from fastdiff_pipelines.live import LiveSession, LiveWorker, Recording
    from fastdiff_pipelines.live.energy import energy_meter
    from fastdiff_pipelines.settings import Settings

    with ExitStack() as held:
        try:
            settings = Settings(**job.settings)
            model = LiveModel(job.model, settings, job.plan, job.size, job.target_ms, 1000 / job.fps,
                              job.compile, job.strict)  # fmt: skip
            held.enter_context(model)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise Failure(ExitCode.USAGE, f"the session cannot be set up: {one_line(error)}") from error
        assert model.size is not None
        recording = None
        if job.record is not None and not model.replays:
            raise Failure(ExitCode.USAGE, f"--record with --target-ms: {NO_REPLAY}; leave one of them out")
        if job.record is not None:
            about = {"model": job.model, "plan": job.plan, "compile": job.compile, "size": model.size}
            about["settings"] = job.settings
            recording = held.enter_context(closing(Recording(job.record, about)))
        problems: list[str] = []
        session = LiveSession(
            model.open, model.controls(), controller=model.controller(), target_ms=job.target_ms, lora=model.lora,
            on_problem=problems.append, recording=recording,
        )  # fmt: skip
        # streams are made and warmed before the first frame, not while it waits
        session.prepare()
        worker = LiveWorker(energy=energy_meter())
        worker.add(session)
        write = held.enter_context(sink(job.sink, job.fps, *model.size))
        feeder = _Feeder(session, worker, frames(job.source, *model.size), job)
        _until_ended(session, worker, feeder, write, model.size)
        found = session.summary() | {"problems": problems[:20]}
    if feeder.failure is not None:
        raise feeder.failure
    if job.json is not None:
        outputs.write_json(job.json, found)
    _say(found)
    return found


class _Feeder(threading.Thread):
    """Takes frames at their time and offers them, whatever the model is doing."""

    def __init__(self, session: Any, worker: Any, found: Any, job: LiveJob):
        super().__init__(daemon=True)
        self.session, self.worker, self.found, self.job = session, worker, found, job
        self.failure: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        from fastdiff_app.live.sources import is_live, paced

        clock = self.session.clock
        try:
            if is_live(self.job.source):
                timed = ((clock(), frame) for frame in self.found)
            else:
                timed = paced(self.found, self.job.fps, clock)
            began = clock()
            for number, (captured, frame) in enumerate(timed):
                late = self.job.seconds is not None and captured - began >= self.job.seconds
                if self.ended.is_set() or late:
                    return
                self.session.offer(frame, number, captured)
                self.worker.wake()
                # not with the next one, which a source may not have
                if number + 1 == self.job.frames:
                    return
        except Exception as error:
            # after the end it is only the session that takes no more
            self.failure = None if self.ended.is_set() else error
        finally:
            self.ended.set()
            self.worker.wake()


def _until_ended(session: Any, worker: Any, feeder: _Feeder, write: Any, size: tuple[int, int]) -> None:
    """Turns in this thread until the source has ended and everything is out."""
    import numpy as np
    from PIL import Image

    from fastdiff_app.live.sinks import Ended

    def deliver() -> None:
        for one in session.take():
            picture = one.payload
            if picture.shape[:2] != size:
                picture = np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC))
            write(picture)
            session.sent(one)

    # pictures are written between turns, so that a sink's trouble is no trouble of the session's
    feeder.start()
    try:
        while not (feeder.ended.is_set() and not session.waits):
            if not worker.run_one():
                feeder.ended.wait(0.002)
            deliver()
        session.drain()
        deliver()
    except Ended:
        pass
    finally:
        feeder.ended.set()
        worker.remove(session)


def replay(path: Path, model: str | None, plan: str | None, sink_target: str | None, fps: float) -> None:
    """Runs a recording again and compares every picture by hash.

    Raises:
        Failure: it is no recording, or a picture differs (exit status 9).
    """
    require_torch()
    if not path.is_file():
        raise Failure(ExitCode.INPUT, f"no such recording: {path}")
    from fastdiff_app.live.model import LiveModel
    from fastdiff_app.live.sinks import sink
    from fastdiff_pipelines.live import replay as run_again
    from fastdiff_pipelines.live.recording import read
    from fastdiff_pipelines.settings import Settings

    try:
        about = next(read(path))[0]
        size = tuple(about["size"])
        settings = Settings(**{"prompt": "", **about["settings"]})
    except (ValueError, StopIteration, KeyError, TypeError) as error:
        raise Failure(ExitCode.INPUT, f"{path} is not a whole recording: {one_line(error)}") from error
    with ExitStack() as held:
        name = about["model"] if model is None else model
        live = LiveModel(name, settings, plan or about["plan"], size, compile=about.get("compile"))  # type: ignore[arg-type]
        made = held.enter_context(live)
        write = held.enter_context(sink(sink_target, fps, *size)) if sink_target else None  # type: ignore[misc]
        try:
            found = run_again(path, made.open, made.lora, (lambda one: write(one.image)) if write else lambda one: None)
        except ValueError as error:
            raise Failure(ExitCode.INPUT, one_line(error)) from error
    err.print(f"{found.frames} frames: {found.same} pictures the same, {found.different} different", markup=False)
    if found.different:
        raise Failure(ExitCode.PARTLY, f"the first picture that differs is {found.first_different}")


def _say(found: dict[str, Any]) -> None:
    frames, age = found["frames"], found["age_ms"]
    dropped = ", ".join(f"{count} {cause}" for cause, count in frames["dropped"].items()) or "none"
    ages = "" if age is None else f"; age p50 {age['p50']:.0f} ms, p95 {age['p95']:.0f}, p99 {age['p99']:.0f}"
    err.print(f"{frames['in']} frames in, {frames['shown']} shown, dropped: {dropped}{ages}", markup=False)
    if found["pace"] is not None and not found["pace"]["fits"]:
        err.print(f"the target could not be kept ({found['pace']['now']})", markup=False, style="yellow")
    for problem in found["problems"][:3]:
        err.print(problem, markup=False, style="yellow")

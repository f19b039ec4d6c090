"""Live sessions: ages under overload, in a browser, fairness, leaks, neighbours and deadlines.

Rows have their figures in `quality`; those on a clock that only work moves are the same on every machine. `ratio` is
not used.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np

from benchmarks.chromium import browser, find
from benchmarks.record import Record, Row, could_not_run, percentile
from fastdiff.quality import Interval
from fastdiff_app.live.model import LiveModel
from fastdiff_pipelines.live import Controls, IdentityStream, LiveSession, LiveWorker, jain
from fastdiff_pipelines.live.virtual import TimedStream, VirtualClock, camera, viewer
from fastdiff_pipelines.live.virtual import run as pass_time
from fastdiff_pipelines.settings import Settings

FPS = 30
SERVICE_MS = 50.0
BROWSER_S = 30.0
SOAK_FRAMES = 10_000
DEADLINE_FRAMES = 300


def run(full: bool = False) -> Record:
    """All rows; `full` watches the browser and the soak for longer."""
    record = Record("live")
    suites: dict[str, Callable[[], Row]] = {
        "overload": overload,
        "browser": lambda: in_browser(BROWSER_S * (4 if full else 1)),
        "users-4": users_4,
        "soak": lambda: soak(SOAK_FRAMES * (10 if full else 1)),
        "slow-neighbour": slow_neighbour,
        "deadline": deadline,
    }
    for name, suite in suites.items():
        try:
            record.rows.append(suite())
        except Exception as error:
            record.rows.append(could_not_run(name, error))
    return record.finish()


def _timed_session(clock: VirtualClock, service: Callable[[TimedStream], float]) -> LiveSession:
    made = LiveSession(lambda scale, plan: TimedStream(clock, service, scale), Controls(Settings("", steps=1)),
                       clock=clock)  # fmt: skip
    viewer(made)
    return made


def _exact(**values: float) -> dict[str, Interval]:
    return {name: Interval.exact(value) for name, value in values.items()}


def overload() -> Row:
    """A camera of 30 fps on a model of 50 ms, on a virtual clock."""
    clock = VirtualClock()
    worker, session = LiveWorker(clock), _timed_session(clock, lambda stream: SERVICE_MS)
    worker.add(session)
    camera(clock, session, FPS, 60)
    pass_time(clock, worker.run_one, 60)
    ages = session.ledger.ages()
    figures = _exact(age_ms_p99=percentile(ages, 99), age_ms_most=max(ages), shown=float(len(ages)))
    return Row("overload", quality=figures, note=f"virtual clock, 60 s of {FPS} fps on {SERVICE_MS:g} ms")


def users_4() -> Row:
    """Four people with unlike cameras and models of unlike cost, on a virtual clock."""
    clock = VirtualClock()
    worker = LiveWorker(clock)
    costs = [20.0 + 15 * i for i in range(4)]
    sessions = [_timed_session(clock, lambda stream, cost=cost: cost) for cost in costs]
    for number, session in enumerate(sessions):
        worker.add(session)
        camera(clock, session, FPS * (1 + number), 60)
    pass_time(clock, worker.run_one, 60)
    shown = [session.ledger.summary()["frames"]["shown"] for session in sessions]
    shares = [count * cost for count, cost in zip(shown, costs, strict=True)]
    return Row("users-4", quality=_exact(jain=jain(shares)), note="of the model's time, virtual clock, 60 s")


@contextlib.contextmanager
def _serving(model: LiveModel, page: bool) -> Iterator[tuple[str, Any]]:
    """A server of this process's own in a thread: its address and its `Live`."""
    import uvicorn

    from fastdiff_app.live import pictures
    from fastdiff_app.live.server import Serving, build

    with model:
        app = build(model, Serving(), page=page)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", ws_per_message_deflate=False,
                                ws_max_size=2 * pictures.MOST_BYTES, timeout_graceful_shutdown=1)  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        try:
            yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app.live
        finally:
            server.should_exit = True
            thread.join(30)


STATE = "[...document.querySelectorAll('*')].find((one) => one.fastdiff).fastdiff"


def in_browser(seconds: float) -> Row:
    """Chromium's made-up camera through the page and the identity model at 512 pixels: glass to glass."""
    if find() is None:
        return could_not_run("browser", "no chromium is installed (Debian: apt install chromium)")
    model = LiveModel("identity", Settings(""))
    with _serving(model, page=True) as (address, live), browser() as page:
        page.go(f"http://{address}/")
        page.until("!!document.querySelector('.fd-start')", 60)
        page.run("document.querySelector('.fd-start').click()")
        page.until(f"{STATE}.shown > 60", 60)
        page.run(f"(() => {{ const s = {STATE}; s.ages.length = s.ids.length = s.times.length = 0; }})()")
        time.sleep(seconds)
        ages, ids = page.run(f"{STATE}.ages"), page.run(f"{STATE}.ids")
        stages = live.worker.sessions[0].ledger.summary()["stages_ms"]
        complaints = list(page.complaints)
    if complaints or any(b <= a for a, b in itertools.pairwise(ids)):
        raise RuntimeError(f"ids did not rise, or the console complained: {complaints[:2]}")
    figures = _exact(glass_to_glass_ms_p50=median(ages), glass_to_glass_ms_p95=percentile(ages, 95),
                     fps=len(ages) / seconds)  # fmt: skip
    slow = max(stages, key=lambda name: stages[name]["p50"])
    return Row("browser", quality=figures, note=f"identity model, 512 pixels, {seconds:g} s; longest stage: {slow}")


def soak(frames: int) -> Row:
    """Many frames through a session: what memory each leaves behind."""
    import psutil

    process = psutil.Process()
    session = LiveSession(lambda scale, plan: IdentityStream(64, 64), Controls(Settings("")))
    viewer(session)
    worker = LiveWorker()
    worker.add(session)
    picture = np.zeros((64, 64, 3), np.uint8)
    held: list[int] = []
    places: list[int] = []
    for number in range(frames):
        session.offer(picture, number)
        worker.run_one()
        # the ledger's window and the allocator fill up first
        if number % 250 == 0 and number >= frames // 4:
            gc.collect()
            places.append(number)
            held.append(process.memory_info().rss)
    slope = float(np.polyfit(places, held, 1)[0])
    return Row("soak", quality=_exact(bytes_per_frame=slope), note=f"slope of resident memory over {frames} frames")


def slow_neighbour() -> Row:
    """How much later pictures of one viewer are when another's never get read, on a virtual clock."""

    def p95(neighbour: bool) -> float:
        clock = VirtualClock()
        worker, session = LiveWorker(clock), _timed_session(clock, lambda stream: 6.0)
        sessions = [session]
        if neighbour:
            sessions.append(_timed_session(clock, lambda stream: 6.0))
            sessions[1].on_ready = lambda: None
        for number, one in enumerate(sessions):
            worker.add(one)
            camera(clock, one, FPS, 60, start=number * 0.011)
        pass_time(clock, worker.run_one, 60)
        return percentile(session.ledger.ages(), 95)

    alone, beside = p95(False), p95(True)
    figures = _exact(p95_ms_alone=alone, p95_ms_beside=beside, p95_change=beside / alone - 1)
    return Row("slow-neighbour", quality=figures, note="a viewer who never reads, virtual clock, 60 s")


class _Slowed:
    """A denoiser that does its work twice or more when told to."""

    def __init__(self, module: Any):
        self.module, self.times = module, 1
        self._handle = module.register_forward_pre_hook(self._before, with_kwargs=True)
        self._inside = False

    def _before(self, module: Any, words: Any, named: Any) -> None:
        if not self._inside:
            self._inside = True
            for _ in range(self.times - 1):
                module(*words, **named)
            self._inside = False

    def remove(self) -> None:
        """Leave it as it was."""
        self._handle.remove()


def deadline() -> Row:
    """The embedded model, paced, suddenly twice as slow: misses from a second later on, and changes of settings."""
    from fastdiff_pipelines.live import measure

    settings = Settings("a big green circle on a plain white background", steps=4, strength=0.6)
    with LiveModel(None, settings) as model:
        model.rungs = measure(model.ladder(), model._timed)
        # a camera slow enough and a target wide enough for the model as measured, too tight for it at half speed
        asked = model.rungs[0].cost_ms
        model.interval_ms = 1.3 * asked
        model.target_ms = 1.35 * (model.rungs[0].inside_ms(1.0, model.interval_ms) + model.interval_ms)
        controller = model.controller()
        session = LiveSession(model.open, model.controls(), controller=controller)
        viewer(session)
        worker, slowed = LiveWorker(), _Slowed(model.pipe.unet)
        worker.add(session)
        try:
            judged, late = _paced(session, worker, slowed, model.interval_ms / 1000, model.target_ms)
        finally:
            slowed.remove()
    assert controller is not None
    times = [decision.at for decision in controller.decisions]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    figures = _exact(miss_share=late / max(1, judged), frames=float(judged), changes=float(len(times)),
                     least_s_between=min(gaps, default=float("inf")) if gaps else 0.0)  # fmt: skip
    note = (
        f"target {model.target_ms:.0f} ms, camera {1000 / model.interval_ms:.1f} fps; ended at {controller.rung.name}"
    )
    return Row("deadline", quality=figures, note=note)


def _paced(
    session: LiveSession, worker: LiveWorker, slowed: _Slowed, interval_s: float, target_ms: float
) -> tuple[int, int]:
    """Frames at their time through a real model: those judged from a second after the slow-down on, and the late."""
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    began = session.clock()
    slowed_at: float | None = None
    judged = late = number = 0

    def judge() -> None:
        nonlocal judged, late
        for one in session.take():
            session.sent(one)
            now = session.clock()
            if slowed_at is not None and now - slowed_at > 1:
                judged += 1
                late += (now - one.journey.captured) * 1000 > target_ms

    session.on_ready = judge
    stop = threading.Event()

    def shoot() -> None:
        nonlocal number
        while not stop.is_set():
            due = began + number * interval_s
            time.sleep(max(0.0, due - session.clock()))
            # each frame differs, or the similarity filter would rightly skip them
            session.offer(np.roll(picture, 7 * number, axis=1), number, due)
            number += 1

    thread = threading.Thread(target=shoot, daemon=True)
    thread.start()
    while judged < DEADLINE_FRAMES and session.clock() - began < 240:
        if slowed_at is None and session.clock() - began > 5:
            slowed_at, slowed.times = session.clock(), 2
        if not worker.run_one():
            time.sleep(0.001)
    stop.set()
    thread.join()
    return judged, late

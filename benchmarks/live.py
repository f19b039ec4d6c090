"""Live sessions: ages under overload, in a browser, fairness, leaks, neighbours and deadlines.

Rows have their figures in `quality`; those on a clock that only work moves are the same on every machine. `ratio` is
not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.chromium import browser, find
from benchmarks.record import Record, Row, could_not_run, percentile
from benchmarks.slow_line import alone_ms, slow_line
from benchmarks.slowed import Slowed, paced
from benchmarks.viewers import Person, visit, watch
from fastdiff.quality import Interval
from fastdiff_app.live import messages, pictures
from fastdiff_app.live.model import LiveModel, worthwhile
from fastdiff_pipelines.live import Controls, IdentityStream, LiveSession, LiveWorker, jain
from fastdiff_pipelines.live.virtual import TimedStream, VirtualClock, camera, viewer
from fastdiff_pipelines.live.virtual import run as pass_time
from fastdiff_pipelines.settings import Settings
from fastdiff_pipelines.slots import Output

FPS = 30
SERVICE_MS = 50.0
BROWSER_S = 30.0
SOAK_FRAMES = 10_000
DEADLINE_FRAMES = 900
FRAME_BYTES = 40_000
TOGETHER_S = 25.0
SETTLED_S = 5.0


def run(full: bool = False) -> Record:
    """All rows; `full` watches the browser and the soak for longer."""
    record = Record("live")
    seconds = BROWSER_S * (4 if full else 1)
    suites: dict[str, Callable[[], Row]] = {
        "overload": overload,
        "browser": lambda: in_browser("browser", LiveModel("identity", Settings("")), seconds),
        "line-75ms": lambda: in_browser("line-75ms", LiveModel("identity", Settings("")), seconds, 0.075),
        "line-75ms-model-50ms": lambda: in_browser(
            "line-75ms-model-50ms", _WaitingModel("identity", Settings("")), seconds, 0.075
        ),
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
    """Four people with unlike cameras: models of unlike cost on a virtual clock, and the embedded one over sockets."""
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
    with _embedded() as address:
        seen = watch(address, [Person(fps, TOGETHER_S) for fps in (30, 40, 50, 60)])
    found = _exact(jain=jain(shares), jain_sockets=jain([float(len(ages)) for ages in seen]),
                   fps_sockets=sum(map(len, seen)) / TOGETHER_S)  # fmt: skip
    return Row("users-4", quality=found, note="of the model's time: virtual clock, 60 s; four processes over sockets")


@contextlib.contextmanager
def _embedded() -> Iterator[str]:
    """The address of a server of the embedded model at one step."""
    with serving(LiveModel(None, Settings("a red circle", steps=1)), page=False) as (address, _, _):
        yield address


@contextlib.contextmanager
def serving(model: LiveModel, page: bool) -> Iterator[tuple[str, Any, asyncio.AbstractEventLoop]]:
    """A server of this process's own in a thread: its address, its `Live` and its loop."""
    import uvicorn

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
            where = server.servers[0]
            yield f"127.0.0.1:{where.sockets[0].getsockname()[1]}", app.live, where.get_loop()
        finally:
            server.should_exit = True
            thread.join(30)


STATE = "[...document.querySelectorAll('*')].find((one) => one.fastdiff).fastdiff"


class _Waiting(IdentityStream):
    """A model that takes its time and no processor."""

    def push(self, frame: Any = None, frame_id: Any = None, captured: float | None = None) -> list[Output]:
        """As `IdentityStream.push`, later."""
        time.sleep(SERVICE_MS / 1000)
        found = super().push(frame, frame_id, captured)
        for one in found:
            one.timings.denoise_ms = SERVICE_MS
        return found


class _WaitingModel(LiveModel):
    def open(self, scale: float = 1.0, plan: str | None = None) -> Any:
        """A stream that waits."""
        assert self.size is not None
        return _Waiting(*self.size)


def in_browser(name: str, model: LiveModel, seconds: float, delay_s: float = 0.0) -> Row:
    """Chromium's made-up camera through the page and a model: glass to glass, over a line that may take its time."""
    if find() is None:
        return could_not_run(name, "no chromium is installed (Debian: apt install chromium)")
    # what the line takes by itself for frames there and back
    line = alone_ms(delay_s, FRAME_BYTES, FPS, 5 * FPS) if delay_s else []
    with contextlib.ExitStack() as held:
        address, live, _ = held.enter_context(serving(model, page=True))
        if delay_s:
            address = f"127.0.0.1:{held.enter_context(slow_line(int(address.split(':')[1]), delay_s))}"
        page = held.enter_context(browser())
        page.go(f"http://{address}/")
        page.until("!!document.querySelector('.fd-start')", 60)
        page.run("document.querySelector('.fd-start').click()")
        page.until(f"{STATE}.shown > 60", 60)
        # the camera's rate and the line's length are learnt by now
        page.run("new Promise((done) => setTimeout(done, 4000))")
        page.run(f"for (const one of ['ages', 'ids', 'times', 'lags']) {STATE}[one].length = 0")
        began = time.perf_counter()
        page.run(f"new Promise((done) => setTimeout(done, {1000 * seconds / 2}))")
        page.run(f"new Promise((done) => setTimeout(done, {1000 * seconds / 2}))")
        ages, ids, lags, trips = (page.run(f"{STATE}.{one}") for one in ("ages", "ids", "lags", "trips"))
        took = time.perf_counter() - began
        summary = live.worker.sessions[0].ledger.summary()
        complaints = list(page.complaints)
    if complaints or any(b <= a for a, b in itertools.pairwise(ids)):
        raise RuntimeError(f"ids did not rise, or the console complained: {complaints[:2]}")
    trip = min(one for _, one in trips)
    figures = _exact(
        glass_to_glass_ms_p50=median(ages), glass_to_glass_ms_p95=percentile(ages, 95), fps=len(ages) / took,
        round_trip_ms=trip, over_round_trip_ms_p95=percentile(ages, 95) - trip,
        unexplained_ms_p95=summary["unexplained_ms"]["p95"],
    )  # fmt: skip
    known = [lag for lag in lags if lag is not None]
    if known:
        figures |= _exact(camera_to_page_ms_p50=median(known))
    if line:
        figures |= _exact(line_alone_ms_p50=median(line), line_alone_ms_p95=percentile(line, 95))
    assert model.size is not None
    since = "the camera's own time" if known else "the page's having the frame"
    work = f"a pause of {SERVICE_MS:g} ms for a model" if isinstance(model, _WaitingModel) else "no model"
    stages = {stage: spread["p50"] for stage, spread in summary["stages_ms"].items() if spread["p50"] >= 0.5}
    note = (
        f"{work}, {model.size[0]} pixels, {len(ages)} frames in {took:.0f} s, ids rose; age since {since}; "
        f"stages in ms at p50: {', '.join(f'{stage} {value:.1f}' for stage, value in stages.items())}"
    )
    return Row(name, quality=figures, note=note)


def soak(frames: int) -> Row:
    """Many frames over a WebSocket through the embedded model: what memory each leaves, and whether the loop stands."""
    import psutil

    process = psutil.Process()
    settings = Settings("a red circle", steps=1)
    picture = pictures.encode(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    with tempfile.TemporaryDirectory() as folder, _variable("GRADIO_TEMP_DIR", folder):
        with (
            serving(LiveModel(None, settings, size=(32, 32)), page=True) as (address, _, loop),
            _loop_watched(loop) as gaps,
        ):
            held, places = [], []
            for number in _viewed(address, picture, frames):
                # the ledger's window and the allocator fill up first
                if number % 100 == 0 and number >= frames // 4:
                    places.append(number)
                    held.append(process.memory_info().rss)
        left = sum(1 for one in Path(folder).rglob("*") if one.is_file())
    slope = float(np.polyfit(places, held, 1)[0])
    figures = _exact(bytes_per_frame=slope, files_left=float(left), loop_blocked_ms_max=1000 * max(gaps),
                     loop_blocked_ms_p99=1000 * percentile(gaps, 99))  # fmt: skip
    return Row(
        "soak",
        quality=figures,
        note=f"slope of resident memory over {frames} frames of the embedded model at 32 pixels",
    )


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _viewed(address: str, picture: bytes, frames: int) -> Iterator[int]:
    """A viewer who waits for each picture before sending the next frame: the number of pictures so far."""
    with visit(address) as socket:
        for number in range(frames):
            socket.send(messages.frame_in(number, 0.0, picture))
            while isinstance(data := socket.recv(), str) or isinstance(messages.read_frame_out(data), int):
                pass
            socket.send(messages.painted(number, 1.0))
            yield number


@contextlib.contextmanager
def _loop_watched(loop: asyncio.AbstractEventLoop) -> Iterator[list[float]]:
    """How much later than asked the server's event loop came back, each time in seconds."""
    gaps: list[float] = []
    ended = threading.Event()

    async def watch() -> None:
        while not ended.is_set():
            before = loop.time()
            await asyncio.sleep(0.005)
            gaps.append(loop.time() - before - 0.005)

    future = asyncio.run_coroutine_threadsafe(watch(), loop)
    try:
        yield gaps
    finally:
        ended.set()
        future.result(10)


def slow_neighbour() -> Row:
    """How much later pictures of one viewer are when another's never get read: over sockets, and on a virtual clock."""
    alone, beside = _p95_virtual(False), _p95_virtual(True)
    figures = _exact(virtual_p95_ms_alone=alone, virtual_p95_ms_beside=beside, virtual_p95_change=beside / alone - 1)
    who = Person(FPS / 2, TOGETHER_S, SETTLED_S)
    company = {
        "alone": [],
        "beside": [Person(FPS, TOGETHER_S, reads=False)],
        "beside_reader": [Person(FPS, TOGETHER_S)],
    }
    found = {}
    for name, others in company.items():
        with _embedded() as address:
            found[name] = percentile(watch(address, [who, *others])[0], 95)
    figures |= _exact(**{f"p95_ms_{name}": value for name, value in found.items()})
    figures |= _exact(p95_change=found["beside"] / found["alone"] - 1)
    note = f"the embedded model, {FPS // 2} fps beside {FPS} that nobody reads, from {SETTLED_S:g} s on; virtual, 60 s"
    return Row("slow-neighbour", quality=figures, note=note)


def _p95_virtual(neighbour: bool) -> float:
    clock = VirtualClock()
    worker, session = LiveWorker(clock), _timed_session(clock, lambda stream: 6.0)
    sessions = [session]
    if neighbour:
        sessions.append(_timed_session(clock, lambda stream: 6.0))
        sessions[1].on_ready = lambda: None
    for one in sessions:
        worker.add(one)
        camera(clock, one, FPS, 60)
    pass_time(clock, worker.run_one, 60)
    return percentile(session.ledger.ages(), 95)


def deadline() -> Row:
    """The embedded model, paced, suddenly twice as slow: misses from a second later on, and changes of settings."""
    from fastdiff_pipelines.live import measure

    settings = Settings("a big green circle on a plain white background", steps=4, strength=0.6)
    with LiveModel(None, settings) as model:
        model.rungs = worthwhile(measure(model.ladder(), model._timed), 1000 / FPS)
        # a camera slow enough and a target wide enough for the model as measured, too tight for it at half speed
        asked = model.rungs[0].cost_ms
        model.interval_ms = 1.3 * asked
        model.target_ms = 1.35 * (model.rungs[0].inside_ms(1.0, model.interval_ms) + model.interval_ms)
        controller = model.controller()
        session = LiveSession(model.open, model.controls(), controller=controller)
        viewer(session)
        worker, slowed = LiveWorker(), Slowed(model.pipe.unet)
        worker.add(session)
        try:
            judged, late = paced(session, worker, slowed, model.interval_ms / 1000, model.target_ms, DEADLINE_FRAMES)
        finally:
            slowed.remove()
    assert controller is not None
    frames = session.ledger.summary()["frames"]
    times = [decision.at for decision in controller.decisions]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    figures = _exact(miss_share_of_shown=late / max(1, judged), judged=float(judged),
                     dropped_share=1 - frames["shown"] / frames["in"], changes=float(len(times)),
                     least_s_between=min(gaps, default=float("inf")) if gaps else 0.0)  # fmt: skip
    note = (
        f"target {model.target_ms:.0f} ms, camera {1000 / model.interval_ms:.1f} fps; ended at {controller.rung.name}"
    )
    return Row("deadline", quality=figures, note=note)

"""Live sessions without waiting: a clock that only work moves, cameras on it, and a model that costs what it is told.

Queues, fairness and deadlines are decided by arithmetic here, to the millisecond and the same every time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastdiff_pipelines.live.session import LiveSession
from fastdiff_pipelines.settings import Settings
from fastdiff_pipelines.slots import Output, Timings

LOOK_S = 0.05
_PICTURE = np.zeros((1, 1, 3), np.uint8)
_PIXELS = torch.zeros(3, 1, 1)


class VirtualClock:
    """Seconds that pass when told to, with things that happen at their time."""

    def __init__(self):
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._count = 0

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, what: Callable[[], object]) -> None:
        """Let something happen at a time, or at once if that has passed."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what))

    def advance(self, seconds: float) -> None:
        """Let time pass, and what falls due happen."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            when, _, what = heapq.heappop(self._events)
            self.now = max(self.now, when)
            what()
        self.now = max(self.now, end)

    def next_event(self) -> float | None:
        """When the next thing happens; None when nothing will."""
        return self._events[0][0] if self._events else None


class TimedStream:
    """A stream of `Settings.steps` frames in flight whose push takes as long as a function of its settings says.

    Args:
        service_ms: milliseconds of a push, given the stream.
    """

    def __init__(self, clock: VirtualClock, service_ms: Callable[[TimedStream], float], scale: float = 1.0):
        self.clock, self.service_ms, self.scale = clock, service_ms, scale
        self.size = 1, 1
        self.settings = Settings("", steps=1)
        self.spent_ms = (0.0, 0.0, 0.0)
        self._inside: list[tuple[Any, Timings, Settings]] = []

    @property
    def in_flight(self) -> int:
        """Frames inside."""
        return len(self._inside)

    def push(self, frame: Any = None, frame_id: Any = None, captured: float | None = None) -> list[Output]:
        """As `Stream.push`, with pictures of one pixel."""
        self._inside.append((frame_id, Timings(captured, self.clock()), self.settings))
        self._work()
        return self._out(max(0, len(self._inside) - self.settings.steps + 1))

    def flush(self) -> list[Output]:
        """As `Stream.flush`."""
        found: list[Output] = []
        while self._inside:
            self._work()
            found += self._out(1)
        return found

    def update(self, **changes: Any) -> None:
        """As `Stream.update`."""
        for name in ("on_update", "similarity"):
            changes.pop(name, None)
        self.settings = self.settings.changed(**changes)

    def clear(self) -> None:
        """As `Stream.clear`."""
        self._inside.clear()

    def _work(self) -> None:
        taken = self.service_ms(self)
        self.clock.advance(taken / 1000)
        encode, denoise, decode = self.spent_ms
        self.spent_ms = encode, denoise + taken, decode
        for _, timings, _ in self._inside:
            timings.denoise_ms += taken

    def _out(self, count: int) -> list[Output]:
        found, self._inside = self._inside[:count], self._inside[count:]
        outputs = []
        for frame_id, timings, settings in found:
            timings.finished = self.clock()
            output = Output(frame_id, _PIXELS, settings, timings)
            output.__dict__["image"] = _PICTURE
            outputs.append(output)
        return outputs


def camera(clock: VirtualClock, session: LiveSession, fps: float, seconds: float, start: float = 0.0) -> None:
    """Frames of a camera, each offered at the time it is taken."""
    for number in range(int(seconds * fps)):
        when = start + number / fps
        clock.at(when, lambda number=number, when=when: _offer(session, number, when))


def _offer(session: LiveSession, number: int, when: float) -> None:
    if not session.closed:
        session.offer(_PICTURE, number, when)


def viewer(session: LiveSession) -> None:
    """Takes every picture the moment it is ready."""

    def take() -> None:
        for one in session.take():
            session.sent(one)

    session.on_ready = take


def run(clock: VirtualClock, run_one: Callable[[], bool], until: float) -> None:
    """Let a worker's `run_one` work and time pass until then."""
    while clock.now < until:
        if not run_one():
            # a worker also looks up now and then when nothing happens
            coming = clock.next_event()
            clock.advance(max(1e-6, min(clock.now + LOOK_S if coming is None else coming, until) - clock.now))

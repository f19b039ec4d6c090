"""A model made slower while frames come at their time: how late pictures are from a second after that on."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from fastdiff_pipelines.live import LiveSession, LiveWorker

BEFORE_S = 5.0
SETTLED_S = 1.0
GIVE_UP_S = 240.0


class Slowed:
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


def paced(
    session: LiveSession, worker: LiveWorker, slowed: Slowed, interval_s: float, target_ms: float, frames: int
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
            if slowed_at is not None and now - slowed_at > SETTLED_S:
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
    while judged < frames and session.clock() - began < GIVE_UP_S:
        if slowed_at is None and session.clock() - began > BEFORE_S:
            slowed_at, slowed.times = session.clock(), 2
        if not worker.run_one():
            time.sleep(0.001)
    stop.set()
    thread.join()
    return judged, late

"""The ledger of a live session, for frames that come several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from fastdiff.acceleration import check_number
from fastdiff_pipelines.live.ledger import Journey, Ledger
from fastdiff_pipelines.rollout.chunks import Chunk


class SteadyClock:
    """A clock that never runs backwards; where the one it reads does, it stands still and counts.

    Attributes:
        backwards: how often time went back.
    """

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.backwards = 0
        self._last = clock()

    def __call__(self) -> float:
        now = self.clock()
        self.backwards += now < self._last
        self._last = max(self._last, now)
        return self._last


class ChunkLedger(Ledger):
    """Every frame of every chunk, with what only chunks have.

    A frame's age counts from its control frame's capture, or from when its chunk began where there is none. A viewer
    who plays ``fps`` frames a second from the first chunk on needs frame ``j`` at ``j / fps`` after it; frames handed
    out later count as late.

    Args:
        clock: seconds.
        fps: frames a second that are wanted, None where nobody plays them.
        target_ms: age that a frame must not exceed.
    """

    def __init__(self, clock: Callable[[], float], fps: float | None = None, target_ms: float | None = None):
        if fps is not None:
            check_number("ChunkLedger", "fps", fps, 1e-3)
        if target_ms is not None:
            check_number("ChunkLedger", "target_ms", target_ms, 0)
        steady = clock if isinstance(clock, SteadyClock) else SteadyClock(clock)
        super().__init__(steady, target_ms)
        self.steady = steady
        self.fps = fps
        self.chunks = self.late = 0
        self.upkeep_ms = 0.0
        self._began: float | None = None
        self._gaps: deque[float] = deque(maxlen=2048)
        self._handed: float | None = None

    def hand_out(self, chunk: Chunk) -> None:
        """A chunk reached whoever asked for it."""
        now = self.clock()
        count = len(chunk)
        for i in range(count):
            captured = chunk.entered if chunk.captured is None else chunk.captured[min(i, len(chunk.captured) - 1)]
            journey = Journey(chunk.first_frame + i, captured, chunk.entered, dict(chunk.stages), chunk.version)
            self.finish(journey, now)
        self.chunks += 1
        if self._began is None:
            self._began = now
        elif self.fps is not None:
            due = self._began + (chunk.first_frame + np.arange(count)) / self.fps
            self.late += int((due < now).sum())
        if self._handed is not None:
            self._gaps.append((now - self._handed) * 1000)
        self._handed = now

    def keep_up(self, milliseconds: float) -> None:
        """Time spent on the context after a chunk had been handed out."""
        self.upkeep_ms += milliseconds

    def summary(self) -> dict[str, Any]:
        """As `Ledger.summary`, with chunks, late frames, upkeep and the spread of jitter."""
        gaps = np.array(self._gaps)
        jitter = np.abs(np.diff(gaps))
        return {
            **super().summary(),
            "chunks": self.chunks,
            "late_frames": None if self.fps is None else self.late,
            "chunk_ms": float(gaps.mean()) if len(gaps) else None,
            "jitter_ms_p95": float(np.percentile(jitter, 95)) if len(jitter) else None,
            "upkeep_ms_per_chunk": self.upkeep_ms / self.chunks if self.chunks else None,
            "clock_went_back": self.steady.backwards,
        }

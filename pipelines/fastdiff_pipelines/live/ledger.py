"""Where every millisecond of a frame went, and where every frame went that was never shown.

A frame carries its `Journey`: each part of the way writes down what it measured itself, and the end of the way is read
from the clock. What the parts do not explain of the whole is reported too, so the ledger can be held against itself.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdiff_pipelines.slots import Timings

STAGES = ("uplink", "wait", "unpack", "encode", "denoise", "decode", "others", "rest", "idle", "pack", "send", "paint")
"""Parts of the way in order: to this machine; in the mailbox; to pixels; the three models; other frames' encoding and
decoding; what else the stream did; in the stream while nothing of this session runs; to bytes; in the outbox; and to
the viewer's screen."""

WINDOW = 2048
PERCENTS = (50, 95, 99)


@dataclass
class Journey:
    """One frame's way.

    Attributes:
        frame_id: as its source numbers it; ids of one source rise.
        captured: when it was taken, seconds of the session's clock.
        received: when it reached this process.
        stages: milliseconds by stage.
        version: of the settings it was finished with.
    """

    frame_id: int
    captured: float
    received: float
    stages: dict[str, float] = field(default_factory=dict)
    version: int = 0
    repeated: bool = False

    def spend(self, stage: str, milliseconds: float) -> None:
        """Add to a stage."""
        self.stages[stage] = self.stages.get(stage, 0.0) + milliseconds

    def spend_inside(self, timings: Timings, models_ms: float, busy_ms: float, whole_ms: float) -> None:
        """Add the stages of a stream.

        Args:
            timings: what the stream says of this frame.
            models_ms: what it says its models took meanwhile, for whichever frames.
            busy_ms: of its operations meanwhile.
            whole_ms: from going in to coming out.
        """
        own = {"encode": timings.encode_ms, "denoise": timings.denoise_ms, "decode": timings.decode_ms}
        for stage, milliseconds in own.items():
            self.spend(stage, milliseconds)
        # a repeated frame took part in no call, so all that ran meanwhile was others' work
        self.spend("others", max(0.0, models_ms - sum(own.values())))
        # what a stream does not say of itself, and all of one that says nothing
        self.spend("rest", max(0.0, busy_ms - max(models_ms, sum(own.values()))))
        self.spend("idle", whole_ms - busy_ms)


@dataclass
class Finished:
    """A picture on its way out: `payload` is what the session's `pack` made of it."""

    journey: Journey
    payload: Any
    packed: float


class Ledger:
    """Latencies, ages, drops and deadlines of one session; safe to use from several threads.

    Args:
        clock: seconds, the same clock that journeys were timed with.
        target_ms: age at display that a frame must not exceed; None where none is asked for.
        window: frames that percentiles look back on; counts are of the whole session.
    """

    def __init__(self, clock: Callable[[], float], target_ms: float | None = None, window: int = WINDOW):
        self.clock = clock
        self.target_ms = target_ms
        self.started = clock()
        self.admitted = self.shown = self.repeated = self.missed = self.judged = 0
        self.drops: Counter[str] = Counter()
        self.first_frame_ms: float | None = None
        self.prompt_to_pixel: deque[int] = deque(maxlen=64)
        self.last_shown: float | None = None
        self.energy_j: float | None = None
        self._rows: deque[tuple[float, float, float, dict[str, float]]] = deque(maxlen=window)
        self._asked: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def admit(self, count: int = 1) -> None:
        """Frames that reached the session, whatever becomes of them."""
        with self._lock:
            self.admitted += count

    def drop(self, cause: str, count: int = 1) -> None:
        """Frames that will not be shown: "replaced" by a newer one, "stale", "outbox" (the viewer is slow), "window"
        (the viewer held them back), "broken", "failed" or "closed"."""
        if count > 0:
            with self._lock:
                self.drops[cause] += count

    def asked(self, version: int) -> None:
        """A new look was asked for, which frames of this version will have."""
        with self._lock:
            self._asked = (version, self.shown)

    def finish(self, journey: Journey, at: float) -> None:
        """A frame was shown (or handed out, where nobody tells when it is shown)."""
        age = (at - journey.captured) * 1000
        with self._lock:
            self.shown += 1
            self.repeated += journey.repeated
            self.last_shown = at
            if self.first_frame_ms is None:
                self.first_frame_ms = (at - self.started) * 1000
            if self.target_ms is not None:
                self.judged += 1
                self.missed += age > self.target_ms
            if self._asked is not None and journey.version >= self._asked[0]:
                self.prompt_to_pixel.append(self.shown - self._asked[1])
                self._asked = None
            self._rows.append((at, age, (at - journey.received) * 1000, dict(journey.stages)))

    def ages(self) -> list[float]:
        """Ages at display of the frames in the window, in milliseconds, oldest first."""
        with self._lock:
            return [row[1] for row in self._rows]

    def summary(self) -> dict[str, Any]:
        """Everything as plain values: the one JSON of the command line, of `/metrics` and of the page."""
        with self._lock:
            rows = list(self._rows)
            counts = {
                "in": self.admitted,
                "shown": self.shown,
                "repeated": self.repeated,
                "dropped": dict(sorted(self.drops.items())),
            }
            deadline = None
            if self.target_ms is not None:
                rate = self.missed / self.judged if self.judged else 0.0
                deadline = {"target_ms": self.target_ms, "missed": self.missed, "rate": rate}
            first, waits = self.first_frame_ms, list(self.prompt_to_pixel)
            energy = None if self.energy_j is None or not self.shown else self.energy_j / self.shown
        ages = np.array([row[1] for row in rows])
        seen = [name for name in STAGES if any(name in row[3] for row in rows)]
        table = {name: np.array([row[3].get(name, 0.0) for row in rows]) for name in seen}
        explained = sum(table.values(), np.zeros(len(rows)))
        span = rows[-1][0] - rows[0][0] if len(rows) > 1 else 0.0
        return {
            "frames": counts,
            "fps": (len(rows) - 1) / span if span > 0 else None,
            "age_ms": _spread(ages),
            "latency_ms": _spread(np.array([row[2] for row in rows])),
            "stages_ms": {name: _spread(values) for name, values in table.items()},
            "unexplained_ms": _spread(np.abs(ages - explained)),
            "jitter_ms": float(np.abs(np.diff(ages)).mean()) if len(ages) > 1 else None,
            "deadline": deadline,
            "first_frame_ms": first,
            "prompt_to_pixel_frames": max(waits) if waits else None,
            "energy_j_per_frame": energy,
        }


def _spread(values: np.ndarray) -> dict[str, float] | None:
    """p50, p95 and p99 of measured values; None of none."""
    if not len(values):
        return None
    found = np.percentile(values, PERCENTS)
    return {f"p{percent}": float(value) for percent, value in zip(PERCENTS, found, strict=True)}

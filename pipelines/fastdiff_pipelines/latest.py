"""The latest-wins slot between a camera and a stream: depth one, newest frame kept, older ones counted as dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Captured:
    """A frame from a live source, with its id and `time.perf_counter` capture time."""

    frame_id: Any
    frame: Any
    captured: float


class LatestFrame:
    """Hand frames from a capturing thread to a processing one; whoever is slow sees only the newest.

    The age of a frame taken is therefore at most one service time plus one camera interval, however slow the stream.

    Attributes:
        put_count, taken_count, dropped_count: frames put in, taken out, and replaced before anyone took them. What was
            put is always taken, dropped, or still waiting.
    """

    def __init__(self):
        self._condition = threading.Condition()
        self._waiting: Captured | None = None
        self._closed = False
        self.put_count = self.taken_count = self.dropped_count = 0

    def put(self, frame: Any, frame_id: Any = None, captured: float | None = None) -> None:
        """Offer a frame, replacing one that still waits. Ids and capture times are filled in when not given.

        Raises:
            RuntimeError: after `close`.
        """
        now = time.perf_counter() if captured is None else captured
        with self._condition:
            if self._closed:
                raise RuntimeError("this source is closed; make a new LatestFrame")
            if self._waiting is not None:
                self.dropped_count += 1
            self._waiting = Captured(self.put_count if frame_id is None else frame_id, frame, now)
            self.put_count += 1
            self._condition.notify()

    def get(self, timeout: float | None = None) -> Captured | None:
        """Take the newest frame, waiting up to ``timeout`` seconds; None when the source is closed and empty.

        Raises:
            TimeoutError: nothing came in time.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._waiting is not None or self._closed, timeout):
                raise TimeoutError(f"no frame within {timeout} s")
            taken, self._waiting = self._waiting, None
            self.taken_count += taken is not None
            return taken

    def close(self) -> None:
        """No more frames; one that still waits can be taken."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def __iter__(self) -> Iterator[Captured]:
        while (taken := self.get()) is not None:
            yield taken

"""Pictures on their way to a viewer: at most two that wait, and those that were sent and not yet seen."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

from fastdiff_pipelines.live.ledger import Finished

OUTBOX = 2
UNACKNOWLEDGED = 256
UNSEEN = 64
QUIET_S, QUIET_UNSEEN = 2.0, 8


class Outbox:
    """The newest pictures of one session; safe to use from several threads.

    Args:
        acknowledged: whether the viewer tells when a picture was shown.
    """

    def __init__(self, acknowledged: bool):
        self.acknowledged = acknowledged
        self._waiting: deque[Finished] = deque()
        self._sent: OrderedDict[int, tuple[Finished, float]] = OrderedDict()
        self._unseen = 0
        self._unseen_since = 0.0
        self._lock = threading.Lock()

    def unread(self, now: float) -> bool:
        """Whether the viewer does not keep up: pictures wait, or more went out since one was last seen, or went out
        longer ago, than a line would hold. (A connection takes megabytes for somebody who reads none of it.)"""
        quiet = self._unseen >= QUIET_UNSEEN and now - self._unseen_since >= QUIET_S
        return len(self._waiting) >= OUTBOX or self._unseen >= UNSEEN or quiet

    def put(self, one: Finished) -> bool:
        """Add a picture; whether the oldest that waited had to go for it."""
        with self._lock:
            self._waiting.append(one)
            late = len(self._waiting) > OUTBOX
            if late:
                self._waiting.popleft()
            return late

    def take(self) -> list[Finished]:
        """All that wait, oldest first."""
        with self._lock:
            found = list(self._waiting)
            self._waiting.clear()
            return found

    def sent(self, one: Finished, at: float) -> None:
        """A picture has left, and its viewer will tell when it was seen."""
        with self._lock:
            self._sent[one.journey.frame_id] = (one, at)
            self._unseen_since = self._unseen_since if self._unseen else at
            self._unseen += 1
            while len(self._sent) > UNACKNOWLEDGED:
                self._sent.popitem(last=False)

    def seen(self, frame_id: int) -> tuple[Finished, float] | None:
        """The picture that was seen and when it had left; None for one that is not awaited."""
        with self._lock:
            found = self._sent.pop(frame_id, None)
            if found is not None:
                self._unseen = 0
            return found

    def clear(self) -> int:
        """Forget everything; how many waited."""
        with self._lock:
            count = len(self._waiting)
            self._waiting.clear()
            self._sent.clear()
            return count

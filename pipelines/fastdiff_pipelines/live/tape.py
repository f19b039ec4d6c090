"""The recording that a session has: asked for at any time, begun and ended between turns, whole whatever happens."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

from fastdiff_pipelines.live.recording import Recording


class Tape:
    """Whoever runs the model switches, writes and closes; any thread may ask.

    Args:
        recording: what is recorded to from the beginning; None for nothing.
    """

    def __init__(self, recording: Recording | None = None):
        self.current = recording
        self._asked: tuple[Recording | None] | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def next(self) -> Recording | None:
        """What is recorded to from the next turn on."""
        with self._lock:
            return self.current if self._asked is None else self._asked[0]

    @property
    def switches(self) -> bool:
        """Whether another recording, or none, was asked for."""
        return self._asked is not None

    def ask(self, recording: Recording | None) -> None:
        """Record to another one, or to none, from the next turn on.

        Raises:
            RuntimeError: no turn will come; the recording is closed.
        """
        with self._lock:
            refused = self._closed
            if not refused:
                # one that was to begin and never did
                before, self._asked = self._asked, (recording,)
            else:
                before = (recording,)
        if before is not None and before[0] is not None:
            before[0].close()
        if refused and recording is not None:
            raise RuntimeError("the session has ended and cannot be recorded")

    def switch(self) -> bool:
        """Let what was asked for take over; whether anything was."""
        with self._lock:
            if self._asked is None:
                return False
            before, self.current = self.current, self._asked[0]
            self._asked = None
        if before is not None:
            before.close()
        return True

    def write(self, kind: str, **values: Any) -> None:
        """Add a record, where anything is recorded to."""
        if self.current is not None:
            self.current.write(kind, **values)

    def close(self) -> None:
        """What was recorded is whole, and what was asked for never begins."""
        with self._lock:
            self._closed = True
            asked, self._asked = self._asked, None
        with ExitStack() as ends:
            for recording in (self.current, *(asked or ())):
                if recording is not None:
                    ends.callback(recording.close)

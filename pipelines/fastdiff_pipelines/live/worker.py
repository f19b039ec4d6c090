"""The thread that owns the model: sessions take turns, and nothing else may touch it.

An event loop must answer within milliseconds and a model call may take a second, so they never share a thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from fastdiff_pipelines.live.session import LiveSession
from fastdiff_pipelines.live.turns import Turns

log = logging.getLogger(__name__)

DRAIN_AFTER_S = 0.25
ACTIVE_S = 1.0


class LiveWorker:
    """Runs sessions' turns, fairly; `run_one` does one, `start` a thread that does them all.

    Args:
        clock: seconds.
        energy: joules used so far (see `energy_meter`), shared out by turns; None where nothing measures it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, energy: Callable[[], float] | None = None):
        self.clock = clock
        self.energy = energy
        self.last_frame: float | None = None
        self._turns = Turns()
        self._sessions: dict[int, LiveSession] = {}
        self._active: dict[int, float] = {}
        self._turn: LiveSession | None = None
        self._condition = threading.Condition()
        self._woken = False
        self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def sessions(self) -> list[LiveSession]:
        """Those that take turns now."""
        with self._condition:
            return list(self._sessions.values())

    def add(self, session: LiveSession) -> None:
        """A session joins."""
        with self._condition:
            self._sessions[id(session)] = session
            self._turns.join(id(session))

    def remove(self, session: LiveSession) -> None:
        """A session leaves and is closed; a turn under way is finished first by whoever runs it, and ends it then."""
        session.close()
        with self._condition:
            self._sessions.pop(id(session), None)
            self._active.pop(id(session), None)
            self._turns.leave(id(session))
            if self._turn is session:
                return
        session.end()

    def wake(self) -> None:
        """Something changed: look again."""
        with self._condition:
            self._woken = True
            self._condition.notify()

    def run_one(self) -> bool:
        """One turn of whoever is next; False when nobody waits."""
        now = self.clock()
        with self._condition:
            waiting = [key for key, one in self._sessions.items() if one.waits]
            chosen = self._turns.choose(waiting)
            kind = "step"
            if chosen is None:
                kind = "drain"
                chosen = next((key for key, one in self._sessions.items() if one.idle(now, DRAIN_AFTER_S)), None)
            if chosen is None:
                kind = "prepare_another"
                chosen = next((key for key, one in self._sessions.items() if one.unprepared), None)
            if chosen is None:
                return False
            key = chosen
            session = self._sessions[key]  # type: ignore[index]
            self._active[key] = now  # type: ignore[index]
            self._turn = session
            session.sharers = sum(now - then < ACTIVE_S for then in self._active.values())
        before = self.energy() if self.energy is not None else 0.0
        try:
            getattr(session, kind)()
        except Exception as error:
            # one session's trouble must not end everybody's
            log.exception("a live session failed")
            session.on_problem(f"the session ended: {type(error).__name__}: {error}")
            session.close()
        finally:
            with self._condition:
                self._turn = None
                left = key not in self._sessions
            if left:
                session.end()
        if self.energy is not None:
            session.ledger.energy_j = (session.ledger.energy_j or 0.0) + self.energy() - before
        self.last_frame = self.clock()
        with self._condition:
            self._turns.charge(key, self.last_frame - now)
        return True

    def start(self) -> None:
        """Run in a thread of its own until `stop`."""
        if self._thread is not None:
            raise RuntimeError("this worker runs already")
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="fastdiff-live", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its turn, and close every session."""
        self._stopped = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for session in self.sessions:
            self.remove(session)

    def __enter__(self) -> LiveWorker:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _loop(self) -> None:
        while not self._stopped:
            if self.run_one():
                continue
            with self._condition:
                if not self._woken:
                    # a drain may fall due without anybody waking us
                    self._condition.wait(DRAIN_AFTER_S / 2 if self._sessions else None)
                self._woken = False

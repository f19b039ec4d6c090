"""Asking a worker to stop: once to finish the running batch, twice to give it up. Nothing finished is lost."""

import os
import signal
from collections.abc import Iterable


class Stop:
    """Counts the requests. `watch` makes signals count; a test or another thread calls `ask`.

    Args:
        parent: the process without which nobody wants the work; None for a process that stands alone.
    """

    def __init__(self, parent: int | None = None):
        self.asked = 0
        self.parent = parent

    def ask(self, *_: object) -> None:
        """One more request; takes what a signal handler is given."""
        self.asked += 1

    def is_asked(self) -> bool:
        """Finish the running batch, then stop."""
        return self.asked >= 1

    def is_aborted(self) -> bool:
        """Give the running batch up."""
        return self.asked >= 2

    def watch(self, signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
        """Counts these signals from now on; only in a process's main thread."""
        for one in signals:
            signal.signal(one, self.ask)

    def check_parent(self) -> None:
        """Counts as one request when the parent is gone."""
        if self.parent is not None and os.name == "posix" and os.getppid() != self.parent and not self.asked:
            self.ask()

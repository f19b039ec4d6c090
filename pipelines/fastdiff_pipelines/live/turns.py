"""Whose turn it is on a model that several sessions share: whoever had the least of its time so far."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence


class Turns:
    """Start-time fair queueing with equal weights: time already had decides, and waiting earns no credit.

    A session that joins, or comes back after a pause, starts level with the least served of the others: it can neither
    claim the time it was away nor be made to pay for it.
    """

    def __init__(self):
        self._had: dict[Hashable, float] = {}
        self._order: dict[Hashable, int] = {}
        self._count = 0
        self._level = 0.0

    def join(self, who: Hashable) -> None:
        """Add a session."""
        self._had[who] = self._level
        self._touch(who)

    def leave(self, who: Hashable) -> None:
        """Remove a session; unknown ones are ignored."""
        self._had.pop(who, None)
        self._order.pop(who, None)

    def choose(self, ready: Collection[Hashable]) -> Hashable | None:
        """The one of the ready sessions that is next, None of none; of equals, the one that waited longest."""
        known = [who for who in ready if who in self._had]
        if not known:
            return None
        for who in known:
            self._had[who] = max(self._had[who], self._level)
        chosen = min(known, key=lambda who: (self._had[who], self._order[who]))
        self._level = self._had[chosen]
        return chosen

    def charge(self, who: Hashable, seconds: float) -> None:
        """Note what a turn took."""
        if who in self._had:
            self._had[who] += seconds
            self._touch(who)

    def _touch(self, who: Hashable) -> None:
        self._count += 1
        self._order[who] = self._count


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index of shares: 1 when all are equal, 1/n when one has everything."""
    squares = sum(share * share for share in shares)
    return 1.0 if squares == 0 else sum(shares) ** 2 / (len(shares) * squares)

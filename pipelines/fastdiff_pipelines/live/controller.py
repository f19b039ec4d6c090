"""Keeping a deadline: settings are exchanged for time, by a table of what each costs on this machine.

A ladder runs from the settings as asked for to the cheapest that is still wanted. The controller compares what a frame
just cost with the table, so it knows how much slower the machine is than when it was measured, and goes straight to
the first rung that fits, with room for the stalls that it has seen: a push that takes longer than its neighbours makes
every frame inside late, so what is kept free follows from how often that happens and not from a typical push. It
changes at most once a second, goes up only when the better rung would have fitted for a while, and waits longer each
time that turns out wrong.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CHANGE_EVERY_S = 1.0
RECENT = 3
AROUND = 5
REMEMBERED = 512
MISS_SHARE = 0.01


@dataclass(frozen=True)
class Rung:
    """One place on the ladder, with everything that is done there.

    Attributes:
        name: for people.
        changes: settings that differ from those asked for: any of `fastdiff_pipelines.Settings`, `scale` (share of the
            picture's sides), `similarity` (threshold for skipping), `plan` (a name the session's `open` knows).
        drops: whether frames that cannot be on time any more are refused on entry.
        cost_ms: measured time of one push.
        depth: pushes a frame is inside.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    drops: bool = True
    cost_ms: float = 0.0
    depth: int = 1

    def __post_init__(self):
        if self.cost_ms < 0 or self.depth < 1:
            raise ValueError(f"a rung costs 0 ms or more and is 1 push deep or more, got {self!r}")

    def inside_ms(self, slowness: float, interval_ms: float) -> float:
        """From entering to finished, on a machine this many times slower than when measured."""
        service = self.cost_ms * slowness
        return service + (self.depth - 1) * max(service, interval_ms)


@dataclass(frozen=True)
class Budget:
    """What must be kept.

    Attributes:
        target_ms: age of a frame when it is shown.
        interval_ms: time between frames of the camera.
        margin: share of the target that is kept free.
    """

    target_ms: float
    interval_ms: float = 1000 / 30
    margin: float = 0.1

    def __post_init__(self):
        if self.target_ms <= 0 or self.interval_ms <= 0 or not 0 <= self.margin < 1:
            raise ValueError(f"a target and interval are above 0 ms and a margin is a share below 1, got {self!r}")


@dataclass(frozen=True)
class Decision:
    """A change of rung: when, from where to where, and why."""

    at: float
    before: str
    after: str
    reason: str


class DeadlineController:
    """Chooses a rung. Pure logic: times come in as arguments, so it runs on any clock.

    Args:
        rungs: best first; each with its measured cost (see `measure`).
        budget: what must be kept.
        patience_s: how long a better rung must have fitted before it is taken; doubled, up to a minute, each time the
            step up had to be taken back.
    """

    def __init__(self, rungs: Sequence[Rung], budget: Budget, patience_s: float = 2.0):
        if not rungs:
            raise ValueError("a ladder has at least one rung: the settings as asked for")
        if any(rung.cost_ms <= 0 for rung in rungs):
            raise ValueError("every rung needs its measured cost; see fastdiff_pipelines.live.measure")
        self.rungs = tuple(rungs)
        self.budget = budget
        self.overhead_ms = 0.0
        self.decisions: deque[Decision] = deque(maxlen=256)
        self._at = 0
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self._pushes: deque[tuple[float, float]] = deque(maxlen=AROUND)
        self._stalls: deque[float] = deque(maxlen=REMEMBERED)
        self._rarest: list[float] = []
        self._worst: deque[tuple[float, float]] = deque()
        self._changed: float | None = None
        self._fits_since: float | None = None
        self._patience, self._patience_now = patience_s, patience_s
        self._went_up: float | None = None

    @property
    def rung(self) -> Rung:
        """What is in force."""
        return self.rungs[self._at]

    @property
    def slowness(self) -> float:
        """How many times slower than measured the machine is now."""
        return statistics.median(self._ratios) if self._ratios else 1.0

    @property
    def fits(self) -> bool:
        """Whether what is in force keeps the target, as far as was seen."""
        return self._fits(self.rung, self.slowness)

    def admits(self, waited_ms: float) -> bool:
        """Whether a frame that is this old can still be on time."""
        if not self.rung.drops:
            return True
        inside = self.rung.inside_ms(self.slowness, self.budget.interval_ms)
        expected = waited_ms + inside + self.overhead_ms + self.stall_ms(self.rung)
        # what cannot be on time even when fresh is let in: late pictures are better than none
        return expected <= self.budget.target_ms or waited_ms <= 0.25 * inside

    def stall_ms(self, rung: Rung) -> float:
        """By how much a push was longer than its neighbours so often that more than `MISS_SHARE` of frames had it."""
        # every frame that is inside a stalled push is late, and the one that waits for it
        allowed = int(MISS_SHARE / (rung.depth + 1) * len(self._rarest))
        return self._rarest[allowed] if self._rarest else 0.0

    def observe(self, push_ms: float, at: float, overhead_ms: float | None = None) -> Decision | None:
        """Tell what a full push took; the answer is a change of rung, or None.

        Args:
            push_ms: of a push with as many rows as the rung's depth fills.
            at: seconds.
            overhead_ms: what the way adds outside the model, where known.
        """
        if overhead_ms is not None:
            self.overhead_ms = max(0.0, overhead_ms)
        ratio = push_ms / self.rung.cost_ms
        self._ratios.append(ratio)
        self._note_stall(ratio)
        self._worst.append((at, ratio))
        while self._worst[0][0] < at - self._patience_now:
            self._worst.popleft()
        if self._changed is not None and at - self._changed < CHANGE_EVERY_S:
            return None
        return self._down(at) if not self._fits(self.rung, self.slowness) else self._up(at)

    def _note_stall(self, ratio: float) -> None:
        """Judge the push before the last ones by those on both sides: a machine that stays slow has not stalled."""
        self._pushes.append((ratio, self.rung.cost_ms))
        if len(self._pushes) < AROUND:
            return
        middle, cost = self._pushes[AROUND // 2]
        usual = statistics.median(one for one, _ in self._pushes)
        self._stalls.append(max(0.0, (middle - usual) * cost))
        quickest = min(rung.inside_ms(self.slowness, self.budget.interval_ms) for rung in self.rungs)
        # giving something up for a stall that no rung could bear would buy nothing
        bearable = self._most_ms - self.overhead_ms - quickest
        self._rarest = sorted((one for one in self._stalls if one <= bearable), reverse=True)

    @property
    def _most_ms(self) -> float:
        return self.budget.target_ms * (1 - self.budget.margin)

    def _fits(self, rung: Rung, slowness: float) -> bool:
        age = rung.inside_ms(slowness, self.budget.interval_ms) + self.overhead_ms + self.stall_ms(rung)
        if not rung.drops:
            age += self.budget.interval_ms
        return age <= self._most_ms

    def _down(self, at: float) -> Decision | None:
        self._fits_since = None
        slowness = self.slowness
        fitting = [i for i in range(self._at + 1, len(self.rungs)) if self._fits(self.rungs[i], slowness)]
        place = fitting[0] if fitting else len(self.rungs) - 1
        if place <= self._at:
            return None
        if self._went_up is not None and at - self._went_up < 4 * self._patience_now:
            self._patience_now = min(60.0, 2 * self._patience_now)
        reason = f"{slowness:.2f} times the measured cost"
        return self._change(place, at, reason if fitting else f"{reason}; nothing on the ladder keeps the target")

    def _up(self, at: float) -> Decision | None:
        worst = sorted(ratio for _, ratio in self._worst)
        # one hiccup in twenty must not keep a stream down for ever
        slowness = worst[max(0, round(0.95 * (len(worst) - 1)))]
        place = next((i for i in range(self._at) if self._fits(self.rungs[i], slowness)), None)
        if place is None:
            self._fits_since = None
            return None
        if self._fits_since is None:
            self._fits_since = at
        if at - self._fits_since < self._patience_now:
            return None
        if self._went_up is not None and at - self._went_up > 8 * self._patience_now:
            self._patience_now = self._patience
        self._went_up = at
        return self._change(place, at, f"it has fitted for {self._patience_now:g} s")

    def _change(self, place: int, at: float, reason: str) -> Decision:
        decision = Decision(at, self.rung.name, self.rungs[place].name, reason)
        # what was seen holds for the machine, not for the rung, so ratios are kept
        self._at, self._changed, self._fits_since = place, at, None
        self.decisions.append(decision)
        return decision


def measure(rungs: Sequence[Rung], run: Callable[[Rung], float], times: int = 5) -> tuple[Rung, ...]:
    """The rungs with what they cost here: the median of `times` runs each, rungs taking turns.

    Args:
        run: does one full push at a rung and returns its milliseconds; the first call of each is not counted.
    """
    for rung in rungs:
        run(rung)
    spent: list[list[float]] = [[] for _ in rungs]
    for _ in range(times):
        for found, rung in zip(spent, rungs, strict=True):
            found.append(run(rung))
    return tuple(
        Rung(rung.name, rung.changes, rung.drops, max(1e-6, statistics.median(found)), rung.depth)
        for rung, found in zip(rungs, spent, strict=True)
    )

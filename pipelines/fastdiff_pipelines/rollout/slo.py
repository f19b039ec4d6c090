"""Deadlines for video: which batch, how many steps and how long chunks, from what a call costs on this machine.

Two promises can be kept or broken: when the first frame is there, and that every chunk is ready when the one before has
been played. Longer chunks and more chunks in flight serve the second and hurt the first. StreamDiffusionV2 describes
such a scheduler (https://arxiv.org/abs/2511.07399, section 3); here it goes by measured costs and runs on any clock.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from fastdiff.acceleration import check_number
from fastdiff_pipelines.live.controller import Decision

_TIMES = 3
_SIZES = ((1, 1), (2, 1), (4, 1), (1, 3))


@dataclass(frozen=True)
class Target:
    """What is promised.

    Attributes:
        first_frame_ms: from a session's beginning to its first frame.
        fps: frames a second that are played.
        source_fps: frames a second that a camera gives, whose frames a chunk has to wait for; None from noise.
        margin: share of every deadline that is kept free.
    """

    first_frame_ms: float = 1000.0
    fps: float = 16.0
    source_fps: float | None = None
    margin: float = 0.1

    def __post_init__(self):
        check_number("Target", "first_frame_ms", self.first_frame_ms, 1)
        check_number("Target", "fps", self.fps, 1e-3)
        check_number("Target", "margin", self.margin, 0, 0.99)
        if self.source_fps is not None:
            check_number("Target", "source_fps", self.source_fps, 1e-3)


@dataclass(frozen=True)
class Costs:
    """Milliseconds by a straight line: a call costs ``call + row x`` for ``x`` rows times latent frames.

    Attributes:
        call, row: of the denoiser.
        codec: encoding and decoding one latent frame.
        context: the pass over a finished latent frame that a "clean" context needs; 0 for other kinds.
    """

    call: float
    row: float
    codec: float = 0.0
    context: float = 0.0

    def __post_init__(self):
        for name in ("call", "row", "codec", "context"):
            check_number("Costs", name, getattr(self, name), 0)

    @classmethod
    def fitted(cls, measured: Iterable[tuple[int, float]], codec: float = 0.0, context: float = 0.0) -> Costs:
        """The line nearest to measured (rows times frames, milliseconds); neither part of it below 0.

        Raises:
            ValueError: fewer than two different sizes.
        """
        sizes, times = (np.array(column, np.float64) for column in zip(*measured, strict=True))
        if len(set(sizes.tolist())) < 2:
            raise ValueError("a line needs calls of two different sizes")
        row, call = np.polyfit(sizes, times, 1)
        if row < 0:
            row, call = 0.0, times.mean()
        elif call < 0:
            row, call = float((sizes * times).sum() / (sizes**2).sum()), 0.0
        return cls(float(call), float(row), codec, context)

    def denoise_ms(self, rows: int, frames: int) -> float:
        """One denoiser call."""
        return self.call + self.row * rows * frames


@dataclass(frozen=True)
class Choice:
    """One way to run, and what it promises.

    Attributes:
        steps, chunk, batched: as in `RolloutSettings`.
        first_frame_ms: until the first frame, waiting for the camera included.
        chunk_ms: from one chunk to the next.
        played_ms: how long a chunk plays.
        fits: whether both deadlines are kept.
    """

    steps: int
    chunk: int
    batched: bool
    first_frame_ms: float
    chunk_ms: float
    played_ms: float
    fits: bool

    @property
    def changes(self) -> dict[str, int | bool]:
        """What to update a session with."""
        return {"steps": self.steps, "chunk": self.chunk, "batched": self.batched}

    @property
    def name(self) -> str:
        """For people."""
        steps = "step" if self.steps == 1 else "steps"
        way = "batched" if self.batched else "one at a time"
        return f"{self.steps} {steps}, chunks of {self.chunk}, {way}"


def predict(
    costs: Costs, target: Target, steps: int, chunk: int, batched: bool, per_latent: int = 4, slowness: float = 1.0
) -> Choice:
    """What one way to run takes, on a machine this many times slower than measured."""
    codec = slowness * costs.codec * chunk
    played = 1000 * per_latent * chunk / target.fps
    waited = 0.0 if target.source_fps is None else 1000 * per_latent * (chunk - 1) / target.source_fps
    arrives = 0.0 if target.source_fps is None else 1000 * per_latent * chunk / target.source_fps
    if batched:
        # while the batch fills, each call waits for the chunk that enters with it
        calls = [slowness * costs.denoise_ms(rows, chunk) for rows in range(1, steps + 1)]
        first = waited + codec + calls[0] + sum(max(call + codec / 2, arrives) for call in calls[1:])
        period = calls[-1] + codec
    else:
        call = slowness * costs.denoise_ms(1, chunk)
        first = waited + codec + steps * call
        period = steps * call + codec + slowness * costs.context * chunk
    room = 1 - target.margin
    fits = first <= room * target.first_frame_ms and period <= room * played
    return Choice(steps, chunk, batched, first, period, played, fits)


def choose(
    costs: Costs,
    target: Target,
    *,
    steps: Sequence[int] = (1, 2, 3, 4),
    chunks: Sequence[int] = (1, 2, 3),
    batched: Sequence[bool] = (False, True),
    per_latent: int = 4,
    slowness: float = 1.0,
) -> Choice:
    """The best way to run that keeps both deadlines: most steps first, then the earliest first frame.

    Where none does, the one that breaks its worst deadline by the smallest factor.
    """
    ways = [
        predict(costs, target, *way, per_latent=per_latent, slowness=slowness)
        for way in product(sorted(steps), sorted(chunks), batched)
    ]
    fitting = [way for way in ways if way.fits]
    if fitting:
        return max(fitting, key=lambda way: (way.steps, -way.first_frame_ms))
    return min(ways, key=lambda way: max(way.chunk_ms / way.played_ms, way.first_frame_ms / target.first_frame_ms))


def measure(run: Callable[[int, int], float], sizes: Sequence[tuple[int, int]] = _SIZES):
    """(rows times frames, milliseconds) of denoiser calls: the median of three each, the first one not counted.

    Args:
        run: makes one call of so many rows and latent frames and returns its milliseconds.
    """
    measured = []
    for rows, frames in sizes:
        run(rows, frames)
        measured.append((rows * frames, statistics.median(run(rows, frames) for _ in range(_TIMES))))
    return measured


def measured_costs(rollout: Any, prompt: str = "", clock: Callable[[], float] = time.perf_counter) -> Costs:
    """What calls cost on this machine, measured on a `ChunkRollout` in about twenty of them.

    Args:
        clock: seconds.
    """
    # whatever the rollout's own defaults are: one latent frame at a time, from noise
    plain: dict[str, Any] = {"steps": 1, "sigmas": None, "chunk": 1, "batched": False, "noise": "fresh", "motion": None}
    session = rollout.open(prompt, kind="last", **plain)
    chunks = list(session.run(None, 1 + _TIMES))
    session.close()
    codec = statistics.median(chunk.stages["decode"] for chunk in chunks[1:])
    text = rollout.encode([prompt])

    def run(rows: int, frames: int) -> float:
        x = torch.zeros(rows, rollout.cell[0], frames, *rollout.cell[1:], device=rollout.device, dtype=rollout.state)
        began = clock()
        with torch.inference_mode():
            float(rollout.causal(x, x.new_full((rows,), 500.0), text).sum())
        return (clock() - began) * 1000

    # a frame that comes in is encoded as well as decoded, at about the same price
    return Costs.fitted(measure(run), codec=2 * codec, context=run(1, 1))


class SloScheduler:
    """Keeps the per-frame deadline while the machine's speed changes. Pure logic: times come in as arguments.

    A slower machine is answered at once, a faster one only after it has been faster for ``patience_s``; never more than
    one change in ``hold_s``.

    Args:
        costs, target: see there.
        per_latent: frames of video in a latent frame.
        options: of `choose`.
    """

    def __init__(
        self,
        costs: Costs,
        target: Target,
        *,
        patience_s: float = 4.0,
        hold_s: float = 1.0,
        per_latent: int = 4,
        **options: Any,
    ):
        self.costs, self.target, self.per_latent = costs, target, per_latent
        self.patience_s, self.hold_s, self.options = patience_s, hold_s, options
        self.choice = choose(costs, target, per_latent=per_latent, **options)
        self.decisions: deque[Decision] = deque(maxlen=256)
        self._ratios: deque[float] = deque(maxlen=_TIMES)
        self._changed: float | None = None
        self._better_since: float | None = None

    @property
    def slowness(self) -> float:
        """How many times slower than measured the machine is now."""
        return statistics.median(self._ratios) if self._ratios else 1.0

    def observe(self, chunk_ms: float, at: float) -> Choice | None:
        """Tell what one chunk of a full pipeline took; the answer is another way to run, or None.

        Args:
            at: seconds.
        """
        now = self.choice
        expected = self._predicted(now, 1.0).chunk_ms
        self._ratios.append(chunk_ms / max(expected, 1e-9))
        if self._changed is not None and at - self._changed < self.hold_s:
            return None
        slowness = self.slowness
        best = choose(self.costs, self.target, slowness=slowness, per_latent=self.per_latent, **self.options)
        kept = self._predicted(now, slowness)
        on_time = kept.chunk_ms <= (1 - self.target.margin) * kept.played_ms
        if best.changes == now.changes or (on_time and best.steps <= now.steps):
            self._better_since = None
            return None
        if on_time:
            self._better_since = at if self._better_since is None else self._better_since
            if at - self._better_since < self.patience_s:
                return None
        self._better_since, self._changed = None, at
        self.decisions.append(Decision(at, now.name, best.name, f"{slowness:.2f} times the measured cost"))
        self.choice = best
        return best

    def report(self) -> str:
        """The way chosen, whether it keeps the deadlines, and the last change, in a line."""
        fits = "keeps both deadlines" if self.choice.fits else "breaks a deadline, as every other way would"
        said = f"{self.choice.name}: {fits}; {len(self.decisions)} changes"
        if not self.decisions:
            return said
        last = self.decisions[-1]
        return f"{said}, the last from {last.before} ({last.reason})"

    def _predicted(self, way: Choice, slowness: float) -> Choice:
        return predict(self.costs, self.target, way.steps, way.chunk, way.batched, self.per_latent, slowness)

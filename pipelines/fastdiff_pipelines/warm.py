"""Warm starts in a stream: a frame that shows little new begins at a late step, from the last finished picture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastdiff.sampling.warm_start import WarmStart, begin, changed
from fastdiff_pipelines.slots import Slot


@dataclass
class _Last:
    """The last finished frame: what went in, what came out, and the guidance reference it ended with."""

    version: int
    number: int
    encoded: Tensor
    solution: Tensor
    reference: Tensor | None


class Warmth:
    """Decides, frame by frame, and keeps the last finished one.

    Attributes:
        settings: how much may have changed; None starts every frame cold.
        starts, saved: frames started warm so far, and steps they did not take.
    """

    def __init__(self, settings: WarmStart | None):
        self.settings = settings
        self.starts = self.saved = 0
        self._last: _Last | None = None
        self._run = 0

    def enter(self, slot: Slot) -> None:
        """Move a slot that has just entered cold to a later step, if what it shows allows that."""
        slot.encoded = slot.reference
        last, settings = self._last, self.settings
        if settings is None or slot.encoded is None:
            return
        if last is None or last.version != slot.prepared.version or self._run >= settings.refresh:
            self._run = 0
            return
        table = slot.prepared.table
        change = changed(last.encoded, slot.encoded)
        step = settings.step(table.signal.tolist(), table.noise.tolist(), change)
        if step == 0:
            self._run = 0
            return
        # the noise a frame under way has at this step: what was injected last, or what it began with
        noise = slot.noises[step : step + 1] if slot.prepared.injects else slot.noises[:1]
        inputs = (last.encoded, slot.encoded) if settings.move else (None, None)
        slot.latent, slot.past = begin(table, step, last.solution, noise, *inputs)
        if slot.prepared.settings.guidance == "onetime":
            # the step that would have made it is not taken
            slot.reference = last.reference
        slot.step = step
        self._run += 1
        self.starts += 1
        self.saved += step

    def finished(self, slot: Slot) -> None:
        """Remember a finished frame that has pixels, unless a later one is known already."""
        if self.settings is None or slot.encoded is None or slot.lost:
            return
        if self._last is None or slot.number > self._last.number:
            self._last = _Last(slot.prepared.version, slot.number, slot.encoded, slot.latent, slot.reference)

    def reset(self) -> None:
        """Start the next frame cold."""
        self._last, self._run = None, 0

"""The control row: the same pipeline, nothing but fewer steps, at the latency of what it is held against.

An acceleration that leaves denoiser calls out has to be better than leaving steps out, or it is worth nothing:
repeating a velocity under an Euler sampler, for one, is exactly fewer steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

TOLERANCE = 0.05


@dataclass(frozen=True)
class ControlRow:
    """How many steps take as long as something else does.

    Attributes:
        steps: of the control. seconds: what it takes; target: what it is held against.
    """

    steps: int
    seconds: float
    target: float

    @property
    def off(self) -> float:
        """Relative difference in latency; below 0 where the control is the faster."""
        return self.seconds / self.target - 1

    @property
    def equal(self) -> bool:
        """True when both take equally long, within 5 %."""
        return abs(self.off) <= TOLERANCE


def equal_latency(target: float, latency: Callable[[int], float], most: int, least: int = 1) -> ControlRow:
    """The number of steps whose latency is nearest to `target` seconds, not above it where there is a choice.

    Args:
        latency: seconds as a function of the number of steps, measured or from a line through measurements.
        most, least: bounds of the number of steps.
    """
    if not 1 <= least <= most:
        raise ValueError(f"steps from {least} to {most} are no range")
    best = min(range(least, most + 1), key=lambda steps: (abs(latency(steps) - target), steps))
    return ControlRow(best, latency(best), target)

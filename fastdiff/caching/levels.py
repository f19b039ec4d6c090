"""Noise levels: one number from 0 (clean) to 1 (noise) for every scheduler, in which schedules and forecasts are kept.

A level is ``sigma / (alpha + sigma)`` of ``x = alpha clean + sigma noise``: for flow matching that is its sigma, and
for variance-preserving models it does not depend on how a scheduler numbers its timesteps.
"""

import math
from dataclasses import dataclass
from typing import Any

from fastdiff.sampling.schedule import is_flow


@dataclass(frozen=True)
class Run:
    """The steps of one call of a pipeline.

    Attributes:
        levels: the noise level of each, from noisy to clean.
    """

    levels: tuple[float, ...]

    def nearest(self, level: float) -> int:
        """The step whose level is nearest."""
        return min(range(len(self.levels)), key=lambda step: abs(self.levels[step] - level))


def run_of(scheduler: Any) -> Run:
    """The steps a scheduler is set to take; none before `set_timesteps`."""
    timesteps = getattr(scheduler, "timesteps", None)
    times = timesteps.tolist() if timesteps is not None else ()
    return Run(tuple(level_at(scheduler, float(value)) for value in times))


def level_at(scheduler: Any, timestep: float) -> float:
    """The noise level of a timestep as a scheduler or a denoiser counts it; flow matching may count to 1 or 1000."""
    if is_flow(scheduler):
        return timestep if timestep <= 1 else timestep / scheduler.config.get("num_train_timesteps", 1000)
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is None:
        return timestep / scheduler.config.get("num_train_timesteps", 1000)
    last = len(products) - 1
    place = min(max(timestep, 0.0), float(last))
    below = min(int(place), max(last - 1, 0))
    share = place - below
    product = (1 - share) * float(products[below]) + share * float(products[min(below + 1, last)])
    signal, noise = math.sqrt(product), math.sqrt(1 - product)
    return noise / (signal + noise)


def signal_and_noise(scheduler: Any, level: float) -> tuple[float, float]:
    """``(alpha, sigma)`` at a level: they add up to 1 in flow matching, their squares do elsewhere."""
    length = 1.0 if is_flow(scheduler) else math.hypot(1 - level, level)
    return (1 - level) / length, level / length


def coordinate(scheduler: Any, level: float) -> float:
    """Where forecasts see a level: as it is in flow matching, whose paths are straight in it, else as an angle."""
    return level if is_flow(scheduler) else math.atan2(level, 1 - level)

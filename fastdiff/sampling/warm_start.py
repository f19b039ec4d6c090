"""Starting from the last solution instead of from noise, with just enough noise to forget what has changed.

As in the real-time iteration of predictive control, and of diffusion policies after it, the previous solution, moved by
what the input moved, is noised to a low level and only the last steps are run. How low follows from how much changed:
at a level ``(signal, noise)`` the noised old and new solutions are ``signal * change / noise`` apart in units of the
noise, and below `tolerance` of that they are hard to tell from one another: little of the old one is left that should
not be. No change gives one step; a new scene gives the full schedule, which is then exactly the cold start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.acceleration import check_number
from fastdiff.sampling.rows import RowTable

BLOCKS = 4


@dataclass(frozen=True)
class WarmStart:
    """How warm starts are chosen.

    Args:
        tolerance: how far apart the noised old and new solution may be, in standard deviations of the noise; 0 never
            starts warm unless nothing at all has changed.
        refresh: warm starts in a row, after which one is cold, so that errors do not add up; 0 allows none.
        move: add what the input changed to the old solution before it is noised.
    """

    tolerance: float = 1.0
    refresh: int = 8
    move: bool = True

    def __post_init__(self):
        check_number("WarmStart", "tolerance", self.tolerance, low=0)
        check_number("WarmStart", "refresh", self.refresh, low=0, whole=True)

    def step(self, signal: Sequence[float], noise: Sequence[float], change: float) -> int:
        """The latest step to start at: 0 is cold, the last one a single step.

        Args:
            signal, noise: levels of the steps' inputs, from noisy to clean, ``[n]`` each.
            change: of the input, as `changed` gives it.
        """
        near = [s * change <= self.tolerance * n for s, n in zip(signal, noise, strict=True)]
        return max((step for step, one in enumerate(near) if one), default=0)

    def strength(self, signal: Sequence[float], noise: Sequence[float], change: float) -> float:
        """The same as diffusers' image-to-image takes it: the share of a schedule's steps to run, in (0, 1]."""
        return 1 - self.step(signal, noise, change) / len(signal)


def changed(before: Tensor, now: Tensor) -> float:
    """How much an input's latent ``[1, C, h, w]`` changed: root mean square in the worst of 4 x 4 blocks.

    The worst block decides, because one small thing that moved must be redrawn whatever the rest does.
    """
    square = (now - before).float().square().mean(dim=1, keepdim=True)
    blocks = torch.nn.functional.adaptive_avg_pool2d(square, BLOCKS)
    return float(blocks.max().sqrt())


def begin(
    table: RowTable, step: int, solution: Tensor, noise: Tensor, before: Tensor | None = None, now: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state to enter ``step`` with: the last solution, moved as the input moved and noised to that level.

    Args:
        table: the sampler's.
        step: from `WarmStart.step`.
        solution: the last clean latent ``[1, C, h, w]``.
        noise: standard normal of its shape.
        before, now: latents of the inputs the old and the new solution belong to, if there are inputs.

    Returns:
        ``(x, clean)``: the state, and the moved solution, which is the previous clean estimate a multistep sampler
        asks for.
    """
    clean = solution if before is None or now is None else solution + (now - before)
    return table.signal[step] * clean + table.noise[step] * noise, clean

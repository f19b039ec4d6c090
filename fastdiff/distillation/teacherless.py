"""Consistency training without a teacher, for models that are trained from the start as few-step models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.distillation.consistency import consistent
from fastdiff.distillation.networks import Batch, Networks
from fastdiff.distillation.objective import Objective, check_range, grid_levels


@dataclass(frozen=True)
class ConsistencyTraining(Objective):
    """Improved training of latent consistency models (https://arxiv.org/abs/2502.01441), no teacher in the loss.

    Two neighbouring levels of one sample and one noise must give one estimate. Latents hold outliers that break the
    usual losses, so: Cauchy's loss with a scale that shrinks as the grid grows finer, a denoising loss on the cleanest
    levels, and noise paired with latents by optimal transport within the batch.

    Args:
        points: grid points at the start and at the end; they double at equal intervals in between.
        steps: training steps over which they do.
        denoising: weight of the denoising loss; its share of the grid is the cleanest fifth.
        transport: pair noise with latents.
    """

    points: tuple[int, int] = (10, 160)
    steps: int = 1000
    denoising: float = 0.5
    transport: bool = True

    def __post_init__(self) -> None:
        check_range(type(self).__name__, "points", self.points, 2)
        if self.steps < 1 or self.denoising < 0:
            raise ValueError("ConsistencyTraining: steps must be at least 1, denoising not below 0")

    def count(self, step: int) -> int:
        """Grid points at a step of training."""
        doublings = int(math.log2(self.points[1] / self.points[0]))
        stage = min(doublings, (doublings + 1) * step // self.steps)
        return min(self.points[1], self.points[0] * 2**stage)

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        levels, count = networks.levels, self.count(batch.step)
        grid = grid_levels(levels.last, count)
        # more weight on noisy levels, where one estimate has to hold for long
        place = (1 + batch.uniform().sqrt() * count).long().clamp(1, count).cpu()
        level, below = grid[place].to(batch.clean.device), grid[place - 1].to(batch.clean.device)
        eps = batch.normal()
        if self.transport:
            eps = eps[pairing(batch.clean, eps)]
        upper, lower = levels.add(batch.clean, eps, level), levels.add(batch.clean, eps, below)
        with torch.no_grad():
            target = consistent(levels, networks.student, lower, below, batch)
        made = consistent(levels, networks.student, upper, level, batch)
        total = cauchy(made - target, scale_of(count))
        cleanest = (place <= max(1, count // 5)).to(batch.clean.device)
        if self.denoising and cleanest.any():
            total = total + self.denoising * (made - batch.clean)[cleanest].square().mean()
        return total


def scale_of(points: int) -> float:
    """The scale c of Cauchy's loss for a grid of so many points (equation 10 there)."""
    return math.exp(-1.18 * math.log(max(points - 1, 1)) - 0.72)


def cauchy(error: Tensor, scale: float) -> Tensor:
    """``log(1 + |error|² / (2 scale²))`` of each sample's mean square, averaged."""
    return torch.log1p(error.square().flatten(1).mean(1) / (2 * scale**2)).mean()


def pairing(clean: Tensor, eps: Tensor) -> Tensor:
    """The order of ``eps`` ``[B, ...]`` with the least sum of squared distances to ``clean``; int64 ``[B]``.

    Raises:
        ModuleNotFoundError: scipy, which solves the assignment, is not installed.
    """
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(clean.flatten(1).double().cpu(), eps.flatten(1).double().cpu()).square()
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1]).to(eps.device)

"""Consistency distillation on a grid: latent consistency (LCM) and trajectory consistency (TCD)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.distillation.networks import Batch, Levels, Network, Networks, ddim, guided, pseudo_huber
from fastdiff.distillation.objective import Objective, check_range, grid_levels


@dataclass(frozen=True)
class LatentConsistency(Objective):
    """LCM (https://arxiv.org/abs/2310.04378): one estimate of the clean sample all along the teacher's trajectory.

    Args:
        scales: guidance of the teacher, drawn uniformly, as diffusers counts it (the paper's w plus 1).
        points: grid points of the trajectory; the teacher takes one DDIM step between two of them.
        huber: c of the pseudo-Huber loss.
    """

    scales: tuple[float, float] = (5.0, 5.0)
    points: int = 50
    huber: float = 1e-3

    def __post_init__(self) -> None:
        check_range(type(self).__name__, "scales", self.scales, 0)
        if self.points < 1:
            raise ValueError(f"{type(self).__name__}: points must be at least 1, got {self.points}")

    def step(self, networks: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(x, level, x_next, level_next)``: a noised sample and where a guided DDIM step takes it."""
        grid = grid_levels(networks.levels.last, self.points)
        place = batch.whole(1, self.points).cpu()
        level, following = grid[place].to(batch.clean.device), grid[place - 1].to(batch.clean.device)
        x = networks.levels.add(batch.clean, batch.normal(), level)
        with torch.no_grad():
            scale = batch.uniform(*self.scales)
            output = guided(networks.teacher, x, level, batch, scale)
            reached = ddim(networks.levels, x, output, level, following)
        return x, level, reached, following

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        x, level, reached, following = self.step(networks, batch)
        with torch.no_grad():
            target = consistent(networks.levels, networks.average, reached, following, batch)
        return pseudo_huber(consistent(networks.levels, networks.student, x, level, batch) - target, self.huber)


@dataclass(frozen=True)
class TrajectoryConsistency(LatentConsistency):
    """TCD (https://arxiv.org/abs/2402.19159): from any level to any cleaner one, by the form of a DDIM step.

    The target level enters the step's coefficients only, so a LoRA needs no further input.
    """

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        x, level, reached, following = self.step(networks, batch)
        share = batch.uniform()
        to = (following * share).long()
        with torch.no_grad():
            output = networks.average(reached, following, batch.condition)
            target = leap(networks.levels, reached, output, following, to)
        output = networks.student(x, level, batch.condition)
        return pseudo_huber(leap(networks.levels, x, output, level, to) - target, self.huber)


def consistent(levels: Levels, network: Network, x: Tensor, level: Tensor, batch: Batch) -> Tensor:
    """The consistency function ``c_skip x + c_out clean`` with LCM's boundary: the identity at level 0."""
    skip, out = boundary(level)
    shape = (-1, *[1] * (x.ndim - 1))
    # the clean estimate of level 0 is x itself, whatever the network says; level 1 stands in to keep numbers finite
    safe = level.clamp(min=1)
    clean, _ = levels.estimates(x, network(x, safe, batch.condition), safe)
    return skip.view(shape).to(x) * x + out.view(shape).to(x) * clean


def boundary(level: Tensor, deviation: float = 0.5, scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """LCM's ``(c_skip, c_out)`` of levels; (1, 0) at level 0. Float64."""
    scaled = level.double() * scaling
    return deviation**2 / (scaled**2 + deviation**2), scaled / (scaled**2 + deviation**2).sqrt()


def leap(levels: Levels, x: Tensor, output: Tensor, level: Tensor, to: Tensor) -> Tensor:
    """A DDIM step that stays where it is at level 0."""
    moved = ddim(levels, x, output, level.clamp(min=1), to)
    here = (level == 0).view(-1, *[1] * (x.ndim - 1))
    return torch.where(here, x, moved)

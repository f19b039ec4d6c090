"""Consistency distillation on a grid: latent consistency (LCM) and trajectory consistency (TCD)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.distillation.networks import Batch, Levels, Network, Networks, ddim, guided, pseudo_huber
from fastdiff.distillation.objective import Objective, check_range, grid_levels
from fastdiff.sampling import algebra


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


@dataclass(frozen=True)
class SubPathLinear(LatentConsistency):
    """SPLAM (https://arxiv.org/abs/2407.04029): consistency along the chord between two points of the trajectory.

    A point ``g`` of the way up the chord has the signal of its noisy end and a noise between both, so scaled to the
    schedule it is a state of some level between them. The student is told that level; the paper's network is told
    ``g`` by an embedding of its own, which a pretrained denoiser does not have.
    """

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        levels = networks.levels
        x, level, reached, following = self.step(networks, batch)
        with torch.no_grad():
            target = consistent(levels, networks.average, reached, following, batch)
        state, between, signal, noise = chord(levels, x, level, reached, following, batch.uniform().to(x.device))
        output = networks.student(state, between, batch.condition)
        clean, _ = algebra.estimates(levels.prediction, state, output, signal, noise)
        skip, out = (value.view(-1, *[1] * (x.ndim - 1)).to(x) for value in boundary(between))
        return pseudo_huber(skip * state + out * clean - target, self.huber)


def chord(
    levels: Levels, x: Tensor, level: Tensor, reached: Tensor, following: Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(state, level, signal, noise)`` of the point ``share`` ``[B]`` of the way from ``reached`` up to ``x``.

    The state is scaled to the schedule; the level may lie between two.
    """
    share = share.view(-1, *[1] * (x.ndim - 1))
    signal, noise = levels.at(level, x)
    end_signal, end_noise = levels.at(following, x)
    # a flow's trajectory is straight, so its chord needs no scaling; else the clean end is brought to one signal
    ratio = torch.ones_like(signal) if levels.is_flow else signal / end_signal
    state = share * x + (1 - share) * ratio * reached
    # both ends are of one trajectory, so noise adds in a straight line; the paper adds variances, as if the two had
    # nothing in common, which at both ends is the same and in between leaves the schedule
    signal = share * signal + (1 - share) * ratio * end_signal
    noise = share * noise + (1 - share) * ratio * end_noise
    size = signal + noise if levels.is_flow else (signal**2 + noise**2).sqrt()
    between = levels.level_of((noise / signal).flatten())
    return state / size, between, signal / size, noise / size


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

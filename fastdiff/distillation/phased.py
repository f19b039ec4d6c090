"""Phased consistency: the student leaps over one phase of the trajectory at a time, and samples deterministically."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.distillation.networks import Batch, Networks, guided
from fastdiff.distillation.objective import Objective


@dataclass(frozen=True)
class Phased(Objective):
    """From any level of a phase straight to its clean edge, as the guided teacher gets there in several steps.

    The phases of PCM (https://arxiv.org/abs/2405.18407) with the direct targets of progressive distillation
    (https://arxiv.org/abs/2202.00512): no bootstrapping, so the loss is a regression that a few thousand images move.
    Sampled by DDIM (TCD with gamma 0) at the phases' noisy ends.

    Args:
        edges: levels between phases from clean to noisy, starting at 0; levels are timesteps + 1.
        substeps: teacher steps over one phase, second order (DPM-Solver++ 2M) after the first.
        scale: guidance of the teacher, as diffusers counts it.
        at_edge: share of samples that start at their phase's noisy end, where sampling will; others lie within.
        noisiest: share of samples in the noisiest phase, where places are decided; the others share the rest equally.
    """

    edges: Sequence[int] = (0, 250, 500, 750, 1000)
    substeps: int = 4
    scale: float = 5.0
    at_edge: float = 0.7
    noisiest: float = 0.4

    def __post_init__(self) -> None:
        edges = list(self.edges)
        if len(edges) < 2 or edges[0] != 0 or any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError(f"Phased: edges must rise from 0, got {edges}")
        if self.substeps < 1 or not 0 <= self.at_edge <= 1 or not 0 <= self.noisiest <= 1:
            raise ValueError("Phased: substeps must be at least 1, at_edge and noisiest shares in 0 to 1")

    def starts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(level, edge) int64 ``[B]`` each: where a sample starts, and the clean end of its phase."""
        edges = torch.tensor(list(self.edges))
        phases = len(edges) - 1
        share = batch.uniform().cpu()
        others = (share - self.noisiest) / (1 - self.noisiest) if self.noisiest < 1 else share
        phase = (others * (phases - 1)).long().clamp(0, max(0, phases - 2))
        phase = torch.where((share < self.noisiest) | (phases == 1), phases - 1, phase)
        low, high = edges[phase], edges[phase + 1]
        within = low + 1 + (batch.uniform().cpu() * (high - low)).long().clamp(max=high - low - 1)
        level = torch.where(batch.uniform().cpu() < self.at_edge, high, within)
        return level.to(batch.clean.device), low.to(batch.clean.device)

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        """Mean squared error of the velocity, which weighs a clean estimate by 1 / noise²."""
        levels = networks.levels
        level, edge = self.starts(batch)
        x = levels.add(batch.clean, batch.normal(), level)
        with torch.no_grad():
            reached = solve(networks, x, level, edge, batch, self.substeps, self.scale)
            target = levels.velocity(x, levels.clean_reaching(x, level, reached, edge), level)
        clean, _ = levels.estimates(x, networks.student(x, level, batch.condition), level)
        return functional.mse_loss(levels.velocity(x, clean, level), target)


def solve(
    networks: Networks, x: Tensor, level: Tensor, to: Tensor, batch: Batch, substeps: int, scale: float
) -> Tensor:
    """The guided teacher's trajectory from ``level`` to ``to`` ``[B]``, in steps of equal angle; DPM-Solver++ 2M."""
    levels = networks.levels
    past: Tensor | None = None
    width_before: Tensor | None = None
    here = level
    for number in range(substeps):
        there = level + ((to - level) * (number + 1)).div(substeps, rounding_mode="trunc")
        there = torch.where(torch.tensor(number + 1 == substeps), to, torch.minimum(there, here))
        output = guided(networks.teacher, x, here, batch, scale)
        clean, _ = levels.estimates(x, output, here)
        signal, noise = levels.at(here, x)
        next_signal, next_noise = levels.at(there, x)
        width = torch.log(next_signal / next_noise) - torch.log(signal / noise)
        used = clean
        if past is not None and width_before is not None:
            share = width / (2 * width_before)
            # the last step to the clean end has no width, and a step of no length no history
            share = torch.where(
                torch.isfinite(share) & (width > 0) & (width_before > 0), share, torch.zeros_like(share)
            )
            used = clean + share * (clean - past)
        ratio = next_noise / noise
        x = ratio * x + (next_signal - signal * ratio) * used
        past, width_before, here = clean, width, there
    return x

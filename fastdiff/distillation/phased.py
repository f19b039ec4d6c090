"""Phased consistency: the student leaps over one phase of the trajectory at a time, and samples deterministically."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.distillation.networks import Batch, Networks, guided
from fastdiff.distillation.objective import Objective, grid_levels
from fastdiff.sampling import algebra, schedule


def equal_edges(scheduler: Any, phases: int) -> tuple[int, ...]:
    """Edges of ``phases`` equal phases, in steps of the scheduler: a flow's shift makes the noisy ones short.

    Args:
        scheduler: a diffusers scheduler; one that shifts by resolution counts as not shifted.
    """
    config = schedule.config_of(scheduler)
    count = config["num_train_timesteps"]
    if not schedule.is_flow(scheduler) or config.get("use_dynamic_shifting"):
        return tuple(grid_levels(count, phases).tolist())
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return tuple(round(count * algebra.shift_sigma(place / phases, shift)) for place in range(phases + 1))


@dataclass(frozen=True)
class Phased(Objective):
    """From any level of a phase straight to its clean edge, as the guided teacher gets there in several steps.

    The phases of PCM (https://arxiv.org/abs/2405.18407) with the direct targets of progressive distillation
    (https://arxiv.org/abs/2202.00512): no bootstrapping, so the loss is a regression that a few thousand images move.
    Sampled by DDIM (TCD with gamma 0) at the phases' noisy ends.

    A student of few phases learns best from one of more: `nodes` are the levels at which a phased teacher learned to
    take its steps. With one phase, and `also` some levels inside it, the student goes straight to the clean sample
    from each of them, which is sampled by LCM in one step or several.

    Args:
        edges: levels between phases from clean to noisy, starting at 0; levels are timesteps + 1.
        substeps: teacher steps over one phase.
        order: of the teacher's steps: 2 is DPM-Solver++ 2M (after a first step of order 1), 1 is DDIM.
        scale: guidance of the teacher, as diffusers counts it.
        at_edge: share of samples that start at their phase's noisy end, where sampling will; others lie within.
        noisiest: share of samples in the noisiest phase, where places are decided; the others share the rest equally.
        nodes: levels of the teacher's steps, in place of `substeps` equal ones; every start but its own is one of them.
        also: levels inside phases at which sampling will start too; they share `at_edge` with the phase's noisy end.
    """

    edges: Sequence[int] = (0, 250, 500, 750, 1000)
    substeps: int = 4
    scale: float = 5.0
    at_edge: float = 0.7
    noisiest: float = 0.4
    order: int = 2
    nodes: Sequence[int] = ()
    also: Sequence[int] = ()

    def __post_init__(self) -> None:
        edges = list(self.edges)
        if len(edges) < 2 or edges[0] != 0 or any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError(f"Phased: edges must rise from 0, got {edges}")
        if self.substeps < 1 or not 0 <= self.at_edge <= 1 or not 0 <= self.noisiest <= 1:
            raise ValueError("Phased: substeps must be at least 1, at_edge and noisiest shares in 0 to 1")
        if self.order not in (1, 2):
            raise ValueError(f"Phased: order must be 1 or 2, got {self.order}")
        if any(level in edges or not 0 < level < edges[-1] for level in self.also):
            raise ValueError(f"Phased: also={tuple(self.also)} must lie inside phases, not on the edges {edges}")

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
        level = torch.where(batch.uniform().cpu() < self.at_edge, self._entry(low, high, batch), within)
        return level.to(batch.clean.device), low.to(batch.clean.device)

    def _entry(self, low: Tensor, high: Tensor, batch: Batch) -> Tensor:
        """One of the levels of a phase at which sampling starts."""
        if not self.also:
            return high
        inner = torch.tensor(list(self.also))
        inside = (inner > low[:, None]) & (inner < high[:, None])
        # each phase's places are its inner levels, then its noisy end
        choice = (batch.uniform().cpu() * (inside.sum(1) + 1)).long()
        nth = inside.cumsum(1) - 1
        found = inside & (nth == choice[:, None])
        return torch.where(found.any(1), (found * inner).sum(1), high)

    def path(self, level: Tensor, edge: Tensor) -> Tensor:
        """The teacher's levels from a start to its phase's clean end, int64 ``[B, steps + 1]``; the end may repeat."""
        if not self.nodes:
            parts = torch.arange(self.substeps + 1, device=level.device)
            return level[:, None] + ((edge - level)[:, None] * parts).div(self.substeps, rounding_mode="trunc")
        nodes = torch.tensor(sorted(self.nodes, reverse=True), device=level.device)
        inner = nodes.expand(len(level), -1).clamp(min=edge[:, None]).minimum(level[:, None])
        # those above the start are the start itself: they go to the end of the row, where they count as the edge
        inner = torch.where(nodes >= level[:, None], edge[:, None], inner).sort(1, descending=True).values
        return torch.cat([level[:, None], inner, edge[:, None]], 1)

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        """Mean squared error of the velocity, which weighs a clean estimate by 1 / noise²."""
        levels = networks.levels
        level, edge = self.starts(batch)
        x = levels.add(batch.clean, batch.normal(), level)
        with torch.no_grad():
            reached = solve(networks, x, self.path(level, edge), batch, self.scale, self.order)
            target = levels.velocity(x, levels.clean_reaching(x, level, reached, edge), level)
        clean, _ = levels.estimates(x, networks.student(x, level, batch.condition), level)
        return functional.mse_loss(levels.velocity(x, clean, level), target)


def solve(networks: Networks, x: Tensor, path: Tensor, batch: Batch, scale: float, order: int = 2) -> Tensor:
    """The guided teacher's trajectory along the levels ``path`` ``[B, steps + 1]``, which never rise.

    DPM-Solver++ 2M where ``order`` is 2, DDIM where it is 1. A step of no length changes nothing.
    """
    levels = networks.levels
    past: Tensor | None = None
    width_before: Tensor | None = None
    for here, there in itertools.pairwise(path.unbind(1)):
        moves = there < here
        if not moves.any():
            break
        here = here.clamp(min=1)
        output = guided(networks.teacher, x, here, batch, scale)
        clean, _ = levels.estimates(x, output, here)
        signal, noise = levels.at(here, x)
        next_signal, next_noise = levels.at(there, x)
        width = torch.log(next_signal / next_noise) - torch.log(signal / noise)
        used = clean
        if order == 2 and past is not None and width_before is not None:
            share = width / (2 * width_before)
            # the last step to the clean end has no width, and a step of no length no history
            share = torch.where(
                torch.isfinite(share) & (width > 0) & (width_before > 0), share, torch.zeros_like(share)
            )
            used = clean + share * (clean - past)
        ratio = next_noise / noise
        moved = ratio * x + (next_signal - signal * ratio) * used
        x = torch.where(moves.view(-1, *[1] * (x.ndim - 1)), moved, x)
        past, width_before = clean, width
    return x

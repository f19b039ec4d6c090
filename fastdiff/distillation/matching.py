"""Matching distributions instead of trajectories: DMD2, and MMD for a fixed number of steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastdiff.distillation.networks import Batch, Network, Networks, ddim, guided
from fastdiff.distillation.objective import Objective


class _Critic(nn.ModuleDict):
    """The critic's module, and the network it is."""

    def __init__(self, module: nn.Module, network: Network):
        super().__init__({"critic": module})
        self.network = network


@dataclass(frozen=True)
class DistributionMatching(Objective):
    """DMD2 (https://arxiv.org/abs/2405.14867): move samples from where the student draws to where the teacher would.

    The student is trained on what it meets when sampling (backward simulation), and a critic, a LoRA on the teacher,
    learns to denoise the student's own samples; the difference of both denoisers is the gradient.

    Args:
        steps: levels at which the student is called, noisy to clean.
        scale: guidance of the teacher, as diffusers counts it.
        share: lowest and highest level at which denoisers are compared, as shares of the schedule.
    """

    helper_steps: ClassVar[int] = 5
    steps: Sequence[int] = (1000, 750, 500, 250)
    scale: float = 5.0
    share: tuple[float, float] = (0.02, 0.98)

    def __post_init__(self) -> None:
        steps = list(self.steps)
        if not steps or any(a <= b for a, b in itertools.pairwise(steps)) or steps[-1] < 1:
            raise ValueError(f"DistributionMatching: steps must fall and stay above 0, got {steps}")
        if not 0 < self.share[0] < self.share[1] <= 1:
            raise ValueError(f"DistributionMatching: share={self.share!r} must be two rising numbers within 0 and 1")

    def helpers(self, networks: Networks, example: Batch) -> nn.ModuleDict:
        if networks.fresh is None:
            raise ValueError("DistributionMatching needs a critic, which these networks cannot make")
        return _Critic(*networks.fresh())

    def draw(self, networks: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, level, eps)`` that the student meets at one of its steps when it samples, without gradients."""
        stop = int(batch.whole(0, len(self.steps) - 1)[0])
        levels = networks.levels
        x = batch.normal()
        level = torch.full((len(x),), min(self.steps[0], levels.last), device=x.device)
        if not levels.is_flow:
            # the noisiest state of a VP schedule is not quite noise; samplers start from noise all the same
            x = levels.at(level, x)[1] * x
        with torch.no_grad():
            for following in self.steps[1 : stop + 1]:
                clean, _ = levels.estimates(x, networks.student(x, level, batch.condition), level)
                level = torch.full_like(level, following)
                x = levels.add(clean, batch.normal(), level)
        return x, level, batch.normal()

    def _made(self, networks: Networks, batch: Batch) -> Tensor:
        x, level, _ = self.draw(networks, batch)
        return networks.levels.estimates(x, networks.student(x, level, batch.condition), level)[0]

    def _level(self, networks: Networks, batch: Batch) -> Tensor:
        last = networks.levels.last
        return batch.whole(max(1, int(self.share[0] * last)), int(self.share[1] * last))

    def loss(self, networks: Networks, batch: Batch, helpers: Any) -> Tensor:
        """Half the mean square to the sample moved by the normalised difference of both clean estimates."""
        made = self._made(networks, batch)
        with torch.no_grad():
            level = self._level(networks, batch)
            noised = networks.levels.add(made, batch.normal(), level)
            output = guided(networks.teacher, noised, level, batch, self.scale)
            real, _ = networks.levels.estimates(noised, output, level)
            fake, _ = networks.levels.estimates(noised, helpers.network(noised, level, batch.condition), level)
            size = (made - real).abs().flatten(1).mean(1).clamp(min=1e-3)
            gradient = (fake - real) / size.view(-1, *[1] * (made.ndim - 1))
        return 0.5 * functional.mse_loss(made, made.detach() - gradient)

    def helper_loss(self, networks: Networks, batch: Batch, helpers: Any) -> Tensor:
        """Denoising of the student's samples, in velocities."""
        with torch.no_grad():
            made = self._made(networks, batch)
        level = self._level(networks, batch)
        noised = networks.levels.add(made, batch.normal(), level)
        clean, _ = networks.levels.estimates(noised, helpers.network(noised, level, batch.condition), level)
        levels = networks.levels
        return functional.mse_loss(levels.velocity(noised, clean, level), levels.velocity(noised, made, level))


@dataclass(frozen=True)
class MomentMatching(Objective):
    """MMD-DDM (https://arxiv.org/abs/2301.07969): unroll a short deterministic sampler and match features of samples.

    The features are of latents (averages over cells of several sizes), so nothing is decoded and no other network is
    trusted. Good for the number of steps it was trained at only, and no judge of itself: report another metric.

    Args:
        steps: levels of the sampler, noisy to clean; DDIM.
        power: of the polynomial kernel ``(<x, y> / d + 1) ** power``.
    """

    steps: Sequence[int] = (1000, 750, 500, 250)
    power: int = 3

    def __post_init__(self) -> None:
        steps = list(self.steps)
        if not steps or any(a <= b for a, b in itertools.pairwise(steps)) or steps[-1] < 1:
            raise ValueError(f"MomentMatching: steps must fall and stay above 0, got {steps}")
        if self.power < 1:
            raise ValueError(f"MomentMatching: power must be at least 1, got {self.power}")

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        """Unbiased MMD² between the student's samples and the clean latents."""
        levels = networks.levels
        x = batch.normal()
        places = [*self.steps, 0]
        start = torch.full((len(x),), min(places[0], levels.last), device=x.device)
        x = levels.at(start, x)[1] * x
        for here, there in itertools.pairwise(places):
            level = torch.full_like(start, min(here, levels.last))

            def step(x: Tensor, level: Tensor = level, there: int = there) -> Tensor:
                output = networks.student(x, level, batch.condition)
                return ddim(levels, x, output, level, torch.full_like(level, there))

            made = checkpoint(step, x, use_reentrant=False)
            assert isinstance(made, Tensor)
            x = made
        return unbiased_mmd2(moments(x), moments(batch.clean), self.power)


def moments(x: Tensor) -> Tensor:
    """Averages over cells of 1, 2 and 4 a side of latents ``[B, C, h, w]`` and of their squares: ``[B, d]``."""
    parts = [x, x.square()]
    cells = [functional.adaptive_avg_pool2d(part, size).flatten(1) for part in parts for size in (1, 2, 4)]
    return torch.cat(cells, 1)


def unbiased_mmd2(x: Tensor, y: Tensor, power: int = 3) -> Tensor:
    """Unbiased squared maximum mean discrepancy of ``[m, d]`` and ``[m, d]`` under a polynomial kernel."""
    count, width = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / width + 1) ** power

    within = kernel(x, x) + kernel(y, y)
    within = (within.sum() - within.diagonal().sum()) / (count * (count - 1))
    return within - 2 * kernel(x, y).mean()

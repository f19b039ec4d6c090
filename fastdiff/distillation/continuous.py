"""Continuous-time consistency (sCM) of a pretrained network seen as TrigFlow, as SANA-Sprint distils."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.distillation.networks import Batch, Levels, Network, Networks, guided, trigflow
from fastdiff.distillation.objective import Objective, check_range


@dataclass(frozen=True)
class ContinuousConsistency(Objective):
    """sCM (https://arxiv.org/abs/2410.11081) with SANA-Sprint's transformation (https://arxiv.org/abs/2503.09641).

    The tangent of the student along the guided teacher's trajectory is a central difference of two forwards: forward
    mode does not exist for fused attention, and a difference runs through any kernel. `adversarial` adds the latent
    adversarial loss of SANA-Sprint, a discriminator on pooled statistics of the student's clean estimate.

    Args:
        scales: guidance of the teacher, drawn uniformly, as diffusers counts it.
        mean, deviation: of ``log(tan(angle))``, drawn normally.
        step: half the difference of angles in the tangent.
        warmup: steps over which the tangent's unstable term grows to full weight.
        adversarial: weight of the adversarial loss; 0 for none.
    """

    scales: tuple[float, float] = (5.0, 5.0)
    mean: float = 0.2
    deviation: float = 1.6
    step: float = 1e-2
    warmup: int = 400
    adversarial: float = 0.0

    def __post_init__(self) -> None:
        check_range(type(self).__name__, "scales", self.scales, 0)
        if self.deviation <= 0 or self.step <= 0 or self.warmup < 0 or self.adversarial < 0:
            raise ValueError(
                f"{type(self).__name__}: deviation and step must be above 0, warmup and adversarial not below"
            )

    def helpers(self, networks: Networks, example: Batch) -> nn.ModuleDict:
        if not self.adversarial:
            return nn.ModuleDict()
        return nn.ModuleDict({"critic": Critic(example.clean.shape[1])})

    def angles(self, batch: Batch, levels: Levels) -> Tensor:
        """Angles float64 ``[B]`` within the schedule."""
        place = batch.uniform().double().clamp(1e-6, 1 - 1e-6)
        drawn = self.mean + self.deviation * math.sqrt(2) * torch.erfinv(2 * place - 1)
        return torch.atan(drawn.exp()).clamp(max=last_angle(levels))

    def state(self, networks: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        """A noised sample in TrigFlow's coordinates, and its angle."""
        angle = self.angles(batch, networks.levels)
        signal, noise = _wide(torch.cos(angle), batch.clean), _wide(torch.sin(angle), batch.clean)
        return signal * batch.clean + noise * batch.normal(), angle

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        x, angle = self.state(networks, batch)
        student = trigflow(networks.levels, networks.student)
        ours = student(x, angle, batch.condition)
        with torch.no_grad():
            flow = self._teacher(networks, x, angle, batch)
            slope = tangent(student, x, angle, flow, batch, self.step, last_angle(networks.levels))
            direction = self.direction(x, angle, ours.detach(), flow, slope, batch.step)
        error = (ours - ours.detach() - direction).square().flatten(1).mean(1)
        total = (error / torch.tan(angle).to(error).clamp(min=0.1)).mean()
        if self.adversarial:
            clean = _wide(torch.cos(angle), x) * x - _wide(torch.sin(angle), x) * ours
            total = total - self.adversarial * helpers["critic"](clean).mean()
        return total

    def direction(self, x: Tensor, angle: Tensor, ours: Tensor, flow: Tensor, slope: Tensor, step: int) -> Tensor:
        """The normalised tangent that the student's output follows: sCM's algorithm 1; 0 at the optimum."""
        ratio = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        cos, sin = _wide(torch.cos(angle), x), _wide(torch.sin(angle), x)
        found = -(cos**2) * (ours - flow) - ratio * (cos * sin * x + cos * sin * slope)
        size = found.flatten(1).norm(dim=1) / math.sqrt(found[0].numel())
        return found / _wide(size + 0.1, x)

    def _teacher(self, networks: Networks, x: Tensor, angle: Tensor, batch: Batch) -> Tensor:
        return guided(trigflow(networks.levels, networks.teacher), x, angle, batch, batch.uniform(*self.scales))

    def helper_loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor | None:
        """Hinge loss of the discriminator: clean latents against the student's estimates."""
        if not self.adversarial:
            return None
        x, angle = self.state(networks, batch)
        with torch.no_grad():
            ours = trigflow(networks.levels, networks.student)(x, angle, batch.condition)
            made = _wide(torch.cos(angle), x) * x - _wide(torch.sin(angle), x) * ours
        critic = helpers["critic"]
        return functional.relu(1 - critic(batch.clean)).mean() + functional.relu(1 + critic(made)).mean()


class Critic(nn.Module):
    """A small convolutional discriminator of latents ``[B, C, h, w]``: logits of 4 x 4 patches."""

    def __init__(self, channels: int, width: int = 48):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 1, h / 4, w / 4]``."""
        return self.net(x)


def last_angle(levels: Levels) -> float:
    """The noisiest angle at which the networks of a schedule may be asked."""
    signal, noise = float(levels.signal[-1]), float(levels.noise[-1])
    return min(math.atan2(noise, signal), math.pi / 2 - 1e-3)


def tangent(
    network: Network, x: Tensor, angle: Tensor, flow: Tensor, batch: Batch, step: float, last: float = math.pi / 2
) -> Tensor:
    """Derivative of ``network`` along the trajectory through ``x`` with velocity ``flow``, by a central difference.

    Where a step would leave the schedule, both are moved in.
    """
    up = (angle + step).clamp(max=last)
    down = (angle - step).clamp(min=1e-4)
    ahead = network(x + _wide(up - angle, x) * flow, up, batch.condition)
    behind = network(x + _wide(down - angle, x) * flow, down, batch.condition)
    return (ahead - behind) / _wide(up - down, x)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, *[1] * (like.ndim - 1))

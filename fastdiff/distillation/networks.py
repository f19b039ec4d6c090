"""What a distillation loss sees: noise levels, a batch, and networks called as ``net(x, level, condition)``.

Levels are whole numbers from 0, the clean sample, to T, the noisiest: level i of a VP schedule is its timestep i - 1,
level i of a flow is ``sigma = i / T``. So the clean end is a level like any other, and a step may go to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.sampling import algebra, schedule

Condition = Mapping[str, Tensor]
"""Keyword arguments of the denoiser, each ``[B, ...]``."""

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""``(x [B, ...], level [B], condition)`` to the network's output, of the shape of ``x``; levels may be fractional."""


@dataclass(frozen=True)
class Levels:
    """Noise levels of a scheduler, clean to noisy: ``x = signal * clean + noise * eps``, float64 ``[T + 1]`` each."""

    prediction: algebra.Prediction
    signal: Tensor
    noise: Tensor
    is_flow: bool = False

    @classmethod
    def of(cls, scheduler: Any) -> Levels:
        """The levels of a diffusers scheduler."""
        prediction = schedule.prediction_of(scheduler)
        if schedule.is_flow(scheduler):
            count = schedule.config_of(scheduler)["num_train_timesteps"]
            sigma = torch.arange(count + 1, dtype=torch.float64) / count
            return cls(prediction, 1 - sigma, sigma, True)
        signal, noise = schedule.signal_and_noise(scheduler)
        one = torch.ones(1, dtype=torch.float64)
        return cls(prediction, torch.cat([one, signal]), torch.cat([0 * one, noise]))

    @property
    def last(self) -> int:
        """The noisiest level."""
        return len(self.signal) - 1

    def told(self, level: Tensor) -> Tensor:
        """What the network is told: timesteps 0 to 999 of a VP schedule, 1000 sigma of a flow."""
        return level if self.is_flow else (level - 1).clamp(min=0)

    def at(self, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise) of int64 levels ``[B]``, shaped to multiply ``like`` ``[B, ...]``, in its dtype."""
        shape = (-1, *[1] * (like.ndim - 1))
        index = level.to(self.signal.device)
        return (
            self.signal[index].to(like).view(shape),
            self.noise[index].to(like).view(shape),
        )

    def add(self, clean: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """The state at ``level``."""
        signal, noise = self.at(level, clean)
        return signal * clean + noise * eps

    def estimates(self, x: Tensor, output: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """``(clean, eps)`` that an output means at ``level`` (1 to T)."""
        return algebra.estimates(self.prediction, x, output, *self.at(level, x))

    def output(self, clean: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """The output that means ``(clean, eps)`` at ``level``."""
        return algebra.predict(self.prediction, clean, eps, *self.at(level, clean))

    def clean_reaching(self, x: Tensor, level: Tensor, target: Tensor, to: Tensor) -> Tensor:
        """The clean estimate with which one DDIM step takes ``x`` at ``level`` to ``target`` at ``to`` < ``level``."""
        signal, noise = self.at(level, x)
        next_signal, next_noise = self.at(to, x)
        ratio = next_noise / noise
        return (target - ratio * x) / (next_signal - ratio * signal)

    def level_of(self, ratio: Tensor) -> Tensor:
        """The level, whole or between two, at which noise / signal is ``ratio`` ``[B]``; float64, 1 at the least."""
        if self.is_flow:
            return (self.last / (1 + 1 / ratio.double())).clamp(1e-3, self.last)
        table = (self.noise[1:] / self.signal[1:]).log().to(ratio.device)
        wanted = ratio.double().clamp(min=1e-12).log().clamp(table[0], table[-1])
        right = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        low, high = table[right - 1], table[right]
        return right + (wanted - low) / (high - low)

    def velocity(self, x: Tensor, clean: Tensor, level: Tensor) -> Tensor:
        """The velocity (v of VP, or of a flow) of a state and its clean estimate: the scale in which losses compare."""
        signal, noise = self.at(level, x)
        eps = (x - signal * clean) / noise
        return eps - clean if self.is_flow else signal * eps - noise * clean


@dataclass
class Batch:
    """What one step of training learns from.

    Attributes:
        clean: clean latents ``[B, C, h, w]``, scaled as the denoiser sees them.
        condition, unconditional: of the captions, and of the empty caption.
        generator: the only source of randomness of a loss.
        step: number of the training step, from 0.
    """

    clean: Tensor
    condition: Condition
    unconditional: Condition
    generator: torch.Generator
    step: int = 0

    def normal(self) -> Tensor:
        """Standard normal noise of the shape of ``clean``."""
        return torch.randn(self.clean.shape, generator=self.generator, dtype=self.clean.dtype).to(self.clean.device)

    def whole(self, low: int, high: int) -> Tensor:
        """Int64 ``[B]``, uniform in low..high."""
        count = len(self.clean)
        return torch.randint(low, high + 1, (count,), generator=self.generator).to(self.clean.device)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Float ``[B]``, uniform and stratified over the batch, in a random order."""
        count = len(self.clean)
        places = torch.arange(count) + torch.rand(count, generator=self.generator)
        order = torch.randperm(count, generator=self.generator)
        return (low + (high - low) * places[order] / count).to(self.clean)


@dataclass
class Networks:
    """The networks of a run: ``student`` learns, ``teacher`` is fixed, ``average`` is the student's moving average.

    Attributes:
        fresh: makes another trainable copy of the teacher: the module, and the network it is.
        modules: the student's and the teacher's modules, for losses that look inside.
    """

    levels: Levels
    student: Network
    teacher: Network
    average: Network
    fresh: Callable[[], tuple[nn.Module, Network]] | None = None
    modules: tuple[nn.Module, nn.Module] | None = None


def guided(network: Network, x: Tensor, level: Tensor, batch: Batch, scale: Tensor | float) -> Tensor:
    """Output under classifier-free guidance; ``scale`` as diffusers counts it (1 is none), a number or ``[B]``."""
    if isinstance(scale, (int, float)) and scale == 1:
        return network(x, level, batch.condition)
    both = {name: torch.cat([batch.condition[name], batch.unconditional[name]]) for name in batch.condition}
    wanted, empty = network(torch.cat([x, x]), torch.cat([level, level]), both).chunk(2)
    if isinstance(scale, Tensor):
        scale = scale.view(-1, *[1] * (x.ndim - 1)).to(x)
    return empty + scale * (wanted - empty)


def ddim(levels: Levels, x: Tensor, output: Tensor, level: Tensor, to: Tensor) -> Tensor:
    """One DDIM step (eta 0) from ``level`` to ``to``; to level 0 it is the clean estimate."""
    clean, eps = levels.estimates(x, output, level)
    return levels.add(clean, eps, to)


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """``sqrt(error² + c²) - c``, averaged (improved consistency training, https://arxiv.org/abs/2310.14189)."""
    return ((error.square() + c * c).sqrt() - c).mean()


def trigflow(levels: Levels, network: Network) -> Network:
    """A network as TrigFlow's ``F(x, angle, condition)`` (https://arxiv.org/abs/2503.09641, section 3.1).

    ``x = cos(angle) clean + sin(angle) eps`` for latents of unit deviation, ``F`` its derivative by the angle. Exact
    for every parameterisation, so a pretrained flow or VP network needs no training to be called like this.
    """

    def called(x: Tensor, angle: Tensor, condition: Condition) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 1))
        signal, noise = torch.cos(angle).to(x).view(shape), torch.sin(angle).to(x).view(shape)
        scale = 1 / (signal + noise) if levels.is_flow else torch.ones_like(signal)
        level = levels.level_of(torch.tan(angle))
        output = network(x * scale, level, condition)
        clean, eps = algebra.estimates(levels.prediction, x * scale, output, signal * scale, noise * scale)
        return signal * eps - noise * clean

    return called

"""Noise levels of a chunk's steps, for every strength at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Levels:
    """Flow matching's sigmas of ``steps`` steps from any strength down to 0.

    The steps are evenly spaced in the scheduler's own time, before its shift towards noise, as diffusers spaces them:
    ``sigma = shift u / (1 + (shift - 1) u)``. A lower strength begins later and keeps their number.

    Args:
        shift: of the scheduler.
        sigmas: levels for strength 1 instead, falling; see `RolloutSettings`.
    """

    def __init__(self, steps: int, shift: float, sigmas: tuple[float, ...] | None = None, device: Any = "cpu"):
        self.shift = shift
        if sigmas is None:
            even = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
        else:
            even = self._even(torch.tensor([*sigmas, 0.0], dtype=torch.float64))
        self.even = even.to(device)

    def __len__(self) -> int:
        return len(self.even) - 1

    def __call__(self, strength: Tensor) -> Tensor:
        """Levels float64 ``[B, steps + 1]`` for strengths ``[B]``, the last one 0."""
        begin = self._even(strength.to(self.even)) / self.even[0]
        return shifted(self.even * torch.minimum(begin, torch.ones_like(begin))[:, None], self.shift)

    def _even(self, sigma: Tensor) -> Tensor:
        return sigma / (self.shift - (self.shift - 1) * sigma)


def shifted(even: Any, shift: float) -> Any:
    """Evenly spaced levels, a number or a tensor, moved towards noise."""
    return shift * even / (1 + (shift - 1) * even)


def shift_of(scheduler: Any) -> float:
    """A flow-matching scheduler's shift towards noise, 1 where it has none."""
    config = scheduler.config
    return float(getattr(config, "flow_shift", None) or getattr(config, "shift", None) or 1.0)

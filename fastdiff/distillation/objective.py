"""What every distillation loss has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastdiff.distillation.networks import Batch, Networks


@dataclass(frozen=True)
class Objective:
    """A loss, its settings checked on construction; it keeps no state of its own.

    A loss that trains networks beside the student (a critic, a discriminator) makes them in `helpers`; the trainer
    keeps them, optimises them `helper_steps` times a step with `helper_loss`, and hands them to both calls.
    """

    helper_steps: ClassVar[int] = 1

    def helpers(self, networks: Networks, example: Batch) -> nn.ModuleDict:
        """Networks to train beside the student; none by default."""
        return nn.ModuleDict()

    def helper_loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor | None:
        """Loss of the helpers on a batch; None where there are none."""
        return None

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        """The student's loss on a batch, a scalar with gradients to the student alone."""
        raise NotImplementedError


def grid_levels(count: int, points: int) -> torch.Tensor:
    """``points + 1`` levels from 0 to ``count``, as evenly spaced as whole numbers allow; int64."""
    return torch.linspace(0, count, points + 1, dtype=torch.float64).round().long()


def check_range(owner: str, name: str, value: tuple[float, float], low: float, high: float = float("inf")) -> None:
    """Raise a `ValueError` unless ``value`` is (a, b) with low <= a <= b <= high."""
    if len(value) != 2 or not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{owner}: {name}={value!r} must be two numbers in order, within {low} and {high}")

"""Scenes of the world as training data for students of the embedded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import Pool


@dataclass
class WorldSource:
    """Encoded renders of all kinds and their captions, drawn from (seed, step, rank); one caption in ten is empty.

    Args:
        seed: scenes of different seeds have nothing in common.
        processes: how many processes take from it, each with its own rank.
    """

    seed: int = 1_000
    processes: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        self._pools: dict[tuple[int, int], Pool] = {}

    def take(self, step: int, rank: int, batch: int) -> tuple[Tensor, Sequence[str], torch.Generator]:
        """Latents float32 [B, 4, 16, 16] of unit scale, captions, and the step's own generator."""
        if (rank, batch) not in self._pools:
            self._pools[rank, batch] = Pool(self, rank, batch, singles=0)
        return self._pools[rank, batch].take(step)

"""A chunk on its way through the steps, and what it is when it comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastdiff_pipelines.rollout.settings import RolloutSettings


@dataclass(frozen=True)
class Chunk:
    """A finished chunk.

    Attributes:
        number: of the chunk, from 0.
        first_frame: number of its first frame, from 0.
        pixels: float ``[B, 3, F, H, W]`` in 0..1.
        latents: of about unit variance ``[B, C, c, h, w]``.
        settings: in force when it was finished.
        version: of the settings, growing with every update.
        stages: milliseconds by stage, as `ChunkLedger` names them.
        entered: when its first frame was there, by the session's clock.
        captured: when each of its control frames was taken; None without.
    """

    number: int
    first_frame: int
    pixels: Tensor
    latents: Tensor
    settings: RolloutSettings
    version: int
    stages: dict[str, float]
    entered: float
    captured: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return self.pixels.shape[2]

    @cached_property
    def frames(self) -> np.ndarray:
        """The frames as uint8 ``[B, F, H, W, 3]``."""
        whole = self.pixels.mul(255).round_().to(torch.uint8)
        return whole.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


@dataclass(eq=False)
class Flying:
    """A chunk between two steps.

    Attributes:
        x: ``[B, C, c, h, w]``, noisy until the last step is taken.
        sigmas: ``[B, steps + 1]``, float64.
        noises: ``[steps, B, C, c, h, w]``.
        shown: frames of video to be handed out; None for all.
    """

    number: int
    x: Tensor
    sigmas: Tensor
    noises: Tensor
    entered: float
    shown: int | None = None
    captured: tuple[float, ...] | None = None
    step: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._first = self.x

    def rewind(self) -> int:
        """Back to before the first step; how many had been taken."""
        taken, self.step, self.x = self.step, 0, self._first
        return taken

    @property
    def nbytes(self) -> int:
        """Bytes of its latents and of their noise."""
        held = [tensor.untyped_storage() for tensor in (self.x, self._first, self.noises)]  # which may share
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())

    @property
    def finished(self) -> bool:
        """Whether every step has been taken."""
        return self.step == len(self.noises)

    def told(self) -> Tensor:
        """Timesteps of the next step, 0..1000, ``[B]``."""
        return (1000 * self.sigmas[:, self.step]).to(self.x.dtype)

    def advance(self, velocity: Tensor, sampler: str) -> None:
        """Take one step.

        With "renoise" the clean estimate ``x - sigma v`` gets the next step's own noise, with "euler" the state moves
        on along the velocity; the last step ends at sigma 0 either way.
        """
        now, then = (self.sigmas[:, self.step + i].to(self.x.dtype).view(-1, 1, 1, 1, 1) for i in (0, 1))
        self.step += 1
        clean = self.x - now * velocity
        if self.finished:
            self.x = clean
        elif sampler == "renoise":
            self.x = (1 - then) * clean + then * self.noises[self.step]
        else:
            self.x = self.x + (then - now) * velocity

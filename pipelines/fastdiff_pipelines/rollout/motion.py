"""How much control frames move, and how much noise that leaves room for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.acceleration import check_number


@dataclass(frozen=True)
class Motion:
    """The motion-aware noise controller of StreamDiffusionV2 (https://arxiv.org/abs/2511.07399).

    Still pictures take much noise and come out new; moving ones take less and stay with their input. With ``d`` the
    largest root mean square difference of neighbouring frames in the chunk, ``s = memory s' + (1 - memory) (strength -
    span clip(d / full, 0, 1))``, ``s'`` that of the chunk before.

    Attributes:
        span: how far the strength falls at full motion.
        full: difference, in pixels of -1..1, that counts as full motion.
        memory: share of the strength before, 0 to below 1.
    """

    span: float = 0.1
    full: float = 0.2
    memory: float = 0.1

    def __post_init__(self):
        check_number("Motion", "span", self.span, 0, 1)
        check_number("Motion", "full", self.full, 1e-6, 2)
        check_number("Motion", "memory", self.memory, 0, 0.999999)


class MotionController:
    """The controller of one session: remembers the last frame and the last strength, and never asks the device.

    Args:
        motion: its settings.
        first: strength before the first chunk; None takes the one asked for.
    """

    def __init__(self, motion: Motion, first: float | None = None):
        self.motion = motion
        self.first = first
        self.reset()

    def reset(self) -> None:
        """Forget frames and strengths."""
        self._frame: Tensor | None = None
        self._strength: Tensor | None = None

    def strength(self, frames: Tensor, asked: float) -> Tensor:
        """The strength for a chunk, ``[B]``, in ``asked - span`` to ``asked`` once the memory has faded.

        Args:
            frames: the chunk's control frames ``[B, 3, F, H, W]`` in -1..1.
            asked: strength for a still picture.
        """
        seen = frames if self._frame is None else torch.cat([self._frame, frames], dim=2)
        self._frame = frames[:, :, -1:].clone()
        motion = self.motion
        if seen.shape[2] > 1:
            moved = seen.diff(dim=2).square().mean(dim=(1, 3, 4)).sqrt().amax(1)
        else:
            moved = seen.new_zeros(len(seen))
        wanted = asked - motion.span * (moved / motion.full).clamp(0, 1)
        if self._strength is None:
            self._strength = torch.full_like(wanted, asked if self.first is None else self.first)
        self._strength = motion.memory * self._strength + (1 - motion.memory) * wanted
        return self._strength.clamp(1e-3, 1)

"""The moving buffer's student of `mini-wan`: a LoRA that crosses a share of the noise levels in one call.

StreamDiT's distillation (https://arxiv.org/abs/2507.03745): every frame of the buffer has its own share of the levels,
the guided teacher crosses it in several micro-steps, and the student learns to land where the teacher does, in all
shares at once. The buffers begin as true frames and noise; the student moves some of them on by itself before it
learns, so that it meets its own errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.video.causal import CausalWan
from fastdiff.video.text import Text

from . import wan_rollout, wan_student, wan_weights
from .wan_training import SHARES, Latents, TextToVideo, captions, windows

DEFAULTS = {"batch": 32, "learning_rate": 1e-3}
_MICRO_STEPS = 4  # of the teacher to a share
_OWN = 6  # chunks the student lets leave before it learns, at most
_GROWING = 0.3  # of the steps: a buffer that still fills
_FRAMES, _POOL, _PASSES = 33, 768, 4

Velocity = Callable[[Tensor, Tensor], Tensor]
"""From latents ``[B, C, F, h, w]`` and timesteps 0..1000 ``[B, F]`` to velocities like the latents."""


@dataclass(frozen=True)
class Buffer:
    """Frames under way, each at the upper edge of its share, and the clean one that leads them.

    Attributes:
        clean: ``[B, C, 0 or 1, h, w]``.
        noisy: ``[B, C, 1 to SHARES, h, w]``, oldest first; the last has just entered as noise.
    """

    clean: Tensor
    noisy: Tensor

    @classmethod
    def of(cls, frames: Tensor, led: bool, generator: torch.Generator) -> Buffer:
        """True latents ``[B, C, F, h, w]`` as a buffer; the first stays clean where it leads."""
        clean, rest = frames[:, :, : int(led)], frames[:, :, int(led) :]
        noise = torch.randn(rest.shape, generator=generator).to(rest)
        sigma = levels(rest.shape[2], 1.0).to(rest)[:, None, None]
        return cls(clean, (1 - sigma) * rest + sigma * noise)

    def crossed(self, velocity: Velocity, micro_steps: int = 1) -> Tensor:
        """The frames under way after their shares, ``[B, C, F, h, w]``: Euler steps, even before the shift."""
        x, led, count = self.noisy, self.clean.shape[2], self.noisy.shape[2]
        for step in range(micro_steps):
            now, after = (levels(count, 1 - (step + some) / micro_steps).to(x) for some in (0, 1))
            told = 1000 * torch.cat([now.new_zeros(led), now]).expand(len(x), -1)
            flow = velocity(torch.cat([self.clean, x], dim=2), told)[:, :, led:]
            x = x + (after - now)[:, None, None] * flow
        return x

    def after(self, crossed: Tensor, noise: Tensor) -> Buffer:
        """The buffer after one has left, if it was full, and noise has entered."""
        full = crossed.shape[2] == SHARES
        clean = crossed[:, :, :1] if full else self.clean
        return Buffer(clean, torch.cat([crossed[:, :, int(full) :], noise], dim=2))


def levels(under_way: int, left: float) -> Tensor:
    """Sigmas of the frames under way, float32 ``[F]``, with this part of their shares before them."""
    even = torch.arange(SHARES - under_way, SHARES, dtype=torch.float32)
    return wan_rollout.shifted((even + left) / SHARES)


def guided(causal: CausalWan, prompts: Tensor, nothing: Tensor, guidance: float) -> Velocity:
    """The teacher's velocity with guidance, both halves in one call."""
    text = Text.joined([Text(prompts), *[Text(nothing)] * len(prompts)])

    def velocity(x: Tensor, told: Tensor) -> Tensor:
        with_prompt, without = causal(torch.cat([x, x]), torch.cat([told, told]), text).chunk(2)
        return without + guidance * (with_prompt - without)

    return velocity


def mini_wan_buffer(run: Any) -> tuple[nn.Module, Callable[[int, int, int], Tensor]]:
    """Mean squared error between the student's mean velocity over a share and the guided teacher's."""
    model = TextToVideo()
    if not wan_weights.load_into("mini-wan", model):
        raise FileNotFoundError("there is no teacher: train mini-wan first")
    model.to(run.device).requires_grad_(False)
    module = wan_student.Student(model.transformer).to(run.device)
    teacher, student = CausalWan(model.transformer), CausalWan(module.transformer)
    pools: dict[int, Latents] = {}

    def loss(step: int, rank: int, batch: int) -> Tensor:
        pool = pools.setdefault(rank, Latents(run, rank))
        latents, _, scenes, rng = pool.take(step, batch, _FRAMES, _POOL, _PASSES)
        words, generator = captions(scenes, rng), torch.Generator().manual_seed(int(rng.integers(2**31)))
        text = Text(model.embed(words, run.device).detach())

        def velocity(x: Tensor, told: Tensor) -> Tensor:
            return student(x, told, text)

        with torch.no_grad():
            nothing = model.embed([""], run.device)
            buffer = _begun(latents.to(run.device), rng, generator)
            for _ in range(int(rng.integers(_OWN + 1))):
                noise = torch.randn(buffer.noisy[:, :, :1].shape, generator=generator).to(buffer.noisy)
                buffer = buffer.after(buffer.crossed(velocity), noise)
            expected = buffer.crossed(guided(teacher, text.embeds, nothing, wan_student.GUIDANCE), _MICRO_STEPS)
        count = buffer.noisy.shape[2]
        width = (levels(count, 0.0) - levels(count, 1.0)).to(expected)[:, None, None]
        return ((buffer.crossed(velocity) - expected) / width).square().mean()

    return module, loss


def _begun(latents: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Buffer:
    """Buffers of true frames ``[B, C, 9, h, w]``: filling ones from a clip's beginning, full ones from anywhere."""
    if rng.random() < _GROWING:
        return Buffer.of(latents[:, :, : int(rng.integers(1, SHARES))], False, generator)
    starts = rng.integers(0, latents.shape[2] - SHARES, len(latents))
    return Buffer.of(windows(latents, starts, SHARES + 1), True, generator)

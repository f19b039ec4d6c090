"""`mini-wan` frame after frame, in the plainest form: what training and measuring need of a causal rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.video.cache import KeyValueCache
from fastdiff.video.causal import CausalWan
from fastdiff.video.text import Text

from . import wan

CONTEXT = 4  # latent frames before the one that is made: with it, a window as in training


def shifted(even: Any, shift: float = wan.SHIFT) -> Any:
    """Evenly spaced noise levels in 0..1, a number or an array, moved towards noise."""
    return shift * even / (1 + (shift - 1) * even)


def sigmas(steps: int, shift: float = wan.SHIFT) -> list[float]:
    """Noise levels of a frame's denoiser calls, from 1 down, shifted towards noise; the last call ends at 0."""
    return [shifted(1 - step / steps, shift) for step in range(steps)]


class Rollout:
    """A batch of clips that grow by a latent frame at a time.

    Args:
        causal: the transformer's causal plug.
        prompts: embeddings ``[B, L, E]``.
        nothing: those of an empty prompt, ``[1, L, E]``, for guidance.
        guidance: 1 for none.
        generator: of all noise; on the CPU.
    """

    def __init__(
        self,
        causal: CausalWan,
        prompts: Tensor,
        generator: torch.Generator,
        nothing: Tensor | None = None,
        guidance: float = 1.0,
        cells: tuple[int, int] = (wan.SIZE // 8, wan.SIZE // 8),
    ) -> None:
        self.causal, self.generator, self.guidance = causal, generator, guidance
        self.batch, self.cells = len(prompts), cells
        if guidance != 1.0:
            if nothing is None:
                raise ValueError("guidance needs the embeddings of an empty prompt")
            prompts = Text.joined([Text(prompts), *[Text(nothing)] * self.batch]).embeds
        self.text = Text(prompts)
        self.cache: KeyValueCache = causal.cache(len(prompts), CONTEXT, *cells)

    def noise(self) -> Tensor:
        """One latent frame of noise, ``[B, C, 1, h, w]``."""
        drawn = torch.randn(self.batch, wan.CHANNELS, 1, *self.cells, generator=self.generator)
        return drawn.to(self.causal.device, self.causal.dtype)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """The guided velocity of the next frame ``[B, C, 1, h, w]`` at a noise level."""
        if self.guidance == 1.0:
            return self.causal(x, x.new_full((len(x),), 1000 * sigma), self.text, cache=self.cache)
        both = torch.cat([x, x])
        told = both.new_full((len(both),), 1000 * sigma)
        with_prompt, without = self.causal(both, told, self.text, cache=self.cache).chunk(2)
        return without + self.guidance * (with_prompt - without)

    @torch.no_grad()
    def frame(self, levels: Sequence[float], renoise: bool = True) -> Tensor:
        """The next latent frame ``[B, C, 1, h, w]``: an estimate a level, noised again to the next (or by Euler)."""
        x = self.noise()
        for level, after in zip(levels, [*levels[1:], 0.0], strict=True):
            velocity = self.velocity(x, level)
            if not renoise:
                x = x + (after - level) * velocity
                continue
            x = x - level * velocity
            if after:
                x = (1 - after) * x + after * self.noise()
        return x

    @torch.no_grad()
    def keep(self, frame: Tensor) -> None:
        """Make a finished frame the context of those that follow."""
        x = frame if self.guidance == 1.0 else torch.cat([frame, frame])
        self.causal(x, x.new_zeros(len(x)), self.text, cache=self.cache, commit=True)

    def clip(self, frames: int, levels: Sequence[float], renoise: bool = True) -> Tensor:
        """The next ``frames`` latent frames, ``[B, C, frames, h, w]``."""
        made = []
        for _ in range(frames):
            made.append(self.frame(levels, renoise))
            self.keep(made[-1])
        return torch.cat(made, dim=2)


def pixels(vae: Any, latents: Tensor) -> Tensor:
    """Frames uint8 ``[B, F, H, W, 3]`` of normalised latents ``[B, C, k, h, w]``."""
    from fastdiff.video.streaming_vae import StreamingVAE

    session = StreamingVAE(vae)
    frames = session.decode(session.unscaled(latents))
    assert frames is not None
    return as_uint8(frames)


def as_uint8(frames: Tensor) -> Tensor:
    """Frames ``[B, 3, F, H, W]`` in -1..1 as uint8 ``[B, F, H, W, 3]``."""
    return ((frames.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)

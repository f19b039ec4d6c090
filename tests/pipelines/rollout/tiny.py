"""Rollouts over networks of a few thousand parameters, and one in float64 whose every sum is plain."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional

from fastdiff.anatomy_wan import WanShape
from fastdiff.video import rotary
from fastdiff.video.cache import KeyValueCache
from fastdiff.video.causal import CausalWan
from fastdiff.video.text import Text
from fastdiff_pipelines.rollout import ChunkRollout
from tests.video.nets import CHANNELS, TEXT, wan

SIZE = 16


def embed(prompt: str) -> Tensor:
    """Six random tokens known by the prompt, and some padding."""
    generator = torch.Generator().manual_seed(sum(prompt.encode()) + 1)
    return functional.pad(torch.randn(6, TEXT, generator=generator), (0, 0, 0, 4))


class TinyPipe:
    """What a rollout needs of a `WanPipeline`."""

    def __init__(self, seed: int = 0, shift: float = 3.0):
        kind: Any = AutoencoderKLWan
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vae = kind(base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                            temperal_downsample=[False, True, True], latents_mean=[0.1] * CHANNELS,
                            latents_std=[0.7] * CHANNELS).eval().requires_grad_(False)  # fmt: skip
        self.transformer = wan(seed=seed)
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)

    def encode_prompt(self, prompt: list[str], **options: Any) -> tuple[Tensor, None]:
        return torch.stack([embed(one) for one in prompt]), None


def rollout(**options: Any) -> ChunkRollout:
    return ChunkRollout(TinyPipe(), height=SIZE, width=SIZE, **options)


def video(frames: int, seed: int = 0, size: int = SIZE) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8))


class PlainCausal:
    """One layer of attention over frames in float64, with the interface of `CausalWan` and its way with the cache."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.shape = WanShape(1, 1, 12, (1, 1, 1), CHANNELS, (4, 4, 4))
        sizes = (CHANNELS, 36), (12, CHANNELS), (TEXT, CHANNELS)
        drawn = (torch.randn(size, generator=generator, dtype=torch.float64) / 2 for size in sizes)
        self.inward, self.outward, self.text = drawn
        self.calls: list[int] = []

    def cache(self, rows: int, frames: int, height: int, width: int, **options: Any) -> KeyValueCache:
        return KeyValueCache(1, rows, frames, height * width, 1, 12, dtype=torch.float64, **options)

    def __call__(
        self, x: Tensor, timestep: Tensor, text: Text, *, cache: Any = None, rows: Any = None, chunk: Any = None,
        window: int | None = None, commit: bool | int = False,
    ) -> Tensor:  # fmt: skip
        self.calls.append(len(x) * x.shape[2])
        batch, _, frames, height, width = x.shape
        kept = frames if commit is True else int(commit)
        told = timestep if timestep.dim() == 2 else timestep[:, None].expand(-1, frames)
        words = (text.embeds.double().mean(1) @ self.text)[:, :, None, None, None]
        hidden = x + words + (told / 1000).sin()[:, None, :, None, None]
        q, k, v = (hidden.movedim(1, -1) @ self.inward).chunk(3, dim=-1)  # [B, F, h, w, 12]
        q, k, v = (part.reshape(batch, frames, height * width, 1, 12) for part in (q, k, v))
        space = rotary.in_space(self.shape, height, width, x.device, torch.float64)
        layout = cache.layout(frames, rows, kept)
        k = rotary.turn(k, space)
        time = rotary.in_time(self.shape, layout.new, torch.float64)
        past, values = cache.read(0, layout)
        aged = rotary.turn(past, rotary.in_time(self.shape, layout.held, torch.float64))
        keys, values = torch.cat([aged, rotary.turn(k, time)], dim=1), torch.cat([values, v], dim=1)
        q = rotary.turn(rotary.turn(q, space), time)
        if kept:
            cache.stage(0, k[:, :kept], v[:, :kept])
            cache.commit(layout, x[:, :, :kept], told[:, :kept])
        mask = self._sees(layout, frames, chunk or frames, window).repeat_interleave(height * width, 1)
        mask = mask.repeat_interleave(height * width, 2)[:, None]
        flat = [part.flatten(1, 2).transpose(1, 2) for part in (q, keys, values)]
        mixed = functional.scaled_dot_product_attention(*flat, attn_mask=mask).transpose(1, 2)
        return (mixed.reshape(batch, frames, height, width, 12) @ self.outward).movedim(-1, 1) + 0.3 * hidden

    @staticmethod
    def _sees(layout: Any, frames: int, chunk: int, window: int | None) -> Tensor:
        """Boolean ``[B, c, F + c]``, frame by frame, in the plainest way."""
        made = []
        for held, new in zip(layout.held.tolist(), layout.new.tolist(), strict=True):
            rows = []
            for place in range(frames):
                begins = new[0] + place // chunk * chunk
                first = 0 if window is None else begins - window
                rows.append([max(first, 0) <= time < begins + chunk for time in (*held, *new)])
            made.append(rows)
        return torch.tensor(made)

    recache = CausalWan.recache


def plain_model() -> Any:
    """Stands in for a `ChunkRollout`: latents of 2 x 2 cells, everything in float64."""
    pipe = TinyPipe()
    pipe.vae.double()
    return SimpleNamespace(
        pipe=pipe,
        vae=pipe.vae,
        causal=PlainCausal(),
        cell=(CHANNELS, 2, 2),
        height=SIZE,
        width=SIZE,
        device=torch.device("cpu"),
        state=torch.float64,
        encode=lambda prompts: Text(torch.stack([embed(one) for one in prompts])),
        running=lambda session: nullcontext(),
    )

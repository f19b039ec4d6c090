"""The decoder of `mini-wan` for videos without end: the encoder and its latents stay as they are.

An autoencoder that learned from short clips has never met caches that are many chunks old, and its colours go within
twenty chunks. Here the decoder runs through whole long clips, its caches handed on as in a stream; gradients reach back
some chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.anatomy_video import FeatureList

from . import moving, wan, wan_weights
from .wan_training import Latents, picture_error, pixels

DEFAULTS = {"batch": 4, "learning_rate": 1.5e-3}
_FRAMES = 81  # 21 latent frames: longer than any cache remembers
_BACK = 4  # chunks that gradients reach back
_POOL, _PASSES = 64, 4
_NOISE = 0.05  # of the latents' deviation, added before decoding


def wan_decoder(run: Any) -> tuple[nn.Module, Callable[[int, int, int], Tensor]]:
    """The autoencoder's own error of pictures, over all chunks of long clips."""
    module: Any = wan_weights.load_autoencoder().to(run.device).requires_grad_(False)
    for part in (module.decoder, module.post_quant_conv):
        part.requires_grad_(True)
    pools: dict[int, Latents] = {}

    def loss(step: int, rank: int, batch: int) -> Tensor:
        pool = pools.setdefault(rank, Latents(run, rank))
        latents, scenes, rng = pool.take(step, batch, _FRAMES, _POOL, _PASSES)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        noisy = latents + _NOISE * torch.randn(latents.shape, generator=generator)
        clips = pixels([moving.render(scene, _FRAMES, wan.SIZE) for scene in scenes]).to(run.device)
        with torch.autocast(torch.device(run.device).type, torch.bfloat16):
            return picture_error(_decoded(module, (noisy * pool.std + pool.mean).to(run.device)) - clips)

    return module, loss


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    """As `wan_training.decode`, but what a chunk remembers of chunks further back is taken as given."""
    chunks = FeatureList(vae)
    cache, made = chunks.empty("decoder"), []
    for number, part in enumerate(latents.split(1, dim=2)):
        if number % _BACK == 0:
            cache = [entry.detach() if isinstance(entry, Tensor) else entry for entry in cache]
        frames, cache = chunks.decode(part, cache)
        made.append(frames)
    return torch.cat(made, dim=2).float()

"""The autoencoder of `mini-wan` for videos without end: what `wan-autoencoder` learned from short clips, on long ones.

An autoencoder that has only seen short clips has never met caches that are many chunks old: late in a video its encoder
mixes up colours and its decoder loses them. Here both run through long clips with their caches handed on as in a
stream; gradients reach back some chunks. So that latents keep their meaning for a transformer that knows them, a late
frame's are drawn to what the autoencoder as it was says of the same frame early in a video.

In every second step the latents that are decoded change, somewhere on the way, to another clip's, which moves alike or
is of something else: a decoder that has never seen a cut goes on showing the old colours for many chunks after new
words were given. In the second part of a run only the decoder learns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fastdiff.anatomy_video import FeatureList

from . import moving, wan, wan_weights
from .wan_training import encode, picture_error, pixels

DEFAULTS = {"batch": 2, "learning_rate": 8e-4}
_FRAMES = 49  # 13 latent frames: longer than its caches remember
_BACK = 4  # chunks that gradients reach back
_EARLY = 2  # the latent frame from which on latents mean what they mean there
_ANCHOR = 0.3
_BOTH = 0.5  # of the run: encoder and decoder; then latents mean what they mean, and a transformer may learn them
_NOISE = 0.05  # added to latents before they are decoded


def wan_long(run: Any) -> tuple[nn.Module, Callable[[int, int, int], Tensor]]:
    """The error of pictures over all chunks of long clips, and how far latents are from what they meant before.

    What they meant is the shipped autoencoder's word: export only when the run is done, or the rest learns another.
    """
    module: Any = wan_weights.load_autoencoder().to(run.device)
    before: Any = copy.deepcopy(module).requires_grad_(False)

    def loss(step: int, rank: int, batch: int) -> Tensor:
        rng = np.random.default_rng([run.seed, 7, step, rank])
        module.requires_grad_(step < _BOTH * run.steps)
        module.decoder.requires_grad_()
        module.post_quant_conv.requires_grad_()
        scenes, first = [moving.scene(rng) for _ in range(batch)], [int(rng.integers(1000)) for _ in range(batch)]
        if step % 4 == 1:
            scenes, first = [scenes[0], *(moving.otherwise(scenes[0], rng) for _ in scenes[1:])], first[:1] * batch
        clips = [moving.render(scene, _FRAMES, wan.SIZE, start) for scene, start in zip(scenes, first, strict=True)]
        clip = pixels(clips).to(run.device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        with torch.autocast(torch.device(run.device).type, torch.bfloat16):
            last = clip.shape[2] // wan.PER_LATENT
            cut = int(rng.integers(1, last)) if step % 2 else last + 1
            latents, frames = _through(module, clip, generator, cut)
            drawn = _drawn(before, clip, latents, rng) if latents.requires_grad else 0.0
        return picture_error(frames.float() - exchanged(clip, 1 + (cut - 1) * wan.PER_LATENT)) + _ANCHOR * drawn

    return module, loss


def _drawn(before: Any, clip: Tensor, latents: Tensor, rng: np.random.Generator) -> Tensor:
    """How far the first latents and a late one are from what the autoencoder ``before`` says of their frames early."""
    late = int(rng.integers(_EARLY + 1, latents.shape[2]))
    there = (late - _EARLY) * wan.PER_LATENT
    again = clip[:, :, there : there + 1 + _EARLY * wan.PER_LATENT]
    with torch.no_grad():
        early = encode(before, clip[:, :, : 1 + _EARLY * wan.PER_LATENT])[:, : wan.CHANNELS]
        said = encode(before, again)[:, : wan.CHANNELS, _EARLY:]
    drawn = functional.mse_loss(latents[:, :, : _EARLY + 1].float(), early.float())
    return drawn + functional.mse_loss(latents[:, :, late : late + 1].float(), said.float())


def exchanged(clip: Tensor, at: int) -> Tensor:
    """Clips ``[B, C, F, h, w]`` whose frames from ``at`` on are each other's."""
    return torch.cat([clip[:, :, :at], clip[:, :, at:].flip(0)], dim=2)


def _through(vae: Any, clip: Tensor, generator: torch.Generator, cut: int) -> tuple[Tensor, Tensor]:
    """Latents ``[B, C, 1 + k, h, w]`` of clips and decoded frames, which from chunk ``cut`` on are of each other's.

    Chunk by chunk, gradients held back now and then.
    """
    chunks = FeatureList(vae)
    sides: dict[str, list[Any]] = {side: chunks.empty(side) for side in ("encoder", "decoder")}
    latents, frames = [], []
    for number, part in enumerate([clip[:, :, :1], *clip[:, :, 1:].split(wan.PER_LATENT, dim=2)]):
        if number % _BACK == 0:
            sides = {side: [_held(entry) for entry in cache] for side, cache in sides.items()}
        moments, sides["encoder"] = chunks.encode(part, sides["encoder"])
        latents.append(moments[:, : wan.CHANNELS])
        noise = torch.randn(latents[-1].shape, generator=generator).to(latents[-1])
        told = (latents[-1] if number < cut else latents[-1].flip(0)) + _NOISE * noise
        made, sides["decoder"] = chunks.decode(told, sides["decoder"])
        frames.append(made)
    return torch.cat(latents, dim=2), torch.cat(frames, dim=2)


def _held(entry: Any) -> Any:
    return entry.detach() if isinstance(entry, Tensor) else entry

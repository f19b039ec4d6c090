"""Helios' chunk loop as a generator: frames as soon as a chunk is done, for as long as wanted.

diffusers' Helios pipelines make a clip chunk by chunk and give it back when all are done; the clip and the history it
is made from grow with every chunk. Here each chunk is handed over when it is made, and the history keeps the frames
that the next chunk looks at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.anatomy_video import helios_loop, latent_scale

_PER_CHUNK = 9


@torch.no_grad()
def chunks(pipe: Any, count: int | None = None, **inputs: Any) -> Iterator[Tensor]:
    """The frames of one chunk after the other.

    Args:
        pipe: a `HeliosPipeline` or `HeliosModularPipeline`.
        count: chunks to make; None for no end.
        inputs: as for the pipeline's call, without `num_frames` and `output_type`; `guidance_scale` as a
            `HeliosPipeline` takes it.

    Yields:
        ``[B, 3, F, H, W]`` in -1..1, F frames a chunk.

    Raises:
        TypeError: an input that Helios' loop does not know.
        Unsupported: another pipeline.
    """
    for name in ("num_frames", "output_type"):
        if name in inputs:
            raise TypeError(f"chunks takes no {name}: it makes `count` chunks of frames in -1..1")
    per_chunk = inputs.get("num_latent_frames_per_chunk") or _PER_CHUNK
    components, loop, state = helios_loop(pipe, inputs | {"num_latent_frames_per_chunk": per_chunk, "num_frames": 1})
    vae = components.vae
    mean, deviation = (value.to(vae.device, vae.dtype) for value in latent_scale(vae))
    for number in itertools.count() if count is None else range(count):
        loop.loop_step(components, state, k=number)
        state.history_latents = state.history_latents[:, :, -sum(state.history_sizes) :].clone()
        yield vae.decode(state.latent_chunks.pop().to(mean) * deviation + mean, return_dict=False)[0]

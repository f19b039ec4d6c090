"""Training data of a model whose training data is not at hand: what it draws itself from a list of prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 8


class PromptSource:
    """Clean latents the teacher drew for prompts, made once, kept in a folder, and shuffled anew every pass.

    Args:
        pipe: the teacher.
        prompts: captions; latent i belongs to prompt i modulo their number and has noise of its own.
        folder: keeps ``latents-*.pt``; what is there already is not drawn again.
        count: how many latents.
        steps, scale: how the teacher draws; ``scale`` is its guidance.
        seed: of noise and order.
        empty: share of captions that are left out, for guidance to go on working.

    Raises:
        ValueError: there are no prompts.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        folder: Path,
        count: int = 256,
        steps: int = 25,
        scale: float = 5.0,
        seed: int = 0,
        empty: float = 0.1,
    ):
        if not prompts:
            raise ValueError("PromptSource: there are no prompts to draw")
        self.prompts = [prompts[index % len(prompts)] for index in range(count)]
        self.seed, self.empty = seed, empty
        folder.mkdir(parents=True, exist_ok=True)
        self.latents = torch.cat(
            [self._chunk(pipe, start, folder, steps, scale) for start in range(0, count, CHUNK)]
        ).float()

    def _chunk(self, pipe: Any, start: int, folder: Path, steps: int, scale: float) -> Tensor:
        path = folder / f"latents-{start}.pt"
        prompts = self.prompts[start : start + CHUNK]
        about = repr((prompts, steps, scale, self.seed, type(pipe).__name__))
        if path.exists():
            kept = torch.load(path, weights_only=True)
            if kept["about"] == about:
                return kept["latents"]
        noise = [torch.Generator().manual_seed(self.seed * 1_000_003 + start + index) for index in range(len(prompts))]
        options = {"num_inference_steps": steps, "guidance_scale": scale, "generator": noise}
        latents = pipe(prompts, output_type="latent", **options).images.cpu()
        torch.save({"about": about, "latents": latents}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
        return latents

    def take(self, step: int, rank: int, batch: int) -> tuple[Tensor, Sequence[str], torch.Generator]:
        """Latents ``[batch, C, h, w]``, their captions, and the step's own generator."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 64 + rank)
        chosen = torch.randint(len(self.latents), (batch,), generator=generator)
        left_out = torch.rand(batch, generator=generator) < self.empty
        captions = ["" if out else self.prompts[i] for i, out in zip(chosen.tolist(), left_out.tolist(), strict=True)]
        return self.latents[chosen], captions, generator

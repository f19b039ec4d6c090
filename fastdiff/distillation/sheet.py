"""What a student draws while it learns: a contact sheet beside the checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.distillation.networks import Condition, Levels, Network, ddim
from fastdiff.distillation.objective import Objective, grid_levels

CAPTIONS = (
    "a big red circle on the left on a plain white background",
    "a small blue square at the top on a striped gray background",
    "a big yellow triangle in the center on a plain black background",
    "a small white ring on the right on a dotted green background",
    "a big purple cross at the bottom on a plain pink background",
    "a green house on snow at night with the moon on the left",
    "a red diamond above a black circle on a plain blue background",
    "a yellow tree on grass at day with the sun on the right",
)


@torch.no_grad()
def sample(
    network: Network, levels: Levels, places: Sequence[int], hops: bool, x: Tensor, condition: Condition, seed: int = 0
) -> Tensor:
    """Latents from noise ``x`` ``[B, C, h, w]``: by DDIM from place to place, or to the clean estimate and back."""
    generator = torch.Generator().manual_seed(seed)
    for here, there in itertools.pairwise([*places, 0]):
        level, to = (torch.full((len(x),), value, device=x.device) for value in (here, there))
        output = network(x, level, condition)
        if hops:
            x = ddim(levels, x, output, level, to)
        else:
            clean, _ = levels.estimates(x, output, level)
            x = levels.add(clean, torch.randn(x.shape, generator=generator).to(x), to)
    return x


def places_of(objective: Objective, known: dict[str, list[int]], levels: Levels) -> tuple[list[int], bool]:
    """Where a student of this objective is called for a sheet, and whether it goes from place to place by DDIM."""
    if known:
        return known[max(known, key=int)], not getattr(objective, "also", True)
    own: Any = getattr(objective, "steps", ())
    steps: list[int] = [] if isinstance(own, int) else list(own)
    few = type(objective).__name__ not in ("AdaptedGuidance", "Compression")
    return steps or grid_levels(levels.last, 4 if few else 20).flip(0)[:-1].tolist(), not few


@torch.no_grad()
def draw(path: Path, pipe: Any, latents: Tensor) -> None:
    """Decode latents ``[B, C, h, w]`` and write them as a row of pictures."""
    from PIL import Image

    vae = pipe.vae
    shift = vae.config.get("shift_factor") or 0.0
    weight = next(vae.parameters())
    decoded = vae.decode((latents / vae.config["scaling_factor"] + shift).to(weight.device, weight.dtype)).sample
    pixels = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()
    row = torch.cat(list(pixels), 1).numpy()
    partial = path.with_suffix(".partial.png")
    Image.fromarray(row).save(partial)
    partial.replace(path)

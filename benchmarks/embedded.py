"""Pictures of the embedded model that several benchmarks of training-free methods draw and read back."""

from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import Row
from fastdiff.miniature import detector, world
from fastdiff_app.methods import to_bytes

NAMES = ("background", "colour", "position", "shape", "size")
STEPS, GUIDANCE = 25, 5.0
SEED = 5_000_011


def time_against_first(rows: list[Row]) -> None:
    """Fill in how many times faster than the first row each is."""
    for row in rows:
        row.ratio = rows[0].ms_median / row.ms_median if rows[0].ms_median and row.ms_median else None


def object_scenes(count: int) -> list[world.Scene]:
    """The same scenes of one object each in every benchmark."""
    rng = np.random.default_rng(SEED)
    return [world.object_scene(rng) for _ in range(count)]


def draw(
    pipe: Any, scenes: list[world.Scene], batch: int = 16, steps: int = STEPS, seed: int = SEED
) -> tuple[Tensor, list[float]]:
    """Pictures [N, 3, H, W] in 0..1 at the model's own size, and milliseconds for each; picture i has seed + i."""
    made, taken = [], []
    for first in range(0, len(scenes), batch):
        some = scenes[first : first + batch]
        noise = [torch.Generator().manual_seed(seed + first + row) for row in range(len(some))]
        start = perf_counter()
        words = [world.caption(scene) for scene in some]
        pictures = pipe(
            words, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=noise, output_type="pt"
        ).images
        taken += [(perf_counter() - start) * 1000 / len(some)] * len(some)
        made.append(pictures.cpu())
    return torch.cat(made), taken


def attributes_right(pictures: Tensor, scenes: list[world.Scene]) -> np.ndarray:
    """Share of attributes that are right, [N]; larger pictures are read at the detector's size."""
    images = [to_bytes(picture.permute(1, 2, 0).float().numpy()) for picture in pictures]
    scores = detector.score(images, scenes)
    return np.nanmean(np.stack([scores[name] for name in NAMES]), axis=0)


def image_to_image(pipe: Any) -> Any:
    """The same parts as an image-to-image pipeline."""
    import diffusers

    made: Any = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made

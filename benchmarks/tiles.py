"""`bench tiles`: pictures larger than the embedded model was made for, in tiles.

Rows:
    tiles-overlapping, tiles-moving, tiles-fixed: pictures enlarged twice each way from the model's own size, the second
        half of 25 steps on tiles of that size: MultiDiffusion's half-overlapping ones, `TiledInference` (its grid moves
        and wraps), and a grid that stands still. `nfe` counts denoiser calls for a picture. `border` is the mean
        gradient across the tiles' borders over that of like lines beside them: 1 is no seam. `attribute` is of the
        picture made small again, `attribute_difference` to `tiles-overlapping`, paired; `native`, the small pictures
        themselves, is what they were enlarged from.
    tiles-overlapping-large, tiles-moving-large: the same four times each way, for the time.

Intervals are 95 %; `ms_median` is one picture, and the grids take turns picture by picture.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from benchmarks.embedded import (
    GUIDANCE,
    SEED,
    STEPS,
    attributes_right,
    draw,
    image_to_image,
    object_scenes,
    time_against_first,
)
from benchmarks.record import Record, Row
from fastdiff.miniature import world
from fastdiff.quality import Interval, mean_interval, paired_difference
from fastdiff.runtime.tiles import TiledInference, tile_starts
from fastdiff_app.engine import load_pipeline


def run(full: bool = False) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many pictures.
    """
    times = 4 if full else 1
    record = Record("tiles")
    record.rows += measure_tiles(24 * times, large=2 * times, seams=128 * times)
    return record.finish()


def measure_tiles(pictures: int, large: int = 2, seams: int = 0, steps: int = STEPS, pipe: Any = None) -> list[Row]:
    """Rows `native` and `tiles-...`.

    Args:
        pictures: to compare the grids on.
        large: pictures made four times larger each way.
        seams: pictures on the moving grid, whose borders need many; as many as `pictures` at the least.
    """
    pipe = pipe or load_pipeline(None, "text-to-image")
    seams = max(seams, pictures)
    scenes = object_scenes(seams)
    small, _ = draw(pipe, scenes, steps=steps)
    rows = [Row("native", quality={"attribute": mean_interval(attributes_right(small, scenes))})]
    redraw = image_to_image(pipe)
    found = _tiled(redraw, scenes, small, 2, {"overlapping": pictures, "moving": seams, "fixed": pictures}, steps)
    first = attributes_right(found["overlapping"][0], scenes[:pictures])
    for made, row in found.values():
        attribute = attributes_right(made[:pictures], scenes[:pictures])
        row.quality["attribute"] = mean_interval(attribute)
        row.quality["attribute_difference"] = paired_difference(attribute, first)
    grown = _tiled(redraw, scenes, small, 4, {"overlapping": large, "moving": large}, steps)
    for _, row in grown.values():
        row.method += "-large"
    return rows + [row for some in (found, grown) for _, row in some.values()]


def _tiled(
    redraw: Any, scenes: list[world.Scene], small: Tensor, times: int, grids: dict[str, int], steps: int
) -> dict[str, tuple[Tensor, Row]]:
    """Enlarged pictures [N, 3, H, W] of each grid and its row; one picture a call, as a user with little memory has it.

    The grids take turns picture by picture, and times are of the pictures that all of them make.
    """
    size = small.shape[-1] * times
    period = redraw.vae_scale_factor * 2 ** (len(redraw.unet.config.block_out_channels) - 1)
    enlarged = torch.nn.functional.interpolate(small, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    made: dict[str, list[Tensor]] = {grid: [] for grid in grids}
    borders: dict[str, list[tuple[list[int], list[int]]]] = {grid: [] for grid in grids}
    taken: dict[str, list[float]] = {grid: [] for grid in grids}
    calls: dict[str, int] = {}
    counted: list[int] = []
    inner = redraw.unet.conv_in.register_forward_pre_hook(lambda module, args: counted.append(1))
    for place in range(max(grids.values())):
        for grid in (grid for grid, count in grids.items() if place < count):
            # a seed of its own for every picture: borders at the same places in all would measure what is in them
            member = TiledInference(grid=grid, seed=place)
            with fastdiff.accelerate(redraw, member):
                counted.clear()
                start = perf_counter()
                picture = redraw(
                    world.caption(scenes[place]),
                    image=enlarged[place : place + 1],
                    strength=0.5,
                    num_inference_steps=steps,
                    guidance_scale=GUIDANCE,
                    generator=torch.Generator().manual_seed(SEED + place),
                    output_type="pt",
                ).images
                milliseconds = (perf_counter() - start) * 1000
            calls[grid] = len(counted)
            made[grid].append(picture)
            borders[grid].append(_borders(redraw, member, size))
            if place < min(grids.values()):
                taken[grid].append(milliseconds)
    inner.remove()
    found = {}
    for grid in grids:
        row = Row.timed(f"tiles-{grid}", taken[grid], nfe=calls[grid])
        pictures = torch.cat(made[grid])
        row.quality["border"] = border_ratio(pictures, borders[grid], period)
        found[grid] = pictures, row
    time_against_first([row for _, row in found.values()])
    return found


def _borders(pipe: Any, member: TiledInference, size: int) -> tuple[list[int], list[int]]:
    """Rows and columns of pixels at which a tile of the last step begins."""
    scale = pipe.vae_scale_factor
    side, told = pipe.unet.config.sample_size, float(pipe.scheduler.timesteps[-1])
    lines = [
        sorted({start * scale for start in tile_starts(member, side, size // scale, told, axis)} - {0})
        for axis in ("rows", "columns")
    ]
    return lines[0], lines[1]


def border_ratio(pictures: Tensor, borders: Sequence[tuple[list[int], list[int]]], period: int = 16) -> Interval:
    """Mean gradient across lines of borders, over that across lines one and two periods beside them.

    Lines near by see much the same, so what is in the picture cancels and what a border adds is left. Whole periods
    beside, for a UNet draws steps between the places that share a cell of its coarsest layer, from the start of its
    tile on, and a decoder between latent cells: lines of another phase do not have them.

    Args:
        pictures: [N, C, H, W].
        borders: of each picture, the rows and columns of pixels before which a tile ends.
        period: pixels of a cell of the denoiser's coarsest layer.
    """
    here, there = [], []
    for picture, own in zip(pictures, borders, strict=True):
        at, beside = [], []
        for axis, lines in zip((-2, -1), own, strict=True):
            steps = picture.diff(dim=axis).abs().mean(dim=(0, -1 if axis == -2 else -2))  # [lines]
            for line in lines:
                around = [line + side * period * away for away in (1, 2) for side in (-1, 1)]
                at.append(steps[line - 1])
                beside.append(steps[[one - 1 for one in around if 0 < one <= len(steps)]].mean())
        here.append(float(torch.stack(at).mean()))
        there.append(float(torch.stack(beside).mean()))
    difference, level = mean_interval(np.array(here) - np.array(there)), float(np.mean(there))
    low, value, high = (1 + side / level for side in (difference.low, difference.value, difference.high))
    return Interval(value, low, high, difference.n)

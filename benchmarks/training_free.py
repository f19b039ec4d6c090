"""`bench training_free`: what can be had on the embedded model without training anything.

Rows:
    tiles-overlapping, tiles-moving, tiles-fixed: pictures enlarged twice each way from the model's own size, the second
        half of 25 steps on tiles of that size: MultiDiffusion's half-overlapping ones, `TiledInference` (its grid moves
        and wraps), and a grid that stands still. `nfe` counts denoiser calls for a picture. `border` is the mean
        gradient across the tiles' borders over that of the lines beside them: 1 is no seam. `attribute` is of the
        picture made small again, `attribute_difference` to `tiles-overlapping`, paired; `native`, the small pictures
        themselves, is what they were enlarged from.
    tiles-overlapping-large, tiles-moving-large: the same four times each way, for the time.
    shift-32, shift-40, shift-48, shift-64: `NoiseShift` calibrated at that size: `gain` is the held-out share of the
        one-step error taken away, `accepted` whether it was more than two standard errors.
    cold-stream, warm-stream, warm-stream-loose, warm-stream-unmoved: a moving clip through the stream of 4 steps, and
        with warm starts at a tolerance of 0.5, of 1, and of 0.5 without `move`; `-still` on a clip that stands still
        after a third. `nfe` is rows a frame, rounded, with `rows_per_frame` exactly; `psnr` is to the cold stream,
        `place_error` how far off the object is, as a fraction of the side.
    guided, interval-...: 25 steps with guidance at all noise levels, and in an interval of them.
    steps-N, fitted-N: N steps of the scheduler's own, and of a schedule fitted on other prompts where it was better;
        `psnr` is to 40 steps, `gain_db` what the fitted one gained.

Intervals are 95 %; `ms_median` is one picture or frame, in batches where the method allows; the methods of a
comparison take turns, picture by picture, frame by frame or batch by batch.
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from benchmarks.record import Record, Row
from fastdiff.miniature import detector, render, world
from fastdiff.quality import Interval, mean_interval, paired_difference, psnr
from fastdiff.runtime.tiles import TiledInference, tile_starts
from fastdiff.sampling.interval import GuidanceInterval
from fastdiff.sampling.noise_shift import Fit, calibrate
from fastdiff.sampling.steps import fit
from fastdiff.sampling.warm_start import WarmStart
from fastdiff_app.demo import Demo, attributes, demo
from fastdiff_app.engine import load_pipeline
from fastdiff_app.methods import to_bytes
from fastdiff_pipelines import Stream
from fastdiff_pipelines.frames import Codec

NAMES = ("background", "colour", "position", "shape", "size")
STEPS, GUIDANCE = 25, 5.0
SEED = 5_000_011
_STREAM: dict[str, Any] = {"steps": 4, "strength": 0.5, "height": 64, "width": 64}
INTERVALS = ((0.2, 0.85), (0.0, 0.85), (0.35, 1.0), (0.5, 1.0))


def run(full: bool = False, only: Sequence[str] = ("tiles", "shift", "warm", "interval", "steps")) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many pictures.
        only: which parts.
    """
    parts: dict[str, Callable[[int], list[Row]]] = {
        "tiles": lambda times: measure_tiles(24 * times, large=2 * times, seams=128 * times),
        "shift": lambda times: measure_noise_shift(96 * times),
        "warm": lambda times: measure_warm_start(3 * times),
        "interval": lambda times: measure_guidance_interval(96 * times),
        "steps": lambda times: measure_steps(64 * times),
    }
    record = Record("training_free")
    for name in only:
        record.rows += parts[name](4 if full else 1)
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
    scenes = _scenes(seams)
    small, _ = _drawn(pipe, scenes, steps=steps)
    rows = [Row("native", quality={"attribute": mean_interval(_attribute(small, scenes))})]
    redraw = _image_to_image(pipe)
    found = _tiled(redraw, scenes, small, 2, {"overlapping": pictures, "moving": seams, "fixed": pictures}, steps)
    first = _attribute(found["overlapping"][0], scenes[:pictures])
    for made, row in found.values():
        attribute = _attribute(made[:pictures], scenes[:pictures])
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
        row.quality["border"] = border_ratio(pictures, borders[grid], redraw.vae_scale_factor)
        found[grid] = pictures, row
    _against_first([row for _, row in found.values()])
    return found


def _against_first(rows: list[Row]) -> None:
    for row in rows:
        row.ratio = rows[0].ms_median / row.ms_median if rows[0].ms_median and row.ms_median else None


def _borders(pipe: Any, member: TiledInference, size: int) -> tuple[list[int], list[int]]:
    """Rows and columns of pixels at which a tile of the last step begins."""
    scale = pipe.vae_scale_factor
    side, told = pipe.unet.config.sample_size, float(pipe.scheduler.timesteps[-1])
    lines = [
        sorted({start * scale for start in tile_starts(member, side, size // scale, told, axis)} - {0})
        for axis in ("rows", "columns")
    ]
    return lines[0], lines[1]


def border_ratio(
    pictures: Tensor, borders: Sequence[tuple[list[int], list[int]]], cell: int = 4, near: int = 2, far: int = 4
) -> Interval:
    """Mean gradient across lines of borders, over that across lines `near` to `far` latent cells beside them.

    Neighbouring lines see much the same, so what is in the picture cancels and what a border adds is left. Whole cells
    beside, for a decoder draws steps between its cells that lines within them do not have.

    Args:
        pictures: [N, C, H, W].
        borders: of each picture, the rows and columns of pixels before which a tile ends.
        cell: pixels of a latent cell.
    """
    here, there = [], []
    for picture, own in zip(pictures, borders, strict=True):
        at, beside = [], []
        for axis, lines in zip((-2, -1), own, strict=True):
            steps = picture.diff(dim=axis).abs().mean(dim=(0, -1 if axis == -2 else -2))  # [lines]
            for line in lines:
                around = [line + side * cell * away for away in range(near, far + 1) for side in (-1, 1)]
                at.append(steps[line - 1])
                beside.append(steps[[one - 1 for one in around if 0 < one <= len(steps)]].mean())
        here.append(float(torch.stack(at).mean()))
        there.append(float(torch.stack(beside).mean()))
    difference, level = mean_interval(np.array(here) - np.array(there)), float(np.mean(there))
    low, value, high = (1 + side / level for side in (difference.low, difference.value, difference.high))
    return Interval(value, low, high, difference.n)


def measure_noise_shift(
    pictures: int, sizes: Sequence[int] = (32, 40, 48, 64), pipe: Any = None, keep: list[Fit] | None = None
) -> list[Row]:
    """Rows `shift-SIZE`; the fits themselves are appended to `keep`."""
    pipe = pipe or load_pipeline(None, "text-to-image")
    codec, rows = Codec(pipe), []
    scenes = [world.random_scene(rng) for rng in [np.random.default_rng(SEED)] for _ in range(pictures)]
    for size in sizes:
        images = torch.from_numpy(np.stack([render.render(scene, size) for scene in scenes]))
        images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            latents = torch.cat([codec.encode(some) for some in images.split(32)])
        found = calibrate(pipe, latents, [world.caption(scene) for scene in scenes])
        told = [shifted - time for time, shifted in zip(found.told, found.shifted, strict=True)]
        quality = {
            "gain": found.gain,
            "accepted": Interval.exact(float(found.accepted)),
            "largest_change": Interval.exact(max(told, key=abs)),
        }
        factors = ", ".join(f"{factor:g}" for factor in found.factors)
        rows.append(Row(f"shift-{size}", quality=quality, note=f"factors from clean to noisy: {factors}"))
        if keep is not None:
            keep.append(found)
    return rows


def measure_warm_start(clips: int, frames: int = 24, pipe: Any = None) -> list[Row]:
    """Rows `cold-stream` and `warm-stream...` on clips that move, and the same on clips that stand still half-way."""
    pipe = pipe or load_pipeline(None, "image-to-image")
    shots = [demo(seed, frames) for seed in range(clips)]
    ways = {
        "cold-stream": None,
        "warm-stream": WarmStart(0.5),
        "warm-stream-loose": WarmStart(1.0),
        "warm-stream-unmoved": WarmStart(0.5, move=False),
    }
    rows = []
    for ending, films in (("", [list(shot.frames) for shot in shots]), ("-still", [_halted(shot) for shot in shots])):
        found = _streamed(pipe, shots, films, ways)
        cold = found[0][0]
        for made, row in found:
            row.method += ending
            row.quality["psnr"] = mean_interval(psnr(made, cold).clamp(max=100).numpy())
        _against_first([row for _, row in found])
        rows += [row for _, row in found]
    return rows


def _halted(shot: Demo) -> list[np.ndarray]:
    """The clip's first third, after which the picture stands."""
    moving = len(shot.frames) // 3
    return [shot.frames[min(frame, moving)] for frame in range(len(shot.frames))]


def _streamed(
    pipe: Any, shots: list[Demo], films: list[list[np.ndarray]], ways: dict[str, WarmStart | None]
) -> list[tuple[Tensor, Row]]:
    """Pictures [N, 3, H, W] and row of each way; the ways take turns frame by frame."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, list[Any]] = {name: [] for name in ways}
    computed = dict.fromkeys(ways, 0)
    for shot, film in zip(shots, films, strict=True):
        streams = {name: Stream(pipe, shot.prompt, **_STREAM, warm_start=warm) for name, warm in ways.items()}
        for stream in streams.values():
            stream.warmup()
        for frame in film:
            for name, stream in streams.items():
                start = perf_counter()
                made[name] += stream.push(frame)
                taken[name].append((perf_counter() - start) * 1000)
        for name, stream in streams.items():
            made[name] += stream.flush()
            computed[name] += stream.report().rows_computed
    truths = [shot.truths[_shown(shot, image)] for shot, film in zip(shots, films, strict=True) for image in film]
    found = []
    for name, outputs in made.items():
        row = Row.timed(name, taken[name], nfe=round(computed[name] / len(truths)))
        row.quality["rows_per_frame"] = Interval.exact(computed[name] / len(truths), len(truths))
        pictures = [output.image for output in outputs]
        right = attributes(pictures, truths)
        row.quality |= {one: mean_interval(right[one]) for one in NAMES if one != "position"}
        # finer than the word for a place, which flips half-way between two
        places = [_away(picture, truth) for picture, truth in zip(pictures, truths, strict=True)]
        row.quality["place_error"] = mean_interval(places)
        found.append((torch.stack([output.pixels for output in outputs]).cpu(), row))
    return found


def _away(picture: np.ndarray, truth: world.Scene) -> float:
    """How far the object is from where the frame has it, as a fraction of the picture's side."""
    x, y = detector.locate(picture)
    return float(np.hypot(x - truth.things[0].x, y - truth.things[0].y))


def _shown(shot: Demo, image: np.ndarray) -> int:
    """Which frame of the clip an image is."""
    return next(place for place, frame in enumerate(shot.frames) if np.array_equal(frame, image))


def measure_guidance_interval(pictures: int, pipe: Any = None) -> list[Row]:
    """Rows `guided` and `interval-LOW-HIGH`."""
    pipe = pipe or load_pipeline(None, "text-to-image")
    scenes, batch = _scenes(pictures), 16
    _drawn(pipe, scenes[:batch])  # warm caches
    ways: dict[str, Any] = {"guided": []}
    ways |= {f"interval-{low:g}-{high:g}": GuidanceInterval(low, high) for low, high in INTERVALS}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, list[Tensor]] = {name: [] for name in ways}
    spared = dict.fromkeys(ways, 0)
    for first in range(0, pictures, batch):
        for name, member in ways.items():
            with fastdiff.accelerate(pipe, member) as handle:
                drawn, milliseconds = _drawn(pipe, scenes[first : first + batch], seed=SEED + first)
                spared[name] = round(sum(STEPS * row.accelerated / row.seen for row in handle.report().rows))
            made[name].append(drawn)
            taken[name] += milliseconds
    right = {name: _attribute(torch.cat(drawn), scenes) for name, drawn in made.items()}
    rows = []
    for name in ways:
        row = Row.timed(name, taken[name], nfe=2 * STEPS - spared[name])
        row.quality["attribute"] = mean_interval(right[name])
        row.quality["attribute_difference"] = paired_difference(right[name], right["guided"])
        rows.append(row)
    _against_first(rows)
    return rows


def measure_steps(pictures: int, budgets: Sequence[int] = (4, 6, 8, 12), pipe: Any = None) -> list[Row]:
    """Rows `steps-N` or `fitted-N`, whichever the fit decided for, half of the pictures held out."""
    pipe = pipe or load_pipeline(None, "text-to-image")
    prompts = [world.caption(scene) for scene in _scenes(pictures)]
    rows = []
    for trial in fit(pipe, prompts, budgets, guidance_scale=GUIDANCE):
        steps, times = trial.member.steps, trial.member.timesteps
        row = Row(f"{'fitted' if times else 'steps'}-{steps}", trial.milliseconds, nfe=2 * steps)
        row.quality = {"psnr": trial.psnr, "gain_db": trial.gain}
        row.note = f"timesteps {', '.join(f'{time:g}' for time in times)}" if times else "the scheduler's own timesteps"
        rows.append(row)
    _against_first(rows[::-1])
    return rows


def _scenes(count: int) -> list[world.Scene]:
    rng = np.random.default_rng(SEED)
    return [world.object_scene(rng) for _ in range(count)]


def _drawn(
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


def _attribute(pictures: Tensor, scenes: list[world.Scene]) -> np.ndarray:
    """Share of attributes that are right, [N]; larger pictures are read at the detector's size."""
    images = [to_bytes(picture.permute(1, 2, 0).float().numpy()) for picture in pictures]
    scores = detector.score(images, scenes)
    return np.nanmean(np.stack([scores[name] for name in NAMES]), axis=0)


def _image_to_image(pipe: Any) -> Any:
    """The same parts as an image-to-image pipeline."""
    import diffusers

    made: Any = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made

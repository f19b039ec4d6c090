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

Intervals are 95 %; `ms_median` is one picture or frame, in batches where the method allows.
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
    grids = {"overlapping": pictures, "moving": seams, "fixed": pictures}
    found = {grid: _tiled(redraw, scenes[:count], small[:count], 2, grid, steps) for grid, count in grids.items()}
    first, first_row = found["overlapping"][0], found["overlapping"][1]
    assert first_row.ms_median is not None
    for made, row in found.values():
        attribute = _attribute(made[:pictures], scenes[:pictures])
        row.quality["attribute"] = mean_interval(attribute)
        row.quality["attribute_difference"] = paired_difference(attribute, _attribute(first, scenes[:pictures]))
        assert row.ms_median is not None
        row.ratio = first_row.ms_median / row.ms_median
        rows.append(row)
    grown = {grid: _tiled(redraw, scenes[:large], small[:large], 4, grid, steps)[1] for grid in list(grids)[:2]}
    for grid, row in grown.items():
        row.method = f"tiles-{grid}-large"
        assert row.ms_median is not None and grown["overlapping"].ms_median is not None
        row.ratio = grown["overlapping"].ms_median / row.ms_median
    return rows + list(grown.values())


def _tiled(
    redraw: Any, scenes: list[world.Scene], small: Tensor, times: int, grid: str, steps: int
) -> tuple[Tensor, Row]:
    """Enlarged pictures [N, 3, H, W] and their row; one picture a call, as a user with little memory has it."""
    size = small.shape[-1] * times
    enlarged = torch.nn.functional.interpolate(small, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    made, borders, taken, calls = [], [], [], 0
    counted: list[int] = []
    inner = redraw.unet.conv_in.register_forward_pre_hook(lambda module, args: counted.append(1))
    for place, scene in enumerate(scenes):
        # a seed of its own for every picture: borders at the same places in all would measure what is there in them
        member = TiledInference(grid=grid, seed=place)
        with fastdiff.accelerate(redraw, member):
            counted.clear()
            start = perf_counter()
            made.append(
                redraw(
                    world.caption(scene),
                    image=enlarged[place : place + 1],
                    strength=0.5,
                    num_inference_steps=steps,
                    guidance_scale=GUIDANCE,
                    generator=torch.Generator().manual_seed(SEED + place),
                    output_type="pt",
                ).images
            )
            taken.append((perf_counter() - start) * 1000)
            calls = len(counted)
        borders.append(_borders(redraw, member, size))
    inner.remove()
    pictures = torch.cat(made)
    row = Row.timed(f"tiles-{grid}", taken, nfe=calls)
    row.quality["border"] = border_ratio(pictures, borders, redraw.vae_scale_factor)
    return pictures, row


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
        cold: Tensor | None = None
        for name, warm in ways.items():
            made, row = _streamed(pipe, shots, films, warm)
            cold = made if cold is None else cold
            row.method = name + ending
            row.quality["psnr"] = mean_interval(psnr(made, cold).clamp(max=100).numpy())
            if rows and ending == "" and rows[0].ms_median and row.ms_median:
                row.ratio = rows[0].ms_median / row.ms_median
            rows.append(row)
    for row in rows[len(ways) :]:
        row.ratio = rows[len(ways)].ms_median / row.ms_median
    return rows


def _halted(shot: Demo) -> list[np.ndarray]:
    """The clip's first third, after which the picture stands."""
    moving = len(shot.frames) // 3
    return [shot.frames[min(frame, moving)] for frame in range(len(shot.frames))]


def _streamed(
    pipe: Any, shots: list[Demo], films: list[list[np.ndarray]], warm: WarmStart | None
) -> tuple[Tensor, Row]:
    taken: list[float] = []
    pixels, rows, frames, right, places = [], 0, 0, [], []
    for shot, film in zip(shots, films, strict=True):
        stream = Stream(pipe, shot.prompt, steps=4, strength=0.5, height=64, width=64, warm_start=warm)
        stream.warmup()
        outputs: list[Any] = []
        for frame in film:
            start = perf_counter()
            outputs += stream.push(frame)
            taken.append((perf_counter() - start) * 1000)
        outputs += stream.flush()
        pixels += [output.pixels for output in outputs]
        rows, frames = rows + stream.report().rows_computed, frames + len(film)
        truths = [shot.truths[_shown(shot, image)] for image in film]
        pictures = [output.image for output in outputs]
        right.append(attributes(pictures, truths))
        # finer than the word for a place, which flips half-way between two
        places += [_away(picture, truth) for picture, truth in zip(pictures, truths, strict=True)]
    row = Row.timed("", taken, nfe=round(rows / frames))
    row.quality["rows_per_frame"] = Interval.exact(rows / frames, frames)
    names = [name for name in NAMES if name != "position"]
    row.quality |= {name: mean_interval(np.concatenate([one[name] for one in right])) for name in names}
    row.quality["place_error"] = mean_interval(places)
    return torch.stack(pixels).cpu(), row


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
    scenes = _scenes(pictures)
    _drawn(pipe, scenes[:16])  # warm caches
    made, taken = _drawn(pipe, scenes)
    whole = _attribute(made, scenes)
    row = Row.timed("guided", taken, nfe=2 * STEPS, ratio=1.0)
    row.quality["attribute"] = mean_interval(whole)
    rows = [row]
    for low, high in INTERVALS:
        with fastdiff.accelerate(pipe, GuidanceInterval(low, high)) as handle:
            made, taken = _drawn(pipe, scenes)
            seen = handle.report().rows[0]
        part = _attribute(made, scenes)
        left = round(STEPS * seen.accelerated / seen.seen)
        row = Row.timed(f"interval-{low:g}-{high:g}", taken, nfe=2 * STEPS - left)
        assert row.ms_median and rows[0].ms_median
        row.ratio = rows[0].ms_median / row.ms_median
        row.quality["attribute"] = mean_interval(part)
        row.quality["attribute_difference"] = paired_difference(part, whole)
        rows.append(row)
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
    for row in rows:
        row.ratio = rows[-1].ms_median / row.ms_median
    return rows


def _scenes(count: int) -> list[world.Scene]:
    rng = np.random.default_rng(SEED)
    return [world.object_scene(rng) for _ in range(count)]


def _drawn(pipe: Any, scenes: list[world.Scene], batch: int = 16, steps: int = STEPS) -> tuple[Tensor, list[float]]:
    """Pictures [N, 3, H, W] in 0..1 at the model's own size, and milliseconds for each."""
    made, taken = [], []
    for first in range(0, len(scenes), batch):
        some = scenes[first : first + batch]
        noise = [torch.Generator().manual_seed(SEED + first + row) for row in range(len(some))]
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

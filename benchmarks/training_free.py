"""`bench training_free`: what can be had on the embedded model without training anything.

Rows:
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
from benchmarks.embedded import (
    GUIDANCE,
    NAMES,
    SEED,
    STEPS,
    attributes_right,
    draw,
    object_scenes,
    time_against_first,
)
from benchmarks.record import Record, Row
from fastdiff.miniature import detector, render, world
from fastdiff.quality import Interval, mean_interval, paired_difference, psnr
from fastdiff.sampling.interval import GuidanceInterval
from fastdiff.sampling.noise_shift import Fit, calibrate
from fastdiff.sampling.steps import fit
from fastdiff.sampling.warm_start import WarmStart
from fastdiff_app.demo import Demo, attributes, demo
from fastdiff_app.engine import load_pipeline
from fastdiff_pipelines import Stream
from fastdiff_pipelines.frames import Codec

_STREAM: dict[str, Any] = {"steps": 4, "strength": 0.5, "height": 64, "width": 64}
INTERVALS = ((0.2, 0.85), (0.0, 0.85), (0.35, 1.0), (0.5, 1.0))


def run(full: bool = False, only: Sequence[str] = ("shift", "warm", "interval", "steps")) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many pictures.
        only: which parts.
    """
    parts: dict[str, Callable[[int], list[Row]]] = {
        "shift": lambda times: measure_noise_shift(96 * times),
        "warm": lambda times: measure_warm_start(3 * times),
        "interval": lambda times: measure_guidance_interval(96 * times),
        "steps": lambda times: measure_steps(64 * times),
    }
    record = Record("training_free")
    for name in only:
        record.rows += parts[name](4 if full else 1)
    return record.finish()


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
        time_against_first([row for _, row in found])
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
    scenes, batch = object_scenes(pictures), 16
    draw(pipe, scenes[:batch])  # warm caches
    ways: dict[str, Any] = {"guided": []}
    ways |= {f"interval-{low:g}-{high:g}": GuidanceInterval(low, high) for low, high in INTERVALS}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, list[Tensor]] = {name: [] for name in ways}
    spared = dict.fromkeys(ways, 0)
    for first in range(0, pictures, batch):
        for name, member in ways.items():
            with fastdiff.accelerate(pipe, member) as handle:
                drawn, milliseconds = draw(pipe, scenes[first : first + batch], seed=SEED + first)
                spared[name] = round(sum(STEPS * row.accelerated / row.seen for row in handle.report().rows))
            made[name].append(drawn)
            taken[name] += milliseconds
    right = {name: attributes_right(torch.cat(drawn), scenes) for name, drawn in made.items()}
    rows = []
    for name in ways:
        row = Row.timed(name, taken[name], nfe=2 * STEPS - spared[name])
        row.quality["attribute"] = mean_interval(right[name])
        row.quality["attribute_difference"] = paired_difference(right[name], right["guided"])
        rows.append(row)
    time_against_first(rows)
    return rows


def measure_steps(pictures: int, budgets: Sequence[int] = (4, 6, 8, 12), pipe: Any = None) -> list[Row]:
    """Rows `steps-N` or `fitted-N`, whichever the fit decided for, half of the pictures held out."""
    pipe = pipe or load_pipeline(None, "text-to-image")
    prompts = [world.caption(scene) for scene in object_scenes(pictures)]
    rows = []
    for trial in fit(pipe, prompts, budgets, guidance_scale=GUIDANCE):
        steps, times = trial.member.steps, trial.member.timesteps
        row = Row(f"{'fitted' if times else 'steps'}-{steps}", trial.milliseconds, nfe=2 * steps)
        row.quality = {"psnr": trial.psnr, "gain_db": trial.gain}
        row.note = f"timesteps {', '.join(f'{time:g}' for time in times)}" if times else "the scheduler's own timesteps"
        rows.append(row)
    time_against_first(rows[::-1])
    return rows

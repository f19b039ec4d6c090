"""The part of `bench fewstep` that streams: a moving clip through the undistilled stream and through the students.

Rows:
    stream: the stream as it ships, four LCM steps from half-noised frames, undistilled.
    stream-4: the four-step student, whose last two steps lie at that noise: two calls a frame.
    stream-1: the one-step student: one call a frame.

Methods take turns frame by frame. The first clip is also written as a video, side by side with its input.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import fastdiff
from benchmarks.record import RESULTS, Row
from fastdiff.distillation.few_step import FewStep
from fastdiff.quality import mean_interval, paired_difference
from fastdiff_app.demo import Demo, attributes, demo
from fastdiff_app.engine import load_pipeline
from fastdiff_app.methods import Run, StreamLoop, round_robin, to_bytes
from fastdiff_app.video import write_video
from fastdiff_pipelines import Stream

_COMMON: dict[str, Any] = {"strength": 0.5, "guidance": "none", "guidance_scale": 1.0, "seed": 0}
WAYS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "stream": (None, {"steps": 4, "sampler": "lcm"}),
    "stream-4": ("four-step", {"timesteps": (499, 249), "sampler": "ddim"}),
    "stream-1": ("one-step", {"timesteps": (499,), "sampler": "lcm"}),
}
FPS, LARGER = 15, 3


def stream_rows(clips: int = 4, frames: int = 40, size: int = 64, folder: Path = RESULTS) -> list[Row]:
    """One row a way; the video goes to ``folder``/students.mp4 and a strip of it to students.png."""
    shots = [demo(seed, frames, size) for seed in range(clips)]
    runs: dict[str, list[Run]] = {name: [] for name in WAYS}
    with ExitStack() as stack:
        pipes = {name: _pipe(stack, student) for name, (student, _) in WAYS.items()}
        for shot in [shots[0], *shots]:
            now = [Run(name, _loop(pipes[name], name, shot, size)) for name in WAYS]
            round_robin(now, list(shot.frames))
            for one in now:
                runs[one.name].append(one)
    # the first pass over the first clip pays for what later ones find ready
    rows = list(_rows({name: done[1:] for name, done in runs.items()}, shots))
    _show(shots[0], {name: done[1] for name, done in runs.items()}, folder)
    return rows


def _pipe(stack: ExitStack, student: str | None) -> Any:
    pipe = load_pipeline(None, "image-to-image")
    if student:
        stack.enter_context(fastdiff.accelerate(pipe, FewStep(student)))
    return pipe


def _loop(pipe: Any, name: str, shot: Demo, size: int) -> StreamLoop:
    return StreamLoop(Stream(pipe, shot.prompt, height=size, width=size, **_COMMON, **WAYS[name][1]))


def _rows(runs: dict[str, list[Run]], shots: list[Demo]) -> Iterator[Row]:
    plain: np.ndarray | None = None
    slowest: float | None = None
    for name, done in runs.items():
        options = WAYS[name][1]
        taken = [milliseconds for one in done for milliseconds in one.milliseconds]
        row = Row.timed(name, taken, nfe=options.get("steps") or len(options["timesteps"]))
        pictures = [to_bytes(one.images[i]) for one in done for i in sorted(one.images)]
        truths = [shot.truths[i] for shot, one in zip(shots, done, strict=True) for i in sorted(one.images)]
        right = attributes(pictures, truths)
        row.quality = {key: mean_interval(values) for key, values in right.items()}
        mean = np.stack(list(right.values())).mean(0)
        row.quality["attribute"] = mean_interval(mean)
        first = mean if plain is None else plain
        plain = first
        slowest = slowest or row.ms_median
        row.ratio = slowest / row.ms_median if slowest and row.ms_median else None
        row.quality["attribute_difference"] = paired_difference(mean, first)
        row.note = f"{1000 / row.ms_median:.1f} frames a second" if row.ms_median else ""
        yield row


def _show(shot: Demo, runs: dict[str, Run], folder: Path) -> None:
    """Input and every way, side by side."""
    from PIL import Image

    known = sorted(set.intersection(*(set(one.images) for one in runs.values())))
    rows = [np.concatenate([shot.frames[i], *(to_bytes(one.images[i]) for one in runs.values())], 1) for i in known]
    large = np.stack([row.repeat(LARGER, 0).repeat(LARGER, 1) for row in rows])
    write_video(folder / "students.mp4", large, FPS)
    chosen = [rows[int(place)] for place in np.linspace(0, len(rows) - 1, 5)]
    Image.fromarray(np.concatenate(chosen, 0).repeat(2, 0).repeat(2, 1)).save(folder / "students.png")

"""`bench fewstep`: the embedded models in few steps, and what each student gave away for it.

Rows for `mini-sd`, and the same ending in `-dit` for `mini-dit`:
    teacher-25: 25 steps under guidance, the pipeline as it ships.
    teacher-4: the same with 4 steps, which is what a student has to beat.
    student-4, student-2, student-1: the shipped students, one call of the denoiser a step.
    scm-2, scm-1: of `mini-dit` alone, the student distilled by continuous-time consistency.
    agd-25: 25 steps with the guidance adapter: guidance in one row of the batch.
    unfolded-25-dit: teacher-25-dit on a batch of captions as diffusers alone draws it. All other rows of `mini-dit`
        have `FoldedText`, which is exact: `max_abs_difference` is between their latents.
    renders: other renders of the same captions; its `mmd2` is the floor of that column.
    stream, stream-4, stream-1: a moving clip; see `benchmarks.students`.

`attribute` is the mean of background, colour, position, shape and size as the detector reads them, and
`attribute_difference` that to `teacher-25`, paired by prompt and noise. `mmd2` is to renders of the captions, and
`mmd2_difference` to `teacher-4` paired by caption. `diversity` is the spread of place, area and colour over many
pictures of one caption, over the spread the world itself has for it: 1 is a perfect sampler. `nfe` counts conditional
and unconditional rows. Contenders take turns batch by batch. Intervals are 95 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

import fastdiff
from benchmarks.record import Record, Row, could_not_run
from benchmarks.students import stream_rows
from fastdiff.attention.folded import FoldedText
from fastdiff.distillation.adapters import GuidanceAdapter
from fastdiff.distillation.few_step import FewStep
from fastdiff.load import LoadError
from fastdiff.miniature import detector, render, world
from fastdiff.quality import Interval, mean_interval, paired_difference
from fastdiff.quality.distribution import features, mmd2, mmd2_difference
from fastdiff_app.methods import check_finite, to_bytes

NAMES = ("background", "colour", "position", "shape", "size")
STEPS, GUIDANCE = 25, 5.0
SEED = 3_000_017
CAPTIONS, EACH = 12, 16  # for diversity
REPEATS = 3  # of batches that are only timed


@dataclass(frozen=True)
class Contender:
    """A way to draw.

    Attributes:
        options: of the pipeline's call.
        nfe: rows of the denoiser for one picture.
        members: the accelerations, if any.
    """

    name: str
    options: dict[str, Any]
    nfe: int
    members: tuple[Any, ...] = ()


def contenders(model: str) -> list[Contender]:
    """The rows of one model, teacher first."""
    ending = {"mini-sd": "", "mini-dit": "-dit"}[model]
    guided = {"guidance_scale": GUIDANCE}
    exact = (FoldedText(),) if model == "mini-dit" else ()
    few = {f"student-{steps}": ("four-step" if steps == 4 else "one-step", steps) for steps in (4, 2, 1)}
    if exact:
        few |= {"scm-2": ("scm", 2), "scm-1": ("scm", 1)}
    return [
        Contender(f"teacher-25{ending}", {"num_inference_steps": STEPS, **guided}, 2 * STEPS, exact),
        Contender(f"teacher-4{ending}", {"num_inference_steps": 4, **guided}, 8, exact),
        *(
            Contender(f"{name}{ending}", {"num_inference_steps": steps}, steps, (FewStep(student), *exact))
            for name, (student, steps) in few.items()
        ),
        Contender(f"agd-25{ending}", {"num_inference_steps": STEPS, **guided}, STEPS, (*exact, GuidanceAdapter())),
    ]


def run(
    full: bool = False,
    prompts: int = 0,
    batch: int = 32,
    models: Sequence[str] = ("mini-sd", "mini-dit"),
    clips: int = 4,
) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many prompts.
        prompts: how many; 0 chooses.
        clips: how many clips to stream.
    """
    count = prompts or (1024 if full else 256)
    rng = np.random.default_rng(SEED)
    scenes = [world.object_scene(rng) for _ in range(count)]
    truth = features(_stack([render.render(_again(scene, rng)) for scene in scenes]))
    other = features(_stack([render.render(_again(scene, rng)) for scene in scenes]))
    known = _known(rng)
    record = Record("fewstep")
    record.rows.append(Row("renders", quality={"mmd2": mmd2(other, truth)}))
    for model in models:
        record.rows += _model(model, scenes, truth, known, batch)
    if clips:
        record.rows += stream_rows(clips)
    return record.finish()


def _model(model: str, scenes: list[world.Scene], truth: torch.Tensor, known: list, batch: int) -> list[Row]:
    try:
        pipe = fastdiff.load(model)
    except LoadError as error:
        return [could_not_run(one.name, error) for one in contenders(model)]
    pipe.set_progress_bar_config(disable=True)
    captions = [world.caption(scene) for scene in scenes]
    ready, failed = [], {}
    for one in contenders(model):
        try:  # once for nothing: first calls pay for what later ones find ready
            with _engaged(pipe, one):
                _draw(pipe, captions[:batch], one, SEED, batch)
            ready.append(one)
        except (fastdiff.Unsupported, FileNotFoundError) as error:
            failed[one.name] = could_not_run(one.name, error)
    drawn = _in_turns(pipe, ready, captions, batch)
    teacher, control, *_ = (one.name for one in contenders(model))
    seen = {name: features(_stack(pictures)) for name, (pictures, _) in drawn.items()}
    reads = {name: detector.score(pictures, scenes) for name, (pictures, _) in drawn.items()}
    scores = {name: np.stack([read[part] for part in NAMES]).mean(0) for name, read in reads.items()}
    rows: list[Row] = []
    for one in contenders(model):
        if one.name in failed:
            rows.append(failed[one.name])
            continue
        row = Row.timed(one.name, drawn[one.name][1], nfe=one.nfe)
        row.quality = {part: mean_interval(reads[one.name][part]) for part in NAMES}
        row.quality["attribute"] = mean_interval(scores[one.name])
        row.quality["attribute_difference"] = paired_difference(scores[one.name], scores[teacher])
        row.quality["mmd2"] = mmd2(seen[one.name], truth)
        if one.name != control:
            row.quality["mmd2_difference"] = mmd2_difference(seen[one.name], seen[control], truth)
            row.quality["attribute_to_control"] = paired_difference(scores[one.name], scores[control])
        row.quality["diversity"] = _diversity(pipe, one, known, batch)
        if drawn.get(teacher) and row.ms_median:
            row.ratio = float(np.median(drawn[teacher][1])) / row.ms_median
        rows.append(row)
    if model == "mini-dit":
        rows.append(_unfolded(pipe, contenders(model)[0], captions[:batch]))
    return rows


def _unfolded(pipe: Any, one: Contender, captions: list[str]) -> Row:
    """What `FoldedText` saves and changes, by turns on one batch: the times without it."""
    taken: dict[tuple, list[float]] = {(): [], one.members: []}
    latents: dict[tuple, torch.Tensor] = {}
    for _ in range(REPEATS):
        for members in taken:
            noise = [torch.Generator().manual_seed(SEED + index) for index in range(len(captions))]
            with fastdiff.accelerate(pipe, list(members)):
                began = perf_counter()
                latents[members] = pipe(captions, generator=noise, output_type="latent", **one.options).images
                taken[members].append((perf_counter() - began) * 1000 / len(captions))
    row = Row.timed(one.name.replace("teacher", "unfolded"), taken[()], nfe=one.nfe)
    row.ratio = float(np.median(taken[one.members]) / np.median(taken[()]))
    off = (latents[()] - latents[one.members]).abs().max()
    row.quality["max_abs_difference"] = Interval.exact(float(off), len(captions))
    return row


def _engaged(pipe: Any, one: Contender) -> Any:
    return fastdiff.accelerate(pipe, list(one.members))


def _in_turns(
    pipe: Any, ready: list[Contender], captions: list[str], batch: int
) -> dict[str, tuple[list[np.ndarray], list[float]]]:
    """Pictures of every contender and milliseconds for each; they take turns batch by batch."""
    drawn: dict[str, tuple[list[np.ndarray], list[float]]] = {one.name: ([], []) for one in ready}
    for start in range(0, len(captions), batch):
        for one in ready:
            with _engaged(pipe, one):
                pictures, taken = _draw(pipe, captions[start : start + batch], one, SEED + start, batch)
            drawn[one.name][0].extend(pictures)
            drawn[one.name][1].extend(taken)
    return drawn


def _draw(
    pipe: Any, captions: Sequence[str], one: Contender, seed: int, batch: int
) -> tuple[list[np.ndarray], list[float]]:
    """Pictures uint8 [H, W, 3], and milliseconds for each; picture i has noise of its own whatever the batch."""
    pictures: list[np.ndarray] = []
    taken: list[float] = []
    for start in range(0, len(captions), batch):
        some = list(captions[start : start + batch])
        noise = [torch.Generator().manual_seed(seed + start + index) for index in range(len(some))]
        began = perf_counter()
        made = pipe(some, generator=noise, output_type="np", **one.options).images
        taken += [(perf_counter() - began) * 1000 / len(some)] * len(some)
        check_finite(made, "a picture")
        pictures += [to_bytes(picture) for picture in made]
    return pictures, taken


def _again(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """Another scene of the same caption."""
    thing = scene.things[0]
    fixed = {"colour": thing.colour, "shape": thing.shape, "size": thing.size, "position": thing.position}
    return world.object_scene(rng, background=scene.background, texture=scene.texture, **fixed)


def _known(rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """Captions, and the spread of each quantity over the world's own pictures of it."""
    found = []
    for _ in range(CAPTIONS):
        scene = world.object_scene(rng)
        drawn = [detector.measure(render.render(_again(scene, rng))) for _ in range(8 * EACH)]
        found.append((world.caption(scene), _spread(drawn)))
    return found


def _spread(measured: Sequence[np.ndarray]) -> np.ndarray:
    """Distance of the quartiles of each quantity: a few pictures of another object altogether do not move it."""
    low, high = np.nanquantile(measured, [0.25, 0.75], axis=0)
    return high - low


def _diversity(pipe: Any, one: Contender, known: list[tuple[str, np.ndarray]], batch: int) -> Interval:
    """Mean over captions and quantities of the spread over the world's; resampled by caption."""
    ratios = []
    with _engaged(pipe, one):
        for number, (caption, spread) in enumerate(known):
            pictures, _ = _draw(pipe, [caption] * EACH, one, SEED + 1000 * (number + 1), batch)
            measured = [detector.measure(picture) for picture in pictures]
            ratios.append(float(np.nanmean(_spread(measured) / spread)))
    return mean_interval(np.array(ratios))


def _stack(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Float [B, 3, H, W] in 0..1 of uint8 pictures [H, W, 3]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).double() / 255

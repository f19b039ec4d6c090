"""What each method of sparse attention costs in quality on trained models: rows of `bench attention`.

Every method has its tokens in tiles and the same steps in full, so that they differ in nothing but what they are.
Nothing is timed: how long a picture of this size takes says nothing of sizes at which attention is long.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from benchmarks.record import Row, could_not_run
from benchmarks.sparse_linear import SETTINGS, weights
from fastdiff import miniature
from fastdiff.attention.budget import calibrate
from fastdiff.attention.linear import SparseLinear
from fastdiff.attention.order import TokenOrder
from fastdiff.attention.sparse import SparseAttention
from fastdiff.miniature import detector, world
from fastdiff.quality import Interval, mean_interval
from fastdiff_app.engine import load_pipeline
from fastdiff_app.methods import to_bytes

PERCENTS = (50, 75, 90)
# the defaults of `SparseAttention` were chosen on pictures of another seed
SIZE, TRAINED_SIZE, STEPS, GUIDANCE, SEED = 128, 64, 10, 5.0, 7_300_019

ALWAYS = dict(select="pooled", far="none", warm_up=0, refresh=0)
METHODS: dict[str, dict[str, Any]] = {
    "plain": dict(far="none"),
    "xattention": dict(select="antidiagonal", far="none"),
    "pooled": dict(select="pooled", far="none"),
    "re-ttention": dict(far="ratio"),
    "sparsed": dict(select="pattern", far="none", refresh=0),
    "fps": dict(select="tiles", far="none", precision="int8_fp8"),
    "top-k": ALWAYS,
    "far-merge": dict(far="merge"),
    "far-tracked": dict(far="tracked"),
    "fastdiff": dict(far="centroid"),
}
# the control of `sla`, which is trained for this share
_ONLY_AT = {"top-k": 90}
_ATTRIBUTES = ("background", "colour", "position", "shape", "size")


@dataclass(frozen=True)
class Subject:
    """A trained model, and how its attention is taken apart.

    Attributes:
        ending: what the names of its rows end with.
        block, tile: tokens in a block of queries or keys, and along one side of a tile.
        frames: of a clip; 0 for pictures.
        trained: side in pixels for which sparse-linear attention was fine-tuned; 0 where it never was.
    """

    pipe: Any = field(repr=False)
    ending: str = ""
    size: int = SIZE
    block: int = 16
    tile: int = 4
    frames: int = 0
    trained: int = 0

    @property
    def blocks(self) -> dict[str, int]:
        """Arguments of `SparseAttention`."""
        return dict(query_block=self.block, key_block=self.block, minimum_tokens=8 * self.block)

    def plan(self, method: str, percent: int) -> fastdiff.Plan:
        """What a method is, with this share of key blocks left out."""
        if method == "sla":
            attention: Any = SparseLinear(str(weights(self.trained)), density=1 - percent / 100)
        else:
            common = {"density": 1 - percent / 100, "warm_up": 2, "refresh": 4, **self.blocks}
            attention = SparseAttention(**{**common, **METHODS[method]})
        return fastdiff.Plan([attention, TokenOrder(self.tile)])

    def scenes(self, count: int) -> list[Any]:
        """Scenes to be described to the model."""
        rng = np.random.default_rng(SEED)
        scene = world.object_scene
        if self.frames:
            from fastdiff.miniature.moving import scene
        return [scene(rng) for _ in range(count)]

    @torch.no_grad()
    def make(self, scenes: list[Any]) -> "Made":
        """Pictures or clips of scenes, the same noise for the same place in the list."""
        last: dict[str, Tensor] = {}

        def keep(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            last["latents"] = kwargs["latents"]
            return kwargs

        output = self.pipe(
            [world.caption(scene) for scene in scenes],
            height=self.size,
            width=self.size,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(SEED + index) for index in range(len(scenes))],
            output_type="np",
            callback_on_step_end=keep,
            **({"num_frames": self.frames} if self.frames else {}),
        )
        found = output.frames if self.frames else output.images
        return Made(last["latents"], [to_bytes(one) for one in found])

    def attributes(self, made: "Made", scenes: list[Any]) -> Interval:
        """Share of attributes that a detector reads as described, over pictures or clips."""
        names, score = _ATTRIBUTES, detector.score
        if self.frames:
            from fastdiff.miniature.moving_detector import ATTRIBUTES as names
            from fastdiff.miniature.moving_detector import score
        found = score(made.images, scenes)
        return mean_interval(np.mean([found[name] for name in names], axis=0))


@dataclass
class Made:
    """What came out: latents [B, C, (F,) h, w], and uint8 pictures or clips."""

    latents: Tensor
    images: list[np.ndarray]


def mini_sd(pipe: Any = None) -> Subject:
    """The embedded UNet at 128 px, 1,024 tokens."""
    return Subject(pipe or load_pipeline(None, "text-to-image"), trained=SIZE)


def _mini_dit() -> Subject:
    return Subject(load_pipeline("mini-dit", "text-to-image"), "-dit", TRAINED_SIZE, block=8)


def _mini_wan() -> Subject:
    from fastdiff.miniature import moving

    pipe = fastdiff.load("mini-wan")  # `load_pipeline` gives it the student that it is streamed with
    pipe.set_progress_bar_config(disable=True)
    return Subject(pipe, "-video", moving.SIZE, block=4, tile=2, frames=moving.FRAMES)


# models that ship once they are trained
OTHERS: dict[str, Callable[[], Subject]] = {"mini-dit": _mini_dit, "mini-wan": _mini_wan}


def other_rows(count: int) -> Iterator[Row]:
    """Rows of the transformer and of the video model; one that says why where a model is not there."""
    for name, load in OTHERS.items():
        try:
            miniature.path(name)
        except (FileNotFoundError, ValueError):
            yield could_not_run(f"dense-quality of {name}", f"no {name} ships with this fastdiff yet")
            continue
        yield from quality(load(), count)


def quality(subject: Subject, count: int) -> Iterator[Row]:
    """Rows of every method at every density beside the exact model."""
    scenes = subject.scenes(count)
    exact = subject.make(scenes)
    yield _dense(subject, f"dense-quality{subject.ending}", exact, scenes)
    for percent in PERCENTS:
        plain = None
        for method in (*METHODS, *(("sla",) if subject.trained else ())):
            if _ONLY_AT.get(method, percent) != percent:
                continue
            name = f"{method}-quality-{percent}{subject.ending}"
            try:
                row, psnr = _row(subject, name, subject.plan(method, percent), scenes, exact)
            except fastdiff.Unsupported as error:
                yield could_not_run(name, error)
                continue
            plain = psnr if method == "plain" else plain
            if plain is not None:
                row.quality["over_plain"] = mean_interval((psnr - plain).numpy())
            if method in METHODS:
                row.quality["layer_l1"] = _layer_error(subject, method, percent, scenes[:1])
            yield row


def accuracy(subject: Subject, count: int) -> Iterator[Row]:
    """Rows at the size the model was trained for, as fine-tuned: dense, and a tenth of the blocks at every step."""
    subject = replace(subject, size=TRAINED_SIZE)
    scenes = subject.scenes(count)
    exact = subject.make(scenes)
    yield _dense(subject, f"dense-{TRAINED_SIZE}px-quality", exact, scenes)
    settings = SETTINGS[TRAINED_SIZE]
    blocks = {name: getattr(settings, name) for name in ("query_block", "key_block", "minimum_tokens")}
    plans = {
        "top-k": SparseAttention(density=settings.density, **{**ALWAYS, **blocks}),
        "sla": SparseLinear(str(weights(TRAINED_SIZE))),
    }
    for method, plan in plans.items():
        name = f"{method}-{TRAINED_SIZE}px-quality-{100 - round(100 * settings.density)}"
        try:
            yield _row(subject, name, fastdiff.Plan([plan]), scenes, exact)[0]
        except fastdiff.Unsupported as error:
            yield could_not_run(name, error)


def _dense(subject: Subject, name: str, exact: Made, scenes: list[Any]) -> Row:
    row = Row(name)
    row.quality["attribute"] = subject.attributes(exact, scenes)
    return row


def _row(subject: Subject, name: str, plan: fastdiff.Plan, scenes: list[Any], exact: Made) -> tuple[Row, Tensor]:
    """The row, and the PSNR of each picture."""
    with fastdiff.accelerate(subject.pipe, plan) as handle:
        made = subject.make(scenes)
        reports = handle.report().rows
    missed = "; ".join(miss for report in reports for miss in report.misses)
    row = Row(name, note=missed)
    change = (made.latents - exact.latents).double().flatten(1)
    truth = exact.latents.double().flatten(1)
    row.quality["relative_l1"] = mean_interval((change.abs().sum(1) / truth.abs().sum(1)).numpy())
    span = truth.amax(1) - truth.amin(1)
    psnr = 20 * span.log10() - 10 * change.square().mean(1).log10()
    row.quality["psnr"] = mean_interval(psnr.numpy())
    row.quality["attribute"] = subject.attributes(made, scenes)
    share = next(note for note in reports[0].notes if "of all block pairs" in note or "of key blocks" in note)
    row.quality["density"] = Interval.exact(float(share.split()[0]))
    return row, psnr


def _layer_error(subject: Subject, method: str, percent: int, scenes: list[Any]) -> Interval:
    """Relative L1 of attention outputs over layers, steps mean, where the run itself stays exact."""
    settings, *beside = subject.plan(method, percent).accelerations
    assert isinstance(settings, SparseAttention)
    candidate = (settings.density, settings.precision, settings.far)
    samples = calibrate(subject.pipe, lambda: subject.make(scenes), [candidate], settings, bins=1, beside=beside)
    return mean_interval(np.array([sample.error for sample in samples if sample.candidate == candidate]))

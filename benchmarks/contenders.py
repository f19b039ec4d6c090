"""The rows of `bench cache` in the making: who draws, what was measured of them, and how it is kept."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from benchmarks.peers.caches import Draw
from fastdiff.miniature import detector, world
from fastdiff.plan import Plan
from fastdiff.quality import Interval, psnr, ssim
from fastdiff_app.methods import to_bytes

GUIDANCE = 5.0
SEEDS = {"calibration": 5_000_011, "heldout": 6_000_011, "test": 7_000_003}  # far from those of any training run
DRAWN_ON = ("baseline", "fewer-steps-3x", "fastdiff-planned-3x")


@dataclass
class Contender:
    """One row in the making: `draw` gives pictures of prompts and seeds, and the milliseconds they took.

    Attributes:
        figures: of every prompt drawn so far, in order: psnr and ssim to the baseline, share of attributes right.
        again: gives the same with settings that take so many times as long, where there are any.
        since: how many prompts had been timed when its turns began.
    """

    name: str
    draw: Draw | None
    speed: int = 0
    nfe: int | None = None
    note: str = ""
    milliseconds: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    again: Callable[[float], "Contender"] | None = None
    since: int = 0

    def times(self, other: "Contender") -> float:
        """How many times as long it takes as another one: the median over the turns they took side by side."""
        beside = np.array(other.milliseconds[self.since : self.since + len(self.milliseconds)])
        return float(np.median(np.array(self.milliseconds[: len(beside)]) / beside))

    @property
    def drawn(self) -> int:
        """How many prompts it has figures of."""
        return len(self.figures.get("right", ()))

    def add(self, pictures: Tensor, reference: Tensor, scenes: list[world.Scene]) -> None:
        """Take in the pictures of the next prompts."""
        told = {"right": _right(pictures, scenes)}
        if self.speed:
            told["psnr"] = psnr(pictures, reference).clamp(max=100).numpy()
            told["ssim"] = ssim(pictures, reference).numpy()
        for name, values in told.items():
            self.figures.setdefault(name, []).extend(map(float, values))

    def as_json(self) -> dict[str, Any]:
        """All but how to draw."""
        return {name: value for name, value in vars(self).items() if name not in ("draw", "again")}


@dataclass
class Stage:
    """The rows of one sampler, with the plans in them and what finding those cost."""

    contenders: list[Contender]
    plans: dict[str, str]
    costs: dict[str, dict[str, Interval]]
    timed: str = ""

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        costs = {speed: {name: one.as_json() for name, one in some.items()} for speed, some in self.costs.items()}
        return {
            "plans": self.plans,
            "costs": costs,
            "timed": self.timed,
            "contenders": [one.as_json() for one in self.contenders],
        }

    @classmethod
    def of(cls, found: dict[str, Any], pipe: Any, steps: int) -> "Stage":
        """From a file; only what `--full` draws can be drawn."""
        costs = {speed: {name: Interval(**one) for name, one in some.items()} for speed, some in found["costs"].items()}
        stage = cls([Contender(draw=None, **one) for one in found["contenders"]], found["plans"], costs, found["timed"])
        for one in stage.contenders:
            if one.name in DRAWN_ON and one.milliseconds:
                one.draw = plain(pipe, one.nfe // 2 if one.nfe else steps)
            if one.name in DRAWN_ON and one.name.startswith("fastdiff-planned"):
                one.draw = planned(pipe, Plan.from_json(stage.plans[str(one.speed)]), steps)
        return stage


def scenes_of(name: str, count: int) -> list[world.Scene]:
    """Scenes with one object, drawn from this bench's own seeds."""
    rng = np.random.default_rng(SEEDS[name])
    return [world.object_scene(rng) for _ in range(count)]


def plain(pipe: Any, steps: int) -> Draw:
    """The pipeline as it stands at the time of the call."""

    def draw(prompts: list[str], seeds: list[int]) -> tuple[Tensor, float]:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        begun = perf_counter()
        pictures = pipe(
            prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=noise, output_type="pt"
        ).images
        return pictures.float(), (perf_counter() - begun) * 1000

    return draw


def planned(pipe: Any, plan: Any, steps: int) -> Draw:
    """The pipeline under a plan."""

    def draw(prompts: list[str], seeds: list[int]) -> tuple[Tensor, float]:
        with fastdiff.accelerate(pipe, plan, strict=True):
            return plain(pipe, steps)(prompts, seeds)

    return draw


def _right(pictures: Tensor, scenes: list[world.Scene]) -> np.ndarray:
    """Share of each scene's attributes that the detector reads right, [n]."""
    found = detector.score([to_bytes(one) for one in pictures.permute(0, 2, 3, 1).numpy()], scenes)
    return np.nanmean(np.stack(list(found.values())), axis=0)

"""`bench cache`: ways of leaving work out of a run, at equal latency, against the picture of the whole run.

The embedded model, 50 steps of DDIM and (rows ending in -dpm) 25 of DPM-Solver++, guidance 5, the same words and noise
for all. For about twice and three times the speed:
    fewer-steps: the control; the same pipeline asked for as many steps as the plan computes.
    uniform: computed steps evenly spread, the last output repeated between them.
    deepcache, cache-dit: as published, in environments of their own (`make peers`).
    diffusers: its own caches; the one that runs on a UNet is Pyramid Attention Broadcast.
    fastdiff-static: `Forecast` with a schedule that needs no measurement.
    fastdiff-planned: what `fastdiff tune` finds on other prompts.

A row whose latency cannot be brought within 5 % of the planned row's says "not reachable". Methods take turns batch by
batch. `psnr` is the median, `psnr_p10` the tenth percentile, `planned_ahead` the median of the paired difference of the
planned row's PSNR and this one's (above 0 where planned is the better), `attribute_drop` the paired drop of the share
of attributes that the detector reads right.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import fastdiff
from benchmarks.peers.pipelines import PeerFailed, PipelinePeer
from benchmarks.record import Record, Row, could_not_run
from fastdiff.caching.diffusers_cache import DiffusersCache
from fastdiff.caching.forecast import Forecast
from fastdiff.miniature import detector, world
from fastdiff.planning.candidates import forecast_of, static_forecast
from fastdiff.planning.measure import Workload
from fastdiff.planning.search import Infeasible, uniform
from fastdiff.planning.tune import Planner, Tuned
from fastdiff.quality import (
    Interval,
    mean_interval,
    median_interval,
    paired_median_difference,
    psnr,
    quantile_interval,
    ssim,
)
from fastdiff.quality.control import TOLERANCE
from fastdiff_app.engine import load_pipeline
from fastdiff_app.methods import to_bytes

SPEEDS = (2, 3)
STEPS = {"ddim": 50, "dpm": 25}
GUIDANCE = 5.0
SEEDS = {"calibration": 5_000_011, "heldout": 6_000_011, "test": 7_000_003}  # far from those of any training run
Draw = Callable[[list[str], list[int]], tuple[Tensor, float]]


@dataclass
class Contender:
    """One row in the making: `draw` gives pictures of prompts and seeds, and the milliseconds they took."""

    name: str
    draw: Draw | None
    speed: int = 0
    nfe: int | None = None
    note: str = ""
    milliseconds: list[float] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """Median for one picture."""
        return float(np.median(self.milliseconds))


def scenes_of(name: str, count: int) -> list[world.Scene]:
    """Scenes with one object, drawn from this bench's own seeds."""
    rng = np.random.default_rng(SEEDS[name])
    return [world.object_scene(rng) for _ in range(count)]


def workload(name: str, count: int, steps: int, batch: int) -> Workload:
    """The captions of such scenes."""
    words = tuple(world.caption(scene) for scene in scenes_of(name, count))
    return Workload(words, SEEDS[name], steps, GUIDANCE, batch=batch)


def run(
    full: bool = False,
    prompts: int = 0,
    batch: int = 16,
    searched: int = 12,
    samplers: tuple[str, ...] = ("ddim", "dpm"),
    peers: bool = True,
    pipe: Any = None,
) -> Record:
    """Runs the benchmark.

    Args:
        full: eight times as many prompts.
        prompts: how many; 0 chooses. searched: prompts for the search, and as many for its proof.
        samplers: "ddim", "dpm" or both. peers: False leaves other people's packages out.
        pipe: the pipeline to measure; the embedded one where None.
    """
    pipe = pipe or load_pipeline(None, "text-to-image")
    scenes = scenes_of("test", prompts or (1024 if full else 128))
    record = Record("cache")
    own = pipe.scheduler
    for sampler in samplers:
        pipe.scheduler = own if sampler == "dpm" else ddim(own)
        with ExitStack() as stack:
            contenders, tuned = _contenders(stack, pipe, STEPS[sampler], batch, searched, peers)
            _measure([one for one in contenders if one.draw], scenes, batch)
        pipe.scheduler = own
        rows = _rows(contenders, scenes, tuned)
        for row in rows:
            row.method += "" if sampler == "ddim" else "-dpm"
            row.ratio = rows[0].ms_median / row.ms_median if rows[0].ms_median and row.ms_median else None
        record.rows += rows
    return record.finish()


def ddim(scheduler: Any) -> Any:
    """DDIM with a scheduler's noise levels; its own default would clip latents as if they were pixels."""
    kind: Any = DDIMScheduler
    return kind.from_config(scheduler.config, clip_sample=False)


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


def _contenders(
    stack: ExitStack, pipe: Any, steps: int, batch: int, searched: int, peers: bool
) -> tuple[list[Contender], dict[int, Tuned]]:
    calibration, heldout = (workload(name, searched, steps, batch) for name in ("calibration", "heldout"))
    planner = Planner(pipe, calibration, heldout)
    found = [Contender("baseline", plain(pipe, steps), nfe=2 * steps)]
    deepcache = _deepcache(stack, pipe, steps, planner, peers)
    broadcast = _broadcast(pipe, steps, planner)
    dit = _cache_dit(pipe, steps) if peers else "left out"
    tuned = {}
    for speed in SPEEDS:
        best = planner.tune(latency=-float(speed))
        tuned[speed] = best
        computed = best.best.computed
        even = forecast_of(planner.study.trajectories, uniform(steps, computed))
        found += [
            Contender(f"fewer-steps-{speed}x", plain(pipe, computed), speed, 2 * computed),
            Contender(f"uniform-{speed}x", planned(pipe, even, steps), speed, 2 * computed),
            deepcache.contender(speed),
            _diffusers(pipe, speed, steps, broadcast),
            Contender(f"cache-dit-{speed}x", None, speed, note=dit),
            _static(pipe, speed, steps, computed),
            Contender(f"fastdiff-planned-{speed}x", planned(pipe, best.plan, best.steps), speed, 2 * computed),
        ]
    return found, tuned


def _static(pipe: Any, speed: int, steps: int, computed: int) -> Contender:
    for count in (computed, computed - 1, computed + 1):
        try:
            one: Forecast = static_forecast(steps, count)
        except Infeasible:
            continue
        return Contender(f"fastdiff-static-{speed}x", planned(pipe, one, steps), speed, 2 * count)
    return Contender(f"fastdiff-static-{speed}x", None, speed, note="not reachable: no interval gives this speed")


def _peer(stack: ExitStack, name: str, pipe: Any) -> PipelinePeer | str:
    try:
        return stack.enter_context(PipelinePeer(name, pipe))
    except (OSError, ChildProcessError) as error:
        return str(error)


def _probe(planner: Planner) -> tuple[list[str], list[int]]:
    """A few prompts to find settings with, which are not measured afterwards."""
    some = planner.calibration
    count = min(8, len(some.prompts))
    return list(some.prompts[:count]), [some.seed + place for place in range(count)]


@dataclass
class _DeepCache:
    """DeepCache at the outermost branch, whose cached steps are its cheapest, and what whole and cached steps take."""

    peer: PipelinePeer | None
    steps: int
    whole: float = 0.0
    cached: float = 0.0
    note: str = ""

    def draw_with(self, interval: int) -> Draw:
        """Its pictures at an interval."""
        settings = {"cache_interval": interval, "cache_branch_id": 0}
        assert self.peer is not None
        draw = self.peer.draw
        return lambda some, noise: draw(some, noise, self.steps, GUIDANCE, settings)

    def taken(self, interval: int) -> float:
        """Expected milliseconds for a picture."""
        computed = -(-self.steps // interval)
        return computed * self.whole + (self.steps - computed) * self.cached

    def contender(self, speed: int) -> Contender:
        """The interval that comes nearest to a speed."""
        name = f"deepcache-{speed}x"
        if self.note:
            return Contender(name, None, speed, note=self.note)
        goal = self.taken(1) / speed
        interval = min(range(2, self.steps + 1), key=lambda one: (abs(self.taken(one) - goal), one))
        if self.taken(interval) > goal * (1 + 2 * TOLERANCE):
            most = self.taken(1) / self.taken(self.steps)
            note = f"not reachable: at most {most:.2f} times faster, with one step of all computed whole"
            return Contender(name, None, speed, note=note)
        return Contender(name, self.draw_with(interval), speed, note=f"interval {interval}, branch 0")


def _deepcache(stack: ExitStack, pipe: Any, steps: int, planner: Planner, peers: bool) -> _DeepCache:
    peer = _peer(stack, "deepcache", pipe) if peers else "left out"
    if isinstance(peer, str):
        return _DeepCache(None, steps, note=peer)
    found = _DeepCache(peer, steps)
    prompts, seeds = _probe(planner)
    try:
        whole, least = (
            min(found.draw_with(interval)(prompts, seeds)[1] for _ in range(2)) / len(prompts)
            for interval in (1, steps)
        )
    except (PeerFailed, ChildProcessError) as error:
        return _DeepCache(None, steps, note=str(error)[:200])
    found.whole = whole / steps
    found.cached = (least - found.whole) / (steps - 1)
    return found


def _broadcast(pipe: Any, steps: int, planner: Planner) -> tuple[DiffusersCache, float]:
    """What diffusers has for a UNet, at its fastest (every attention repeated for the whole run), and how fast."""
    prompts, seeds = _probe(planner)
    broadest = DiffusersCache(method="pyramid_attention", interval=steps, warm_up=2, max_run=steps)
    whole = min(plain(pipe, steps)(prompts, seeds)[1] for _ in range(2))
    least = min(planned(pipe, broadest, steps)(prompts, seeds)[1] for _ in range(2))
    return broadest, whole / least


def _diffusers(pipe: Any, speed: int, steps: int, found: tuple[DiffusersCache, float]) -> Contender:
    name, (broadest, fastest) = f"diffusers-{speed}x", found
    if fastest < speed * (1 - 2 * TOLERANCE):
        note = f"not reachable: Pyramid Attention Broadcast is at most {fastest:.2f} times faster on this UNet"
        return Contender(name, None, speed, note=f"{note}; diffusers' other caches refuse UNets or crash on them")
    return Contender(name, planned(pipe, broadest, steps), speed)


def _cache_dit(pipe: Any, steps: int) -> str:
    """What cache-dit says to a UNet."""
    with ExitStack() as stack:
        peer = _peer(stack, "cache-dit", pipe)
        if isinstance(peer, str):
            return peer
        try:
            peer.draw(["a red circle"], [0], 4, GUIDANCE, {})
        except (PeerFailed, ChildProcessError) as error:
            return f"not reachable: {str(error)[:200]}"
    return f"not reachable: it accepts the UNet and leaves all {steps} steps in"


def _measure(contenders: list[Contender], scenes: list[world.Scene], batch: int) -> None:
    captions = [world.caption(scene) for scene in scenes]
    for start in range(0, len(scenes), batch):
        some = captions[start : start + batch]
        seeds = [SEEDS["test"] + start + place for place in range(len(some))]
        for one in contenders:
            if one.draw is None:
                continue
            try:
                pictures, taken = one.draw(some, seeds)
            except (PeerFailed, ChildProcessError, fastdiff.Unsupported) as error:
                one.draw, one.note = None, str(error)
                continue
            one.pictures.append(pictures)
            one.milliseconds += [taken / len(some)] * len(some)


def _rows(contenders: list[Contender], scenes: list[world.Scene], tuned: dict[int, Tuned]) -> list[Row]:
    ours = {one.speed: one for one in contenders if one.name.startswith("fastdiff-planned")}
    reference = torch.cat(contenders[0].pictures)
    known = _right(reference, scenes)
    rows = []
    for one in contenders:
        if one.draw is None:
            rows.append(could_not_run(one.name, one.note))
            continue
        row = Row.timed(one.name, one.milliseconds, nfe=one.nfe, note=one.note)
        rows.append(row)
        if not one.speed:
            row.quality["attribute"] = mean_interval(known)
            continue
        best = ours[one.speed]
        off = one.ms / best.ms - 1
        if abs(off) > TOLERANCE:
            row.note = f"not reachable: its nearest setting is {100 * off:+.0f} % off the planned row's latency"
            continue
        row.quality = _quality(torch.cat(one.pictures), reference, known, scenes)
        if one is not best:
            theirs, mine = (psnr(torch.cat(some.pictures), reference).numpy() for some in (one, best))
            row.quality["planned_ahead"] = paired_median_difference(mine, theirs)
        else:
            row.quality |= dict(_cost(tuned[one.speed]))
    return rows


def _quality(pictures: Tensor, reference: Tensor, known: np.ndarray, scenes: list[world.Scene]) -> dict[str, Interval]:
    decibels = psnr(pictures, reference).clamp(max=100).numpy()
    return {
        "psnr": median_interval(decibels),
        "psnr_p10": quantile_interval(decibels, 0.1),
        "ssim": mean_interval(ssim(pictures, reference).numpy()),
        "attribute_drop": mean_interval(known - _right(pictures, scenes)),
    }


def _cost(tuned: Tuned) -> Iterator[tuple[str, Interval]]:
    yield "expected_psnr", tuned.best.quality["psnr"]
    yield "search_generations", Interval.exact(tuned.spent)
    yield "proof_generations", Interval.exact(tuned.heldout)


def _right(pictures: Tensor, scenes: list[world.Scene]) -> np.ndarray:
    """Share of each scene's attributes that the detector reads right, [n]."""
    found = detector.score([to_bytes(one) for one in pictures.permute(0, 2, 3, 1).numpy()], scenes)
    return np.nanmean(np.stack(list(found.values())), axis=0)

"""`bench cache`: ways of leaving work out of a run, at equal latency, against the picture of the whole run.

The embedded model, 50 steps of DDIM and (rows ending in -dpm) 25 of DPM-Solver++, guidance 5, the same words and noise
for all. For about twice and three times the speed:
    fewer-steps: the control; the same pipeline asked for as many steps as the plan has time for.
    uniform: computed steps evenly spread, the last output repeated between them.
    deepcache, cache-dit: as published, in environments of their own (`make peers`).
    diffusers: its own caches; the one that runs on a UNet is Pyramid Attention Broadcast.
    fastdiff-static: `Forecast` with a schedule that needs no measurement.
    fastdiff-planned: what `fastdiff tune` finds on other prompts.

A row whose latency cannot be brought within 5 % of the planned row's says "not reachable". Methods take turns batch by
batch. `psnr` is the median, `psnr_p10` the tenth percentile, `planned_ahead` the median of the paired difference of the
planned row's PSNR and this one's (above 0 where planned is the better), `attribute_drop` the paired drop of the share
of attributes that the detector reads right.

`--full` goes on where the timed prompts end: 1,024 prompts for the rows in `DRAWN_ON`, drawn without a clock, since
pictures do not depend on what else the machine does. Each figure carries its own number of prompts. What
was measured by the same sources is kept under out/, so that it resumes; Ctrl-C ends it with what there is.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import fastdiff
from benchmarks import kept
from benchmarks.peers.caches import DeepCache, Draw, Probe, cache_dit, quickest, started
from benchmarks.peers.pipelines import PeerFailed
from benchmarks.record import Record, Row, could_not_run
from fastdiff.caching.diffusers_cache import DiffusersCache
from fastdiff.miniature import detector, world
from fastdiff.plan import Plan
from fastdiff.planning.candidates import forecast_of, static_forecast
from fastdiff.planning.measure import Workload
from fastdiff.planning.provenance import model_fingerprint, sampled_weights
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
TIMED, FULL = 128, 1024
DRAWN_ON = ("baseline", "fewer-steps-3x", "fastdiff-planned-3x")
_PARTS = ("caching", "planning", "quantization", "attention", "runtime")
SOURCES = (*(f"fastdiff/{part}/*.py" for part in _PARTS), "benchmarks/cache.py", "benchmarks/peers/*.py")


@dataclass
class Contender:
    """One row in the making: `draw` gives pictures of prompts and seeds, and the milliseconds they took.

    Attributes:
        figures: of every prompt drawn so far, in order: psnr and ssim to the baseline, share of attributes right.
    """

    name: str
    draw: Draw | None
    speed: int = 0
    nfe: int | None = None
    note: str = ""
    milliseconds: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ms(self) -> float:
        """Median for one picture."""
        return float(np.median(self.milliseconds))

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
        return {name: value for name, value in vars(self).items() if name != "draw"}


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
        full: goes on to 1,024 prompts, from what the last run by the same sources kept where there is one.
        prompts: how many to time; 0 chooses. searched: prompts for the search, and as many for its proof.
        samplers: "ddim", "dpm" or both. peers: False leaves other people's packages out.
        pipe: the pipeline to measure; the embedded one where None.
    """
    pipe = pipe or load_pipeline(None, "text-to-image")
    prompts = prompts or TIMED
    record, own, ended = Record("cache"), pipe.scheduler, False
    model = model_fingerprint(pipe), sampled_weights(pipe)
    settings = (model, STEPS, GUIDANCE, SEEDS, prompts, batch, searched, peers, torch.__version__)
    key = kept.digest(*settings, sources=SOURCES)
    stages: dict[str, Stage] = {}
    for sampler in samplers:
        steps = STEPS[sampler]
        pipe.scheduler = own if sampler == "dpm" else ddim(own)
        found = kept.read(f"bench-cache-{sampler}", key) if full else None
        if found is not None:
            stages[sampler] = Stage.of(found, pipe, steps)
            continue
        with ExitStack() as stack:
            stage = stages[sampler] = _stage(stack, pipe, steps, batch, searched, peers)
            stage.timed = f"timed {record.created}, commit {record.commit}, load {record.machine['load']}"
            _measure([one for one in stage.contenders if one.draw], prompts, batch)
        _keep(stage, f"bench-cache-{sampler}", key)
    for sampler, stage in stages.items():
        pipe.scheduler = own if sampler == "dpm" else ddim(own)
        if full and not ended:
            ended = _draw_on(stage, partial(_keep, stage, f"bench-cache-{sampler}", key), 2 * batch)
        rows = _rows(stage)
        for row in rows:
            row.method += "" if sampler == "ddim" else "-dpm"
            row.ratio = rows[0].ms_median / row.ms_median if rows[0].ms_median and row.ms_median else None
        record.rows += rows
    pipe.scheduler = own
    return record.finish()


def _keep(stage: Stage, name: str, key: str) -> None:
    kept.write(name, key, stage.as_json())


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


def _stage(stack: ExitStack, pipe: Any, steps: int, batch: int, searched: int, peers: bool) -> Stage:
    calibration, heldout = (workload(name, searched, steps, batch) for name in ("calibration", "heldout"))
    planner = Planner(pipe, calibration, heldout)
    # prompts to find settings with, which are not measured afterwards
    probe: Probe = (list(calibration.prompts), [calibration.seed + place for place in range(searched)])
    peer = started(stack, "deepcache", pipe) if peers else "left out"
    deepcache = DeepCache.measured(peer, steps, GUIDANCE, probe)
    broadcast = _broadcast(pipe, steps, probe)
    dit = cache_dit(pipe, steps, GUIDANCE) if peers else "left out"
    stage = Stage([Contender("baseline", plain(pipe, steps), nfe=2 * steps)], {}, {})
    for speed in SPEEDS:
        best = planner.tune(latency=-float(speed))
        stage.plans[str(speed)], stage.costs[str(speed)] = best.plan.to_json(), dict(_cost(best))
        ours = planned(pipe, best.plan, best.steps)
        goal = quickest(ours, probe)

        def even(count: int, planner: Planner = planner) -> Draw:
            return planned(pipe, forecast_of(planner.study.trajectories, uniform(steps, count)), steps)

        count = _as_long(goal, even, probe, best.best.computed, steps)
        stage.contenders += [
            Contender(f"fewer-steps-{speed}x", plain(pipe, count), speed, 2 * count),
            Contender(f"uniform-{speed}x", even(count), speed, 2 * count),
            _contender(f"deepcache-{speed}x", speed, deepcache.nearest(goal, TOLERANCE)),
            _diffusers(pipe, speed, steps, broadcast),
            Contender(f"cache-dit-{speed}x", None, speed, note=dit),
            _static(pipe, speed, steps, count),
            Contender(f"fastdiff-planned-{speed}x", ours, speed, _calls(best), best.best.name),
        ]
    return stage


def _as_long(goal: float, even: Callable[[int], Draw], probe: Probe, computed: int, steps: int) -> int:
    """How many computed steps take as long as the plan does: its own number, unless its calls are cheaper ones."""
    taken = quickest(even(computed), probe)
    return computed if abs(taken / goal - 1) <= TOLERANCE else min(max(2, round(computed * goal / taken)), steps - 1)


def _calls(tuned: Tuned) -> int | None:
    """Denoiser calls of both branches; None where calls are not all of a kind."""
    return 2 * tuned.best.computed if tuned.best.candidate.plain else None


def _contender(name: str, speed: int, found: tuple[Draw | None, str]) -> Contender:
    return Contender(name, found[0], speed, note=found[1])


def _static(pipe: Any, speed: int, steps: int, computed: int) -> Contender:
    for count in (computed, computed - 1, computed + 1):
        try:
            one = static_forecast(steps, count)
        except Infeasible:
            continue
        return Contender(f"fastdiff-static-{speed}x", planned(pipe, one, steps), speed, 2 * count)
    return Contender(f"fastdiff-static-{speed}x", None, speed, note="not reachable: no interval gives this speed")


def _broadcast(pipe: Any, steps: int, probe: Probe) -> tuple[DiffusersCache, float]:
    """What diffusers has for a UNet, at its fastest (every attention repeated for the whole run), and how fast."""
    broadest = DiffusersCache(method="pyramid_attention", interval=steps, warm_up=2, max_run=steps)
    return broadest, quickest(plain(pipe, steps), probe) / quickest(planned(pipe, broadest, steps), probe)


def _diffusers(pipe: Any, speed: int, steps: int, found: tuple[DiffusersCache, float]) -> Contender:
    name, (broadest, fastest) = f"diffusers-{speed}x", found
    if fastest < speed * (1 - 2 * TOLERANCE):
        note = f"not reachable: Pyramid Attention Broadcast is at most {fastest:.2f} times faster on this UNet"
        return Contender(name, None, speed, note=f"{note}; diffusers' other caches refuse UNets or crash on them")
    return Contender(name, planned(pipe, broadest, steps), speed)


def _measure(contenders: list[Contender], count: int, batch: int) -> None:
    """Every contender draws every batch in turn, by the clock."""
    scenes = scenes_of("test", count)
    for start in range(0, count, batch):
        some = scenes[start : start + batch]
        reference = None
        for one in contenders:
            if one.draw is None:
                continue
            try:
                pictures, taken = one.draw(*_asked(some, start))
            except (PeerFailed, ChildProcessError, fastdiff.Unsupported) as error:
                one.draw, one.note = None, str(error)
                continue
            reference = pictures if reference is None else reference
            one.add(pictures, reference, some)
            one.milliseconds += [taken / len(some)] * len(some)


def _asked(scenes: list[world.Scene], start: int) -> tuple[list[str], list[int]]:
    return [world.caption(scene) for scene in scenes], [SEEDS["test"] + start + place for place in range(len(scenes))]


def _draw_on(stage: Stage, keep: Callable[[], None], batch: int) -> bool:
    """Draw further prompts for `DRAWN_ON`, without a clock; True when it was told to stop."""
    chosen = [one for one in stage.contenders if one.name in DRAWN_ON and one.draw and one.milliseconds]
    scenes = scenes_of("test", FULL)
    try:
        while chosen and (start := chosen[0].drawn) < FULL:
            some = scenes[start : start + batch]
            pictures = [one.draw(*_asked(some, start))[0] for one in chosen if one.draw]
            for one, made in zip(chosen, pictures, strict=True):
                one.add(made, pictures[0], some)
            keep()
            print(f"{start + len(some)} of {FULL} prompts", flush=True)
    except KeyboardInterrupt:
        return True
    return False


def _rows(stage: Stage) -> list[Row]:
    ours = {one.speed: one for one in stage.contenders if one.name.startswith("fastdiff-planned")}
    known, rows = stage.contenders[0].figures["right"], []
    for one in stage.contenders:
        if not one.milliseconds or (one.draw is None and not one.figures):
            rows.append(could_not_run(one.name, one.note))
            continue
        row = Row.timed(one.name, one.milliseconds, nfe=one.nfe, note=one.note)
        rows.append(row)
        if not one.speed:
            row.note = stage.timed
            row.quality["attribute"] = mean_interval(known)
            continue
        best = ours[one.speed]
        off = one.ms / best.ms - 1
        if abs(off) > TOLERANCE:
            row.note = f"not reachable: its nearest setting is {100 * off:+.0f} % off the planned row's latency"
            continue
        row.quality = _quality(one, known)
        if one is not best:
            both = min(one.drawn, best.drawn)
            mine, theirs = (some.figures["psnr"][:both] for some in (best, one))
            row.quality["planned_ahead"] = paired_median_difference(mine, theirs)
        else:
            row.quality |= stage.costs.get(str(one.speed), {})
    return rows


def _quality(one: Contender, known: list[float]) -> dict[str, Interval]:
    right = np.asarray(one.figures["right"])
    return {
        "psnr": median_interval(one.figures["psnr"]),
        "psnr_p10": quantile_interval(one.figures["psnr"], 0.1),
        "ssim": mean_interval(one.figures["ssim"]),
        "attribute_drop": mean_interval(np.asarray(known[: len(right)]) - right),
    }


def _cost(tuned: Tuned) -> Iterator[tuple[str, Interval]]:
    yield "expected_psnr", tuned.best.quality["psnr"]
    yield "search_generations", Interval.exact(tuned.spent)
    yield "proof_generations", Interval.exact(tuned.heldout)


def _right(pictures: Tensor, scenes: list[world.Scene]) -> np.ndarray:
    """Share of each scene's attributes that the detector reads right, [n]."""
    found = detector.score([to_bytes(one) for one in pictures.permute(0, 2, 3, 1).numpy()], scenes)
    return np.nanmean(np.stack(list(found.values())), axis=0)

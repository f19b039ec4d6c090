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
batch, and what is called so many times faster is the median over turns taken side by side. `psnr` is the median,
`psnr_p10` the tenth percentile, `planned_ahead` the median of the paired difference of the planned row's PSNR and this
one's (above 0 where planned is the better), `attribute_drop` the paired drop of the share of attributes that the
detector reads right.

`--full` goes on where the timed prompts end: 1,024 prompts for the rows in `DRAWN_ON`, drawn without a clock, since
pictures do not depend on what else the machine does. Each figure carries its own number of prompts. What
was measured by the same sources is kept under out/, so that it resumes; Ctrl-C ends it with what there is.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

import fastdiff
from benchmarks import kept
from benchmarks.contenders import DRAWN_ON, GUIDANCE, SEEDS, Contender, Stage, plain, planned, scenes_of
from benchmarks.peers.caches import DeepCache, Draw, Probe, cache_dit, quickest, started
from benchmarks.peers.pipelines import PeerFailed
from benchmarks.record import Record, Row, could_not_run
from fastdiff.caching.diffusers_cache import DiffusersCache
from fastdiff.miniature import world
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
    quantile_interval,
)
from fastdiff.quality.control import TOLERANCE
from fastdiff_app.engine import load_pipeline

SPEEDS = (2, 3)
STEPS = {"ddim": 50, "dpm": 25}
TIMED, FULL = 128, 1024
_PARTS = ("caching", "planning", "quantization", "attention", "runtime")
SOURCES = (*(f"fastdiff/{part}/*.py" for part in _PARTS), "benchmarks/c*.py", "benchmarks/peers/*.py")


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
            _once_more(stage, lambda some: _measure(some, prompts, batch))
        _keep(stage, f"bench-cache-{sampler}", key)
    for sampler, stage in stages.items():
        pipe.scheduler = own if sampler == "dpm" else ddim(own)
        if full and not ended:
            ended = _draw_on(stage, partial(_keep, stage, f"bench-cache-{sampler}", key), 2 * batch)
        rows = _rows(stage)
        for row in rows:
            row.method += "" if sampler == "ddim" else "-dpm"
        record.rows += rows
    pipe.scheduler = own
    return record.finish()


def _keep(stage: Stage, name: str, key: str) -> None:
    kept.write(name, key, stage.as_json())


def ddim(scheduler: Any) -> Any:
    """DDIM with a scheduler's noise levels; its own default would clip latents as if they were pixels."""
    kind: Any = DDIMScheduler
    return kind.from_config(scheduler.config, clip_sample=False)


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
            _counted(f"fewer-steps-{speed}x", partial(plain, pipe), speed, count, steps),
            _counted(f"uniform-{speed}x", even, speed, count, steps),
            _deepcache(f"deepcache-{speed}x", deepcache, speed, goal),
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


def _counted(name: str, draw: Callable[[int], Draw], speed: int, count: int, steps: int) -> Contender:
    """A way that computes a number of steps, which can be asked for more or fewer."""

    def again(times: float) -> Contender:
        return _counted(name, draw, speed, min(max(2, round(count * times)), steps - 1), steps)

    return Contender(name, draw(count), speed, 2 * count, again=again)


def _deepcache(name: str, deepcache: DeepCache, speed: int, goal: float) -> Contender:
    draw, note = deepcache.nearest(goal, TOLERANCE)
    return Contender(name, draw, speed, note=note, again=lambda times: _deepcache(name, deepcache, speed, goal * times))


def _static(pipe: Any, speed: int, steps: int, computed: int) -> Contender:
    name = f"fastdiff-static-{speed}x"
    for count in (computed, computed - 1, computed + 1):
        try:
            one = static_forecast(steps, count)
        except Infeasible:
            continue
        again = partial(lambda count, times: _static(pipe, speed, steps, max(2, round(count * times))), count)
        return Contender(name, planned(pipe, one, steps), speed, 2 * count, again=again)
    return Contender(name, None, speed, note="not reachable: no interval gives this speed")


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
            if one.drawn == start:
                one.add(pictures, reference, some)
            one.milliseconds += [taken / len(some)] * len(some)


def _once_more(stage: Stage, measure: Callable[[list[Contender]], None]) -> None:
    """Times rows that missed the planned row's latency with the setting that this calls for, beside the planned row.

    Settings were found on a few prompts; what was measured of all the timed ones knows better. Where there is nothing
    between two settings, the nearer one stays.
    """
    ours = {one.speed: one for one in stage.contenders if one.name.startswith("fastdiff-planned") and one.milliseconds}
    instead: dict[int, Contender] = {}
    timed = len(stage.contenders[0].milliseconds)
    for place, one in enumerate(stage.contenders):
        best = ours.get(one.speed)
        if best is None or one.again is None or not one.milliseconds or _off(one, best) <= TOLERANCE:
            continue
        other = one.again(1 / one.times(best))
        if other.draw is not None and (other.nfe, other.note) != (one.nfe, one.note):
            instead[place] = replace(other, since=timed)
    if not instead:
        return
    beside = [one for one in ours.values() if any(one.speed == other.speed for other in instead.values())]
    measure([stage.contenders[0], *beside, *instead.values()])
    for place, other in instead.items():
        one = stage.contenders[place]
        if other.milliseconds and _off(other, ours[one.speed]) < _off(one, ours[one.speed]):
            stage.contenders[place] = other


def _off(one: Contender, best: Contender) -> float:
    return abs(one.times(best) - 1)


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
        row.ratio = 1 / one.times(stage.contenders[0])
        rows.append(row)
        if not one.speed:
            row.note = stage.timed
            row.quality["attribute"] = mean_interval(known)
            continue
        best = ours[one.speed]
        off = one.times(best) - 1 if one is not best else 0.0
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

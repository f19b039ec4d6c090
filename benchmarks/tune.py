"""`bench tune`: what a plan was expected to do, against what it does on prompts nobody has seen, and what it cost.

The embedded model, 28 steps of DDIM, guidance 5. Rows: the baseline, then for budgets of twice and three times the
speed the plan that `fastdiff tune` chose, and with -expected what it said of itself beforehand: median PSNR on its
held-out prompts and milliseconds for a picture; `psnr_off` is measured less expected in dB, `ms_times` measured over
expected latency, `speed_times` the measured speed over the one that was asked for. `search_generations` is the work of
the search in full generations for each of its prompts, `proof_generations` that of the proof for each of its own.
Rows `calls of N: ...` are single denoiser calls of N pictures: as they are, and computed or left out under `Forecast`;
`of_step` is their time over that of the first.
"""

from collections.abc import Iterator
from math import inf
from statistics import median
from typing import Any

import torch

from benchmarks import gpu_cache
from benchmarks.cache import SEEDS, ddim, plain, planned, workload
from benchmarks.gpu import Place
from benchmarks.record import Record, Row
from fastdiff.miniature import models
from fastdiff.planning.tune import Planner, Tuned
from fastdiff.quality import Interval, median_interval, psnr
from fastdiff_app.engine import load_pipeline

STEPS = 28
SPEEDS = (2, 3)
CALLS = (1, 16)  # pictures in the calls that are timed one by one


def run(full: bool = False, prompts: int = 0, searched: int = 16, batch: int = 16, pipe: Any = None) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many prompts.
        prompts: how many to measure on; 0 chooses. searched: prompts for the search, and as many for its proof.
        pipe: the pipeline to measure; the embedded one where None.
    """
    pipe = pipe or load_pipeline(None, "text-to-image")
    pipe.scheduler = ddim(pipe.scheduler)
    calibration, heldout = (workload(name, searched, STEPS, batch) for name in ("calibration", "heldout"))
    planner = Planner(pipe, calibration, heldout)
    plans = {speed: planner.tune(latency=-float(speed)) for speed in SPEEDS}
    test = workload("test", prompts or (256 if full else 64), STEPS, batch)
    ways = {"baseline": plain(pipe, STEPS)}
    ways |= {f"plan-{speed}x": planned(pipe, found.plan, found.steps) for speed, found in plans.items()}
    pictures: dict[str, list[torch.Tensor]] = {name: [] for name in ways}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for start in range(0, len(test.prompts), batch):
        some = list(test.prompts[start : start + batch])
        seeds = [SEEDS["test"] + start + place for place in range(len(some))]
        for name, draw in ways.items():
            drawn, ms = draw(some, seeds)
            pictures[name].append(drawn)
            taken[name] += [ms / len(some)] * len(some)
    record = Record("tune")
    reference = torch.cat(pictures["baseline"])
    record.rows.append(Row.timed("baseline", taken["baseline"], nfe=2 * STEPS))
    for speed, found in plans.items():
        name = f"plan-{speed}x"
        decibels = psnr(torch.cat(pictures[name]), reference).clamp(max=100).numpy()
        measured = Row.timed(name, taken[name], nfe=2 * found.best.computed, note=found.best.name)
        measured.quality["psnr"] = median_interval(decibels)
        record.rows += [measured, _expected(name, found, measured, median(taken["baseline"]), speed)]
    record.rows += _calls(CALLS)
    return record.finish()


def _calls(sizes: tuple[int, ...]) -> Iterator[Row]:
    """What leaving a call out costs here beside computing it."""
    pipe = load_pipeline(None, "image-to-image")
    pipe.scheduler = ddim(pipe.scheduler)
    for pictures in sizes:
        place = Place(torch.device("cpu"), torch.float32, None, (), 5 * gpu_cache.STEPS, inf, pictures)
        yield from gpu_cache.skips(place, pipe, models.SIZE, f"calls of {pictures}: ", ())


def _expected(name: str, found: Tuned, measured: Row, baseline_ms: float, asked: int) -> Row:
    """What the plan's file says of it, and how far off that was."""
    expected = found.best.quality["psnr"]
    row = Row(f"{name}-expected", ms_median=1000 * found.best.seconds, nfe=2 * found.best.computed)
    row.ratio = found.baseline / found.best.seconds
    assert measured.ms_median is not None
    measured_speed = baseline_ms / measured.ms_median
    row.quality = {
        "psnr": expected,
        "psnr_off": Interval.exact(measured.quality["psnr"].value - expected.value),
        "speed_times": Interval.exact(measured_speed / asked),
        "ms_times": Interval.exact(measured.ms_median / (1000 * found.best.seconds)),
        "search_generations": Interval.exact(found.spent),
        "proof_generations": Interval.exact(found.heldout),
    }
    return row

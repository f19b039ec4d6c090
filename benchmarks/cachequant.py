"""`bench cachequant`: what CacheQuant's schedule and corrections bring on the embedded model, weights quantised or not.

24 steps of DDIM, guidance 5. Rows `<weights>-<way>`, where weights are `int4` (stored in four bits) or `float`; ways:
    every-step: all steps computed.
    uniform: every other step computed and its output used twice, the plain way to save as much.
    schedule: as many computed, placed by the dynamic programme with its term for quantisation.
    corrected: and every step's output corrected per channel, where held-out prompts say that it helps.
    computed-only: only the outputs of computed steps corrected, for quantisation.

`output_error` is the relative error of all outputs on the inputs of exact runs of prompts that nothing was fitted on;
`psnr` (median) is of the pictures against the model as it is, same seeds, and `over_uniform` the paired difference in
dB to the row `uniform` of the same weights. Intervals are 95 %. Nothing is timed: `nfe` says what is left out.
"""

from dataclasses import replace
from typing import Any

import torch

import fastdiff
from benchmarks.cache import ddim, workload
from benchmarks.record import Record, Row
from fastdiff.acceleration import Acceleration
from fastdiff.caching.cachequant import CacheQuant, Step, affine, plan, record
from fastdiff.quality import Interval, median_interval, paired_median_difference, psnr
from fastdiff.quantization.stored import StoredWeights
from fastdiff_app.engine import load_pipeline

STEPS = 24
WEIGHTS: dict[str, tuple[Acceleration, ...]] = {"int4": (StoredWeights("int4", minimum_features=48),), "float": ()}


def run(full: bool = False, prompts: int = 0, fitted: int = 8, pipe: Any = None) -> Record:
    """Runs the benchmark.

    Args:
        full: four times as many prompts.
        prompts: how many are judged; 0 chooses. fitted: how many the corrections learn from; half as many more decide.
        pipe: the pipeline to measure; the embedded one where None.
    """
    pipe = pipe or load_pipeline(None, "text-to-image")
    pipe.scheduler = ddim(pipe.scheduler)
    learn, held = (
        workload("calibration", fitted, STEPS, fitted),
        workload("heldout", max(1, fitted // 2), STEPS, fitted),
    )
    judged = workload("test", prompts or (256 if full else 64), STEPS, 16)
    watched = workload("test", min(16, len(judged.prompts)), STEPS, 16)
    truth = judged.run(pipe)[0]
    made = Record("cachequant")
    for name, weights in WEIGHTS.items():
        steps, others, new = (
            record(pipe, lambda load=load: load.run(pipe), weights) for load in (learn, held, watched)
        )
        corrected = plan(steps, others, 2)
        computed = tuple(row for row in corrected.corrections if row[0] in corrected.levels)
        ways = {
            "every-step": CacheQuant(tuple(step.level for step in steps)),
            "uniform": CacheQuant(tuple(step.level for step in steps[::2])),
            "schedule": replace(corrected, corrections=()),
            "corrected": corrected,
            "computed-only": replace(corrected, corrections=computed),
        }
        pictures: dict[str, torch.Tensor] = {}
        for way, one in ways.items():
            with fastdiff.accelerate(pipe, [*weights, one]):
                pictures[way] = psnr(judged.run(pipe)[0], truth).clamp(max=100)
        for way, one in ways.items():
            row = Row(f"{name}-{way}", nfe=2 * len(one.levels))
            row.quality["output_error"] = Interval.exact(output_error(new, one), len(watched.prompts))
            row.quality["psnr"] = median_interval(pictures[way].numpy())
            if way != "uniform":
                row.quality["over_uniform"] = paired_median_difference(
                    pictures[way].numpy(), pictures["uniform"].numpy()
                )
            made.rows.append(row)
    return made.finish()


def output_error(steps: list[Step], one: CacheQuant) -> float:
    """Relative error of what a schedule would answer at every recorded step, on that step's exact input."""
    rows = {level: (torch.tensor(scale), torch.tensor(shift)) for level, scale, shift in one.corrections}
    missed, whole, kept = 0.0, 0.0, torch.empty(0)
    for step in steps:
        computed = step.level in one.levels
        value = step.quantised if computed else kept
        if step.level in rows:
            value = affine(value, *rows[step.level])
        kept = value if computed else kept
        missed += float((value - step.exact).square().sum())
        whole += float(step.exact.square().sum())
    return (missed / whole) ** 0.5

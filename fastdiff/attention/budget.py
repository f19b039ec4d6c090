"""Choosing density, precision and far part of each layer and noise level within a measured error.

`calibrate` runs a pipeline exactly and computes beside every attention call what each candidate would have given:
its error, and its time on this machine. `sensitivities` measures how much an error of one layer moves the final
result. `choose` takes the fastest candidates whose weighted errors add up to no more than the budget, and gives rows
for `SparseAttention(budget=...)`, which go into a plan file like any other setting.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastdiff
from fastdiff.acceleration import Acceleration, Verdict
from fastdiff.anatomy import anatomy
from fastdiff.attention.far import near
from fastdiff.attention.plug import Call, Plug
from fastdiff.attention.sparse import Choice, Run, SparseAttention
from fastdiff.hooks import Hooks

Candidate = tuple[float, str, str]
EXACT: Candidate = (1.0, "exact", "none")
# what a calibration can measure beside exact attention: 8 bits, densities, and the far field off and on
LATTICE: tuple[Candidate, ...] = (
    (1.0, "int8", "none"),
    (1.0, "int8_fp8", "none"),
    *((density, "exact", far) for density in (0.5, 0.35, 0.25, 0.15, 0.1) for far in ("none", "centroid")),
)


@dataclass(frozen=True)
class Sample:
    """One candidate (density, precision, far) for one layer between two timesteps: mean relative L1 error and time."""

    layer: str
    low: float
    high: float
    candidate: Candidate
    error: float
    ms: float


@dataclass(frozen=True)
class _Watch(Acceleration):
    """Gives every attention call that fits to `attend`."""

    stage: ClassVar[str] = "attention"
    minimum_tokens: int
    prepare: Callable[[Hooks], Callable[[Call], Tensor | None]] = field(repr=False)

    def supports(self, pipe: Any) -> Verdict:
        """As sparse attention does."""
        return SparseAttention().supports(pipe)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Take over the attention of every denoiser."""
        hooks.counter.expects = "nothing"
        for denoiser in anatomy(pipe).denoisers.values():
            Plug(hooks, denoiser, self.prepare(hooks), self.minimum_tokens)


def calibrate(
    pipe: Any,
    generate: Callable[[], Any],
    candidates: Sequence[Candidate],
    settings: SparseAttention,
    bins: int = 3,
    beside: Sequence[Acceleration] = (),
) -> list[Sample]:
    """Measure every candidate on every layer while `generate` calls the pipeline, whose result stays exact.

    Args:
        candidates: (density, precision, far) each, such as `LATTICE`.
        settings: blocks, selection and schedule of the run to come; its density, precision and far are not used.
        bins: noise levels told apart, equal parts of the range of timesteps.
        beside: what else will act, such as `TokenOrder`.
    """
    taken: list[tuple[str, float, Candidate, float, float]] = []

    def prepare(hooks: Hooks) -> Callable[[Call], Tensor | None]:
        runs = {
            one: Run(replace(settings, density=one[0], precision=one[1], far=one[2], budget=()), hooks)
            for one in candidates
        }

        def attend(call: Call) -> None:
            start = perf_counter()
            exact = near(call, None)[0].float()
            taken.append((call.layer, call.moment.timestep, EXACT, 0.0, (perf_counter() - start) * 1000))
            for candidate, run in runs.items():
                call.moment.engaged = False
                start = perf_counter()
                output = run.attend(call)
                milliseconds = (perf_counter() - start) * 1000
                if output is not None and call.moment.engaged:
                    error = float((output.float() - exact).abs().sum() / exact.abs().sum().clamp(min=1e-30))
                    taken.append((call.layer, call.moment.timestep, candidate, error, milliseconds))

        return attend

    with fastdiff.accelerate(pipe, fastdiff.Plan([_Watch(settings.minimum_tokens, prepare), *beside])):
        generate()
    return _binned(taken, bins)


def _binned(taken: list[tuple[str, float, Candidate, float, float]], bins: int) -> list[Sample]:
    if not taken:
        raise ValueError("no attention call fits: every sequence is shorter than minimum_tokens, or none was made")
    times = [timestep for _, timestep, _, _, _ in taken]
    low, width = min(times), (max(times) - min(times)) / bins or 1.0
    found: dict[tuple[str, int, Candidate], list[tuple[float, float]]] = {}
    for layer, timestep, candidate, error, milliseconds in taken:
        place = min(bins - 1, int((timestep - low) / width))
        found.setdefault((layer, place, candidate), []).append((error, milliseconds))
    samples = []
    for (layer, place, candidate), values in found.items():
        errors, milliseconds = (sum(column) / len(values) for column in zip(*values, strict=True))
        # the outer bins reach to the ends, whatever schedule the run will have
        first = float("-1e9") if place == 0 else low + place * width
        last = 1e9 if place == bins - 1 else low + (place + 1) * width
        samples.append(Sample(layer, first, last, candidate, errors, milliseconds))
    return samples


def sensitivities(
    pipe: Any, generate: Callable[[], Tensor], minimum_tokens: int = 1024, size: float = 0.05
) -> dict[str, float]:
    """How much of a layer's relative L1 error arrives in what `generate` returns, by one run a layer.

    Each layer's attention gets noise of relative size `size`; the change of the result is divided by it.
    """
    layers: list[str] = []
    shaken = ""

    def prepare(hooks: Hooks) -> Callable[[Call], Tensor | None]:
        def attend(call: Call) -> Tensor | None:
            if call.layer not in layers:
                layers.append(call.layer)
            if call.layer != shaken:
                return None
            output = near(call, None)[0]
            generator = torch.Generator().manual_seed(call.moment.step)
            noise = torch.randn(output.shape, generator=generator).to(output)
            return output + size * noise * output.abs().sum() / noise.abs().sum()

        return attend

    weights = {}
    with fastdiff.accelerate(pipe, _Watch(minimum_tokens, prepare)):
        exact = generate().float()
        for layer in list(layers):
            shaken = layer
            weights[layer] = float((generate().float() - exact).abs().sum() / exact.abs().sum() / size)
    return weights


def choose(samples: Sequence[Sample], weights: Mapping[str, float], budget: float) -> tuple[Choice, ...]:
    """Rows for `SparseAttention.budget`: the least time whose weighted errors, meant over noise levels, stay within it.

    A price of error is found by bisection; at that price each layer and level takes its cheapest candidate.
    """
    places: dict[tuple[str, float, float], list[Sample]] = {}
    for sample in samples:
        places.setdefault((sample.layer, sample.low, sample.high), []).append(sample)
    levels = max(1, len({(low, high) for _, low, high in places}))

    def at(price: float) -> list[Sample]:
        return [
            min(some, key=lambda one: (one.ms + price * weights.get(layer, 1.0) * one.error / levels, one.error))
            for (layer, _, _), some in places.items()
        ]

    def cost(chosen: list[Sample]) -> float:
        return sum(weights.get(one.layer, 1.0) * one.error for one in chosen) / levels

    low, high = 0.0, 1.0
    while cost(at(high)) > budget and high < 1e15:
        high *= 4
    if cost(at(low)) <= budget:
        high = low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle)) <= budget else (middle, high)
    return tuple((one.layer, one.low, one.high, *one.candidate) for one in at(high) if one.candidate != EXACT)

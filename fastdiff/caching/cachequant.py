"""Reusing denoiser outputs of a quantised model on a schedule that knows of both errors, and correcting each.

CacheQuant (https://arxiv.org/abs/2503.01323): a dynamic programme places the computed steps where what reuse and
quantisation cost together is least, then two affine maps per step and channel are fitted one after the other: one
takes the quantised output to the exact one, one takes the reused output to that of its step. Here each map is shrunk
towards doing nothing by what held-out prompts say, and a channel whose held-out error does not fall keeps none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastdiff
from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_number
from fastdiff.anatomy import anatomy, denoiser_arguments
from fastdiff.caching.boundary import TIMES, Boundary, Call, read, rebuild
from fastdiff.caching.levels import level_at
from fastdiff.hooks import Hooks
from fastdiff.quantization.sensitivity import record as record_calls

Correction = tuple[float, tuple[float, ...], tuple[float, ...]]
SHRINKAGES = (0.0, 1.0, 4.0, 16.0, 64.0, math.inf)
_NEAR = 1e-4


def segment_costs(exact: Tensor, quantised: Tensor | None = None) -> Tensor:
    """float64 [T, T]: the mean absolute error if steps i..j all use what the quantised model computes at step i.

    Args:
        exact: [T, ...], the exact outputs of every step.
        quantised: like it, the quantised model's on the same inputs; None where nothing is quantised.
    """
    found = exact if quantised is None else quantised
    steps = len(exact)
    each = torch.stack([(exact - found[start]).abs().flatten(1).mean(1).double() for start in range(steps)])
    costs = each.cumsum(1) - each.cumsum(1).diagonal()[:, None] + each.diagonal()[:, None]
    return torch.where(torch.ones(steps, steps).triu().bool(), costs.cpu(), torch.inf)


def segment_bounds(steps: int, interval: int) -> tuple[int, int, int]:
    """How many segments, the shortest and the longest, for one computed step in `interval`; always feasible."""
    segments = math.ceil(steps / interval)
    return segments, max(min(math.ceil(interval / 2), steps // segments), 1), min(2 * interval, steps)


def segments_of_least_cost(
    costs: Tensor, segments: int, shortest: int = 1, longest: int | None = None
) -> tuple[int, ...]:
    """The first steps of so many segments that cover all steps at least total cost.

    Args:
        costs: [T, T] as `segment_costs` gives them.
        shortest, longest: steps in a segment; None bounds nothing.

    Raises:
        ValueError: the bounds leave no way to cover T steps.
    """
    steps = len(costs)
    longest = steps if longest is None else longest
    if not segments * shortest <= steps <= segments * longest or shortest < 1 or segments < 1:
        raise ValueError(
            f"{segments} segments of {shortest} to {longest} steps cannot cover {steps} steps; change their number"
        )
    best = torch.full((segments + 1, steps + 1), torch.inf, dtype=torch.float64)
    best[0, 0] = 0
    came = torch.zeros(segments + 1, steps + 1, dtype=torch.long)
    for count in range(1, segments + 1):
        for end in range(count * shortest, steps + 1):
            for start in range(max(end - longest, 0), end - shortest + 1):
                total = best[count - 1, start] + costs[start, end - 1]
                if total < best[count, end]:
                    best[count, end], came[count, end] = total, start
    if not best[segments, steps].isfinite():
        raise ValueError("no schedule has a finite cost; the outputs hold values that are not numbers")
    starts, end = [], steps
    for count in range(segments, 0, -1):
        end = int(came[count, end])
        starts.append(end)
    return tuple(reversed(starts))


def least_squares(found: Tensor, target: Tensor, shrinkage: float = 0.0) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] that take found to target [n, C, ...] per channel, shrunk towards 1 and 0.

    The scale keeps a share n / (n + shrinkage) of its distance from 1, so that infinite shrinkage leaves everything
    alone; the shift, that share of what then remains of the mean.
    """
    keep = 0.0 if shrinkage == math.inf else len(found) / (len(found) + shrinkage)
    x, y = (one.double().transpose(0, 1).flatten(1) for one in (found, target))
    x_mean, y_mean = x.mean(1), y.mean(1)
    variance = (x - x_mean[:, None]).square().mean(1)
    covariance = ((x - x_mean[:, None]) * (y - y_mean[:, None])).mean(1)
    whole = torch.where(variance > 0, covariance / variance.clamp_min(1e-30), 1.0)
    scale = 1 + keep * (whole - 1)
    return scale, keep * (y_mean - scale * x_mean)


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x [n, C, ...] scaled and shifted per channel."""
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return x * scale.to(x).view(shape) + shift.to(x).view(shape)


def fitted(found: Tensor, target: Tensor, held_found: Tensor, held_target: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] fitted on some prompts [n, C, ...], with the shrinkage that held-out ones like best.

    A channel whose held-out error does not fall keeps scale 1 and shift 0.
    """

    def error(scale: Tensor, shift: Tensor) -> Tensor:
        missed = affine(held_found.double(), scale, shift) - held_target.double()
        return missed.square().transpose(0, 1).flatten(1).mean(1)

    tried = [least_squares(found, target, shrinkage) for shrinkage in SHRINKAGES]
    scale, shift = min(tried, key=lambda one: float(error(*one).sum()))
    falls = error(scale, shift) < error(torch.ones_like(scale), torch.zeros_like(shift))
    return torch.where(falls, scale, 1.0), torch.where(falls, shift, 0.0)


@dataclass(frozen=True)
class CacheQuant(Acceleration):
    """Compute the denoiser at some noise levels, repeat its output between them, and correct it at every level.

    Args:
        levels: of the computed steps, from 1 (noise) to 0 (clean), as `plan` chose them; the first step is computed
            always. A run with other steps computes at those nearest to them, without corrections.
        corrections: (level, scale per channel, shift per channel): applied to what was computed at its level, or to
            what is repeated there.
    """

    stage: ClassVar[str] = "blocks"
    levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    corrections: tuple[Correction, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(self.levels))
        rows = tuple((level, tuple(scale), tuple(shift)) for level, scale, shift in self.corrections)
        object.__setattr__(self, "corrections", rows)
        if not self.levels:
            raise ValueError("CacheQuant: levels is empty; at least one step must be computed")
        for level in (*self.levels, *(row[0] for row in rows)):
            check_number("CacheQuant", "levels", level, low=0, high=1)
        for level, scale, shift in rows:
            if len(scale) != len(shift):
                raise ValueError(f"CacheQuant: the correction at level {level} has as many scales as shifts")
            for value in (*scale, *shift):
                check_number("CacheQuant", "corrections", value, low=-1e6, high=1e6)

    def supports(self, pipe: Any) -> Verdict:
        """Refused beside a diffusers cache, which would be told of fewer steps than are taken."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            if getattr(denoiser, "is_cache_enabled", False):
                return Verdict(False, f"the {name} has a diffusers cache already; call disable_cache() first")
        return Verdict(True)

    def conflict(self, other: Acceleration) -> str:
        """Two that decide which calls are computed miscount each other's."""
        both = type(other).__name__ in ("DiffusersCache", "Forecast")
        return "both decide which denoiser calls are computed; keep one" if both else ""

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser of the pipeline."""
        for denoiser in anatomy(pipe).denoisers.values():
            _Repeater(self, hooks, pipe, denoiser)
        hooks.counter.held = lambda: hooks.requests.bytes_held


@dataclass
class _Kept:
    value: Tensor | None = None
    template: Callable[[Tensor], Any] | None = None


class _Repeater:
    """Computes or repeats each call of one denoiser."""

    def __init__(self, settings: CacheQuant, hooks: Hooks, pipe: Any, denoiser: Any):
        self.settings, self.counter = settings, hooks.counter
        self.boundary = Boundary(hooks, pipe, denoiser, self.act)

    def act(self, call: Call) -> Any:
        """The output of one call."""
        kept: _Kept = self.boundary.state(call.request, "kept", _Kept)
        shape = None if kept.value is None else (len(kept.value), *kept.value.shape[2:])
        fits = shape == (len(call.sample), *call.sample.shape[2:])
        if kept.value is not None and kept.template is not None and fits and not self._due(call):
            self.counter.count(accelerated=True)
            return kept.template(self._corrected(call, kept.value))
        self.counter.count(accelerated=False)
        output = call.compute()
        value = read(output)
        if value is None:
            self.counter.miss("computes calls that answer with more than one tensor")
            return output
        kept.template = rebuild(output)
        # a copy, since pipelines and graphs may write to theirs
        kept.value = self._corrected(call, value).clone()
        return kept.template(kept.value.clone())

    def _due(self, call: Call) -> bool:
        if call.run is not None:
            run = call.run
            planned = call.request.state((self, "planned"), lambda: {run.nearest(one) for one in self.settings.levels})
            return call.position in planned
        return call.level is None or any(abs(call.level - one) < _NEAR for one in self.settings.levels)

    def _corrected(self, call: Call, value: Tensor) -> Tensor:
        for level, scale, shift in self.settings.corrections:
            if call.level is not None and abs(level - call.level) < _NEAR:
                if len(scale) != value.shape[1]:
                    raise Unsupported(
                        f"CacheQuant: the correction at level {level} is for {len(scale)} channels and the output has "
                        f"{value.shape[1]}; fit it on this model"
                    )
                return affine(value, torch.tensor(scale), torch.tensor(shift))
        if self.settings.corrections:
            self.counter.note("a run takes steps that no correction was fitted for; those are left uncorrected")
        return value


@dataclass(frozen=True)
class Step:
    """One step of a recorded generation.

    Attributes:
        level: its noise level; exact, quantised: outputs [n, C, ...] on the same inputs.
    """

    level: float
    exact: Tensor
    quantised: Tensor


def record(pipe: Any, generate: Callable[[], Any], quantised: Sequence[Acceleration] = ()) -> list[Step]:
    """Every step's exact and quantised output in one call of the pipeline, which `generate` makes."""
    calls = record_calls(pipe, generate, calls=1_000_000)
    other = [call.output for call in calls]
    if quantised:
        with fastdiff.accelerate(pipe, list(quantised)), torch.no_grad():
            other = [_tensor(call.denoiser(*call.args, **call.kwargs)) for call in calls]
    steps: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for call, found in zip(calls, other, strict=True):
        given = denoiser_arguments(call.denoiser, call.args, call.kwargs)
        time = float(next(torch.as_tensor(given[name]).flatten()[0] for name in TIMES if name in given))
        both = steps.setdefault(level_at(pipe.scheduler, time), ([], []))
        both[0].append(call.output)
        both[1].append(found)
    return [Step(level, torch.cat(exact), torch.cat(found)) for level, (exact, found) in steps.items()]


def plan(steps: Sequence[Step], held_out: Sequence[Step], interval: int, corrected: bool = True) -> CacheQuant:
    """Schedule and corrections for one computed step in `interval`.

    What falls on held-out prompts is the error of every output on the inputs of the exact run. A sampler adds them up,
    so measure pictures with and without corrections before relying on them.

    Args:
        steps, held_out: the same steps recorded on some prompts and on others.
        corrected: False gives the schedule alone.
    """
    costs = segment_costs(*(torch.stack([getattr(step, name) for step in steps]) for name in ("exact", "quantised")))
    starts = segments_of_least_cost(costs, *segment_bounds(len(steps), interval))
    levels = tuple(steps[start].level for start in starts)
    rows: list[Correction] = []
    kept = held_kept = torch.empty(0)
    for place, (step, held) in enumerate(zip(steps, held_out, strict=True)):
        # what was computed is corrected for quantisation, and what is repeated, already corrected, for its age
        found, held_found = (step.quantised, held.quantised) if place in starts else (kept, held_kept)
        scale, shift = fitted(found, step.exact, held_found, held.exact)
        if place in starts:
            kept, held_kept = affine(found, scale, shift), affine(held_found, scale, shift)
        rows.append((step.level, tuple(scale.tolist()), tuple(shift.tolist())))
    return CacheQuant(levels, tuple(rows) if corrected else ())


def _tensor(output: Any) -> Tensor:
    value = read(output)
    if value is None:
        raise Unsupported("CacheQuant: this denoiser answers with more than one tensor; use Forecast")
    return value

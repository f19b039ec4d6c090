"""Leaving out denoiser calls: what the denoiser would have said is continued from its last answers.

It happens at the denoiser's boundary and sees only its input and output, so that one piece of code serves every UNet
and transformer, the forward itself (compiled or not) stays as it is, and no more than four latents are held. Related:
EasyCache (https://arxiv.org/abs/2507.02860) for the indicator, TaylorSeer (https://arxiv.org/abs/2503.06923) for
continuing instead of repeating.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastdiff.acceleration import Acceleration, Verdict, check_choice, check_number
from fastdiff.anatomy import anatomy
from fastdiff.caching.boundary import Boundary, Call, read, rebuild
from fastdiff.caching.history import ORDERS, History, combined, replaced
from fastdiff.caching.levels import coordinate, signal_and_noise
from fastdiff.hooks import Hooks
from fastdiff.runtime.compile import MARK
from fastdiff.sampling.schedule import is_flow

QUANTITIES = ("output", "residual", "clean", "noise")
SCHEDULES = ("uniform", "adaptive", "levels")
Fit = tuple[float, ...]


@dataclass(frozen=True)
class Forecast(Acceleration):
    """Compute the denoiser at some steps and continue its output between them. Lossy, bounded by PSNR.

    Args:
        schedule: "uniform" computes every `interval`-th step; "adaptive" computes a row when its output is estimated
            to have changed by `threshold` since it was last computed; "levels" computes at the noise levels `levels`.
        interval: uniform: every how many steps to compute.
        threshold: adaptive: relative change; 0 computes always.
        levels: levels: of the computed steps, from 1 (noise) to 0 (clean), as a planner chose them. A run with other
            steps computes at those nearest to them.
        order: degree of the polynomial in the noise level that continues: 0 repeats, 1 is linear, 2 quadratic.
        damping: what the polynomial adds to the last value is multiplied by this; from 0 to 1.
        quantity: what is continued: the "output", the "residual" (output less input), or the estimate of the "clean"
            latent or of the "noise" that lies in both.
        fits: levels: for steps left out, (level, weight of the input, weights of the last outputs, newest first), as a
            planner fitted them; they replace `order` and `quantity` in a run whose steps are the planner's.
        warm_up: first steps, always computed. tail: last steps, always computed.
        max_run: most steps left out in a row; 0 leaves it to the schedule.
        guard: compute also when the estimated change since the last computed call passes this; 0 for no guard.
    """

    stage: ClassVar[str] = "blocks"
    schedule: str = "uniform"
    interval: int = 2
    threshold: float = 0.1
    levels: tuple[float, ...] = ()
    order: int = 0
    damping: float = 1.0
    quantity: str = "clean"
    fits: tuple[Fit, ...] = ()
    warm_up: int = 3
    tail: int = 1
    max_run: int = 0
    guard: float = 0.0

    def __post_init__(self):
        check_choice("Forecast", "schedule", self.schedule, SCHEDULES)
        check_choice("Forecast", "order", self.order, ORDERS)
        check_choice("Forecast", "quantity", self.quantity, QUANTITIES)
        for name in ("threshold", "guard"):
            check_number("Forecast", name, getattr(self, name), low=0)
        check_number("Forecast", "damping", self.damping, low=0, high=1)
        for name, low in (("interval", 1), ("warm_up", 1), ("tail", 0), ("max_run", 0)):
            check_number("Forecast", name, getattr(self, name), low=low, whole=True)
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "fits", tuple(tuple(row) for row in self.fits))
        for level in (*self.levels, *(row[0] if row else float("nan") for row in self.fits)):
            check_number("Forecast", "levels", level, low=0, high=1)
        if (self.schedule == "levels") != bool(self.levels):
            raise ValueError("Forecast: levels belong to schedule='levels' and are needed for it")
        if self.fits and not self.levels:
            raise ValueError("Forecast: fits belong to schedule='levels'")
        for row in self.fits:
            if not 3 <= len(row) <= 2 + len(ORDERS):
                raise ValueError(f"Forecast: a fit is (level, input weight, one to {len(ORDERS)} output weights)")
            for weight in row[1:]:
                check_number("Forecast", "fits", weight, low=-1e6, high=1e6)

    def supports(self, pipe: Any) -> Verdict:
        """Refused beside a diffusers cache, which would be told of fewer steps than are taken."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            if getattr(denoiser, "is_cache_enabled", False):
                return Verdict(False, f"the {name} has a diffusers cache already; call disable_cache() first")
        return Verdict(True)

    def conflict(self, other: Acceleration) -> str:
        """Two that decide which calls are computed miscount each other's."""
        if type(other).__name__ == "DiffusersCache":
            return "both decide which denoiser calls are computed; keep one"
        return ""

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser of the pipeline."""
        for denoiser in anatomy(pipe).denoisers.values():
            Forecaster(self, hooks, pipe, denoiser)
        hooks.counter.held = lambda: hooks.requests.bytes_held

    @property
    def _watches(self) -> bool:
        """True when the estimated change is needed."""
        return self.schedule == "adaptive" or self.guard > 0


class Forecaster:
    """Decides for each row of each call of one denoiser, computes what must be, continues the rest."""

    def __init__(self, settings: Forecast, hooks: Hooks, pipe: Any, denoiser: Any):
        self.settings = settings
        self.counter = hooks.counter
        self.keep = max(settings.order + 1, *(len(row) - 2 for row in settings.fits), 1)
        self.boundary = Boundary(hooks, pipe, denoiser, self.act)
        self.scheduler = self.boundary.scheduler
        self.prediction = _prediction(self.scheduler)
        self._remapped: set[tuple[float, ...]] = set()

    def act(self, call: Call) -> Any:
        """The output of one call."""
        history: History = self.boundary.state(call.request, "history", History)
        if call.index == 0:
            self._check_length(call)
        signature = (call.sample.shape, call.sample.dtype, call.sample.device, call.return_dict)
        known = history.fits(signature)
        if known and call.run is None and call.level is not None:
            # a call at the level of the last one belongs to another picture: there is nothing to continue
            known = coordinate(self.scheduler, call.level) not in history.points[0]
        if call.level is None and known:
            self.counter.miss("computes calls whose rows stand at different noise levels")
        count = len(call.sample)
        wanted = self._wanted(call, history) if known and call.level is not None else [True] * count
        rows = [row for row, wants in enumerate(wanted) if wants]
        if len(rows) == count:
            output = self._compute(call, history)
        elif not rows:
            output = history.template(self._continued(call, history))  # type: ignore[operator]
        else:
            output = self._mixed(call, history, rows)
        for row, wants in enumerate(wanted):
            history.runs[row : row + 1] = [0 if wants else history.runs[row] + 1]
        self.counter.count(accelerated=len(rows) < count)
        return output

    def _wanted(self, call: Call, history: History) -> list[bool]:
        """For each row whether it must be computed."""
        settings, count = self.settings, len(call.sample)
        left = None if call.steps is None else call.steps - call.position
        if call.index < settings.warm_up or (left is not None and left <= settings.tail):
            return [True] * count
        due = self._due(call)
        wanted = [due or bool(settings.max_run and run >= settings.max_run) for run in history.runs]
        if settings._watches and not all(wanted):
            bounds = [settings.threshold] if settings.schedule == "adaptive" else []
            bound = min([*bounds, settings.guard] if settings.guard else bounds)
            # not (change >= bound), which a NaN would pass as "unchanged"
            wanted = [one or not change < bound for one, change in zip(wanted, _change(call, history), strict=True)]
        return wanted

    def _due(self, call: Call) -> bool:
        settings = self.settings
        if settings.schedule == "uniform":
            return (call.index - settings.warm_up) % settings.interval == settings.interval - 1
        if settings.schedule == "adaptive":
            return False
        if call.run is None:
            level = call.level
            return any(abs(level - planned) < 1e-4 for planned in settings.levels)  # type: ignore[operator]
        return call.position in self._planned(call)

    def _check_length(self, call: Call) -> None:
        planned = len(self.settings.levels)
        if call.steps is not None and planned > call.steps:
            raise ValueError(
                f"Forecast: the plan computes {planned} steps and the run takes {call.steps}; "
                "take more steps, or tune a plan for as many"
            )

    def _planned(self, call: Call) -> frozenset[int]:
        run = call.run
        assert run is not None
        key = (self, "planned")
        return call.request.state(key, lambda: frozenset(run.nearest(level) for level in self.settings.levels))

    def _fit(self, call: Call) -> Fit | None:
        """The fitted weights of this step, if this run takes the steps they were fitted for."""
        if not self.settings.fits or call.level is None:
            return None
        for row in self.settings.fits:
            if abs(row[0] - call.level) < 1e-4:
                return row
        if call.run is not None and call.run.levels not in self._remapped:
            self._remapped.add(call.run.levels)
            self.counter.note(
                f"a run of {call.steps} steps is not the one the plan was fitted on: its levels were mapped to the "
                f"nearest steps, and calls left out are continued with order {self.settings.order}"
            )
        return None

    def _weights(self, call: Call) -> tuple[float, float]:
        """(a, b) of the continued quantity ``a input + b output`` at a call's level."""
        assert call.level is not None
        signal, noise = signal_and_noise(self.scheduler, call.level)
        return combination(self.settings.quantity, self.prediction, signal, noise)

    def _quantity(self, call: Call, value: Tensor, rows: list[int] | None = None) -> Tensor:
        """What is remembered of an output. A copy, since pipelines and graphs may write to theirs."""
        sample = call.sample if rows is None else call.sample[rows]
        if self.settings.fits or sample.shape != value.shape or call.level is None:
            return value.clone()
        a, b = self._weights(call)
        return combined([sample, value], [[a, b]] * len(value)) if (a, b) != (0, 1) else value.clone()

    def _compute(self, call: Call, history: History) -> Any:
        output = call.compute()
        value = read(output)
        if value is None or call.level is None or len(value) != len(call.sample):
            if value is None:
                self.counter.miss("computes calls that answer with more than one tensor")
            history.values.clear()
            history.points.clear()
        else:
            history.template = rebuild(output)
            history.push(self._quantity(call, value), coordinate(self.scheduler, call.level), self.keep)
            self._watch(call, history, value, None)
        history.runs = history.runs or [0] * len(call.sample)
        return output

    def _continued(self, call: Call, history: History, rows: list[int] | None = None) -> Tensor:
        sample = call.sample if rows is None else call.sample[rows]
        fit = self._fit(call)
        if fit is not None and len(history.values) >= len(fit) - 2 and sample.shape[1:] == history.values[0].shape[1:]:
            values = [value if rows is None else value[rows] for value in history.values[: len(fit) - 2]]
            return combined([sample, *values], [fit[1:]] * len(sample))
        assert call.level is not None
        value = history.continued(coordinate(self.scheduler, call.level), self.settings.damping, rows)
        if self.settings.fits or sample.shape != value.shape:
            return value
        a, b = self._weights(call)
        # where the output hardly enters the quantity, what comes back from it must stay finite
        b = b if abs(b) > 1e-3 else math.copysign(1e-3, b)
        return combined([sample, value], [[-a / b, 1 / b]] * len(sample)) if (a, b) != (0, 1) else value

    def _mixed(self, call: Call, history: History, rows: list[int]) -> Any:
        """Some rows computed, the others continued; a compiled denoiser is given all, so as to keep its shapes."""
        assert call.level is not None
        others = [row for row in range(len(call.sample)) if row not in rows]
        continued = self._continued(call, history, others)
        if getattr(self.boundary.denoiser, MARK, False):
            answer = read(call.compute())
            value = None if answer is None else answer[rows]
        else:
            value = read(call.compute(rows))
        assert value is not None, "an output that could be read once can be read again"
        history.push(self._quantity(call, value, rows), coordinate(self.scheduler, call.level), self.keep, rows)
        self._watch(call, history, value, rows)
        whole = value.new_empty((len(call.sample), *value.shape[1:]))
        whole[rows], whole[others] = value, continued
        return history.template(whole)  # type: ignore[operator]

    def _watch(self, call: Call, history: History, value: Tensor, rows: list[int] | None) -> None:
        """Remember input and output of computed rows, and how much their output changes as their input does."""
        if not self.settings._watches:
            return
        sample = call.sample if rows is None else call.sample[rows]
        before, output = history.input, history.output
        if before is None or output is None:
            history.input, history.output = sample.clone(), value.clone()
            return
        if rows is not None:
            before, output = before[rows], output[rows]
        rates = _mean(value - output) / _mean(sample - before).clamp(min=1e-12)
        if rows is None:
            history.input, history.output, history.rates = sample.clone(), value.clone(), rates
            return
        history.rates = rates.new_full((len(call.sample),), float("nan")) if history.rates is None else history.rates
        assert history.input is not None and history.output is not None
        history.input = replaced(history.input, rows, sample)
        history.output = replaced(history.output, rows, value)
        history.rates = replaced(history.rates, rows, rates)


def _mean(tensor: Tensor) -> Tensor:
    """Mean absolute value of each row, [B] in float32."""
    return tensor.float().abs().flatten(1).mean(1)


def _change(call: Call, history: History) -> list[float]:
    """EasyCache's estimate for each row: how much of its last computed output has changed since."""
    if history.rates is None or history.input is None or history.output is None:
        return [float("nan")] * len(call.sample)
    moved = _mean(call.sample - history.input)
    return (history.rates * moved / _mean(history.output).clamp(min=1e-12)).tolist()


def combination(quantity: str, prediction: str, signal: float, noise: float) -> tuple[float, float]:
    """(a, b) such that ``a input + b output`` is the quantity, for ``input = signal clean + noise eps``."""
    if quantity == "residual":
        return -1.0, 1.0
    if quantity == "clean":
        found = {
            "epsilon": (1 / max(signal, 1e-6), -noise / max(signal, 1e-6)),
            "v_prediction": (signal, -noise),
            "flow_prediction": (1.0, -noise),
        }.get(prediction, (0.0, 1.0))
    elif quantity == "noise":
        found = {
            "sample": (1 / max(noise, 1e-6), -signal / max(noise, 1e-6)),
            "v_prediction": (noise, signal),
            "flow_prediction": (1.0, signal),
        }.get(prediction, (0.0, 1.0))
    else:
        return 0.0, 1.0
    return found


def _prediction(scheduler: Any) -> str:
    """What the network predicts, as diffusers names it."""
    if scheduler is None:
        return ""
    return "flow_prediction" if is_flow(scheduler) else str(scheduler.config.get("prediction_type", "epsilon"))

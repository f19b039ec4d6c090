"""As few steps as a loss in quality allows, at the timesteps where they do most.

A schedule is chosen by what it costs on the model at hand: `fit` runs a few prompts with many steps, works out what
one long step between any two of those timesteps would get wrong, and finds the path of n steps with the least error in
all by dynamic programming (as https://arxiv.org/abs/2106.03802, but for the solver that runs, its second order
included). No further denoiser calls are needed for that, since every long step is a sum of what the many short ones
computed. A schedule so found replaces the scheduler's own only where it is better on other prompts.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_number
from fastdiff.anatomy import anatomy, public_class
from fastdiff.hooks import Hooks
from fastdiff.quality.fidelity import psnr
from fastdiff.quality.statistics import Interval, mean_interval, paired_difference
from fastdiff.sampling.algebra import estimates
from fastdiff.sampling.schedule import check_timesteps, is_flow, prediction_of, steps_for_strength


@dataclass(frozen=True)
class StepBudget(Acceleration):
    """At most so many denoising steps, whatever a call asks for.

    Args:
        steps: of the denoiser; with image to image, those that really run. Calls that ask for fewer are left alone.
        timesteps: falling timesteps to take instead of the scheduler's own, as many as `steps`; empty leaves the
            choice to the scheduler. `fit` finds some.
    """

    stage: ClassVar[str] = "steps"
    steps: int = 12
    timesteps: tuple[float, ...] = ()

    def __post_init__(self):
        check_number("StepBudget", "steps", self.steps, low=1, high=1000, whole=True)
        object.__setattr__(self, "timesteps", tuple(float(time) for time in self.timesteps))
        if self.timesteps:
            check_timesteps(self.timesteps, 1000)
            if len(self.timesteps) != self.steps:
                raise ValueError(f"StepBudget: {len(self.timesteps)} timesteps are not steps={self.steps}")

    def supports(self, pipe: Any) -> Verdict:
        """Needs a pipeline that can be told its steps, and where timesteps are given, those."""
        known = inspect.signature(public_class(pipe).__call__).parameters
        if "num_inference_steps" not in known:
            return Verdict(False, f"{type(pipe).__name__} does not let a call choose its number of steps")
        if not self.timesteps:
            return Verdict(True)
        if "strength" in known:
            return Verdict(False, "image to image begins part-way, at a timestep of its own; leave timesteps empty")
        argument = "sigmas" if is_flow(pipe.scheduler) else "timesteps"
        accepts = inspect.signature(pipe.scheduler.set_timesteps).parameters
        if argument not in known or argument not in accepts:
            return Verdict(False, f"{type(pipe.scheduler).__name__} chooses its own timesteps; leave timesteps empty")
        if pipe.scheduler.config.get("use_dynamic_shifting"):
            return Verdict(False, "this scheduler moves timesteps with the size of the picture; leave timesteps empty")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Change what calls of the pipeline ask for."""
        shortened: ContextVar[bool] = ContextVar("fastdiff_steps_shortened", default=False)

        def call(inner: Callable, running: Any, *args: Any, **kwargs: Any) -> Any:
            known = inspect.signature(public_class(running).__call__).parameters
            given = {**dict(zip(list(known)[1:], args, strict=False)), **kwargs}
            changes = self._changes(running, known, given)
            before = shortened.set(bool(changes))
            try:
                return inner(**{**given, **changes})
            finally:
                shortened.reset(before)

        def count(inner: Callable, *args: Any, **kwargs: Any) -> Any:
            hooks.counter.count(shortened.get())
            return inner(*args, **kwargs)

        hooks.override(pipe, "__call__", call)
        for denoiser in anatomy(pipe).denoisers.values():
            hooks.wrap(denoiser, "forward", count)

    def _changes(self, pipe: Any, known: Any, given: dict[str, Any]) -> dict[str, Any]:
        if given.get("timesteps") is not None or given.get("sigmas") is not None:
            return {}  # whoever names timesteps means those
        asked = given.get("num_inference_steps", known["num_inference_steps"].default)
        strength = given.get("strength", known["strength"].default) if "strength" in known else 1.0
        steps = steps_for_strength(self.steps, strength)
        if asked <= steps:
            return {}
        if not self.timesteps:
            return {"num_inference_steps": steps}
        if is_flow(pipe.scheduler):
            return {"num_inference_steps": steps, "sigmas": unshifted(pipe.scheduler, self.timesteps)}
        return {"num_inference_steps": steps, "timesteps": [round(time) for time in self.timesteps]}


def unshifted(scheduler: Any, timesteps: Sequence[float]) -> list[float]:
    """The sigmas to give a flow scheduler for these timesteps: it applies its shift to whatever it is given."""
    shift, count = scheduler.config.get("shift", 1.0), scheduler.config.num_train_timesteps
    return [time / count / (shift - (shift - 1) * time / count) for time in timesteps]


@dataclass(frozen=True)
class Trajectory:
    """What a run of many steps saw.

    Attributes:
        timesteps: ``[N]``, falling.
        signal, noise: float64 ``[N + 1]``, the last of the clean end.
        states: ``[N + 1, D]`` float64, all rows of the batch and all cells in one; the last is the sample.
        clean: clean estimates ``[N, D]``.
    """

    timesteps: tuple[float, ...]
    signal: np.ndarray
    noise: np.ndarray
    states: np.ndarray
    clean: np.ndarray


@contextmanager
def _recorded(scheduler: Any) -> Iterator[list[tuple[float, Tensor, Tensor]]]:
    """Everything the scheduler is handed in the block, as (timestep, sample, guided output)."""
    seen: list[tuple[float, Tensor, Tensor]] = []
    inner = scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((float(timestep), sample.detach().clone(), model_output.detach().clone()))
        return inner(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = step
    try:
        yield seen
    finally:
        del scheduler.step


def trajectory(pipe: Any, prompts: Sequence[str], steps: int, seed: int = 0, **call: Any) -> Trajectory:
    """Run prompts with many steps and keep what the solver saw.

    Raises:
        Unsupported: a scheduler other than DPM-Solver++ of order 1 or 2, DDIM and flow-matching Euler.
    """
    scheduler = pipe.scheduler
    solver_order(scheduler)
    with _recorded(scheduler) as seen:
        made = pipe(list(prompts), num_inference_steps=steps, generator=_draws(len(prompts), seed),
                    output_type="latent", **call).images  # fmt: skip
    signal, noise = map(np.array, zip(*(_levels(scheduler, time) for time, _, _ in seen), strict=True))
    clean = [
        estimates(
            prediction_of(scheduler), x.double(), output.double()[:, : x.shape[1]], torch.tensor(s), torch.tensor(n)
        )[0]
        for (_, x, output), s, n in zip(seen, signal, noise, strict=True)
    ]
    states = [x.double() for _, x, _ in seen] + [made.double()]
    return Trajectory(
        tuple(time for time, _, _ in seen),
        np.append(signal, 1.0),
        np.append(noise, 0.0),
        torch.stack(states).flatten(1).cpu().numpy(),
        torch.stack(clean).flatten(1).cpu().numpy(),
    )


def solver_order(scheduler: Any) -> int:
    """1 or 2, the order of the scheduler's steps."""
    kind, config = type(scheduler).__name__, scheduler.config
    if kind in ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler"):
        return 1
    if kind == "DPMSolverMultistepScheduler" and config.algorithm_type == "dpmsolver++" and config.solver_order < 3:
        return config.solver_order
    raise Unsupported(f"step schedules are fitted for DPM-Solver++, DDIM and flow-matching Euler, not for {kind}")


def _levels(scheduler: Any, time: float) -> tuple[float, float]:
    if is_flow(scheduler):
        sigma = time / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    product = float(scheduler.alphas_cumprod[round(time)])
    return product**0.5, (1 - product) ** 0.5


def step_errors(seen: Trajectory, order: int) -> np.ndarray:
    """Root mean square error of a step from i to j after one from h: float64 ``[N, N, N + 1]`` at (h, i, j).

    A first step has h = i. Errors are those of the state in VP coordinates, infinite where i < j and h <= i fail.
    """
    count, cells = seen.clean.shape
    vectors = np.concatenate([seen.states, seen.clean])
    gram = vectors @ vectors.T / cells
    half_log = np.log(seen.signal[:-1] / seen.noise[:-1])
    errors = np.full((count, count, count + 1), np.inf)
    for i in range(count):
        for j in range(i + 1, count + 1):
            ratio = seen.noise[j] / seen.noise[i]
            weight = seen.signal[j] - seen.signal[i] * ratio
            for h in range(i + 1):
                second = 0.0
                if order == 2 and h < i and j < count:
                    second = (half_log[j] - half_log[i]) / (2 * (half_log[i] - half_log[h]))
                index = np.array([j, i, count + 1 + i, count + 1 + h])
                parts = np.array([-1.0, ratio, weight * (1 + second), -weight * second])
                square = parts @ gram[np.ix_(index, index)] @ parts
                errors[h, i, j] = max(square, 0.0) ** 0.5 / np.hypot(seen.signal[j], seen.noise[j])
    return errors


def best_path(errors: np.ndarray, steps: int) -> list[int]:
    """The places of the ``steps`` timesteps with the least sum of errors, from the first to the clean end.

    Args:
        errors: as of `step_errors`.
    """
    count = errors.shape[0]
    if not 1 <= steps <= count:
        raise ValueError(f"a path of {steps} steps does not fit {count} timesteps")
    if steps == 1:
        return [0]
    # least[i, j]: of paths that have stepped from i to j; at first from the beginning, as a first step
    least = np.full((count, count), np.inf)
    least[0] = errors[0, 0, :count]
    back = []
    for _ in range(steps - 2):
        through = least[:, :, None] + errors[:, :, :count]  # [h, i, j]
        back.append(through.argmin(axis=0))
        least = through.min(axis=0)
    ending = least + errors[:, :, count]  # the last step goes from i, after h, to the end
    h, i = np.unravel_index(int(ending.argmin()), ending.shape)
    path = [int(i), int(h)]
    for choice in reversed(back):
        path.append(int(choice[path[-1], path[-2]]))
    return path[::-1]


def fitted(seen: Trajectory, steps: int, order: int) -> tuple[float, ...]:
    """The timesteps of the best path of so many steps."""
    return tuple(seen.timesteps[place] for place in best_path(step_errors(seen, order), steps))


@dataclass(frozen=True)
class Trial:
    """A number of steps as it did on prompts that were not fitted on.

    Attributes:
        member: the budget to put into a plan, with the fitted timesteps where they were better.
        psnr: to the run of many steps, in dB.
        gain: of the fitted timesteps over the scheduler's own, paired, in dB; accepted where the interval is above 0.
        milliseconds: of one picture with the member's number of steps, as measured here.
    """

    member: StepBudget
    psnr: Interval
    gain: Interval
    milliseconds: float


def fit(
    pipe: Any,
    prompts: Sequence[str],
    budgets: Sequence[int] = (4, 6, 8, 10, 12, 16),
    reference: int = 40,
    batch: int = 16,
    seed: int = 0,
    **call: Any,
) -> list[Trial]:
    """Fit schedules on the first half of the prompts and measure them on the second.

    Args:
        pipe: an unaccelerated text-to-image pipeline.
        prompts: 16 or more.
        budgets: numbers of steps to try.
        reference: steps of the run that is taken for the truth.
        batch: prompts in one call.
        call: further arguments of the pipeline's call, such as `guidance_scale` and the size.

    Raises:
        Unsupported: the scheduler's steps are not known here, or it takes no timesteps.
    """
    order = solver_order(pipe.scheduler)
    half = len(prompts) // 2
    if half < 2:
        raise ValueError("schedules are fitted on half of the prompts and measured on the others: give more of them")
    verdict = StepBudget(2, (999.0, 500.0)).supports(pipe)
    if not verdict:
        raise Unsupported(verdict.reason)
    errors = step_errors(trajectory(pipe, prompts[: min(half, batch)], reference, seed, **call), order)
    times = _times(pipe, reference)
    held = prompts[half:]
    truth, _ = _pictures(pipe, held, reference, None, batch, seed + half, call)
    trials = []
    for steps in budgets:
        own, taken = _pictures(pipe, held, steps, None, batch, seed + half, call)
        member = StepBudget(steps, tuple(times[place] for place in best_path(errors, steps)))
        moved, _ = _pictures(pipe, held, steps, member.timesteps, batch, seed + half, call)
        # equal pictures would be infinitely good, and no difference could be taken
        of_own, of_moved = (psnr(one, truth).clamp(max=100).numpy() for one in (own, moved))
        gain = paired_difference(of_moved, of_own)
        better = gain.low > 0
        trials.append(
            Trial(
                member if better else StepBudget(steps),
                mean_interval(of_moved if better else of_own),
                gain,
                taken / len(held),
            )
        )
    return trials


def choose(trials: Sequence[Trial], psnr_db: float | None = None, milliseconds: float | None = None) -> Trial:
    """The trial to use: the fewest steps that keep `psnr_db` (the interval's low end), or the most in `milliseconds`.

    Raises:
        ValueError: not exactly one limit was given, or none of the trials keeps it; the message says the nearest.
    """
    if (psnr_db is None) == (milliseconds is None):
        raise ValueError("give one limit: psnr_db or milliseconds")
    ordered = sorted(trials, key=lambda trial: trial.member.steps)
    if psnr_db is not None:
        good = [trial for trial in ordered if trial.psnr.low >= psnr_db]
        if good:
            return good[0]
        best = max(ordered, key=lambda trial: trial.psnr.low)
        raise ValueError(f"no trial keeps {psnr_db} dB; {best.member.steps} steps keep {best.psnr.low:.1f} dB")
    fast = [trial for trial in ordered if milliseconds is not None and trial.milliseconds <= milliseconds]
    if fast:
        return fast[-1]
    raise ValueError(f"the quickest trial, {ordered[0].member.steps} steps, takes {ordered[0].milliseconds:.0f} ms")


def _times(pipe: Any, steps: int) -> list[float]:
    pipe.scheduler.set_timesteps(steps)
    return [float(time) for time in pipe.scheduler.timesteps]


def _pictures(
    pipe: Any, prompts: Sequence[str], steps: int, times: Sequence[float] | None, batch: int, seed: int,
    call: dict[str, Any],
) -> tuple[Tensor, float]:  # fmt: skip
    """Pictures [N, 3, H, W] in 0..1, and milliseconds they took."""
    own: dict[str, Any] = {}
    if times is not None:
        flow = is_flow(pipe.scheduler)
        own = {"sigmas": unshifted(pipe.scheduler, times)} if flow else {"timesteps": [round(time) for time in times]}
    made, start = [], perf_counter()
    for first in range(0, len(prompts), batch):
        some = list(prompts[first : first + batch])
        made.append(
            pipe(some, num_inference_steps=steps, generator=_draws(len(some), seed + first), output_type="pt",
                 **own, **call).images.cpu()
        )  # fmt: skip
    return torch.cat(made), (perf_counter() - start) * 1000


def _draws(count: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]

"""What the planner may propose for a number of computed steps; a candidate is a plan with a name."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastdiff.acceleration import Acceleration
from fastdiff.caching.forecast import Forecast
from fastdiff.planning.search import (
    Infeasible,
    Schedule,
    Trajectories,
    fit_schedule,
    front_loaded,
    schedule_of,
    segment_costs,
    uniform,
)
from fastdiff.sampling.steps import StepBudget

# how strongly measured outcomes weigh against plain local error: proxies mislead, so neighbours are tried as well
TEMPERS = (1.0, 0.7, 0.4)
LONGEST = 10


@dataclass(frozen=True)
class Candidate:
    """A way to make a run faster.

    Attributes:
        members: of the plan it is; in the order of their stages.
        computed: denoiser calls of each branch.
        predicted: energy of the picture's error that the search expects; NaN where it has no opinion.
        plain: True when each of those calls costs what one of the plain pipeline does.
    """

    name: str
    members: tuple[Acceleration, ...]
    computed: int
    predicted: float = float("nan")
    plain: bool = True


def forecast_of(
    trajectories: Trajectories, schedule: Schedule, most: int = 0, quantity: str = "output", ridge: float = 1e-3
) -> Forecast:
    """The acceleration that computes a schedule's steps and fits the others; `most` 0 repeats the quantity instead."""
    levels = tuple(trajectories.levels[step] for step in schedule)
    fits = fit_schedule(trajectories, schedule, most, ridge) if most else ()
    return Forecast("levels", levels=levels, fits=fits, quantity=quantity, warm_up=1, tail=1)


def static_forecast(steps: int, computed: int) -> Forecast:
    """A schedule that needs no measurement: the first steps all computed, the rest evenly, the output repeated.

    Most of a picture is settled in the first steps, so half of the computed ones go there.

    Raises:
        Infeasible: no interval gives this number.
    """
    options = []
    for warm_up in range(1, computed):
        for interval in range(2, 12):
            left_in = sum((step - warm_up) % interval == interval - 1 for step in range(warm_up, steps - 1))
            if warm_up + left_in + 1 == computed:
                options.append((abs(warm_up - computed / 2), interval, warm_up))
    if not options:
        raise Infeasible(f"no uniform schedule computes {computed} of {steps} steps")
    _, interval, warm_up = min(options)
    return Forecast(interval=interval, warm_up=warm_up, quantity="output")


def controls(trajectories: Trajectories, computed: int, fewer: int) -> list[Candidate]:
    """What has to be beaten: uniform repetition, and simply fewer steps."""
    even = forecast_of(trajectories, uniform(trajectories.steps, computed))
    return [Candidate("uniform", (even,), computed), Candidate("fewer-steps", (StepBudget(fewer),), fewer)]


def candidates(
    trajectories: Trajectories,
    errors: dict[tuple[int, int], float],
    weights: Sequence[float],
    computed: int,
) -> list[Candidate]:
    """Schedules with `computed` calls: by dynamic programming under several weighings, and by rule; with forecasts.

    The most promising come first, since not all may be tried.
    """
    steps = trajectories.steps
    named: dict[str, Schedule] = {}
    for temper in TEMPERS:
        costs = segment_costs(errors, [weight**temper for weight in weights], LONGEST)
        try:
            named[f"outcome^{temper:g}"] = schedule_of(costs, computed, LONGEST)
        except Infeasible:
            # so few computed steps that segments must be longer than their errors were taken for
            continue
    for share in (0.5, 0.35):
        named[f"front-{share:g}"] = front_loaded(steps, computed, share)
    costs = segment_costs(errors, weights, LONGEST)
    linear, constant, seen = [], [], set()
    for name, schedule in named.items():
        if schedule in seen or len(schedule) != computed:
            continue
        seen.add(schedule)
        predicted = sum(costs[start][end] for start, end in pairwise(schedule))
        for most, into in ((2, linear), (1, constant)):
            one = forecast_of(trajectories, schedule, most)
            into.append(Candidate(f"{name} fit-{most}", (one,), computed, predicted))
        if name == "front-0.5":
            constant.append(Candidate(f"{name} repeat", (forecast_of(trajectories, schedule),), computed, predicted))
    return [*linear, *constant, *_static(steps, computed)]


def _static(steps: int, computed: int) -> list[Candidate]:
    """The static schedule with as many computed steps, or the next number that has one; none where none has."""
    for count in range(computed, steps):
        try:
            return [Candidate("static", (static_forecast(steps, count),), count)]
        except Infeasible:
            continue
    return []

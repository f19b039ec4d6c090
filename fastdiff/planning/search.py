"""The search itself: pure functions of recorded trajectories, segment costs and schedules.

A schedule is an increasing tuple of steps that are computed; the first and the last always are. Between two computed
steps lies a segment, whose cost is what leaving its steps out does to the final result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Schedule = tuple[int, ...]
INFINITE = float("inf")


class Infeasible(ValueError):
    """No schedule keeps to the bounds that were asked for."""


def best_schedules(costs: Sequence[Sequence[float]], longest: int) -> dict[int, tuple[float, Schedule]]:
    """The cheapest schedule for every number of computed steps, by dynamic programming.

    Args:
        costs: ``costs[start][end]`` of the segment between computed steps `start` < `end`; 0 where they are neighbours.
        longest: most steps from one computed step to the next.

    Returns:
        Number of computed steps to (total cost, schedule); numbers that no schedule within `longest` has are absent.
    """
    steps = len(costs)
    reach: list[dict[int, tuple[float, int]]] = [{} for _ in range(steps)]  # reach[end][count] = (cost, start)
    reach[0][1] = (0.0, -1)
    for end in range(1, steps):
        for start in range(max(0, end - longest), end):
            for count, (cost, _) in reach[start].items():
                total = cost + costs[start][end]
                if total < reach[end].get(count + 1, (INFINITE, 0))[0]:
                    reach[end][count + 1] = (total, start)
    found = {}
    for count, (cost, _) in reach[-1].items():
        schedule, place = [], steps - 1
        for left in range(count, 0, -1):
            schedule.append(place)
            place = reach[place][left][1]
        found[count] = (cost, tuple(reversed(schedule)))
    return found


def schedule_of(costs: Sequence[Sequence[float]], count: int, longest: int) -> Schedule:
    """The cheapest schedule with `count` computed steps.

    Raises:
        Infeasible: none keeps segments within `longest`; the message says how many steps it takes.
    """
    found = best_schedules(costs, longest)
    if count not in found:
        raise Infeasible(
            f"no schedule of {len(costs)} steps computes {count} of them with segments of at most {longest}; "
            f"compute from {min(found)} to {max(found)}"
        )
    return found[count][1]


def uniform(steps: int, count: int) -> Schedule:
    """`count` computed steps as evenly spread as whole numbers allow, first and last among them."""
    if not 2 <= count <= steps:
        raise Infeasible(f"from 2 to {steps} of {steps} steps can be computed, not {count}")
    return tuple(round(place * (steps - 1) / (count - 1)) for place in range(count))


def front_loaded(steps: int, count: int, share: float) -> Schedule:
    """`share` of the computed steps at the start, in a row, and the others evenly over the rest."""
    start = min(max(1, round(share * count)), count - 1)
    rest = count - start
    spread = [start - 1 + round(place * (steps - start) / rest) for place in range(1, rest + 1)]
    return tuple(sorted({*range(start), *spread}))


@dataclass(frozen=True)
class Trajectories:
    """What the reference runs of some prompts did, step by step.

    Attributes:
        levels: noise level of each step.
        inputs, outputs: per step the denoiser's input and its output with guidance applied, [P, ...] float32.
    """

    levels: tuple[float, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def steps(self) -> int:
        """How many steps each run took."""
        return len(self.levels)


def fitted(features: Sequence[Tensor], target: Tensor, prior: Tensor, ridge: float = 1e-3) -> Tensor:
    """Weights [F] whose sum of `features` is nearest to `target`, drawn towards `prior` by `ridge`.

    Ridge towards a known-good answer (here: repeating the last output) is what keeps a fit on a few prompts from being
    worse than that answer on others; an infinite ridge gives the prior.
    """
    table = torch.stack([feature.flatten().double() for feature in features])
    gram = table @ table.T / table.shape[1]
    right = table @ target.flatten().double() / table.shape[1] + ridge * gram.diagonal() * prior
    return torch.linalg.solve(gram + ridge * gram.diagonal().diag(), right)


def features_at(trajectories: Trajectories, step: int, computed: Sequence[int]) -> list[Tensor]:
    """The input now and the last outputs, newest first; what a fitted forecast may use."""
    shapes_agree = trajectories.inputs[step].shape == trajectories.outputs[step].shape
    now = trajectories.inputs[step] if shapes_agree else torch.zeros_like(trajectories.outputs[step])
    return [now, *(trajectories.outputs[one] for one in reversed(computed))]


def segment_errors(trajectories: Trajectories, longest: int, ridge: float = 1e-3) -> dict[tuple[int, int], float]:
    """For each (computed step, later step left out): energy of the error of the best single-output forecast.

    Costs no denoiser call.
    """
    errors = {}
    for start in range(trajectories.steps):
        for step in range(start + 1, min(start + longest, trajectories.steps)):
            features = features_at(trajectories, step, [start])
            target = trajectories.outputs[step]
            weights = fitted(features, target, torch.tensor([0.0, 1.0], dtype=torch.float64), ridge)
            off = (combine(features, weights) - target).double().flatten(1).square().mean(1)
            # of a typical prompt: a few whose picture turns into another would hide what the others need
            errors[start, step] = math.exp(float(off.clamp(min=1e-20).log().mean()))
    return errors


def segment_costs(errors: dict[tuple[int, int], float], weights: Sequence[float], longest: int) -> list[list[float]]:
    """``costs[start][end]``: what the steps between do to the result, each error weighed by what comes of it.

    Errors of one segment have one cause and point the same way, so they add up as amplitudes, segments as energies.

    Args:
        weights: per step, energy of the change of the final result for each unit of energy of an error there.
    """
    steps = len(weights)
    costs = [[INFINITE] * steps for _ in range(steps)]
    for start in range(steps):
        total = 0.0
        for end in range(start + 1, min(start + longest, steps - 1) + 1):
            costs[start][end] = total**2
            total += math.sqrt(weights[end] * errors.get((start, end), INFINITE))
    return costs


def combine(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of features."""
    return sum((float(weight) * feature for weight, feature in zip(weights, features, strict=True)), 0 * features[0])


def fit_schedule(
    trajectories: Trajectories, schedule: Schedule, most: int = 2, ridge: float = 1e-3
) -> tuple[tuple[float, ...], ...]:
    """For every step a schedule leaves out: (level, weight of the input, weights of the last outputs, newest first).

    How many outputs a step uses, up to `most`, is what two-fold validation over prompts finds best.
    """
    rows = []
    halves = (slice(0, None, 2), slice(1, None, 2))
    for step in range(trajectories.steps):
        if step in schedule:
            continue
        before = [one for one in schedule if one < step]
        target = trajectories.outputs[step]
        options = []
        for used in range(1, min(most, len(before)) + 1):
            features = features_at(trajectories, step, before[-used:])
            prior = torch.tensor([0.0, 1.0, *[0.0] * (used - 1)], dtype=torch.float64)
            off = 0.0
            for learn, test in (halves, halves[::-1]):
                if len(target[test]) == 0 or len(target[learn]) == 0:
                    continue
                weights = fitted([one[learn] for one in features], target[learn], prior, ridge)
                off += float((combine([one[test] for one in features], weights) - target[test]).square().sum())
            options.append((off, used, fitted(features, target, prior, ridge)))
        _, _, weights = min(options, key=lambda option: option[:2])
        rows.append((trajectories.levels[step], *(float(weight) for weight in weights)))
    return tuple(rows)

"""The search against brute force and against what can be worked out by hand."""

import itertools
import math
import random

import pytest
import torch

from fastdiff.planning.search import (
    Infeasible,
    Trajectories,
    best_schedules,
    combine,
    features_at,
    fit_schedule,
    fitted,
    front_loaded,
    schedule_of,
    segment_costs,
    segment_errors,
    uniform,
)


def _costs(steps: int, seed: int) -> list[list[float]]:
    chance = random.Random(seed)
    return [[0.0 if end == start + 1 else chance.random() for end in range(steps)] for start in range(steps)]


@pytest.mark.parametrize("seed", range(12))
def test_dynamic_programming_finds_what_brute_force_finds(seed: int):
    chance = random.Random(100 + seed)
    steps, longest = chance.randint(3, 12), chance.randint(1, 6)
    costs = _costs(steps, seed)
    truth: dict[int, float] = {}
    for inner in itertools.chain.from_iterable(
        itertools.combinations(range(1, steps - 1), count) for count in range(steps - 1)
    ):
        schedule = (0, *inner, steps - 1)
        pairs = list(itertools.pairwise(schedule))
        if all(end - start <= longest for start, end in pairs):
            total = sum(costs[start][end] for start, end in pairs)
            truth[len(schedule)] = min(total, truth.get(len(schedule), math.inf))
    found = best_schedules(costs, longest)
    assert set(found) == set(truth)
    for count, (cost, schedule) in found.items():
        assert cost == pytest.approx(truth[count])
        assert len(schedule) == count
        assert schedule[0] == 0
        assert schedule[-1] == steps - 1
        assert cost == pytest.approx(sum(costs[start][end] for start, end in itertools.pairwise(schedule)))


def test_computing_everything_costs_nothing_and_more_steps_never_cost_more():
    trajectories = _trajectories(10, 4)
    errors = segment_errors(trajectories, 5)
    found = best_schedules(segment_costs(errors, [1.0] * 10, 5), 5)
    assert found[10] == (0.0, tuple(range(10)))
    ordered = [found[count][0] for count in sorted(found)]
    assert all(more <= less + 1e-12 for less, more in itertools.pairwise(ordered))


def test_what_cannot_be_says_what_can():
    with pytest.raises(Infeasible, match="compute from 4 to 10"):
        schedule_of(_costs(10, 0), 3, longest=3)
    with pytest.raises(Infeasible, match="from 2 to 10"):
        uniform(10, 11)


def test_rules_of_thumb_have_the_number_asked_for():
    for steps in (10, 25, 50):
        for count in range(4, steps):
            assert len(set(uniform(steps, count))) == count
            one = front_loaded(steps, count, 0.5)
            assert one[0] == 0
            assert one[-1] == steps - 1
            assert len(one) == count


def _trajectories(steps: int, prompts: int) -> Trajectories:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(steps, prompts, 2, 3, 3, generator=generator).cumsum(0)
    outputs = torch.randn(steps, prompts, 2, 3, 3, generator=generator).cumsum(0)
    levels = tuple(1 - step / steps for step in range(steps))
    return Trajectories(levels, tuple(inputs), tuple(outputs))


def test_a_fit_recovers_what_is_linear_and_never_fits_worse_than_its_prior():
    trajectories = _trajectories(6, 8)
    features = features_at(trajectories, 4, [0, 2])
    assert torch.equal(features[1], trajectories.outputs[2])
    assert torch.equal(features[2], trajectories.outputs[0])
    truth = torch.tensor([0.3, 1.2, -0.4], dtype=torch.float64)
    target = combine(features, truth)
    prior = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(fitted(features, target, prior, ridge=0.0), truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(fitted(features, target, prior, ridge=1e9), prior, rtol=0, atol=1e-6)
    noisy = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(2))
    for ridge in (0.0, 1e-3, 1.0):
        weights = fitted(features, noisy, prior, ridge)
        assert (combine(features, weights) - noisy).norm() <= (combine(features, prior) - noisy).norm() + 1e-6


def test_fits_of_a_schedule_name_every_step_left_out_and_only_those():
    trajectories = _trajectories(9, 8)
    schedule = (0, 1, 4, 8)
    rows = fit_schedule(trajectories, schedule, most=2)
    left_out = [step for step in range(9) if step not in schedule]
    assert [row[0] for row in rows] == [trajectories.levels[step] for step in left_out]
    assert all(len(row) in (3, 4) for row in rows)
    # outputs that are constant are repeated
    still = Trajectories(trajectories.levels, trajectories.inputs, (trajectories.outputs[0],) * 9)
    for row in fit_schedule(still, schedule, most=1):
        assert row[1] == pytest.approx(0, abs=1e-5)
        assert row[2] == pytest.approx(1, abs=1e-5)

"""Losses against a world whose consistency function is known: independent Gaussian numbers."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from fastdiff.distillation.consistency import LatentConsistency, TrajectoryConsistency, boundary, consistent, leap
from fastdiff.distillation.networks import Batch, Levels, Networks, ddim, guided
from fastdiff.distillation.phased import Phased, equal_edges, solve

MEAN, DEVIATION = 0.3, 0.6
SCHEDULES: dict[str, dict[str, Any]] = {
    "v": {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
    "epsilon": {"prediction_type": "epsilon", "beta_schedule": "scaled_linear"},
    "flow": {"prediction_type": "flow_prediction", "shift": 1.0},
}


def levels_of(kind: str) -> Levels:
    return Levels.of({"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, **SCHEDULES[kind]})


def spread(levels: Levels, level: Tensor, like: Tensor) -> Tensor:
    """Standard deviation of the state at a level."""
    signal, noise = levels.at(level, like)
    return (signal**2 * DEVIATION**2 + noise**2).sqrt()


def perfect(levels: Levels):
    """The best possible network: the clean estimate is the conditional mean."""

    def network(x: Tensor, level: Tensor, condition: Any) -> Tensor:
        signal, noise = levels.at(level, x)
        clean = MEAN + signal * DEVIATION**2 / spread(levels, level, x) ** 2 * (x - signal * MEAN)
        return levels.output(clean, (x - signal * clean) / noise, level)

    return network


def transported(levels: Levels, x: Tensor, level: Tensor, to: Tensor) -> Tensor:
    """Where the probability flow takes x: its place in the distribution stays the same."""
    here, there = levels.at(level, x)[0], levels.at(to, x)[0]
    return there * MEAN + spread(levels, to, x) / spread(levels, level, x) * (x - here * MEAN)


def leaping(levels: Levels, edge: Any):
    """The network whose DDIM step lands exactly on the flow: `edge(level)` gives where it means to land."""

    def network(x: Tensor, level: Tensor, condition: Any) -> Tensor:
        to = edge(level)
        clean = levels.clean_reaching(x, level, transported(levels, x, level, to), to)
        signal, noise = levels.at(level, x)
        return levels.output(clean, (x - signal * clean) / noise, level)

    return network


def batch(count: int = 64, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    clean = MEAN + DEVIATION * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return Batch(clean, {"text": torch.ones(count, 1)}, {"text": torch.zeros(count, 1)}, generator)


def networks(levels: Levels, student: Any) -> Networks:
    return Networks(levels, student, perfect(levels), student)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_levels_begin_at_the_clean_sample_and_estimates_undo_outputs(kind: str):
    levels = levels_of(kind)
    clean, eps = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    level = torch.tensor([1, 20, 500, 980, 999])
    assert torch.equal(levels.add(clean, eps, torch.zeros(5, dtype=torch.long)), clean)
    found = levels.estimates(levels.add(clean, eps, level), levels.output(clean, eps, level), level)
    torch.testing.assert_close(torch.stack(found), torch.stack([clean, eps]), rtol=0, atol=1e-10)
    assert levels.last == 1000


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_step_with_the_clean_estimate_that_reaches_a_target_reaches_it(kind: str):
    levels = levels_of(kind)
    x, target = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    level, to = torch.tensor([999, 750, 500, 40]), torch.tensor([740, 500, 0, 20])
    clean = levels.clean_reaching(x, level, target, to)
    signal, noise = levels.at(level, x)
    reached = ddim(levels, x, levels.output(clean, (x - signal * clean) / noise, level), level, to)
    torch.testing.assert_close(reached, target, rtol=0, atol=1e-10)


def equal_steps(level: Tensor, to: Tensor, count: int) -> Tensor:
    return Phased(substeps=count).path(level, to)


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_the_teachers_solver_is_of_second_order(kind: str):
    levels = levels_of(kind)
    one = batch()
    level, to = torch.full((64,), 600), torch.full((64,), 120)
    x = levels.add(one.clean, one.normal(), level)
    truth = transported(levels, x, level, to)
    errors = [
        (solve(networks(levels, None), x, equal_steps(level, to, count), one, 1.0) - truth).abs().mean().item()
        for count in (10, 20, 40)
    ]
    slopes = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert min(slopes) > 1.6, slopes


@pytest.mark.parametrize("kind", SCHEDULES)
def test_one_substep_is_one_ddim_step(kind: str):
    levels = levels_of(kind)
    one = batch(3)
    level, to = torch.tensor([990, 500, 100]), torch.tensor([500, 20, 0])
    x = levels.add(one.clean, one.normal(), level)
    made = solve(networks(levels, None), x, equal_steps(level, to, 1), one, 1.0)
    expected = ddim(levels, x, perfect(levels)(x, level, None), level, to)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_phased_is_zero_for_the_flow_itself_and_only_there(kind: str):
    levels = levels_of(kind)
    edges = torch.tensor([0, 250, 500, 750, 990])
    objective = Phased(edges=tuple(edges.tolist()), substeps=40, scale=1.0)

    def edge(level: Tensor) -> Tensor:
        return edges[(torch.searchsorted(edges, level) - 1).clamp(min=0)]

    best = objective.loss(networks(levels, leaping(levels, edge)), batch(), nn.ModuleDict())
    plain = objective.loss(networks(levels, perfect(levels)), batch(), nn.ModuleDict())
    assert best < 1e-4 < 1e-3 < plain


def test_a_teacher_with_steps_of_its_own_takes_them_and_no_others():
    """Steps of no length change nothing: a start inside the path gives what a path of its own gives."""
    levels = levels_of("v")
    objective = Phased(edges=(0, 1000), nodes=(250, 500, 750), also=(500,), order=1, scale=1.0)
    level, edge = torch.tensor([990, 500]), torch.tensor([0, 0])
    path = objective.path(level, edge)
    assert path.tolist() == [[990, 750, 500, 250, 0], [500, 250, 0, 0, 0]]
    one = batch(2)
    x = levels.add(one.clean, one.normal(), level)
    made = solve(networks(levels, None), x, path, one, 1.0, order=1)
    row = x[1:]
    for here, there in ((500, 250), (250, 0)):
        here, there = torch.tensor([here]), torch.tensor([there])
        row = ddim(levels, row, perfect(levels)(row, here, None), here, there)
    torch.testing.assert_close(made[1:], row, rtol=0, atol=1e-12)


def test_a_phase_may_have_several_entries():
    starts, edges = Phased(edges=(0, 1000), also=(500,), at_edge=1.0).starts(batch(1000))
    assert edges.eq(0).all()
    assert {500, 1000} == set(starts.tolist())
    assert 450 < int(starts.eq(500).sum()) < 550
    mixed, _ = Phased(edges=(0, 500, 1000), also=(250,), at_edge=1.0).starts(batch(1000))
    assert {250, 500, 1000} == set(mixed.tolist())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_phases_of_a_flow_are_its_own_steps(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    ends = [round(1000 * float(sigma)) for sigma in scheduler.sigmas]
    assert list(equal_edges(scheduler, 4)) == ends[::-1]
    assert equal_edges(DDIMScheduler(), 4) == (0, 250, 500, 750, 1000)


def test_phased_starts_where_it_is_told():
    edges = torch.tensor([0, 250, 500, 750, 1000])
    level, edge = Phased(at_edge=1.0, noisiest=0.5).starts(batch(1000))
    assert set(level.tolist()) == {250, 500, 750, 1000}
    assert (level - edge == 250).all()
    assert abs((level == 1000).double().mean().item() - 0.5) < 0.01
    level, edge = Phased(at_edge=0.0).starts(batch(1000))
    assert torch.equal(edge, edges[torch.searchsorted(edges, level) - 1])
    level, edge = Phased(edges=(0, 1000)).starts(batch(10))
    assert (edge == 0).all() and level.min() >= 1


def test_lcm_boundary_is_the_published_one():
    skip, out = boundary(torch.tensor([0, 19, 999]))
    assert (skip[0], out[0]) == (1, 0)
    torch.testing.assert_close(skip[1:], torch.tensor([6.9e-6, 2.5e-9], dtype=torch.float64), rtol=0.02, atol=0)


def test_lcm_vanishes_for_the_consistency_function():
    levels = levels_of("v")
    objective = LatentConsistency((1.0, 1.0), points=500)
    best = objective.loss(networks(levels, leaping(levels, torch.zeros_like)), batch(), nn.ModuleDict())
    plain = objective.loss(networks(levels, perfect(levels)), batch(), nn.ModuleDict())
    assert best < 0.2 * plain


def test_a_leap_goes_where_the_flow_goes_and_stays_at_the_clean_end():
    levels = levels_of("v")
    one = batch(3)
    level, to = torch.tensor([990, 300, 0]), torch.tensor([250, 0, 0])
    x = levels.add(one.clean, one.normal(), level)
    output = leaping(levels, lambda _: to)(x, level.clamp(min=1), None)
    moved = leap(levels, x, output, level, to)
    torch.testing.assert_close(moved[:2], transported(levels, x, level, to)[:2], rtol=0, atol=1e-10)
    assert torch.equal(moved[2], x[2])


def test_tcd_compares_only_networks_at_their_own_places():
    """A network whose leaps agree from both ends of every teacher's step has no loss: here, one that never moves."""
    levels = levels_of("flow")

    def still(x: Tensor, level: Tensor, condition: Any) -> Tensor:
        return torch.zeros_like(x)

    objective = TrajectoryConsistency((1.0, 1.0), points=10)
    loss = objective.loss(Networks(levels, still, still, still), batch(), nn.ModuleDict())
    assert loss == 0


def test_the_consistency_function_is_the_identity_at_the_clean_end():
    levels = levels_of("v")
    one = batch(4)
    zero = torch.zeros(4, dtype=torch.long)
    assert torch.equal(consistent(levels, perfect(levels), one.clean, zero, one), one.clean)


def test_guidance_of_one_is_the_condition_and_of_zero_the_empty_one():
    def network(x: Tensor, level: Tensor, condition: Any) -> Tensor:
        return x * condition["text"]

    one = batch(4)
    level = torch.ones(4, dtype=torch.long)
    assert torch.equal(guided(network, one.clean, level, one, 1), one.clean)
    torch.testing.assert_close(guided(network, one.clean, level, one, 0.0), 0 * one.clean)
    torch.testing.assert_close(guided(network, one.clean, level, one, torch.full((4,), 3.0)), 3 * one.clean)


@pytest.mark.parametrize(
    "wrong",
    [
        {"edges": (0,)},
        {"edges": (10, 20)},
        {"edges": (0, 5, 5)},
        {"substeps": 0},
        {"noisiest": 1.5},
        {"also": (250,)},
        {"order": 3},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match="Phased"):
        Phased(**wrong)

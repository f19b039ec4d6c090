"""The losses beyond grids: chords, continuous time, distributions, no teacher. Known optima and identities."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.distillation.consistency import SubPathLinear, chord
from fastdiff.distillation.continuous import ContinuousConsistency, last_angle, tangent
from fastdiff.distillation.matching import DistributionMatching, MomentMatching, moments, unbiased_mmd2
from fastdiff.distillation.networks import Batch, Levels, Networks, trigflow
from fastdiff.distillation.teacherless import ConsistencyTraining, cauchy, pairing, scale_of
from fastdiff.sampling import algebra

MEAN, DEVIATION = 0.3, 0.6
KINDS: dict[str, dict[str, Any]] = {
    "v": {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
    "flow": {"prediction_type": "flow_prediction", "shift": 1.0},
}
everywhere = pytest.mark.parametrize("kind", KINDS)


def levels_of(kind: str) -> Levels:
    return Levels.of({"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, **KINDS[kind]})


def parts(levels: Levels, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(signal, noise) at whole levels and between them, as `Levels.level_of` places them."""
    level = level.double()
    if levels.is_flow:
        noise = level / levels.last
        signal = 1 - noise
    else:
        table = (levels.noise[1:] / levels.signal[1:]).log()
        low = level.floor().long().clamp(1, levels.last - 1)
        ratio = torch.exp(table[low - 1] + (level - low) * (table[low] - table[low - 1]))
        signal = 1 / (1 + ratio**2).sqrt()
        noise = ratio * signal
    shape = (-1, *[1] * (like.ndim - 1))
    return signal.to(like).view(shape), noise.to(like).view(shape)


def gaussian(levels: Levels, mean: float = MEAN, deviation: float = DEVIATION) -> Any:
    """The best network of independent Gaussian numbers."""

    def network(x: Tensor, level: Tensor, condition: Any) -> Tensor:
        signal, noise = parts(levels, level, x)
        power = signal**2 * deviation**2 + noise**2
        clean = mean + signal * deviation**2 / power * (x - signal * mean)
        return algebra.predict(levels.prediction, clean, (x - signal * clean) / noise, signal, noise)

    return network


def consistency(levels: Levels) -> Any:
    """The network whose clean estimate is where the probability flow ends."""

    def network(x: Tensor, level: Tensor, condition: Any) -> Tensor:
        signal, noise = parts(levels, level, x)
        clean = MEAN + DEVIATION / (signal**2 * DEVIATION**2 + noise**2).sqrt() * (x - signal * MEAN)
        return algebra.predict(levels.prediction, clean, (x - signal * clean) / noise, signal, noise)

    return network


def batch(count: int = 64, step: int = 10_000, shape: tuple[int, ...] = (3,)) -> Batch:
    generator = torch.Generator().manual_seed(0)
    clean = MEAN + DEVIATION * torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return Batch(clean, {"text": torch.ones(count, 1)}, {"text": torch.zeros(count, 1)}, generator, step)


def networks(levels: Levels, student: Any, teacher: Any = None) -> Networks:
    return Networks(levels, student, teacher or gaussian(levels), student)


@everywhere
def test_a_level_is_found_by_its_ratio(kind: str):
    levels = levels_of(kind)
    level = torch.tensor([1, 40, 500, 990])
    ratio = levels.noise[level] / levels.signal[level]
    torch.testing.assert_close(levels.level_of(ratio), level.double(), rtol=0, atol=1e-8)
    between = levels.level_of(ratio[1:2] * 1.01)
    assert 40 < between < 42


@everywhere
def test_a_chord_ends_where_its_ends_are(kind: str):
    levels = levels_of(kind)
    clean, eps = torch.randn(2, 3, 2, dtype=torch.float64).unbind()
    level, below = torch.tensor([900, 500, 30]), torch.tensor([880, 480, 10])
    x, reached = levels.add(clean, eps, level), levels.add(clean, eps, below)
    state, where, signal, noise = chord(levels, x, level, reached, below, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(state, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([signal, noise]), torch.cat(levels.at(level, x)), rtol=0, atol=1e-12)
    torch.testing.assert_close(where, level.double(), rtol=0, atol=1e-6)
    state, where, _, _ = chord(levels, x, level, reached, below, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(state, reached, rtol=0, atol=1e-12)
    torch.testing.assert_close(where, below.double(), rtol=0, atol=1e-6)
    _, where, _, _ = chord(levels, x, level, reached, below, torch.full((3,), 0.5, dtype=torch.float64))
    assert (below < where).all()
    assert (where < level).all()


@everywhere
def test_sub_paths_leave_the_consistency_function_alone(kind: str):
    """The finer the grid, the less is left of its loss; that of another network stays."""
    levels = levels_of(kind)

    def loss(student: Any, points: int) -> float:
        objective = SubPathLinear((1.0, 1.0), points=points, huber=0.1)
        return float(objective.loss(networks(levels, student), batch(512), nn.ModuleDict()))

    moving = lambda x, level, condition: consistency(levels)(x, level, condition) * (1 + level[:, None] / 1000)  # noqa: E731
    assert loss(consistency(levels), 200) < 0.3 * loss(consistency(levels), 25)
    assert loss(consistency(levels), 200) < 0.3 * loss(moving, 200)


@everywhere
def test_trigflow_is_the_same_network(kind: str):
    """Its estimates are those of the network it wraps; of a v network it is the identity."""
    levels = levels_of(kind)
    clean, eps = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    angle = torch.tensor([0.05, 0.3, 0.8, 1.2, 1.45], dtype=torch.float64)
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    x = cos * clean + sin * eps
    found = trigflow(levels, gaussian(levels))(x, angle, {})
    power = cos**2 * DEVIATION**2 + sin**2
    wanted = MEAN + cos * DEVIATION**2 / power * (x - cos * MEAN)
    torch.testing.assert_close(cos * x - sin * found, wanted, rtol=0, atol=1e-10)


@everywhere
def test_the_tangent_is_the_derivative(kind: str):
    levels = levels_of(kind)
    student = trigflow(levels, gaussian(levels))
    one = batch(8)
    angle = torch.linspace(0.2, 1.3, 8, dtype=torch.float64)
    x = one.clean
    flow = torch.randn(8, 3, dtype=torch.float64)
    found = tangent(student, x, angle, flow, one, 1e-4)
    exact = torch.func.jvp(lambda a, b: student(a, b, {}), (x, angle), (flow, torch.ones_like(angle)))[1]
    if kind == "flow":  # between the levels of a table the derivative has kinks
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_continuous_consistency_leaves_its_optimum_alone():
    levels = levels_of("flow")
    objective = ContinuousConsistency((1.0, 1.0), step=1e-3)

    def direction(student: Any) -> float:
        one = batch()
        nets = networks(levels, student)
        x, angle = objective.state(nets, one)
        wrapped = trigflow(levels, student)
        flow = trigflow(levels, gaussian(levels))(x, angle, {})
        slope = tangent(wrapped, x, angle, flow, one, objective.step)
        found = objective.direction(x, angle, wrapped(x, angle, {}), flow, slope, one.step)
        return float(found.abs().max())

    assert direction(consistency(levels)) < 1e-4 < 0.1 < direction(gaussian(levels))
    # the loss that training sees: its gradient is nothing at the optimum
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    student = lambda x, level, condition: consistency(levels)(x, level, condition) + shift  # noqa: E731
    objective.loss(networks(levels, student), batch(), nn.ModuleDict()).backward()
    assert shift.grad is not None
    assert abs(shift.grad.item()) < 1e-3


def test_angles_stay_on_the_schedule():
    levels = levels_of("v")
    assert last_angle(levels) == pytest.approx(1.5025, abs=1e-3)
    assert float(ContinuousConsistency(mean=3.0).angles(batch(500), levels).max()) <= last_angle(levels)


def test_the_adversarial_loss_has_a_critic_that_learns():
    levels = levels_of("flow")
    objective = ContinuousConsistency((1.0, 1.0), adversarial=0.5)
    one = batch(16, shape=(4, 8, 8))
    one.clean = one.clean.float()
    nets = networks(levels, consistency(levels))
    helpers = objective.helpers(nets, one)
    before = objective.helper_loss(nets, one, helpers)
    assert before is not None
    optimizer = torch.optim.Adam(helpers.parameters(), lr=1e-2)
    bad = networks(levels, lambda x, level, condition: torch.zeros_like(x))
    losses = []
    for _ in range(30):
        found = objective.helper_loss(bad, batch_like(one), helpers)
        assert found is not None
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.isfinite(objective.loss(nets, one, helpers))


def batch_like(one: Batch) -> Batch:
    return Batch(one.clean, one.condition, one.unconditional, one.generator, one.step)


@everywhere
def test_matched_distributions_give_no_gradient(kind: str):
    levels = levels_of(kind)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    student = lambda x, level, condition: consistency(levels)(x, level, condition) + shift  # noqa: E731
    objective = DistributionMatching(scale=1.0)

    def gradient(critic: Any) -> float:
        nets = networks(levels, student)
        nets.fresh = lambda: (nn.Linear(1, 1), critic)
        shift.grad = None
        objective.loss(nets, batch(), objective.helpers(nets, batch())).backward()
        assert shift.grad is not None
        return abs(shift.grad.item())

    assert gradient(gaussian(levels)) == 0
    # a critic that finds the student's samples too far up pushes the other way
    assert gradient(gaussian(levels, mean=MEAN + 0.5)) > 1e-3


def test_the_critic_learns_the_students_own_law():
    levels = levels_of("flow")
    nets = networks(levels, consistency(levels))
    objective = DistributionMatching(steps=(1000,), scale=1.0)

    def loss(critic: Any) -> float:
        nets.fresh = lambda: (nn.Linear(1, 1), critic)
        return float(objective.helper_loss(nets, batch(512), objective.helpers(nets, batch(2))))

    assert loss(gaussian(levels)) < loss(gaussian(levels, mean=0.0))
    assert loss(gaussian(levels)) < loss(gaussian(levels, deviation=1.2))


def test_mmd_of_known_points():
    a, b = torch.tensor([1.0, 0.0]).expand(5, -1), torch.tensor([0.0, 1.0]).expand(5, -1)
    assert unbiased_mmd2(a, b, 1).item() == pytest.approx(1.5 + 1.5 - 2 * 1.0)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4000, 2, generator=generator, dtype=torch.float64)
    shift = torch.tensor([0.7, -0.4], dtype=torch.float64)
    # the linear kernel sees means only: |difference|² / d
    assert unbiased_mmd2(x + shift, y, 1).item() == pytest.approx(float(shift @ shift) / 2, abs=0.05)


def test_moment_matching_moves_a_sampler_to_the_data():
    levels = levels_of("flow")
    shift = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    student = lambda x, level, condition: consistency(levels)(x, level, condition) + shift  # noqa: E731
    objective = MomentMatching(steps=(1000, 500))
    optimizer = torch.optim.Adam([shift], lr=0.1)
    first = last = 0.0
    for step in range(60):
        one = batch(64, shape=(2, 4, 4))
        one.generator.manual_seed(step)
        loss = objective.loss(networks(levels, student), one, nn.ModuleDict())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert abs(shift.item()) < 0.3
    assert last < 0.1 * first
    assert moments(torch.zeros(2, 3, 8, 8)).shape == (2, 2 * 3 * (1 + 4 + 16))


def test_training_without_a_teacher():
    objective = ConsistencyTraining(points=(10, 160), steps=1000)
    assert [objective.count(step) for step in (0, 199, 200, 500, 999, 5000)] == [10, 10, 20, 40, 160, 160]
    assert scale_of(2) == pytest.approx(math.exp(-0.72))
    assert cauchy(torch.zeros(3, 4), 0.1) == 0
    assert cauchy(torch.ones(2, 4), 1.0).item() == pytest.approx(math.log(1.5))
    levels = levels_of("flow")
    quiet = ConsistencyTraining(denoising=0.0, transport=False)
    best = quiet.loss(networks(levels, consistency(levels)), batch(512), nn.ModuleDict())
    worse = quiet.loss(networks(levels, gaussian(levels, mean=-1.0)), batch(512), nn.ModuleDict())
    assert best < worse


def test_pairing_is_the_cheapest_order():
    pytest.importorskip("scipy", reason="scipy solves the assignment")
    clean, eps = torch.randn(2, 6, 4, dtype=torch.float64).unbind()
    order = pairing(clean, eps)
    assert sorted(order.tolist()) == list(range(6))
    cost = (clean - eps[order]).square().sum()
    assert all(cost <= (clean - eps[torch.randperm(6)]).square().sum() + 1e-12 for _ in range(50))
    assert torch.equal(eps[order][pairing(clean, eps[order])], eps[order])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ContinuousConsistency(deviation=0),
        lambda: DistributionMatching(steps=()),
        lambda: DistributionMatching(share=(0.5, 0.2)),
        lambda: MomentMatching(steps=(1, 5)),
        lambda: MomentMatching(power=0),
        lambda: ConsistencyTraining(points=(9, 3)),
        lambda: ConsistencyTraining(steps=0),
    ],
)
def test_settings_are_checked(make: Any):
    with pytest.raises(ValueError, match="must"):
        make()

"""Forecasts against what can be worked out by hand, in float64."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastdiff
from fastdiff.acceleration import NotEngaged
from fastdiff.caching.forecast import QUANTITIES, Forecast, combination
from fastdiff.caching.history import History, newton_weights
from fastdiff.caching.levels import run_of
from fastdiff.plan import Plan, PlanError

STEPS = 12
DIRECTION = torch.linspace(-1, 1, 32, dtype=torch.float64).view(2, 4, 4)


def curved(x: torch.Tensor, level: Any) -> torch.Tensor:
    """A velocity field without any structure that a forecast could use."""
    return torch.sin(3 * x) + level * x.flip(-1)


def run(pipe: Any, one: Any, x: torch.Tensor, steps: int = STEPS) -> tuple[torch.Tensor, list[int]]:
    """The result and the rows of every call that reached the denoiser."""
    pipe.denoiser.calls.clear()
    with fastdiff.accelerate(pipe, one) as handle:
        result = pipe(x, steps)
        assert not handle.report().misses or one.interval == 1 or one.schedule == "adaptive"
    return result, list(pipe.denoiser.calls)


@given(
    points=st.lists(st.floats(-3, 3), min_size=1, max_size=3, unique_by=lambda value: round(value, 1)),
    at=st.floats(-3, 3),
    coefficients=st.tuples(*[st.floats(-2, 2)] * 3),
)
def test_newton_weights_continue_polynomials_exactly(points: list[float], at: float, coefficients: tuple):
    def polynomial(x: float) -> float:
        return sum(c * x**k for k, c in enumerate(coefficients[: len(points)]))

    weights = newton_weights(points, at)
    found = sum(weight * polynomial(point) for weight, point in zip(weights, points, strict=True))
    assert found == pytest.approx(polynomial(at), abs=1e-6 * (1 + sum(map(abs, weights))))
    assert sum(weights) == pytest.approx(1, abs=1e-9 * (1 + sum(map(abs, weights))))


def test_damping_and_points_that_coincide():
    assert newton_weights([1.0, 2.0, 4.0], 0.5, damping=0.0) == [1.0, 0.0, 0.0]
    assert newton_weights([1.0, 1.0, 3.0], 0.0) == [1.5, 0.0, -0.5]
    half, full = newton_weights([1.0, 2.0], 0.0, 0.5), newton_weights([1.0, 2.0], 0.0)
    assert half == [1 + (full[0] - 1) / 2, full[1] / 2]


def test_quadratic_beats_the_factors_of_taylorseer_where_those_are_off_by_k_n():
    times, interval, ahead = [10.0, 5.0, 0.0], 5.0, 3.0
    values = [time**2 for time in times]
    first, before = (values[0] - values[1]) / interval, (values[1] - values[2]) / interval
    taylor = values[0] + first * ahead + (first - before) / interval * ahead**2 / 2
    weights = newton_weights(times, times[0] + ahead)
    newton = sum(weight * value for weight, value in zip(weights, values, strict=True))
    assert newton == pytest.approx(13**2)
    assert taylor - 13**2 == pytest.approx(-ahead * interval)


@pytest.mark.parametrize("settings", [{"interval": 1}, {"schedule": "adaptive", "threshold": 0.0}])
def test_computing_everything_is_bit_exact(loop, noise, settings):
    pipe = loop(curved)
    plain = pipe(noise, STEPS)
    result, calls = run(pipe, Forecast(**settings), noise)
    assert torch.equal(result, plain)
    assert calls == [3] * STEPS


def test_repeated_velocity_is_euler_on_fewer_steps(loop, noise):
    pipe = loop(curved)
    result, calls = run(pipe, Forecast(quantity="output", order=0, interval=3, warm_up=1, tail=0), noise)
    levels = [*run_of(pipe.scheduler).levels, 0.0]
    x = noise
    for start in range(0, STEPS, 3):
        x = x + (levels[start + 3] - levels[start]) * curved(x, pipe.scheduler.timesteps[start] / 1000)
    assert len(calls) == STEPS // 3
    torch.testing.assert_close(result, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("form", ["tuple", "tensor", "list"])
def test_a_polynomial_of_the_level_is_continued_exactly(loop, noise, order, form):
    def field(x: torch.Tensor, level: Any) -> torch.Tensor:
        level = torch.as_tensor(level, dtype=torch.float64)
        return sum(DIRECTION**k * level**k for k in range(order + 1)) + torch.zeros_like(x)

    pipe = loop(field, form)
    plain = pipe(noise, STEPS)
    settings = Forecast(quantity="output", order=order, interval=4, warm_up=order + 1)
    result, calls = run(pipe, settings, noise)
    assert len(calls) < STEPS
    # the scheduler's timesteps are float32
    torch.testing.assert_close(result, plain, rtol=0, atol=1e-5)
    if order:
        off, _ = run(pipe, replace(settings, order=order - 1), noise)
        assert (off - plain).abs().max() > 1e-3


@pytest.mark.parametrize("flow", [True, False])
def test_a_fixed_clean_latent_or_noise_is_continued_exactly_in_its_own_quantity(loop, noise, flow):
    from fastdiff.caching.levels import level_at, signal_and_noise

    target = noise.flip(0)

    def field(x: torch.Tensor, time: Any) -> torch.Tensor:
        scheduler = pipe.scheduler
        signal, level = signal_and_noise(scheduler, level_at(scheduler, float(time)))
        return (x - target) / level if flow else (signal * x - target) / level

    pipe = loop(field, flow=flow)
    pipe(noise, STEPS)
    plain = torch.stack(pipe.taken)
    for quantity, exact in (("clean", True), ("noise", True), ("output", flow)):
        run(pipe, Forecast(quantity=quantity, interval=3, warm_up=1), noise)
        # with one target the path is straight in flow matching, and its velocity constant as well
        assert ((torch.stack(pipe.taken) - plain).abs().max() < 1e-4) == exact


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction", "sample"])
def test_quantities_are_what_they_say(prediction):
    clean, eps, signal, noise = 1.7, -0.3, 0.6, (0.4 if prediction == "flow_prediction" else 0.8)
    x = signal * clean + noise * eps
    output = {
        "epsilon": eps,
        "sample": clean,
        "v_prediction": signal * eps - noise * clean,
        "flow_prediction": eps - clean,
    }[prediction]
    for quantity, expected in zip(QUANTITIES, (output, output - x, clean, eps), strict=True):
        a, b = combination(quantity, prediction, signal, noise)
        assert a * x + b * output == pytest.approx(expected)


@pytest.mark.parametrize(("run_length", "computed"), [(0, 3 + 1), (2, 3 + 2 + 1)])
def test_without_a_bound_only_warm_up_runs_and_tail_are_computed(loop, noise, run_length, computed):
    pipe = loop(curved)
    settings = Forecast("adaptive", threshold=1e9, warm_up=3, tail=1, max_run=run_length)
    _, calls = run(pipe, settings, noise)
    # 12 steps: 3, then 8 of which every third after two left out, then 1
    assert len(calls) == computed


def test_the_indicator_is_exact_for_a_linear_denoiser(loop, noise):
    pipe = loop(lambda x, level: -2.0 * x)
    seen: list[tuple[float, float]] = []

    import fastdiff.caching.forecast as module

    estimate = module._change

    def watch(call: Any, history: Any) -> list[float]:
        found = estimate(call, history)
        assert history.output is not None
        true = (-2 * call.sample - history.output).abs().flatten(1).mean(1)
        for row, value in enumerate(found):
            if not math.isnan(value):
                seen.append((value, float(true[row] / history.output[row].abs().mean())))
        return found

    module._change = watch
    try:
        run(pipe, Forecast("adaptive", threshold=0.2, warm_up=2), noise)
    finally:
        module._change = estimate
    assert len(seen) > 5
    for estimated, true in seen:
        assert estimated == pytest.approx(true, rel=1e-5)


def test_a_guard_computes_what_a_schedule_would_leave_out(loop, noise):
    pipe = loop(curved)
    loose, calls = run(pipe, Forecast(interval=6, warm_up=2), noise)
    guarded, more = run(pipe, Forecast(interval=6, warm_up=2, guard=0.5), noise)
    plain = pipe(noise, STEPS)
    assert len(more) > len(calls)
    assert (guarded - plain).norm() < (loose - plain).norm()


def test_rows_decide_by_themselves_and_only_theirs_are_computed(loop, noise):
    def field(x: torch.Tensor, level: Any) -> torch.Tensor:
        return torch.where(x[:, :1, :1, :1] > 5, torch.sin(7 * x), 0.01 * x)

    pipe = loop(field)
    noise[1] += 50
    settings = Forecast("adaptive", threshold=0.05, warm_up=2, max_run=4)
    together, calls = run(pipe, settings, noise)
    alone = torch.cat([run(pipe, settings, noise[row : row + 1])[0] for row in range(3)])
    assert 1 in calls
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_planned_levels_are_met_and_mapped_to_other_steps(loop, noise):
    pipe = loop(curved)
    pipe(noise, 28)
    chosen = (0, 1, 2, 5, 9, 14, 20, 27)
    levels = tuple(run_of(pipe.scheduler).levels[step] for step in chosen)
    settings = Forecast("levels", levels=levels, warm_up=1)

    def computed(steps: int) -> list[int]:
        reached.clear()
        run(pipe, settings, noise, steps)
        times = pipe.scheduler.timesteps.tolist()
        return [min(range(steps), key=lambda step: abs(times[step] - time)) for time in reached]

    reached: list[float] = []
    pipe.denoiser.formula = lambda x, level: (reached.append(float(level) * 1000), curved(x, level))[1]
    assert computed(28) == list(chosen)
    assert len(computed(20)) in (7, 8)
    assert computed(20)[0] == 0


def test_fitted_weights_rule_where_they_were_fitted_and_say_so_elsewhere(loop, noise):
    pipe = loop(lambda x, level: 0.5 * x)
    pipe(noise, STEPS)
    levels = run_of(pipe.scheduler).levels
    fits = tuple((level, 0.5, 0.0) for step, level in enumerate(levels) if step % 3)
    settings = Forecast("levels", levels=levels[::3], fits=fits, warm_up=1, tail=0)
    plain = pipe(noise, STEPS)
    result, calls = run(pipe, settings, noise)
    assert len(calls) == 4
    torch.testing.assert_close(result, plain, rtol=0, atol=1e-12)
    with fastdiff.accelerate(pipe, settings) as handle:
        pipe(noise, STEPS - 3)
        assert "a run of 9 steps is not the one the plan was fitted on" in str(handle.report())


def test_memory_is_bounded_counted_and_let_go(loop, noise):
    pipe = loop(curved)
    latent = noise.nbytes
    for settings, most in (
        (Forecast(order=0), 1),
        (Forecast(order=2), 3),
        (Forecast(order=1, guard=0.5), 4),
        (Forecast("adaptive", threshold=0.5, order=1), 4),
    ):
        with fastdiff.accelerate(pipe, settings) as handle:
            held = []
            pipe.denoiser.formula = lambda x, level, held=held, handle=handle: (
                held.append(handle._requests.bytes_held),
                curved(x, level),
            )[1]
            pipe(noise, STEPS)
            # the estimate's rates are one number a row
            assert latent * (most - 1) < max(held) <= latent * most + 64
            assert handle._requests.bytes_held == 0


def test_rows_at_different_levels_are_computed_and_reported(loop, noise):
    pipe = loop(curved)
    times = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).view(3, 1, 1, 1)
    with fastdiff.accelerate(pipe, Forecast(warm_up=1)) as handle:
        with handle.request():
            for _ in range(4):
                output = pipe.denoiser(noise, times)
                assert torch.equal(output[0], curved(noise, times))
        assert pipe.denoiser.calls[-4:] == [3] * 4
    handle = fastdiff.accelerate(pipe, Forecast(warm_up=1), strict=True)
    request = handle.request()
    request.__enter__()
    for _ in range(4):
        pipe.denoiser(noise, times)
    with handle, pytest.raises(NotEngaged, match="Forecast accelerated none of 4 calls"):
        request.close()


def test_another_shape_or_dtype_starts_anew():
    history = History()
    assert not history.fits((3,))
    history.push(torch.ones(2, 3), 0.5, keep=2)
    assert history.fits((3,))
    assert not history.fits((4,))
    assert not history.values


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"order": 3}, "order=3 is not known"),
        ({"quantity": "x"}, "quantity='x'"),
        ({"schedule": "levels"}, "levels belong to schedule='levels'"),
        ({"levels": (0.5,)}, "levels belong to"),
        ({"schedule": "levels", "levels": (float("nan"),)}, "must be a number"),
        ({"schedule": "levels", "levels": (1.5,)}, "from 0 to 1"),
        ({"schedule": "levels", "levels": (0.5,), "fits": ((0.5, 1.0),)}, "a fit is"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"warm_up": 0}, "warm_up=0"),
        ({"damping": 1.5}, "damping=1.5"),
    ],
)
def test_wrong_settings_say_what_would_be_right(wrong, says):
    with pytest.raises(ValueError, match=says):
        Forecast(**wrong)


def test_a_plan_file_keeps_levels_and_fits():
    one = Forecast("levels", levels=(1.0, 0.5), fits=((0.7, 0.1, 0.9), (0.6, 0.2, 0.5, 0.3)))
    text = Plan((one,)).to_json()
    assert Plan.from_json(text) == Plan((one,))
    broken = json.loads(text)
    broken["accelerations"][0]["levels"] = [2.0]
    with pytest.raises(PlanError, match="from 0 to 1"):
        Plan.from_json(json.dumps(broken))
    with pytest.raises(PlanError, match="cannot work together"):
        Plan((Forecast(), fastdiff.plan.member("DiffusersCache")()))  # type: ignore[attr-defined]


def test_a_stream_of_single_steps_is_never_continued_from_another_frame(loop, noise):
    """Outside a pipeline's call, a call that is no less noisy than the last belongs to something new."""
    pipe = loop(curved)
    times = [torch.tensor(time, dtype=torch.float64) for time in (0.9, 0.6, 0.3)]
    with fastdiff.accelerate(pipe, Forecast(warm_up=1, interval=9)) as handle:
        with handle.request(keep=True) as request:
            for frame in range(4):
                assert torch.equal(pipe.denoiser(noise + frame, times[0])[0], curved(noise + frame, times[0]))
            pipe.denoiser.calls.clear()
            for _ in range(3):
                for time in times:
                    pipe.denoiser(noise, time)
        request.close()
    # of each descent the first call is computed and the others are continued
    assert len(pipe.denoiser.calls) == 3

"""Warm starts: the step follows from the change, and a start that changes nothing is the cold one."""

import math

import pytest
import torch

from fastdiff.sampling import rows
from fastdiff.sampling.algebra import clean_weights, noise_weights
from fastdiff.sampling.warm_start import WarmStart, begin, changed

VP = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIGNAL, NOISE = (0.1, 0.5, 0.8, 0.95), (0.99, 0.87, 0.6, 0.31)


def test_no_change_is_one_step_and_any_change_at_no_tolerance_is_a_cold_start():
    assert WarmStart(tolerance=0.5).step(SIGNAL, NOISE, 0.0) == 3
    assert WarmStart(tolerance=0.0).step(SIGNAL, NOISE, 0.0) == 3
    assert WarmStart(tolerance=0.0).step(SIGNAL, NOISE, 1e-6) == 0
    assert WarmStart(tolerance=0.5).step(SIGNAL, NOISE, 100.0) == 0
    assert WarmStart().strength(SIGNAL, NOISE, 0.0) == 0.25
    assert WarmStart().strength(SIGNAL, NOISE, 100.0) == 1.0


@pytest.mark.parametrize("tolerance", [0.1, 0.5, 2.0])
def test_the_step_is_the_last_whose_noise_hides_the_change(tolerance: float):
    settings = WarmStart(tolerance)
    steps = [settings.step(SIGNAL, NOISE, change) for change in torch.linspace(0, 30, 400).tolist()]
    assert steps == sorted(steps, reverse=True)
    for step in (1, 2, 3):
        edge = tolerance * NOISE[step] / SIGNAL[step]
        assert settings.step(SIGNAL, NOISE, edge * 0.999) == step
        assert settings.step(SIGNAL, NOISE, edge * 1.001) == step - 1


def test_change_is_that_of_the_worst_block():
    before = torch.zeros(1, 4, 16, 16)
    now = before.clone()
    now[0, 0, 5, 5] = 2.0
    # one cell of 16 and one channel of 4 in its block
    assert changed(before, now) == pytest.approx(math.sqrt(4 / 64))
    assert changed(before, before + 0.3) == pytest.approx(0.3)
    assert changed(now, now) == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_with_a_perfect_network_any_start_ends_at_the_solution(prediction: str):
    """A network that knows the answer takes every start to it; so does the multistep sampler with the moved history."""
    truth = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = rows.dpm({**VP, "prediction_type": prediction}, 6)
    for start in range(6):
        x, past = begin(table, start, truth - 0.5, noise, torch.zeros_like(truth), torch.full_like(truth, 0.5))
        torch.testing.assert_close(past, truth, rtol=0, atol=1e-12)
        for index in range(start, 6):
            signal, level = table.signal[index], table.noise[index]
            eps = (x - signal * truth) / level
            of_x, of_output = noise_weights(table.prediction, signal, level)
            output = (eps - of_x * x) / of_output
            assert torch.isfinite(torch.stack(clean_weights(table.prediction, signal, level))).all()
            x, past = rows.step(table, x, output, torch.tensor([index]), past=past)
        torch.testing.assert_close(x, truth, rtol=0, atol=1e-6)


def test_the_state_is_the_solution_at_the_level_of_the_step():
    table = rows.lcm(VP, 4)
    solution, noise = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), -1.0)
    x, clean = begin(table, 2, solution, noise)
    torch.testing.assert_close(x, (table.signal[2] * 2 - table.noise[2]).expand(1, 1, 2, 2), check_dtype=False)
    assert torch.equal(clean, solution)


@pytest.mark.parametrize("wrong", [{"tolerance": -1}, {"refresh": -1}, {"refresh": 1.5}, {"tolerance": float("nan")}])
def test_impossible_settings_are_refused(wrong: dict):
    with pytest.raises(ValueError, match="WarmStart"):
        WarmStart(**wrong)

"""The budget holds, spends on what is cheap, and becomes a plan that runs."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.attention.budget import EXACT, Sample, calibrate, choose, sensitivities
from fastdiff.attention.sparse import SparseAttention
from fastdiff.miniature.families import family

SETTINGS = SparseAttention(query_block=4, key_block=4, minimum_tokens=48, warm_up=1, refresh=0)
HALF, QUARTER = (0.5, "exact", "tracked"), (0.25, "exact", "none")


def generator(pipe: Any) -> Tensor:
    return pipe(
        "a red circle",
        num_inference_steps=4,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def test_a_calibration_becomes_a_plan_within_its_budget():
    pipe = family("sd")
    pipe.set_progress_bar_config(disable=True)
    exact = generator(pipe)
    found: list[Tensor] = []
    samples = calibrate(pipe, lambda: found.append(generator(pipe)), [HALF, QUARTER], SETTINGS, bins=2)
    torch.testing.assert_close(found[0], exact, rtol=0, atol=1e-5)
    assert {sample.candidate for sample in samples} == {EXACT, HALF, QUARTER}
    assert all(sample.error >= 0 and sample.ms > 0 for sample in samples)
    error = {
        candidate: sum(sample.error for sample in samples if sample.candidate == candidate)
        for candidate in (EXACT, HALF, QUARTER)
    }
    assert error[EXACT] == 0 < error[HALF] < error[QUARTER]
    weights = sensitivities(pipe, lambda: generator(pipe), minimum_tokens=48)
    assert set(weights) == {sample.layer for sample in samples}
    assert all(weight > 0 for weight in weights.values())
    rows = choose(
        [Sample(s.layer, s.low, s.high, s.candidate, s.error, float(s.candidate[0])) for s in samples], weights, 1e9
    )
    assert rows
    with fastdiff.accelerate(pipe, SparseAttention(**{**SETTINGS.settings(), "budget": rows})) as handle:
        changed = generator(pipe)
        assert handle.report().rows[0].accelerated > 0
    assert not torch.equal(changed, exact)
    assert torch.equal(generator(pipe), exact)


def test_the_least_time_within_the_budget_is_taken():
    samples = []
    for layer, error in (("calm", 0.01), ("touchy", 0.2)):
        samples += [Sample(layer, 0, 1, EXACT, 0.0, 10.0), Sample(layer, 0, 1, HALF, error, 5.0)]
        samples += [Sample(layer, 0, 1, QUARTER, 3 * error, 2.0)]
    weights = {"calm": 1.0, "touchy": 2.0}
    assert choose(samples, weights, 0.0) == ()
    assert choose(samples, weights, 0.03) == (("calm", 0, 1, *QUARTER),)
    assert choose(samples, weights, 0.45) == (("calm", 0, 1, *QUARTER), ("touchy", 0, 1, *HALF))
    assert choose(samples, weights, 10.0) == (("calm", 0, 1, *QUARTER), ("touchy", 0, 1, *QUARTER))


def test_nothing_measured_is_an_error():
    pipe = family("sd")
    with pytest.raises(ValueError, match="no attention call fits"):
        calibrate(pipe, lambda: None, [HALF], SETTINGS)

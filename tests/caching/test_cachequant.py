"""Schedules against every other one, corrections with known answers, and both on a pipeline with held-out prompts."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.caching.cachequant import (
    CacheQuant,
    Step,
    affine,
    fitted,
    least_squares,
    plan,
    record,
    segment_bounds,
    segment_costs,
    segments_of_least_cost,
)
from fastdiff.miniature.families import family
from fastdiff.quantization.stored import StoredWeights


def brute_force(costs: Tensor, segments: int, shortest: int, longest: int) -> float:
    steps = len(costs)
    best = math.inf
    for inner in itertools.combinations(range(1, steps), segments - 1):
        edges = (0, *inner, steps)
        lengths = [end - start for start, end in itertools.pairwise(edges)]
        if shortest <= min(lengths) and max(lengths) <= longest:
            best = min(best, sum(float(costs[a, b - 1]) for a, b in itertools.pairwise(edges)))
    return best


def total(costs: Tensor, starts: tuple[int, ...]) -> float:
    return sum(float(costs[a, b - 1]) for a, b in itertools.pairwise((*starts, len(costs))))


@pytest.mark.parametrize("steps", range(1, 13))
@pytest.mark.parametrize("interval", range(1, 9))
def test_the_schedule_is_the_best_of_all_also_for_few_steps(steps: int, interval: int):
    exact = torch.randn(steps, 2, 3).cumsum(0)
    costs = segment_costs(exact, exact + 0.3 * torch.randn(steps, 2, 3))
    bounds = segment_bounds(steps, interval)
    starts = segments_of_least_cost(costs, *bounds)
    assert starts[0] == 0
    assert len(starts) == bounds[0]
    assert total(costs, starts) == pytest.approx(brute_force(costs, *bounds))


def test_costs_are_what_reuse_would_miss():
    exact, quantised = torch.randn(4, 5), torch.randn(4, 5)
    costs = segment_costs(exact, quantised)
    for start, end in itertools.combinations_with_replacement(range(4), 2):
        expected = sum((exact[step] - quantised[start]).abs().mean() for step in range(start, end + 1))
        assert costs[start, end] == pytest.approx(float(expected), rel=1e-6)
    assert costs[2, 1] == math.inf
    assert torch.equal(segment_costs(exact).diagonal(), torch.zeros(4).double())


def test_a_step_that_quantises_badly_is_reused_for_less():
    exact = torch.linspace(0, 1, 8)[:, None]
    plain = segments_of_least_cost(segment_costs(exact), 2)
    noisy = exact.clone()
    noisy[plain[1]] += 5
    assert plain[1] not in segments_of_least_cost(segment_costs(exact, noisy), 2)


def test_more_segments_never_cost_more_and_all_cost_nothing():
    costs = segment_costs(torch.randn(9, 4).cumsum(0))
    spent = [total(costs, segments_of_least_cost(costs, count)) for count in range(1, 10)]
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] == 0
    with pytest.raises(ValueError, match="cannot cover 9"):
        segments_of_least_cost(costs, 2, 1, 4)
    with pytest.raises(ValueError, match="not numbers"):
        segments_of_least_cost(torch.full((3, 3), math.nan).double(), 2)


def test_an_affine_map_is_found_again_and_shrinks_to_nothing():
    found = torch.randn(6, 3, 4, 4)
    scale, shift = torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([1.0, 0.0, -1.0]).double()
    target = affine(found.double(), scale, shift)
    torch.testing.assert_close(least_squares(found, target), (scale, shift), rtol=1e-6, atol=1e-6)
    nothing = (torch.ones(3).double(), torch.zeros(3).double())
    torch.testing.assert_close(least_squares(found, target, math.inf), nothing)
    torch.testing.assert_close(least_squares(found, found), nothing)
    flat = least_squares(torch.ones(2, 3, 4), torch.full((2, 3, 4), 3.0))
    torch.testing.assert_close(affine(torch.ones(1, 3, 4).double(), *flat), torch.full((1, 3, 4), 3.0).double())


def test_least_squares_never_raise_the_error_they_were_fitted_to():
    found = torch.randn(5, 4, 8)
    target = 0.7 * found + torch.randn(5, 4, 8)
    for shrinkage in (0.0, 1.0, 10.0):
        missed = affine(found.double(), *least_squares(found, target, shrinkage)) - target
        assert missed.square().mean() <= (found - target).square().mean()


def test_only_what_helps_prompts_not_fitted_on_is_kept():
    generator = torch.Generator().manual_seed(0)
    found, held = torch.randn(2, 2, 6, generator=generator), torch.randn(64, 2, 6, generator=generator)

    def target(x: Tensor, noise: float) -> Tensor:
        wanted = x.clone()
        wanted[:, 0] = 1.5 * x[:, 0]  # a true rule in one channel, chance in the other
        wanted[:, 1] = x[:, 1] + noise * torch.randn(len(x), 6, generator=generator)
        return wanted

    scale, shift = fitted(found, target(found, 3.0), held, target(held, 0.0))
    assert scale[0] > 1.3
    assert (float(scale[1]), float(shift[1])) == (1.0, 0.0)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="levels"):
        CacheQuant((1.5,))
    with pytest.raises(ValueError, match="empty"):
        CacheQuant(())
    with pytest.raises(ValueError, match="as many"):
        CacheQuant((1.0,), ((1.0, (1.0,), ()),))
    with pytest.raises(ValueError, match="corrections"):
        CacheQuant((1.0,), ((1.0, (math.nan,), (0.0,)),))
    one = CacheQuant((1.0, 0.5), ((1.0, (1.0, 2.0), (0.0, 0.5)),))
    assert fastdiff.Plan.from_json(fastdiff.Plan((one,)).to_json()) == fastdiff.Plan((one,))


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = family("sd")
    made.set_progress_bar_config(disable=True)
    return made


PROMPTS = ["a red circle", "a blue square"]
OTHERS = ["a green triangle", "a large yellow circle", "a small red square"]


def latents(pipe: Any, prompts: list[str], seed: int) -> Tensor:
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    settings = {"height": 32, "width": 32, "num_inference_steps": 6, "output_type": "latent", "guidance_scale": 5.0}
    return pipe(prompts, generator=generators, **settings).images


def test_computing_every_level_changes_nothing(pipe: Any):
    plain = latents(pipe, PROMPTS, 0)
    steps = record(pipe, lambda: latents(pipe, PROMPTS, 0))
    assert len(steps) == 6
    one = plan(steps, steps, 1)
    assert all(set(scale) == {1.0} and set(shift) == {0.0} for _, scale, shift in one.corrections)
    with fastdiff.accelerate(pipe, one) as handle:
        torch.testing.assert_close(latents(pipe, PROMPTS, 0), plain, rtol=0, atol=1e-6)
        assert handle.report().rows[0].accelerated == 0


def repeated(steps: list[Step], one: CacheQuant) -> float:
    """Squared error of computed, repeated and corrected outputs against the exact ones of the same inputs."""
    rows = {level: (torch.tensor(scale), torch.tensor(shift)) for level, scale, shift in one.corrections}
    nothing = torch.ones(1), torch.zeros(1)
    missed, kept = 0.0, torch.empty(0)
    for step in steps:
        computed = step.level in one.levels
        value = affine(step.quantised if computed else kept, *rows.get(step.level, nothing))
        kept = value if computed else kept
        missed += float((value - step.exact).square().mean())
    return missed


def test_corrections_bring_outputs_nearer_on_new_prompts(pipe: Any):
    quantised = StoredWeights("int3", minimum_features=8)
    calibration = record(pipe, lambda: latents(pipe, PROMPTS, 0), [quantised])
    held = record(pipe, lambda: latents(pipe, OTHERS[:2], 50), [quantised])
    new = record(pipe, lambda: latents(pipe, OTHERS, 100), [quantised])
    corrected, plain = (plan(calibration, held, 2, wanted) for wanted in (True, False))
    assert corrected.levels == plain.levels
    assert len(plain.levels) == 3
    assert repeated(new, corrected) < repeated(new, plain)
    with fastdiff.accelerate(pipe, [quantised, corrected]) as handle:
        assert latents(pipe, OTHERS, 100).isfinite().all()
        rows = {row.name: row for row in handle.report().rows}
    assert (rows["CacheQuant"].seen, rows["CacheQuant"].accelerated) == (6, 3)


def test_a_correction_of_another_model_is_refused(pipe: Any):
    level = record(pipe, lambda: latents(pipe, PROMPTS, 0))[0].level
    one = CacheQuant((level,), ((level, (1.0,) * 3, (0.0,) * 3),))
    with fastdiff.accelerate(pipe, one), pytest.raises(fastdiff.Unsupported, match="3 channels"):
        latents(pipe, PROMPTS, 0)

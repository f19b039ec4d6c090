"""Step budgets: errors of long steps as the solver itself makes them, the best of all paths, and only if it holds."""

import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.miniature.families import family
from fastdiff.quality import Interval
from fastdiff.sampling import rows
from fastdiff.sampling.steps import (
    StepBudget,
    Trajectory,
    Trial,
    best_path,
    choose,
    fit,
    solver_order,
    step_errors,
    trajectory,
    unshifted,
)

CALL: dict[str, Any] = dict(height=32, width=32, guidance_scale=3.0)


@pytest.fixture(scope="module")
def pipe() -> Any:
    made: Any = family("sd")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def seen(pipe: Any) -> Trajectory:
    return trajectory(pipe, ["a red circle", "a blue square"], 10, **CALL)


def test_the_errors_of_the_steps_that_were_taken_are_zero(seen: Trajectory):
    errors = step_errors(seen, 2)
    assert errors[0, 0, 1] < 1e-6
    for i in range(1, 9):
        assert errors[i - 1, i, i + 1] < 1e-5
    assert errors[8, 9, 10] < 1e-5  # the last step, of first order
    assert errors[0, 0, 5] > 1e-2
    assert np.isinf(errors[0, 3, 2])
    assert np.isinf(errors[4, 3, 5])


@pytest.mark.parametrize("order", [1, 2])
def test_an_error_is_that_of_the_solvers_own_step(seen: Trajectory, order: int):
    h, i, j = (2, 2, 5) if order == 1 else (1, 3, 6)
    table = rows.multistep(
        "sample",
        torch.tensor([seen.timesteps[k] for k in (h, i)][-2 if order == 2 else -1 :], dtype=torch.float64),
        torch.tensor(seen.signal[[h, i, j] if order == 2 else [i, j]]),
        torch.tensor(seen.noise[[h, i, j] if order == 2 else [i, j]]),
        first_order_end=False,
    )
    x, clean = torch.tensor(seen.states[i])[None], torch.tensor(seen.clean[i])[None]
    past = torch.tensor(seen.clean[h])[None]
    made, _ = rows.step(table, x, clean, torch.tensor([len(table) - 1]), past=past)
    expected = float((made - torch.tensor(seen.states[j])).square().mean().sqrt())
    assert step_errors(seen, order)[h, i, j] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_no_path_is_better_than_the_best(steps: int):
    errors = np.random.default_rng(steps).random((7, 7, 8))
    for h, i, j in itertools.product(range(7), range(7), range(8)):
        if not h <= i < j:
            errors[h, i, j] = np.inf

    def cost(path: tuple[int, ...]) -> float:
        whole = [path[0], *path, 7]
        return sum(errors[whole[k - 1], whole[k], whole[k + 1]] for k in range(1, len(whole) - 1))

    paths = [(0, *rest) for rest in itertools.combinations(range(1, 7), steps - 1)]
    found = best_path(errors, steps)
    assert cost(tuple(found)) == pytest.approx(min(map(cost, paths)), abs=1e-12)
    with pytest.raises(ValueError, match="does not fit"):
        best_path(errors, 8)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_a_budget_is_kept_and_smaller_calls_are_left_alone(kind: str):
    pipe: Any = family(kind)
    pipe.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {"max_sequence_length": 24} if kind != "sd" else {}

    def run(**settings: Any) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1)
        made = pipe("a ring", height=32, width=32, generator=draw, output_type="latent", **more, **settings)
        return made.images.clone()

    three, two = run(num_inference_steps=3), run(num_inference_steps=2)
    with fastdiff.accelerate(pipe, StepBudget(3)) as handle:
        assert torch.equal(run(), three)
        assert torch.equal(run(num_inference_steps=9), three)
        row = handle.report().rows[0]
        assert row.seen == row.accelerated > 0
        assert torch.equal(run(num_inference_steps=2), two)
        assert handle.report().rows[0].accelerated == row.accelerated


def test_given_timesteps_are_the_ones_visited():
    sd: Any = family("sd")
    sd.set_progress_bar_config(disable=True)
    with fastdiff.accelerate(sd, StepBudget(3, (999, 400, 100))):
        sd("a ring", num_inference_steps=25, **CALL)
        assert sd.scheduler.timesteps.tolist() == [999, 400, 100]
        sd("a ring", timesteps=[900, 300], **CALL)
        assert sd.scheduler.timesteps.tolist() == [900, 300]
    flow: Any = family("sd3")
    flow.set_progress_bar_config(disable=True)
    with fastdiff.accelerate(flow, StepBudget(3, (1000, 700, 200))):
        flow("a ring", num_inference_steps=25, max_sequence_length=24, **CALL)
        assert flow.scheduler.timesteps.tolist() == pytest.approx([1000, 700, 200], abs=1e-3)
    assert unshifted(diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0), [250]) == [0.25]


def test_image_to_image_runs_the_budget_of_steps():
    parts = family("sd").components
    kind: Any = diffusers.StableDiffusionImg2ImgPipeline
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with fastdiff.accelerate(pipe, StepBudget(2)) as handle:
        pipe("a ring", image=torch.zeros(1, 3, 32, 32), strength=0.4, num_inference_steps=30, guidance_scale=1.0)
        assert handle.report().rows[0].seen == 2
    assert "part-way" in StepBudget(2, (900, 100)).supports(pipe).reason


def test_it_says_where_it_cannot_act():
    pipe: Any = family("sd")
    pipe.scheduler = diffusers.DDIMScheduler()
    assert "chooses its own" in StepBudget(2, (900, 100)).supports(pipe).reason
    with pytest.raises(fastdiff.Unsupported, match="LCMScheduler"):
        solver_order(diffusers.LCMScheduler())
    impossible: tuple[dict[str, Any], ...] = (
        {"steps": 0},
        {"steps": 3, "timesteps": (900, 100)},
        {"steps": 2, "timesteps": (100, 900)},
    )
    for wrong in impossible:
        with pytest.raises(ValueError, match=r"StepBudget|fall strictly"):
            StepBudget(**wrong)


def test_fit_measures_on_other_prompts_and_keeps_only_what_is_better(pipe: Any):
    trials = fit(pipe, ["a red circle", "a ring", "a blue square", "a cross"], (2, 10), reference=10, batch=2, **CALL)
    assert [trial.member.steps for trial in trials] == [2, 10]
    assert trials[0].gain.n == 2
    # the path of all timesteps is the scheduler's own: nothing gained, so nothing replaced
    assert trials[1].member.timesteps == ()
    assert trials[1].psnr.value == 100
    assert bool(trials[0].member.timesteps) == (trials[0].gain.low > 0)
    assert "step" not in vars(pipe.scheduler)


def test_the_choice_is_the_fewest_that_keep_the_limit():
    trials = [
        Trial(StepBudget(n), Interval(db, db - 1, db + 1, 9), Interval(0, 0, 0, 9), 10.0 * n)
        for n, db in ((8, 31.0), (4, 22.0), (12, 40.0))
    ]
    assert choose(trials, psnr_db=30).member.steps == 8
    assert choose(trials, milliseconds=85).member.steps == 8
    assert choose(trials, milliseconds=400).member.steps == 12
    with pytest.raises(ValueError, match=r"12 steps keep 39\.0 dB"):
        choose(trials, psnr_db=50)
    with pytest.raises(ValueError, match="takes 40 ms"):
        choose(trials, milliseconds=1)
    with pytest.raises(ValueError, match="one limit"):
        choose(trials)

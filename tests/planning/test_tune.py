"""The planner end to end on a tiny model: its accounts, its proof, its file, its pictures."""

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import fastdiff
from fastdiff.acceleration import Unsupported
from fastdiff.caching.forecast import Forecast
from fastdiff.caching.units import UnitMask
from fastdiff.miniature.families import family
from fastdiff.plan import Plan
from fastdiff.planning import measure, report
from fastdiff.planning.budget import Budget
from fastdiff.planning.candidates import Candidate
from fastdiff.planning.cheaper import cheaper
from fastdiff.planning.measure import Recorder, Tape, Workload, line, outcome_weights, study
from fastdiff.planning.search import uniform
from fastdiff.planning.tune import PACE_STEPS, Planner, tune

STEPS = 10
CALIBRATION = Workload(("a red circle", "a blue square", "a green ring"), 3, STEPS, 3.0, 32, 32, batch=3)
HELDOUT = Workload(("a white cross", "a black diamond", "a big triangle"), 9, STEPS, 3.0, 32, 32, batch=2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The embedded architecture, untrained, with DDIM."""
    made = family("sd")
    made.set_progress_bar_config(disable=True)
    kind: Any = DDIMScheduler
    made.scheduler = kind.from_config(made.scheduler.config, clip_sample=False)
    return made


@pytest.fixture(scope="module")
def planner(pipe: Any) -> Planner:
    """Measured once."""
    return Planner(pipe, CALIBRATION, HELDOUT, score=lambda pictures: (pictures.mean((2, 3)) > 0.5).double())


def test_a_tape_holds_what_the_denoiser_was_given_and_said(pipe: Any):
    seen = []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: seen.append((args[0].clone(), output[0])))
    found = study(pipe, CALIBRATION)
    handle.remove()
    plain, _ = CALIBRATION.run(pipe)
    assert torch.equal(found.reference, plain)
    trajectories = found.trajectories
    assert trajectories.steps == STEPS
    assert all(before > after for before, after in zip(trajectories.levels, trajectories.levels[1:], strict=False))
    for step, (sample, output) in enumerate(seen[-STEPS:]):
        negative, positive = output.chunk(2)
        torch.testing.assert_close(trajectories.inputs[step], sample.chunk(2)[0])
        torch.testing.assert_close(trajectories.outputs[step], negative + 3 * (positive - negative))


def test_a_run_answered_from_a_tape_ends_in_the_same_picture_and_costs_the_rest(pipe: Any):
    found = study(pipe, CALIBRATION)
    tape = Tape(found.tape.calls, found.tape.levels)
    with fastdiff.accelerate(pipe, Recorder(tape, before=7)):
        pictures, _ = CALIBRATION.run(pipe)
    torch.testing.assert_close(pictures, found.reference, rtol=0, atol=1e-6)
    assert tape.rows == (STEPS - 7) * 6
    weights = outcome_weights(pipe, found, shares=(0.2, 0.8))
    assert len(weights) == STEPS
    assert min(weights) > 0
    # steps 2 and 8 were repeated: 7 and 1 of 10 steps ran after them
    assert found.spent == pytest.approx(1 + 0.7 + 0.1)


def test_a_member_that_has_nothing_to_do_is_kept_out_of_the_race(planner: Planner):
    masked = UnitMask((("self-attention", "*", 0.0, 1.0),), warm_up=STEPS)
    said: list[str] = []
    tried: list[tuple[str, int, float]] = []
    planner.say = said.append
    found, _ = planner._calibrated(Candidate("masked", (masked,), STEPS, plain=False), tried)
    planner.say = lambda text: None
    assert found == -math.inf
    assert tried == []
    assert said == [f"masked: left out, UnitMask has nothing to do in {STEPS} steps"]


def test_the_winner_beats_its_controls_within_the_calls_allowed(planner: Planner, tmp_path):
    assert planner.expected(STEPS) > 100
    tuned = planner.tune(latency=-1.6)
    names = [result.name for result in tuned.results]
    assert {"uniform", "fewer-steps"} <= set(names)
    assert tuned.spent <= planner.most
    values = [result.quality["psnr"].value for result in tuned.results]
    assert values[0] == max(values)
    assert {"psnr", "ssim", "attribute_drop"} <= set(tuned.best.quality)
    assert tuned.plan.tuned.steps == STEPS
    tuned.plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == tuned.plan
    with fastdiff.accelerate(planner.pipe, loaded, strict=True) as handle:
        again, _ = HELDOUT.run(planner.pipe)
    rows = {row.name: row for row in handle.report().rows}
    if "Forecast" in rows:
        # two calls of the pipeline
        assert rows["Forecast"].seen - rows["Forecast"].accelerated == 2 * tuned.best.computed
    from fastdiff.quality import psnr

    torch.testing.assert_close(psnr(again, HELDOUT.run(planner.pipe)[0]).clamp(max=100), tuned.best.psnr)


def test_a_cheaper_call_buys_computed_steps(planner: Planner, monkeypatch: pytest.MonkeyPatch):
    kinds = cheaper(planner.pipe)
    assert {"16-bit", "units", "deep", "guidance"} <= set(kinds)
    assert "8-bit" not in kinds  # its layers are too small for it
    paces = {"guidance": (kinds["guidance"], 0.49), "deep": (kinds["deep"], 0.99), "16-bit": (kinds["16-bit"], 0.75)}
    monkeypatch.setattr(planner, "_paces", paces)
    monkeypatch.setattr(planner.study, "seconds", {STEPS: [1.0], STEPS // 2: [0.5]})
    found = {one.name: one for one in planner._cheaper(4)}
    assert list(found) == ["guidance fit-2", "16-bit fit-2"]
    assert [one.computed for one in found.values()] == [8, 5]
    assert [type(one).__name__ for one in found["16-bit fit-2"].members] == ["Precision", "Forecast"]
    assert not found["16-bit fit-2"].plain
    bought = found["16-bit fit-2"]
    assert planner._resized(bought, 0.41, 4) is None, "near enough"
    assert planner._resized(bought, 0.60, 4) is None, "not cheaper at all"
    more = planner._resized(bought, 0.25, 4)
    assert more is not None
    assert (more.name, more.computed, more.plain) == (bought.name, 8, False)
    assert [type(one).__name__ for one in more.members] == ["Precision", "Forecast"]
    loaded = Plan.from_json(Plan(found["16-bit fit-2"].members).to_json())
    pictures, _, idle = planner._run(found["16-bit fit-2"], HELDOUT)
    assert idle == ""
    with fastdiff.accelerate(planner.pipe, loaded):
        assert torch.equal(HELDOUT.run(planner.pipe)[0], pictures)


def test_what_makes_calls_cheaper_is_measured_once_and_counted(planner: Planner, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planner, "_paces", None)
    monkeypatch.setattr(planner.study, "spent", 0.0)
    monkeypatch.setattr(planner, "_base", 0.0)
    planner._cheaper(4)
    kinds = cheaper(planner.pipe)
    assert planner._paces is not None
    # attention of so few tokens stays as it is
    assert set(planner._paces) == set(kinds) - {"sparse"}
    assert planner.study.spent == pytest.approx(planner._base) == pytest.approx((1 + len(kinds)) * PACE_STEPS / STEPS)
    planner._cheaper(4)
    assert planner.study.spent == pytest.approx(planner._base)


@pytest.mark.parametrize("disturbed", [None, 2, 3, STEPS])
def test_a_time_that_something_else_lengthened_is_measured_once_more(planner: Planner, monkeypatch, disturbed):
    asked: list[int] = []
    said: list[str] = []

    def true(count: int) -> float:
        return 0.1 + 0.05 * count

    def timed(pipe: Any, found: Any, count: int) -> float:
        asked.append(count)
        return true(count) * (2 if count == disturbed and asked.count(count) == 1 and count != STEPS else 1)

    monkeypatch.setattr(measure, "_timed", timed)
    found = replace(planner.study, seconds={STEPS: [true(STEPS) * (2 if disturbed == STEPS else 1)]})
    measure.bracket(planner.pipe, found, said.append)
    assert sorted(asked) == sorted([2, 3, *([disturbed] if disturbed else [])])
    assert len(said) == (disturbed is not None)
    for count in range(1, STEPS + 1):
        assert found.latency(count) == pytest.approx(true(count))
    measure.bracket(planner.pipe, found, said.append)
    assert len(asked) == 2 + (disturbed is not None), "once is enough"


def test_fewer_steps_are_a_plan_too(planner: Planner):
    from fastdiff.planning.candidates import controls

    control = controls(planner.study.trajectories, 4, 3)[1]
    plan = Plan.from_json(Plan(control.members).to_json())
    with fastdiff.accelerate(planner.pipe, plan, strict=True):
        pictures = HELDOUT.run(planner.pipe)[0]
    torch.testing.assert_close(pictures, HELDOUT.run(planner.pipe, 3)[0], rtol=0, atol=0)


def test_a_plan_for_many_steps_is_mapped_to_fewer(planner: Planner):
    """28 to 20 steps: the plan computes at the steps nearest to its levels, and says that it was mapped."""

    longer, shorter = (replace(HELDOUT, prompts=HELDOUT.prompts[:1], steps=steps) for steps in (28, 20))
    levels = study(planner.pipe, longer).trajectories.levels
    fits = tuple((level, 0.0, 1.0) for step, level in enumerate(levels) if step % 3)
    plan = Plan((Forecast("levels", levels=levels[::3], fits=fits, warm_up=1),))
    plan = Plan.from_json(plan.to_json())
    with fastdiff.accelerate(planner.pipe, plan, strict=True) as handle:
        shorter.run(planner.pipe)
        row = handle.report().rows[0]
    near = study(planner.pipe, shorter).trajectories.levels
    expected = {min(range(20), key=lambda step: abs(near[step] - level)) for level in levels[::3]} | {0, 19}
    assert row.seen - row.accelerated == len(expected)
    assert "a run of 20 steps is not the one the plan was fitted on" in " ".join(row.notes)


def test_a_budget_is_kept_or_said_not_to_be(planner: Planner):
    easy = planner.tune(Budget("psnr", 1.0))
    assert easy.met is True
    assert easy.best.computed < STEPS
    impossible = planner.tune(Budget("psnr", 99.0))
    assert impossible.met is False
    with pytest.raises(ValueError, match="give a budget"):
        planner.tune()
    with pytest.raises(ValueError, match="nothing is that fast"):
        planner.tune(latency=1e-9)


def test_pictures_and_page_hold_every_contender(planner: Planner, tmp_path):
    tuned = planner.tune(latency=-1.6)
    image = io.BytesIO()
    report.plot(tuned, image)
    assert image.getvalue().startswith(b"\x89PNG")
    text = report.page(tuned, "a <title>", image.getvalue())
    assert "a &lt;title&gt;" in text
    assert all(result.name in text for result in tuned.results)
    assert "full generations" in text


def test_what_cannot_be_tuned_says_why(pipe: Any, planner: Planner):
    with fastdiff.accelerate(pipe, Recorder(Tape())), pytest.raises(Unsupported, match="remove that handle first"):
        tune(pipe, CALIBRATION, HELDOUT, latency=-2.0)
    with pytest.raises(ValueError, match="overlap"):
        Planner(pipe, CALIBRATION, CALIBRATION)
    blind = Planner.__new__(Planner)
    blind.score = None
    with pytest.raises(ValueError, match="attribute_drop needs known truth"):
        blind.tune(Budget("attribute_drop", 0.01))


def test_latency_is_a_line_through_what_was_measured():
    assert line([(10, 1.0)], 5) == 0.5
    assert line([(10, 1.0), (20, 1.5), (30, 2.0)], 40) == pytest.approx(2.5)
    # noise that says that no steps take less than no time, or more steps less, does not
    for points in ([(28, 0.30), (9, 0.05)], [(28, 0.10), (9, 0.20)]):
        assert 0 < line(points, 2) < line(points, 9)
    assert len(uniform(STEPS, 4)) == 4


def test_a_batch_that_is_not_full_does_not_count():
    prompts = tuple(f"prompt {number}" for number in range(17))
    assert Workload(prompts, batch=16).each([1.6, 0.25]) == [0.1]
    assert Workload(prompts[:4], batch=16).each([0.4]) == [0.1]


@pytest.mark.parametrize("wrong", [{"prompts": ()}, {"steps": 2}, {"batch": 0}, {"guidance": -1.0}])
def test_impossible_workloads_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Workload(**{"prompts": ("a red circle",), **wrong})


def test_video_cannot_be_tuned():
    from fastdiff.miniature.video_families import wan

    pipe = wan()
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(Unsupported, match="pictures; WanPipeline makes none"):
        Workload(("a red circle",), steps=3, height=16, width=16).run(pipe)

"""Plans that do not fit say so in one error; budgets are read or refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
from diffusers import DDIMScheduler

import fastdiff
from fastdiff.caching.forecast import Forecast
from fastdiff.miniature import untrained
from fastdiff.plan import Plan, PlanError
from fastdiff.planning import provenance
from fastdiff.planning.budget import Budget, read_budget, read_latency

ONE = Forecast("levels", levels=(0.9, 0.5, 0.1))


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The embedded architecture, untrained."""
    return untrained(0)


def test_a_tuned_plan_is_the_same_after_a_file_and_applies_where_it_was_tuned(pipe: Any, tmp_path):
    origin = provenance.of(pipe, 28, 5.0, (("psnr", 31.5, 30.9, 32.0, 64),))
    plan = Plan((ONE,), tuned=origin)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert loaded.tuned.expected == (("psnr", 31.5, 30.9, 32.0, 64),)
    with fastdiff.accelerate(pipe, loaded) as handle:
        assert handle.report().rows[0].notes == ()


def test_another_model_or_scheduler_is_refused_and_another_version_noted(pipe: Any):
    origin = provenance.of(pipe, 28, 5.0)
    plan = Plan((ONE,), tuned=origin)
    with pytest.raises(PlanError, match="tuned for another model"):
        fastdiff.accelerate(untrained(1), plan)
    other = untrained(0)
    other.scheduler = DDIMScheduler.from_config(other.scheduler.config)  # type: ignore[assignment]
    with pytest.raises(PlanError, match="tuned with DPMSolverMultistepScheduler"):
        fastdiff.accelerate(other, plan)
    assert not hasattr(type(other), "_fastdiff_handle")
    older = Plan((ONE,), tuned=replace(origin, versions=(("torch", "1.0"),), dtype="bfloat16"))
    with fastdiff.accelerate(pipe, older) as handle:
        said = " ".join(handle.report().rows[0].notes)
        assert "tuned with torch 1.0" in said
        assert "tuned in bfloat16, used in float32" in said


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_fingerprint_knows_weights_and_not_their_type(pipe: Any, kind: str):
    import torch

    origin, twin = provenance.of(pipe, 28, 5.0), untrained(0)
    twin.unet.to(getattr(torch, kind))
    assert origin.check(twin) == (f"tuned in float32, used in {kind}: measure again",)
    # rounded twice, as a model is that was saved in one and loaded in the other
    twin.unet.half().bfloat16()
    assert origin.check(twin) == ("tuned in float32, used in bfloat16: measure again",)
    with pytest.raises(ValueError, match="of this shape with other weights"):
        origin.check(untrained(1))
    with torch.no_grad():
        twin.unet.float()
        for value in twin.unet.parameters():
            value.mul_(1.05)
    with pytest.raises(ValueError, match="of this shape with other weights"):
        origin.check(twin)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.update(schema=99), "schema 99"),
        (lambda data: data["accelerations"][0].update(threshold=float("nan")), "NaN"),
        (lambda data: data["accelerations"][0].update(levels=[]), "levels belong to"),
        (lambda data: data["tuned"].pop("model"), "no more and no less"),
        (lambda data: data["tuned"].update(colour="red"), "no more and no less"),
        (lambda data: data["tuned"].update(steps=0), "steps=0"),
        (lambda data: data["tuned"].update(expected=[["psnr", 1.0]]), "expected figure"),
    ],
)
def test_broken_files_say_what_is_wrong_in_one_error(pipe: Any, tmp_path, change, says):
    data = json.loads(Plan((ONE,), tuned=provenance.of(pipe, 28, 5.0)).to_json())
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=says) as caught:
        Plan.load(tmp_path / "plan.json")
    assert "plan.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_schedule_longer_than_the_run_is_one_error(pipe: Any):
    pipe.set_progress_bar_config(disable=True)
    levels = tuple(1 - step / 20 for step in range(20))
    wrong = pytest.raises(ValueError, match="computes 20 steps and the run takes 4")
    with fastdiff.accelerate(pipe, Forecast("levels", levels=levels)), wrong:
        pipe("a red circle", num_inference_steps=4, output_type="latent")
    assert pipe("a red circle", num_inference_steps=4, output_type="latent").images.isfinite().all()


def test_budgets_are_read_or_refused():
    assert read_budget("psnr>=30") == Budget("psnr", 30.0)
    assert read_budget("attribute_drop<=1%") == Budget("attribute_drop", 0.01)
    assert str(read_budget(" ssim >= 0.95 ")) == "ssim>=0.95"
    for wrong in ("psnr", "psnr<=30", "speed>=2", "psnr>=nan", "psnr>=1e999", "attribute_drop>=1%", ""):
        with pytest.raises(ValueError, match="is no budget: write psnr>=30"):
            read_budget(wrong)
    assert read_latency("40ms") == 0.04
    assert read_latency("2.5x") == -2.5
    for wrong in ("40", "0ms", "-1s", "fast"):
        with pytest.raises(ValueError, match="is no latency"):
            read_latency(wrong)
    assert Budget("psnr", 30).met(30.1, 33)
    assert not Budget("psnr", 30).met(29.9, 33)
    assert Budget("attribute_drop", 0.01).met(-0.02, 0.01)

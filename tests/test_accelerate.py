"""The handle: presets that leave members out aloud, plans that do not, reports, requests opened by hand."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import fastdiff
from fastdiff.acceleration import Acceleration, NotEngaged
from fastdiff.anatomy import capture
from fastdiff.miniature.families import family
from fastdiff.plan import Plan, PlanError
from fastdiff.runtime.precision import Precision
from fastdiff.runtime.prompt_cache import PromptCache


@pytest.fixture
def pipe():
    torch.set_num_threads(1)
    pipe = family("sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe):
    return pipe("a red circle", num_inference_steps=2, output_type="latent", generator=torch.manual_seed(0)).images


@dataclass(frozen=True)
class Idle(Acceleration):
    """Promises to act and does not."""

    stage: ClassVar[str] = "blocks"

    def supports(self, pipe):
        return fastdiff.Verdict(True, "works on mondays")

    def apply(self, pipe, hooks):
        hooks.wrap(
            pipe.unet, "forward", lambda inner, *args, **kwargs: (hooks.counter.count(False), inner(*args, **kwargs))[1]
        )


@dataclass(frozen=True)
class Broken(Idle):
    """Fails half-way through `apply`."""

    def apply(self, pipe, hooks):
        super().apply(pipe, hooks)
        raise fastdiff.Unsupported("no wheels; add wheels")


def test_a_preset_leaves_out_what_cannot_act_and_says_so(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with fastdiff.accelerate(pipe, "fast") as handle:
        run(pipe)
        rows = {row.name: row for row in handle.report().rows}
    assert rows["TinyDecoder"].state == "skipped"
    assert "tiny one already" in rows["TinyDecoder"].notes[0]
    assert rows["DiffusersCache"].state == "skipped"
    assert "opt-in" in rows["Compile"].notes[0]
    assert rows["PromptCache"].state == rows["Precision"].state == "active"
    assert "skipped" in str(handle.report())


def test_a_listed_member_that_cannot_act_raises_before_the_run_and_leaves_nothing(pipe):
    before = dict(pipe.unet.__dict__)
    with pytest.raises(fastdiff.Unsupported, match="add wheels"):
        fastdiff.accelerate(pipe, [Broken(), PromptCache()])
    assert pipe.unet.__dict__ == before
    assert "fastdiff_handle" not in "".join(vars(type(pipe)))


def test_what_should_have_engaged_is_reported_and_raises_when_strict(pipe):
    with fastdiff.accelerate(pipe, Idle()) as handle:
        run(pipe)
        report = handle.report()
    assert report.misses == ("Idle accelerated none of 2 calls in a request",)
    assert report.rows[0].notes == ("works on mondays",)
    with fastdiff.accelerate(pipe, Idle(), strict=True), pytest.raises(NotEngaged, match="none of 2 calls"):
        run(pipe)


def test_one_plan_at_a_time(pipe):
    with fastdiff.accelerate(pipe, PromptCache()), pytest.raises(fastdiff.Unsupported, match="already accelerated"):
        fastdiff.accelerate(pipe, PromptCache())


def test_what_is_not_a_pipeline_or_a_plan_is_refused(pipe):
    with pytest.raises(TypeError, match="needs a diffusers pipeline"):
        fastdiff.accelerate(torch.nn.Linear(1, 1), PromptCache())
    with pytest.raises(PlanError, match="presets are exact, balanced, fast"):
        fastdiff.accelerate(pipe, "ludicrous")
    with pytest.raises(PlanError, match="this is a int"):
        fastdiff.accelerate(pipe, [1])


def test_the_class_keeps_its_name_and_is_nobody_elses(pipe, tmp_path):
    other = family("sd", seed=1)
    plain = type(pipe)
    with fastdiff.accelerate(pipe, PromptCache()):
        assert type(pipe) is not plain
        assert type(pipe).__name__ == plain.__name__
        assert isinstance(pipe, plain)
        assert type(other) is plain
        pipe.save_pretrained(tmp_path)
    assert '"_class_name": "StableDiffusionPipeline"' in (tmp_path / "model_index.json").read_text()
    assert type(pipe) is plain


def test_a_request_can_be_opened_by_hand_and_kept(pipe):
    denoiser, args, kwargs = capture(pipe, 64, 64)
    with fastdiff.accelerate(pipe, Precision("bfloat16", "contiguous")) as handle, torch.no_grad():
        with handle.request() as request:
            denoiser(*args, **kwargs)
            assert request.tally["Precision"] == [1, 1]
        with pytest.raises(RuntimeError, match="closed"), request:
            pass
        kept = handle.request(keep=True)
        for _ in range(2):
            with kept:
                kept.state("seen", list).append(1)
        assert kept.state("seen", list) == [1, 1]
        kept.close()
        kept.close()
        assert kept.state("seen", list) == []
        assert handle.report().requests == 2


def test_the_plan_order_is_the_order_of_application(pipe):
    plan = Plan([Precision("bfloat16", "contiguous"), Idle()])
    with fastdiff.accelerate(pipe, plan):
        outermost = pipe.unet.__dict__["forward"]
        assert "Idle" in outermost.around.__qualname__
        assert copy.copy(plan) == plan

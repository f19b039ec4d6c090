"""The model behind the page: its ladder keeps what brings time, and another plan has another pipeline."""

import os

import pytest
import torch

import fastdiff
from fastdiff_app.live.model import LiveModel, worthwhile
from fastdiff_pipelines.live import Rung
from fastdiff_pipelines.settings import Settings


def test_rungs_that_give_something_up_for_nothing_are_left_out() -> None:
    rungs = [
        Rung("as asked", drops=False, cost_ms=20, depth=2),
        Rung("drop", cost_ms=20, depth=2),
        Rung("skip", {"similarity": 0.98}, cost_ms=20, depth=2),
        Rung("one step", {"steps": 1}, cost_ms=12),
        Rung("half size", {"steps": 1, "scale": 0.5}, cost_ms=6),
        Rung("no cheaper plan", {"steps": 1, "scale": 0.5, "plan": "fast"}, cost_ms=5.9),
    ]
    assert [rung.name for rung in worthwhile(rungs, 33.0)] == ["as asked", "drop", "skip", "one step", "half size"]


@pytest.mark.usefixtures("untrained_model")
def test_a_model_on_the_cpu_leaves_a_processor_to_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(before)), raising=False)
    with LiveModel(None, Settings("a red circle", steps=1), plan="none"):
        assert torch.get_num_threads() == max(1, before - 1)
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("untrained_model")
def test_what_fails_on_the_way_in_leaves_nothing_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff_app.live import model as module

    before, pipes = torch.get_num_threads(), []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(before)), raising=False)
    whole = module.load_pipeline
    monkeypatch.setattr(module, "load_pipeline", lambda *words: pipes.append(whole(*words)) or pipes[-1])
    live = LiveModel(None, Settings("a red circle", sampler="euler"))
    with pytest.raises(ValueError, match="euler"), live:
        pass
    assert torch.get_num_threads() == before
    # refused where a plan is applied already
    fastdiff.accelerate(pipes[0], "exact").remove()


def test_a_plan_is_taken_with_compile_and_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff_app.live import model as module

    class Enough(Exception):
        pass

    def accelerated(pipe: object, plan: fastdiff.Plan, strict: bool) -> None:
        assert strict and any(type(one).__name__ == "Compile" for one in plan)
        raise Enough

    monkeypatch.setattr(module, "load_pipeline", lambda *words: object())
    monkeypatch.setattr(module, "accelerated", accelerated)
    with pytest.raises(Enough), LiveModel(None, Settings(""), "none", compile=True, strict=True):
        pass


@pytest.mark.usefixtures("untrained_model")
def test_a_cheaper_plan_acts_on_a_pipeline_of_its_own() -> None:
    with LiveModel(None, Settings("a red circle", steps=1), plan="none") as model:
        plain, cheap = model.open(), model.open(1.0, "fast")
        assert model.pipe is not model._planned("fast")
        assert model._planned("fast") is model._planned("fast")
        assert plain.size == cheap.size == model.size
        assert model.conditions == []


@pytest.mark.usefixtures("untrained_model")
def test_with_a_target_the_ladder_is_measured_on_this_machine() -> None:
    with LiveModel(None, Settings("a red circle", steps=2), plan="none", target_ms=100.0) as model:
        controller = model.controller()
        assert controller is not None
        assert controller.rung.name == "as asked"
        assert all(rung.cost_ms > 0 for rung in model.rungs)
        assert model.rungs[-1].cost_ms < model.rungs[0].cost_ms
    with LiveModel("identity", Settings("")) as model:
        assert model.controller() is None

"""Whole pipelines of every family on two ranks, and what the contract asks of an acceleration that needs ranks."""

import inspect
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.hooks import Wrapped
from fastdiff.miniature.families import family
from fastdiff.parallel.branches import BranchParallel
from fastdiff.parallel.clip import ClipParallel
from fastdiff.parallel.communicator import RankFailed
from fastdiff.parallel.context import ContextParallel
from fastdiff.parallel.controlnet import RemoteControlNet
from fastdiff.parallel.decoder import DecoderParallel
from fastdiff.parallel.lora import LateLora
from fastdiff.parallel.patch import PatchParallel
from fastdiff.parallel.simulator import Simulator, replica

EVERY = (
    PatchParallel("partial", portion=0.1, shares=(1, 2.5)),
    BranchParallel(3),
    DecoderParallel("rows", encode=True),
    ClipParallel(window=3),
    ContextParallel("ring"),
    LateLora("somewhere.safetensors", step=4),
    RemoteControlNet(2),
)


def _draw(pipe: Any, steps: int = 2, size: int = 32, **settings: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(pipe.__call__).parameters
    given = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24}
    given = {key: value for key, value in given.items() if key in known}
    given |= {"num_inference_steps": steps, "height": size, "width": size, "output_type": "pt"}
    return pipe("a red circle", generator=torch.Generator().manual_seed(1), **{**given, **settings}).images


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart"])
def test_two_ranks_draw_the_picture_of_one(name: str):
    pipe = family(name)
    truth = _draw(pipe)
    plan = fastdiff.Plan((PatchParallel(), DecoderParallel()))

    def one(communicator: Any) -> tuple[list[torch.Tensor], bool, torch.Tensor]:
        twin = replica(pipe)
        with fastdiff.accelerate(twin, plan, strict=True) as handle:
            drawn = [_draw(twin), _draw(twin)]
            assert not handle.report().misses
        left = any(isinstance(value, Wrapped) for part in _modules(twin) for value in part.__dict__.values())
        return drawn, left, _draw(twin)

    for drawn, left, after in Simulator(2).run(one).results:
        torch.testing.assert_close(drawn[0], truth, rtol=0, atol=1e-4)
        assert torch.equal(drawn[0], drawn[1])
        assert not left
        assert torch.equal(after, truth)


def _modules(pipe: Any) -> list[torch.nn.Module]:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [module for part in parts for module in part.modules()]


def test_a_rotating_transformer_is_sent_to_context_parallelism():
    verdict = PatchParallel().supports(family("flux"))
    assert not verdict
    assert "ContextParallel" in verdict.reason
    assert "PatchParallel" in ContextParallel().supports(family("sd")).reason


def test_an_error_in_one_rank_ends_all_and_leaves_nothing():
    pipe = family("sd")
    truth = _draw(pipe)

    def one(communicator: Any) -> torch.Tensor:
        twin = replica(pipe)

        def fail(running: Any, step: int, timestep: Any, tensors: dict) -> dict:
            if communicator.rank == 1:
                raise KeyboardInterrupt
            return {}

        plan = PatchParallel("stale", warmup=0, few_steps=True)
        with fastdiff.accelerate(twin, plan), pytest.raises((KeyboardInterrupt, RankFailed)) as caught:
            _draw(twin, callback_on_step_end=fail)
        assert caught.type is (KeyboardInterrupt if communicator.rank == 1 else RankFailed)
        assert not communicator._pending
        # the group was left in good order, so it serves again
        with fastdiff.accelerate(twin, PatchParallel()):
            again = _draw(twin)
        torch.testing.assert_close(again, truth, rtol=0, atol=1e-4)
        return _draw(twin)

    assert all(torch.equal(result, truth) for result in Simulator(2).run(one).results)


@pytest.mark.parametrize("member", EVERY, ids=lambda one: type(one).__name__)
def test_plans_keep_their_settings_in_a_file(member: Any):
    plan = fastdiff.Plan((member,))
    assert fastdiff.Plan.from_json(plan.to_json()) == plan
    assert member.stage == "devices"
    assert member.exact or member.bound == "psnr"


def test_one_rank_says_that_it_does_nothing():
    pipe = family("sd")
    truth = _draw(pipe)
    with fastdiff.accelerate(
        pipe, [PatchParallel(groups=2), BranchParallel(), DecoderParallel()], strict=True
    ) as handle:
        assert torch.equal(_draw(pipe), truth)
        assert str(handle.report()).count("one rank: nothing was installed") == 3

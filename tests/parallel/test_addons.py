"""LoRA switched in at a fixed step, and ControlNet on another rank."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

import fastdiff
from fastdiff.miniature import untrained
from fastdiff.parallel.communicator import RankFailed
from fastdiff.parallel.controlnet import RemoteControlNet, serve
from fastdiff.parallel.lora import LateLora, deltas
from fastdiff.parallel.simulator import Simulator, replica
from tests.parallel.nets import controlnet, inputs, pipeline, sd

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def pipe() -> Any:
    pipe = untrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def path(pipe: Any, tmp_path: Path) -> str:
    width = pipe.unet.get_submodule(LAYER).weight.shape
    torch.manual_seed(2)
    state = {
        f"unet.{LAYER}.lora_A.weight": torch.randn(2, width[1]),
        f"unet.{LAYER}.lora_B.weight": torch.randn(width[0], 2),
    }
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    return str(tmp_path / "pytorch_lora_weights.safetensors")


def _draw(pipe: Any, **settings: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    given = {"prompt": "a red circle", "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(**{**given, **settings}, generator=generator).images


@dataclass(frozen=True)
class _Slow(LateLora):
    """Arrives only once the switch is waiting for it."""

    gate: ClassVar[threading.Event]

    def read(self, pipe: Any, denoiser: str) -> dict[str, torch.Tensor]:
        assert self.gate.wait(30)
        return super().read(pipe, denoiser)


def test_the_switch_is_at_a_fixed_step_whatever_the_disk_does(pipe: Any, path: str):
    base = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    plain = _draw(pipe)

    def at(one: LateLora, **settings: Any) -> tuple[torch.Tensor, str]:
        with fastdiff.accelerate(pipe, one) as handle:
            return _draw(pipe, **settings), str(handle.report())

    fast, report = at(LateLora(path, step=1, scale=0.5))
    assert "before denoiser call 1" in report
    _Slow.gate = threading.Event()

    def late(running: Any, step: int, timestep: Any, tensors: dict) -> dict:
        # one step runs on plain weights before anything can have been read
        threading.Timer(0.05, _Slow.gate.set).start()
        return {}

    slow, report = at(_Slow(path, step=1, scale=0.5), callback_on_step_end=late)
    assert torch.equal(slow, fast)
    assert not torch.equal(fast, plain)
    by_hand = deltas(_state(path), {})[LAYER]
    weight = pipe.unet.get_submodule(LAYER).weight

    def switch(running: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if step == 0:
            with torch.no_grad():
                weight.copy_(weight.float() + 0.5 * by_hand)
        return {}

    assert torch.equal(_draw(pipe, callback_on_step_end=switch), fast)
    pipe.unet.load_state_dict(base)
    assert not torch.equal(at(LateLora(path, step=2, scale=0.5))[0], fast)


def _state(path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key.removeprefix("unet."): value for key, value in load_file(path).items()}


def test_a_hundred_switches_leave_the_weights_as_they_were(pipe: Any, path: str):
    from fastdiff.hooks import Hooks, Requests
    from fastdiff.parallel.lora import _Switch

    pipe.unet.half()
    base = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    settings = LateLora(path, step=0)
    switch = _Switch(settings, lambda: settings.read(pipe, "unet"), pipe.unet, Hooks("LateLora", Requests()))
    for _ in range(100):
        switch.switch()
        assert not torch.equal(pipe.unet.get_submodule(LAYER).weight, base[f"{LAYER}.weight"])
        switch.restore()
    assert all(torch.equal(value, base[name]) for name, value in pipe.unet.state_dict().items())


def test_the_weights_are_back_after_an_error(pipe: Any, path: str):
    base = pipe.unet.get_submodule(LAYER).weight.clone()

    def fail(running: Any, step: int, timestep: Any, tensors: dict) -> dict:
        raise KeyboardInterrupt

    with fastdiff.accelerate(pipe, LateLora(path, step=0)), pytest.raises(KeyboardInterrupt):
        _draw(pipe, callback_on_step_end=fail)
    assert torch.equal(pipe.unet.get_submodule(LAYER).weight, base)


def test_wrong_files_are_named(pipe: Any, path: str, tmp_path: Path):
    with pytest.raises(fastdiff.Unsupported, match="is no file or folder"):
        fastdiff.accelerate(pipe, LateLora(str(tmp_path / "absent.safetensors")))
    state = {key.replace("unet.", "text_encoder."): value for key, value in _state(path).items()}
    other = tmp_path / "text.safetensors"
    save_file({"text_encoder." + key: value for key, value in state.items()}, other)
    with fastdiff.accelerate(pipe, LateLora(str(other))), pytest.raises(fastdiff.Unsupported, match="text_encoder"):
        _draw(pipe)


def test_the_denoiser_does_not_wait_for_residuals_before_it_adds_them():
    pipe = pipeline(sd(), controlnet(sd()))
    arguments = {**inputs("sd"), "controlnet_cond": torch.rand(1, 3, 32, 32)}
    truth = pipe(steps=3, rate=0.1, **arguments)
    assert not torch.equal(truth, pipe(steps=3, rate=0.1, **inputs("sd")))
    arrived = []

    def one(communicator):
        twin = replica(pipe)
        if communicator.rank == 1:
            return serve(twin.controlnet, communicator)
        with fastdiff.accelerate(twin, RemoteControlNet()):
            wrapped = twin.controlnet.forward.around

            def note(name: str) -> None:
                arrived.append((name, wrapped.answer.tree is not None))

            twin.unet.down_blocks[-1].register_forward_hook(lambda *_: note("down"))
            twin.unet.up_blocks[-1].register_forward_hook(lambda *_: note("up"))
            return twin(steps=3, rate=0.1, **arguments)

    run = Simulator(2).run(one)
    assert torch.equal(run.results[0], truth)
    assert run.results[1] == 3
    # in the first step the shapes had to be learnt
    assert arrived[2:] == [("down", False), ("up", True)] * 2
    # the condition did not change, so it was sent once
    sent = run.traffic[0].sent["controlnet"]
    assert sent < 3 * arguments["controlnet_cond"].numel() * 4


def test_a_failing_controlnet_ends_both_sides():
    pipe = pipeline(sd(), controlnet(sd()))

    def one(communicator):
        twin = replica(pipe)
        if communicator.rank == 1:
            twin.controlnet.register_forward_pre_hook(_fail)
            return serve(twin.controlnet, communicator)
        with fastdiff.accelerate(twin, RemoteControlNet()):
            with pytest.raises(RankFailed, match="rank 1 failed: ZeroDivisionError"):
                twin(**inputs("sd"), controlnet_cond=torch.rand(1, 3, 32, 32))
            return None

    with pytest.raises(ZeroDivisionError):
        Simulator(2).run(one)


def _fail(*_: Any) -> None:
    raise ZeroDivisionError

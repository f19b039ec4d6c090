"""A pipeline whose denoiser is a formula, so that what leaving out calls does to it can be worked out by hand."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from fastdiff.caching.levels import run_of, signal_and_noise


class Formula(torch.nn.Module):
    """``formula(sample, level)`` with the level a flow pipeline passes; counts its calls and their rows."""

    def __init__(self, formula: Callable[[Any, Any], Any], form: str = "tuple"):
        super().__init__()
        self.formula, self.form = formula, form
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(in_channels=1)
        self.calls: list[int] = []

    def forward(self, sample: Any, timestep: Any, return_dict: bool = True) -> Any:
        stack = torch.stack(sample) if isinstance(sample, list) else sample
        self.calls.append(len(stack))
        output = self.formula(stack, timestep)
        if self.form == "list":
            return (list(output.unbind(0)),)
        return output if self.form == "tensor" else (output,)


class Loop:
    """Euler steps in float64 of the formula's velocity, or DDIM with v-prediction; `taken` holds every output."""

    def __init__(self, denoiser: Formula, flow: bool = True):
        self.denoiser = denoiser
        kind: Any = FlowMatchEulerDiscreteScheduler if flow else DDIMScheduler
        self.scheduler = kind(shift=2.0) if flow else kind(prediction_type="v_prediction", clip_sample=False)
        self.flow = flow
        self.taken: list[torch.Tensor] = []

    @property
    def components(self) -> dict[str, Any]:
        return {"denoiser": self.denoiser, "scheduler": self.scheduler}

    def __call__(self, x: torch.Tensor, steps: int = 12) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        self._num_timesteps = steps
        self.taken = []
        levels = [*run_of(self.scheduler).levels, 0.0]
        for step, time in enumerate(self.scheduler.timesteps):
            given = list(x.unbind(0)) if self.denoiser.form == "list" else x
            output = self.denoiser(given, time / 1000 if self.flow else time)
            output = output if isinstance(output, torch.Tensor) else output[0]
            output = torch.stack(output) if isinstance(output, list) else output
            self.taken.append(output)
            if self.flow:
                x = x + (levels[step + 1] - levels[step]) * output
                continue
            (signal, noise), (later, less) = (signal_and_noise(self.scheduler, at) for at in levels[step : step + 2])
            x = later * (signal * x - noise * output) + less * (noise * x + signal * output)
        return x


@pytest.fixture
def loop() -> Callable[..., Loop]:
    """Makes a pipeline of a formula: `loop(lambda x, level: ..., form="tuple", flow=True)`."""
    return lambda formula, form="tuple", flow=True: Loop(Formula(formula, form), flow)


@pytest.fixture
def noise() -> torch.Tensor:
    """Float64 [3, 2, 4, 4]."""
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

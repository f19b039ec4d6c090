"""A few-step student in the place of its teacher: weights, scheduler, timesteps and guidance all at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict
from fastdiff.anatomy import anatomy
from fastdiff.distillation import shelf, students
from fastdiff.distillation.diffusers_networks import LORA_FILE
from fastdiff.hooks import Hooks

STUDENTS = ("four-step", "one-step", "scm")


@dataclass(frozen=True)
class FewStep(Acceleration):
    """Draw with a few-step student. Lossy.

    Args:
        source: a folder that `fastdiff distill` wrote, or the name of an embedded student: "four-step"; "one-step",
            which takes one step or two; and "scm", which does too, of the transformer alone.

    The student's LoRA is added to the weights (a copy of those it changes is kept and put back), its scheduler stands
    in for the pipeline's, and a call that names no steps, or a number the student knows, is given its timesteps.
    Guidance is in the student's weights, so a call that names no scale gets the student's.
    """

    stage: ClassVar[str] = "weights"
    source: str = "four-step"

    @property
    def bound(self) -> str:
        """Accuracy of what the prompt asks for: a student need not draw its teacher's pictures."""
        return "attribute"

    def supports(self, pipe: Any) -> Verdict:
        """Needs a student made for these weights."""
        parameters = inspect.signature(type(pipe).__call__).parameters
        if not {"timesteps", "sigmas"} & set(parameters):
            return Verdict(False, f"{type(pipe).__name__} takes neither timesteps nor sigmas")
        return shelf.fits(*self._place(), LORA_FILE, pipe)

    def folder(self, model: str) -> Path:
        """Where the student lies; an embedded one is of the embedded ``model``."""
        source, name = self._place()
        return shelf.kept(source, name, model)

    def _place(self) -> tuple[str, str]:
        return ("embedded", self.source) if self.source in STUDENTS else (self.source, "")

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Add the LoRA, swap the scheduler, and fill in what a call leaves open."""
        folder = shelf.find(*self._place(), pipe)
        denoiser = anatomy(pipe).denoiser
        saved = []
        hooks.on_undo(lambda: _restore(saved))
        for weight, update in updates(denoiser, students.lora_of(folder)):
            saved.append((weight, weight.detach().to("cpu", copy=True)))
            weight.data.add_(update.to(weight.device, torch.float32).to(weight.dtype))
        sampling = students.sampling_of(folder)
        config = pipe.scheduler.config
        hooks.swap(pipe, "scheduler", students.scheduler_of(folder, config))
        signature = inspect.signature(type(pipe).__call__)

        def call(inner: Any, *args: Any, **kwargs: Any) -> Any:
            hooks.counter.count(True)
            return inner(*args, **kwargs)

        hooks.wrap(denoiser, "forward", call)

        def entry(inner: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind_partial(pipe, *args, **kwargs)
            given = bound.arguments
            if given.get("timesteps") is None and given.get("sigmas") is None:
                # an unknown number of steps is refused by name here, before anything runs
                given |= students.steps_of(folder, config, given.get("num_inference_steps"), signature.parameters)
            if "guidance_scale" in signature.parameters:
                given.setdefault("guidance_scale", sampling["guidance_scale"])
            # bind_partial fills arguments in any order; the call is made by name
            return inner(**{name: value for name, value in given.items() if name != "self"})

        hooks.override(pipe, "__call__", entry)


def _restore(saved: list[tuple[Tensor, Tensor]]) -> None:
    while saved:
        weight, before = saved.pop()
        weight.data.copy_(before)


def updates(denoiser: Any, layers: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of a denoiser and what a LoRA in peft's names (``path.lora_A.weight``) adds to each, in float32.

    Raises:
        Unsupported: a layer of the LoRA is not in the denoiser.
    """
    for name, down in layers.items():
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removesuffix(".lora_A.weight")
        up = layers[f"{path}.lora_B.weight"]
        try:
            weight = denoiser.get_submodule(path).weight
        except AttributeError as error:
            raise Unsupported(f"the student changes {path}, which this denoiser does not have") from error
        yield weight, (up.float().flatten(1) @ down.float().flatten(1)).view_as(weight)

"""The boundary of a denoiser: a call taken apart by name, rows taken out of it, and an output put together again.

What happens here happens outside the denoiser's own forward, so one piece of code serves every UNet and transformer,
and a compiled forward stays one graph.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.anatomy import denoiser_arguments, forward_names, step_index
from fastdiff.caching.branches import branch_of
from fastdiff.caching.levels import Run, level_at, run_of
from fastdiff.hooks import Hooks, Request

TIMES = ("timestep", "timesteps", "t")
# positions are the same for every row, also where there happen to be as many as rows
_SHARED = ("img_ids", "txt_ids", "image_rotary_emb", "visual_rope_pos", "text_rope_pos", "scale_factor")


@dataclass
class Call:
    """One denoiser call.

    Attributes:
        sample: noisy input [B, ...], stacked where the model takes a list.
        level: its noise level; None where rows differ or the timestep says nothing.
        index: how many calls of this branch came before in this request.
        run: the steps of the pipeline's call, if this is within one; position: which of them this is.
        return_dict: as the caller asked.
        compute: calls the denoiser as it was asked to, or for some rows only.
    """

    request: Request
    sample: Tensor
    level: float | None
    index: int
    run: Run | None
    position: int
    return_dict: Any
    compute: "Compute"

    @property
    def last(self) -> bool:
        """True at the last step of a pipeline's call."""
        return self.run is not None and self.position >= len(self.run.levels) - 1

    @property
    def steps(self) -> int | None:
        """How many steps the pipeline's call takes, None outside of one."""
        return len(self.run.levels) if self.run else None


class Compute:
    """The denoiser's own answer to a call: `compute()` for all of it, `compute(rows)` for some rows."""

    def __init__(self, inner: Callable, denoiser: Any, args: tuple, kwargs: dict[str, Any], count: int):
        self._inner, self._args, self._kwargs = inner, args, kwargs
        self._names, self._count = forward_names(denoiser), count

    def given(self, name: str) -> Any:
        """An argument given by name; None where it was not."""
        return self._kwargs.get(name)

    def replace(self, **named: Any) -> None:
        """Give the denoiser other values for arguments given by name."""
        self._kwargs = {**self._kwargs, **named}

    def __call__(self, rows: Sequence[int] | None = None) -> Any:
        if rows is None:
            return self._inner(*self._args, **self._kwargs)
        arguments = dict(zip(self._names, self._args, strict=False))
        taken = {name: take_rows(name, value, rows, self._count) for name, value in arguments.items()}
        named = {name: take_rows(name, value, rows, self._count) for name, value in self._kwargs.items()}
        return self._inner(*taken.values(), **named)


class Boundary:
    """Stands around one denoiser's forward and gives every call to `act(call)`, whose answer is the output.

    A call outside of any request, or one that cannot be taken apart, is computed as it is.
    """

    def __init__(self, hooks: Hooks, pipe: Any, denoiser: Any, act: Callable[[Call], Any]):
        self.hooks, self.denoiser, self.act = hooks, denoiser, act
        self.scheduler = getattr(pipe, "scheduler", None)
        hooks.wrap(denoiser, "forward", self.around)

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Serve one call of the denoiser."""
        request = self.hooks.requests.current()
        if request is None:
            with self.hooks.requests.open(stray=True):
                return self.around(inner, *args, **kwargs)
        arguments = denoiser_arguments(self.denoiser, args, kwargs)
        sample = stacked(next(iter(arguments.values())))
        if sample is None:
            self.hooks.counter.miss("leaves calls whose input is not one tensor, or several of one shape, as they are")
            self.hooks.counter.count(accelerated=False)
            return inner(*args, **kwargs)
        outer = request.branch
        request.branch = branch_of(request, self, arguments)
        try:
            return self.act(
                self._call(request, arguments, sample, Compute(inner, self.denoiser, args, kwargs, len(sample)))
            )
        finally:
            request.branch = outer

    def state(self, request: Request, name: str, factory: Callable[[], Any]) -> Any:
        """State of the request's current guidance branch at this boundary."""
        states = self._states(request)
        if name not in states:
            states[name] = factory()
        return states[name]

    def _states(self, request: Request) -> dict[str, Any]:
        return request.state((self, "states", request.branch), dict)

    def _call(self, request: Request, arguments: dict[str, Any], sample: Tensor, compute: Compute) -> Call:
        run, position, level = None, 0, None
        index = self.state(request, "calls", lambda: [0, None])[0]
        time = next((arguments[name] for name in TIMES if name in arguments), None)
        if request.pipe is not None and getattr(request.pipe, "scheduler", None) is not None:
            run = request.state((self, "run"), lambda: run_of(request.pipe.scheduler))
            position = self._position(request.pipe, run, time, index)
            level = run.levels[position] if run.levels else None
        elif self.scheduler is not None:
            value = _one_value(time)
            level = None if value is None else level_at(self.scheduler, value)
            before = self.state(request, "calls", lambda: [0, None])[1]
            if level is not None and before is not None and level > before:
                # noisier than the last call: whoever calls has begun something new, such as a stream's next frame
                self._states(request).clear()
                index = 0
        self._states(request)["calls"] = [index + 1, level]
        return Call(
            request,
            sample,
            level,
            index,
            run or None,
            position if run else index,
            arguments.get("return_dict", True),
            compute,
        )

    @staticmethod
    def _position(pipe: Any, run: Run, time: Any, index: int) -> int:
        step = step_index(pipe)
        if step is not None and (step >= 0 or index == 0):
            # asking the scheduler costs no wait for the device; before its first step it knows where it will begin
            return min(max(step, getattr(pipe.scheduler, "_begin_index", None) or 0), len(run.levels) - 1)
        value = _one_value(time)
        return 0 if value is None else run.nearest(level_at(pipe.scheduler, value))


def _one_value(time: Any) -> float | None:
    """A timestep as a number; None where there is none or rows differ."""
    if not isinstance(time, Tensor):
        return float(time) if isinstance(time, (int, float)) else None
    values = set(time.flatten().tolist())
    return values.pop() if len(values) == 1 else None


def stacked(value: Any) -> Tensor | None:
    """A tensor, or a list of tensors of one shape as one [B, ...]; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        return torch.stack(list(value)) if len({item.shape for item in value}) == 1 else None
    return None


def take_rows(name: str, value: Any, rows: Sequence[int], count: int) -> Any:
    """Of a denoiser argument those `rows` (of `count`) alone; what has no rows is passed on."""
    if name in _SHARED:
        return value
    if isinstance(value, Tensor):
        return value[list(rows)] if value.dim() and len(value) == count else value
    if isinstance(value, dict):
        return {key: take_rows(key, item, rows, count) for key, item in value.items()}
    if isinstance(value, list) and len(value) == count and not any(_has_rows(item, count) for item in value):
        return [value[row] for row in rows]
    if isinstance(value, (list, tuple)):
        return type(value)(take_rows(name, item, rows, count) for item in value)
    return value


def _has_rows(item: Any, count: int) -> bool:
    return isinstance(item, Tensor) and item.dim() > 1 and len(item) == count and count > 1


def read(output: Any) -> Tensor | None:
    """The denoiser's answer as one tensor [B, ...]; None where it holds more than that."""
    if isinstance(output, Tensor):
        return output
    fields = list(output.values()) if isinstance(output, dict) else output
    if isinstance(fields, (list, tuple)) and len(fields) == 1:
        return stacked(fields[0])
    return None


def rebuild(like: Any) -> Callable[[Tensor], Any]:
    """A function that puts a tensor into an output of the kind of `like`, holding none of its tensors."""
    if isinstance(like, Tensor):
        return lambda value: value
    first = next(iter(like.values())) if isinstance(like, dict) else like[0]
    kind = type(first)

    def inside(value: Tensor) -> Any:
        return value if kind is Tensor or issubclass(kind, Tensor) else kind(value.unbind(0))

    if dataclasses.is_dataclass(like) and not isinstance(like, type):
        make: Any = type(like)
        name = dataclasses.fields(like)[0].name
        return lambda value: make(**{name: inside(value)})
    return lambda value: (inside(value),)

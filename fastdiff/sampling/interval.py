"""Guidance only where it helps: at middle noise levels (https://arxiv.org/abs/2404.07724).

At high noise, guidance drives all samples to the same few layouts; at low noise it changes nothing one sees. A step
without it costs half: the denoiser is not called for the negative branch, and the pipeline's own guidance formula,
given the positive output for both, returns just that.
"""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_number
from fastdiff.anatomy import anatomy, conditioning, denoiser_arguments, forward_names, public_class
from fastdiff.hooks import Hooks, Request
from fastdiff.parallel.exchange import output_sample, with_sample
from fastdiff.sampling.told import level_of, timestep_name, told_rows


@dataclass(frozen=True)
class GuidanceInterval(Acceleration):
    """Classifier-free guidance at noise levels above `low` and up to `high`, and none elsewhere.

    Args:
        low, high: levels from 0 (clean) to 1 (noise), as flow matching counts them; the defaults are the paper's for
            SDXL. Most is saved by raising `low`, where most steps are.
    """

    stage: ClassVar[str] = "steps"
    low: float = 0.2
    high: float = 0.85

    def __post_init__(self):
        check_number("GuidanceInterval", "low", self.low, low=0, high=1)
        check_number("GuidanceInterval", "high", self.high, low=0, high=1)
        if self.low >= self.high:
            raise ValueError(f"GuidanceInterval: low={self.low!r} must be below high={self.high!r}")

    def supports(self, pipe: Any) -> Verdict:
        """Needs guidance that is two branches, and a scheduler that says how noisy a timestep is."""
        parts = anatomy(pipe)
        if parts.guidance == "none":
            return Verdict(False, f"{type(pipe).__name__} makes no second guidance branch that could be left out")
        for name, denoiser in parts.denoisers.items():
            if getattr(denoiser.config, "guidance_embeds", False):
                return Verdict(False, f"the {name} is told its guidance as a number; there is no branch to leave out")
            try:
                level_of(parts.scheduler, 500.0)
                timestep_name(forward_names(denoiser))
            except Unsupported as error:
                return Verdict(False, str(error))
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser, and listen to which guidance each call asks for."""
        scale: ContextVar[float] = ContextVar("fastdiff_guidance_scale", default=0.0)

        def call(inner: Callable, running: Any, *args: Any, **kwargs: Any) -> Any:
            before = scale.set(_asked(running, args, kwargs))
            try:
                return inner(*args, **kwargs)
            finally:
                scale.reset(before)

        # some pipelines keep their guidance in a local variable only
        hooks.override(pipe, "__call__", call)
        parts = anatomy(pipe)
        kind = _Batched if parts.guidance == "batched" else _Separate
        for denoiser in parts.denoisers.values():
            hooks.wrap(denoiser, "forward", kind(self, scale, hooks, denoiser).around)

    def conflict(self, other: Acceleration) -> str:
        if other.stage == "blocks" and not other.exact:
            return "what a cache keeps has both branches, and does not fit a call with one"
        if type(other).__name__ == "BranchParallel":
            return "each rank holds one branch, so there is none to leave out"
        return ""


def _asked(pipe: Any, args: tuple, kwargs: dict[str, Any]) -> float:
    known = inspect.signature(public_class(pipe).__call__).parameters
    given = {**dict(zip(list(known)[1:], args, strict=False)), **kwargs}
    name = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    default = known[name].default if name in known else 0.0
    value = given.get(name, default)
    return float(value) if isinstance(value, (int, float)) else 0.0


class _Branches:
    """What both ways of calling for two branches share."""

    def __init__(self, settings: GuidanceInterval, scale: ContextVar[float], hooks: Hooks, denoiser: Any):
        self.settings = settings
        self.scale = scale
        self.hooks = hooks
        self.denoiser = denoiser

    def outside(self, given: dict[str, Any]) -> Request | None:
        """The request, if this call belongs to a guided call of the pipeline at a level without guidance."""
        request = self.hooks.requests.current()
        if request is None or not request.call:
            return None
        # the pipeline's own word where it gives one: it knows of embedded guidance and of skipped layers
        own = getattr(request.pipe, "do_classifier_free_guidance", None)
        if not (own if isinstance(own, bool) else self.scale.get() > 1):
            return None
        times = told_rows(given[timestep_name(given)])
        levels = [level_of(request.pipe.scheduler, time) for time in times]
        inside = [self.settings.low < level <= self.settings.high for level in levels]
        return None if any(inside) else request


class _Batched(_Branches):
    """One call with the negative rows first, as diffusers orders them."""

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        given = denoiser_arguments(self.denoiser, args, kwargs)
        rows = len(next(iter(given.values())))
        skipped = rows % 2 == 0 and self.outside(given) is not None
        self.hooks.counter.count(skipped)
        if not skipped:
            return inner(*args, **kwargs)
        output = inner(**{name: _positive(value, rows) for name, value in given.items()})
        return with_sample(output, torch.cat([output_sample(output)] * 2))


class _Separate(_Branches):
    """Two calls on the same latents at the same time, the positive one first: the second is answered by the first."""

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        given = denoiser_arguments(self.denoiser, args, kwargs)
        request = self.outside(given)
        if request is None:
            self.hooks.counter.count(False)
            return inner(*args, **kwargs)
        kept = request.state((self, "positive"), dict)
        sample, told = next(iter(given.values())), told_rows(given[timestep_name(given)])
        if kept and kept["told"] == told and torch.equal(kept["sample"], sample) and _differs(kept["words"], given):
            self.hooks.counter.count(True)
            output = kept["output"]
            kept.clear()
            return output
        self.hooks.counter.count(False)
        output = inner(*args, **kwargs)
        kept.update(told=told, sample=sample, words=conditioning(given), output=output)
        return output


def _differs(words: list[Tensor], given: dict[str, Any]) -> bool:
    now = conditioning(given)
    return len(now) != len(words) or any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(now, words, strict=True)
    )


def _positive(value: Any, rows: int) -> Any:
    """The second half of whatever has a row for each of `rows`."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] < rows or value.shape[0] % rows:
            return value
        return value[value.shape[0] // 2 :]
    if isinstance(value, dict):
        return {name: _positive(part, rows) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_positive(part, rows) for part in value)
    return value

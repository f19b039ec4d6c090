"""Deep features of a UNet kept for some steps, while its outermost layers run at every step.

The idea is DeepCache's (https://arxiv.org/abs/2312.00858). What it needs to remember is one tensor, the deep input of
the up-layer where the kept part joins; the published helper keeps the output of every layer. Layers that are left out
pass on one channel of their input, so that the UNet's own forward runs as it is written. ControlNet's residuals reach
the layers that run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Verdict, check_number
from fastdiff.anatomy import anatomy
from fastdiff.caching.boundary import Boundary, Call
from fastdiff.caching.schedule import check_schedule, computes
from fastdiff.hooks import Hooks
from fastdiff.runtime.compile import LEAVES_OUT

_UNITS = {"resnets", "attentions", "downsamplers", "upsamplers"}


@dataclass(frozen=True)
class DeepFeatures(Acceleration):
    """Run only the outermost layers of a UNet at some steps. Lossy, bounded by PSNR.

    Args:
        branch: how many skip connections, counted from outside, still reach a layer that runs; 0 runs the last
            up-layer alone.
        interval: every how many steps to run the whole between the first `warm_up` and the last `tail` steps.
    """

    stage: ClassVar[str] = "blocks"
    branch: int = 0
    interval: int = 3
    warm_up: int = 3
    tail: int = 1

    def __post_init__(self):
        check_schedule("DeepFeatures", self.interval, self.warm_up, self.tail)
        check_number("DeepFeatures", "branch", self.branch, low=0, whole=True)

    def supports(self, pipe: Any) -> Verdict:
        """Refused for anything but a UNet of resnets and attentions with enough layers."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            reason = _refusal(denoiser)
            if reason:
                return Verdict(False, f"the {name} {reason}")
            layers = sum(len(block.resnets) for block in denoiser.up_blocks)
            if self.branch > layers - 2:
                return Verdict(False, f"the {name} has {layers} up-layers; branch goes from 0 to {layers - 2}")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser and its deep layers."""
        for denoiser in anatomy(pipe).denoisers.values():
            _Deep(self, hooks, pipe, denoiser)
        hooks.counter.held = lambda: hooks.requests.bytes_held


def _refusal(denoiser: Any) -> str:
    """Why a denoiser is no UNet this knows; empty when it is one."""
    if not all(hasattr(denoiser, name) for name in ("conv_in", "down_blocks", "mid_block", "up_blocks")):
        return "is no UNet: it has no down and up blocks with connections between them"
    if denoiser.mid_block is None:
        return "has no middle block"
    for block in (*denoiser.down_blocks, *denoiser.up_blocks):
        lists = {name for name, child in block.named_children() if isinstance(child, torch.nn.ModuleList)}
        if "resnets" not in lists or lists - _UNITS:
            extra = ", ".join(sorted(lists - _UNITS)) or "no resnets"
            return f"has a {type(block).__name__} with {extra}, whose order this does not know"
    return ""


@dataclass
class _Kept:
    """Of one branch: the deep features, and whether this call leaves layers out."""

    deep: Tensor | None = None
    shape: Any = None
    left_out: bool = False


class _Deep:
    """Decides for one UNet, and stands in for the layers that are left out."""

    def __init__(self, settings: DeepFeatures, hooks: Hooks, pipe: Any, denoiser: Any):
        self.settings, self.hooks = settings, hooks
        widths = [denoiser.conv_in.out_channels]
        deep: list[Any] = [denoiser.mid_block]
        for block in denoiser.down_blocks:
            layers = list(zip(block.resnets, _attentions(block), strict=True))
            for units in [*layers, *((one,) for one in getattr(block, "downsamplers", None) or ())]:
                deep += [one for one in units if one is not None] if len(widths) > settings.branch else []
                widths.append(units[0].out_channels)
        self.width = widths[settings.branch]
        outward = sum(len(block.resnets) for block in denoiser.up_blocks) - 1  # connections between here and outside
        entry = None
        for block in denoiser.up_blocks:
            for units in zip(block.resnets, _attentions(block), strict=True):
                deep += [one for one in units if one is not None] if outward > settings.branch else []
                entry = units[0] if outward == settings.branch else entry
                outward -= 1
            deep += list(getattr(block, "upsamplers", None) or ()) if outward >= settings.branch else []
        self.boundary = Boundary(hooks, pipe, denoiser, self.act)
        for unit in deep:
            hooks.wrap(unit, "forward", self.pass_on)
            hooks.set(unit, LEAVES_OUT, True)
        hooks.wrap(entry, "forward", self.join)

    def act(self, call: Call) -> Any:
        """The output of one call."""
        settings = self.settings
        kept: _Kept = self.boundary.state(call.request, "deep", _Kept)
        shape = (call.sample.shape, call.sample.dtype, call.sample.device)
        whole = kept.shape != shape or computes(call, settings.interval, settings.warm_up, settings.tail)
        kept.left_out, kept.shape = not whole and kept.deep is not None, shape
        if kept.left_out:
            call.compute.replace(**self._shallow_residuals(call))
        try:
            return call.compute()
        finally:
            self.hooks.counter.count(accelerated=kept.left_out)
            kept.left_out = False

    def _shallow_residuals(self, call: Call) -> dict[str, Any]:
        """Residuals given from outside without those for layers that are left out."""
        nothing = torch.zeros((), dtype=call.sample.dtype, device=call.sample.device)
        found: dict[str, Any] = {}
        down = call.compute.given("down_block_additional_residuals")
        if down is not None:
            found["down_block_additional_residuals"] = tuple(
                one if place <= self.settings.branch else nothing for place, one in enumerate(down)
            )
        for name in ("mid_block_additional_residual", "down_intrablock_additional_residuals"):
            given = call.compute.given(name)
            if given is not None:
                found[name] = nothing if isinstance(given, Tensor) else [nothing] * len(given)
        return found

    def _kept(self) -> _Kept | None:
        request = self.hooks.requests.current()
        return None if request is None else self.boundary.state(request, "deep", _Kept)

    def pass_on(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """A deep layer: run, or hand on one channel of what came in."""
        kept = self._kept()
        if kept is None or not kept.left_out:
            return inner(*args, **kwargs)
        came = args[0] if args else kwargs["hidden_states"]
        return (came[:, :1],) if kwargs.get("return_dict") is False else came[:, :1]

    def join(self, inner: Callable, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The outermost layer that runs at every step and takes deep features in: keep them, or put them back."""
        kept = self._kept()
        if kept is not None and kept.left_out:
            assert kept.deep is not None
            hidden_states = torch.cat([kept.deep, hidden_states[:, -self.width :]], dim=1)
        elif kept is not None:
            kept.deep = hidden_states[:, : -self.width].clone()
        return inner(hidden_states, *args, **kwargs)


def _attentions(block: Any) -> list[Any]:
    """One attention for each resnet of a block, None where it has none."""
    found = getattr(block, "attentions", None)
    return [None] * len(block.resnets) if found is None else list(found)

"""What a transformer's blocks add kept for some steps, on any transformer of diffusers.

As in Delta-DiT (https://arxiv.org/abs/2406.01125) the change from the first to the last block is kept and not the
output, so that every step begins from its own input. diffusers' FirstBlockCache does so for blocks in its registry and
crashes or is missing on others; here which output of a block becomes which input of the next is seen while they run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

from torch import Tensor

from fastdiff.acceleration import Acceleration, Verdict, check_number
from fastdiff.anatomy import anatomy, blocks, forward_names
from fastdiff.caching.boundary import Boundary, Call
from fastdiff.caching.schedule import check_schedule, computes
from fastdiff.hooks import Hooks
from fastdiff.runtime.compile import LEAVES_OUT


@dataclass(frozen=True)
class BlockResidual(Acceleration):
    """Run only the first blocks of a transformer at some steps, and add what the others added. Lossy, bounded by PSNR.

    Args:
        keep: blocks at the start of every list of blocks that run at every step.
        interval: every how many steps to run all between the first `warm_up` and the last `tail` steps.
    """

    stage: ClassVar[str] = "blocks"
    keep: int = 1
    interval: int = 2
    warm_up: int = 3
    tail: int = 1

    def __post_init__(self):
        check_schedule("BlockResidual", self.interval, self.warm_up, self.tail)
        check_number("BlockResidual", "keep", self.keep, low=0, whole=True)

    def supports(self, pipe: Any) -> Verdict:
        """Refused where there are no lists of blocks long enough."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            if not _regions(denoiser, self.keep):
                return Verdict(False, f"the {name} has no list of {self.keep + 2} transformer blocks or more")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser and the blocks that are left out at times."""
        for denoiser in anatomy(pipe).denoisers.values():
            _Blocks(self, hooks, pipe, denoiser)
        hooks.counter.held = lambda: hooks.requests.bytes_held


def _regions(denoiser: Any, keep: int) -> list[list[Any]]:
    """Of every list of blocks those beyond the first `keep`; at least two, so that they show how they are joined."""
    lists = groupby(blocks(denoiser), key=lambda found: found[0].rsplit(".", 1)[0])
    groups = [[block for _, block in group] for _, group in lists]
    return [group[keep:] for group in groups if len(group) >= keep + 2]


@dataclass
class _Region:
    """What one branch keeps of one region.

    Attributes:
        entered: inputs of its first block in this call; left: outputs of the block before, in this call.
        joints: for each output, the name of the next block's argument it becomes; None where it becomes none.
        residuals: what the region added to each; None for outputs that are nothing.
    """

    entered: dict[str, Any] = field(default_factory=dict)
    left: tuple[Any, ...] = ()
    joints: tuple[str | None, ...] = ()
    residuals: tuple[Any, ...] = ()


class _Blocks:
    """Decides for one denoiser."""

    def __init__(self, settings: BlockResidual, hooks: Hooks, pipe: Any, denoiser: Any):
        self.settings, self.hooks = settings, hooks
        self.regions = _regions(denoiser, settings.keep)
        self.boundary = Boundary(hooks, pipe, denoiser, self.act)
        for number, region in enumerate(self.regions):
            for place, block in enumerate(region):
                names = forward_names(block)
                last = place == len(region) - 1

                def around(
                    inner: Callable,
                    *args: Any,
                    number: int = number,
                    place: int = place,
                    last: bool = last,
                    names: tuple[str, ...] = names,
                    **kwargs: Any,
                ) -> Any:
                    given = {**dict(zip(names, args, strict=False)), **kwargs}
                    return self.block(inner, args, kwargs, given, number, place, last)

                hooks.wrap(block, "forward", around)
                hooks.set(block, LEAVES_OUT, True)

    def act(self, call: Call) -> Any:
        """The output of one call."""
        settings = self.settings
        kept: dict[Any, Any] = self.boundary.state(call.request, "blocks", dict)
        shape = (call.sample.shape, call.sample.dtype, call.sample.device)
        if kept.get("shape") != shape:
            kept.clear()
        found = [kept.setdefault(number, _Region()) for number in range(len(self.regions))]
        ready = all(region.residuals and any(region.joints) for region in found)
        left_out = ready and not computes(call, settings.interval, settings.warm_up, settings.tail)
        kept |= {"shape": shape, "left_out": left_out}
        try:
            return call.compute()
        finally:
            self.hooks.counter.count(accelerated=left_out)
            kept["left_out"] = False
            for region in found:
                region.entered, region.left = {}, ()

    def block(
        self, inner: Callable, args: tuple, kwargs: dict, given: dict[str, Any], number: int, place: int, last: bool
    ) -> Any:
        """A block's output: its own, or its input with (at the first of a region) what the region added before."""
        request = self.hooks.requests.current()
        kept = self.boundary.state(request, "blocks", dict) if request is not None else {}
        region: _Region | None = kept.get(number)
        if region is None:
            return inner(*args, **kwargs)
        if kept["left_out"]:
            parts = [None if name is None else given[name] for name in region.joints]
            if place == 0:
                parts = [
                    part if residual is None else part + residual
                    for part, residual in zip(parts, region.residuals, strict=True)
                ]
            return parts[0] if len(parts) == 1 else tuple(parts)
        if place == 0:
            region.entered = given
        else:
            region.joints = tuple(_name_of(part, given) for part in region.left)
        output = inner(*args, **kwargs)
        region.left = output if isinstance(output, tuple) else (output,)
        if last:
            region.residuals = tuple(
                None if name is None or not isinstance(part, Tensor) else part - region.entered[name]
                for name, part in zip(region.joints, region.left, strict=True)
            )
        return output


def _name_of(part: Any, given: dict[str, Any]) -> str | None:
    """The argument a block's output was given to the next block as."""
    return next((name for name, value in given.items() if value is part and part is not None), None)

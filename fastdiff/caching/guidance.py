"""Guidance with fewer calls of the negative branch: what it said is continued while the positive one is computed.

Guided outputs are ``negative + scale (positive - negative)`` and the negative branch, told nothing of the prompt,
changes least from step to step. FasterCache (https://arxiv.org/abs/2410.19355) reuses it in batches that diffusers
splits by itself; here both branches keep their own memory, in one call or in two.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from fastdiff.acceleration import Acceleration, Verdict, check_choice
from fastdiff.anatomy import anatomy
from fastdiff.caching.boundary import Boundary, Call, read, rebuild
from fastdiff.caching.history import ORDERS, History
from fastdiff.caching.levels import coordinate
from fastdiff.caching.schedule import check_schedule, computes
from fastdiff.hooks import Hooks


@dataclass(frozen=True)
class GuidanceReuse(Acceleration):
    """Compute the negative branch at some steps only. Lossy, bounded by PSNR.

    Args:
        interval: every how many steps to compute it between the first `warm_up` and the last `tail` steps.
        order: degree of the polynomial in the noise level that continues it; 0 repeats it.
    """

    stage: ClassVar[str] = "blocks"
    interval: int = 2
    order: int = 0
    warm_up: int = 3
    tail: int = 1

    def __post_init__(self):
        check_schedule("GuidanceReuse", self.interval, self.warm_up, self.tail)
        check_choice("GuidanceReuse", "order", self.order, ORDERS)

    def supports(self, pipe: Any) -> Verdict:
        """Refused where there is no negative branch."""
        parts = anatomy(pipe)
        if getattr(parts.denoiser.config, "guidance_embeds", False):
            return Verdict(False, "guidance is an input of this model, so there is no negative branch to leave out")
        if parts.guidance == "none":
            return Verdict(False, "this pipeline computes no negative branch that could be told from the positive one")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser of the pipeline."""
        parts = anatomy(pipe)
        for denoiser in parts.denoisers.values():
            _Reuse(self, hooks, pipe, denoiser, parts.guidance)
        hooks.counter.held = lambda: hooks.requests.bytes_held


class _Reuse:
    """Decides for one denoiser."""

    def __init__(self, settings: GuidanceReuse, hooks: Hooks, pipe: Any, denoiser: Any, guidance: str):
        self.settings = settings
        self.counter = hooks.counter
        self.guidance = guidance
        self.boundary = Boundary(hooks, pipe, denoiser, self.act)

    def act(self, call: Call) -> Any:
        """The output of one call."""
        settings, keep = self.settings, self.settings.order + 1
        rows = _negative_rows(call, self.boundary, self.guidance)
        history: History = self.boundary.state(call.request, "negative", History)
        signature = (call.sample.shape, call.sample.dtype, call.sample.device, call.return_dict, tuple(rows))
        known = history.fits(signature) and bool(rows) and call.level is not None
        if not known or computes(call, settings.interval, settings.warm_up, settings.tail):
            output = call.compute()
            value = read(output)
            if rows and value is not None and call.level is not None:
                history.template = rebuild(output)
                history.push(value[rows].clone(), coordinate(self.boundary.scheduler, call.level), keep)
            self.counter.count(accelerated=False)
            return output
        assert call.level is not None
        continued = history.continued(coordinate(self.boundary.scheduler, call.level), 1.0)
        others = [row for row in range(len(call.sample)) if row not in rows]
        self.counter.count(accelerated=True)
        if not others:
            return history.template(continued)  # type: ignore[operator]
        value = read(call.compute(others))
        assert value is not None, "an output that could be read once can be read again"
        whole = value.new_empty((len(call.sample), *value.shape[1:]))
        whole[rows], whole[others] = continued, value
        return history.template(whole)  # type: ignore[operator]


def _negative_rows(call: Call, boundary: Boundary, guidance: str) -> list[int]:
    """Rows of a call that belong to the negative branch: half of them, all, or none.

    Args:
        guidance: how the pipeline guides, as `fastdiff.anatomy` has it.
    """
    count, branch = len(call.sample), call.request.branch
    branches = len(call.request.state((boundary, "branches"), list))
    if guidance == "separate":
        # diffusers' pipelines that call twice call with the prompt first
        return list(range(count)) if branch == 1 else []
    guided = getattr(call.request.pipe, "do_classifier_free_guidance", True)
    half = count // 2
    if guided and count % 2 == 0 and call.sample[:half].equal(call.sample[half:]):
        return list(range(half))
    # a batched pipeline's denoiser called for one branch at a time, negative first as in its batch
    return list(range(count)) if call.request.pipe is None and branches > 1 and branch == 0 else []

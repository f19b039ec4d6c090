"""Patch parallelism: every rank denoises one strip of the picture, for any UNet or DiT whose layers are known.

Three policies. *sync* waits for what other strips compute now and equals one device up to rounding. *stale* uses what
they computed one step earlier (DistriFusion, Li et al. 2024, arXiv 2402.19481), so that sending hides behind computing.
*partial* also lets attention see only a portion of the two neighbouring strips, and sends only that (PCPP, Zhang et al.
2024, arXiv 2412.02962).
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_choice, check_number
from fastdiff.anatomy import anatomy, conditioning, denoiser_arguments, step_count
from fastdiff.hooks import Hooks, Request
from fastdiff.parallel import layers
from fastdiff.parallel.agreement import check_same_input, enter, group_of, guard_call, together
from fastdiff.parallel.communicator import Communicator, current
from fastdiff.parallel.exchange import History, Pass, output_sample, with_sample
from fastdiff.parallel.rules import Cut, Rules, find
from fastdiff.parallel.strips import Strips

POLICIES = ("sync", "stale", "partial")
FEW_STEPS = 8
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


@dataclass(frozen=True)
class PatchParallel(Acceleration):
    """Cut the picture into one strip of rows a rank.

    Every rank runs the whole pipeline with the same arguments; launch with torchrun, or inside
    `fastdiff.parallel.communicator.using`. One rank alone installs nothing.

    Args:
        policy: "sync" (exact), "stale" or "partial".
        portion: for "partial", the part of an equal strip that attention sees of each neighbour; rounded to rows.
        warmup: for "stale" and "partial", how many steps after the first are still in sync.
        resync: for "stale" and "partial", put in a step in sync every so many; 0 never.
        shares: relative speed of each rank, for strips of unequal height; empty for equal strips.
        rebalance: measure the ranks' speed every so many steps and cut anew; 0 never.
        groups: ranks form so many groups, each of which shares a picture; 2 beside `BranchParallel(2)`.
        few_steps: allow "stale" and "partial" at 8 steps or fewer, where most steps are warm-up and the rest far apart.
    """

    stage: ClassVar[str] = "devices"

    policy: str = "sync"
    portion: float = 0.3
    warmup: int = 4
    resync: int = 0
    shares: tuple[float, ...] = ()
    rebalance: int = 0
    groups: int = 1
    few_steps: bool = False

    def __post_init__(self):
        owner = type(self).__name__
        check_choice(owner, "policy", self.policy, POLICIES)
        check_number(owner, "portion", self.portion, 0)
        check_number(owner, "warmup", self.warmup, 0, whole=True)
        check_number(owner, "resync", self.resync, 0, whole=True)
        check_number(owner, "rebalance", self.rebalance, 0, whole=True)
        check_number(owner, "groups", self.groups, 1, whole=True)
        for share in self.shares:
            check_number(owner, "shares", share, 1e-6)

    @property
    def exact(self) -> bool:
        """Only in sync."""
        return self.policy == "sync"

    def conflict(self, other: Acceleration) -> str:
        branches = getattr(other, "branches", None)
        if type(other).__name__ == "BranchParallel" and branches != self.groups:
            return f"with {branches} branches, set PatchParallel(groups={branches})"
        if type(other).__name__ == "Compile":
            return "ranks exchange rows inside the model, which a compiled graph cannot; compile without it"
        return ""

    def supports(self, pipe: Any) -> Verdict:
        ranks = current().size // self.groups
        if self.shares and len(self.shares) != ranks:
            return Verdict(False, f"{len(self.shares)} shares were given for {ranks} ranks; give one for each")
        for name, denoiser in anatomy(pipe).denoisers.items():
            refused = find(denoiser).refused
            if refused:
                return Verdict(False, f"{name} cannot be cut into strips: {refused}")
        return Verdict(True, "" if ranks > 1 else "one rank: nothing was installed; launch more with torchrun")

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        communicator = group_of(self.groups, inner=True)
        if communicator.size == 1:
            hooks.counter.expects = "nothing"
            return
        parts = anatomy(pipe)
        # histories live in their requests; this only looks at those that are still there
        histories: weakref.WeakSet[History] = weakref.WeakSet()
        for denoiser in parts.denoisers.values():
            rules, cut = find(denoiser), Cut()
            rules.install(hooks, cut)
            wrapper = _Denoiser(self, denoiser, rules, cut, communicator, hooks, parts.guidance == "separate")
            wrapper.histories = histories
            hooks.wrap(denoiser, "forward", wrapper)
        hooks.counter.held = lambda: sum(history.nbytes for history in histories)
        guard_call(hooks, pipe, communicator)


class _Denoiser:
    """Runs one denoiser on this rank's strip. Every call, on every rank, is one forward of the whole picture."""

    def __init__(
        self,
        settings: PatchParallel,
        denoiser: Any,
        rules: Rules,
        cut: Cut,
        communicator: Communicator,
        hooks: Hooks,
        separate: bool,
    ):
        self.settings = settings
        self.denoiser = denoiser
        self.rules = rules
        self.cut = cut
        self.communicator = communicator
        self.hooks = hooks
        self.separate = separate
        self.multiple = granularity(denoiser)
        self.histories: weakref.WeakSet[History] = weakref.WeakSet()
        self.shares: Sequence[float] = settings.shares or (1.0,) * communicator.size

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = denoiser_arguments(self.denoiser, args, kwargs)
        name = next(iter(arguments))
        sample = arguments[name]
        strips = self._strips(sample)
        request = self.hooks.requests.current()
        history = self._history(request, arguments, sample, strips)
        fresh = enter(self.communicator, self._wants_fresh(history))
        self._check(request, sample)
        forward = Pass(self.communicator, strips, fresh, history, self._portion)
        with together(self.communicator), self.cut.during(forward):
            began, waited = perf_counter(), self.communicator.waited_s
            arguments = self._cut(arguments, name, forward)
            output = inner(**arguments)
            busy = perf_counter() - began - (self.communicator.waited_s - waited)
            whole = self._join(output_sample(output), strips)
            self._rebalance(strips, busy, history)
        if history is not None:
            history.forwards += 1
        self.hooks.counter.count(True)
        return with_sample(output, whole)

    @property
    def _portion(self) -> float | None:
        return self.settings.portion if self.settings.policy == "partial" else None

    def _strips(self, sample: Tensor) -> Strips:
        try:
            return Strips.share(sample.shape[-2], self.shares, self.multiple)
        except ValueError as error:
            raise Unsupported(str(error)) from error

    def _history(
        self, request: Request | None, arguments: dict[str, Any], sample: Tensor, strips: Strips
    ) -> History | None:
        if self.settings.exact:
            return None
        if request is None:
            self.hooks.counter.miss("ran in sync outside a request; use the pipeline, or `with handle.request():`")
            return None
        steps = None if request.pipe is None else step_count(request.pipe)
        if steps is not None and steps <= FEW_STEPS and not self.settings.few_steps:
            raise Unsupported(
                f"{steps} steps are too few for policy {self.settings.policy!r}: the first "
                f"{self.settings.warmup + 1} are in sync and the others too different from each other; use "
                "policy='sync', more steps, or few_steps=True"
            )
        branch = request.branch
        if branch is None and self.separate:
            branch = tuple(float(tensor.double().sum()) for tensor in conditioning(arguments))
        history = request.state(("patch", id(self), branch, tuple(sample.shape), strips.bounds), History)
        self.histories.add(history)
        return history

    def _wants_fresh(self, history: History | None) -> bool:
        if history is None or history.forwards <= self.settings.warmup:
            return True
        every = self.settings.resync
        return bool(every) and (history.forwards - self.settings.warmup) % every == 0

    def _check(self, request: Request | None, sample: Tensor) -> None:
        """Once a request: all ranks hold the same input, and no layer has come since that has no rule."""
        if request is not None and request.state(("patch checked", id(self)), list):
            return
        added = find(self.denoiser).layers - self.rules.layers
        if added:
            raise Unsupported(
                f"layers were added since this was applied ({min(added)}); load adapters first, then accelerate"
            )
        check_same_input(self.communicator, sample)
        if request is not None:
            request.state(("patch checked", id(self)), list).append(True)

    def _cut(self, arguments: dict[str, Any], name: str, forward: Pass) -> dict[str, Any]:
        _refuse_uncuttable(arguments, name)
        strips, sample = forward.strips, arguments[name]
        low, high = strips.own(self.communicator.rank)
        # a UNet looks at its input's height to see whether halves will be uneven; rows of a neighbour would mislead it
        if self.rules.entry and strips.rows % self.multiple == 0:
            low, high = layers.kernel_of(self.denoiser.conv_in).needs((low, high))
            low, high = max(0, low), min(strips.rows, high)
            forward.halo_in_input = True
        forward.whole = sample
        cut = {**arguments, name: sample[..., low:high, :]}
        for residual in _RESIDUALS:
            if arguments.get(residual) is not None:
                cut[residual] = _cut_residuals(arguments[residual], strips, self.communicator.rank)
        return cut

    def _join(self, part: Tensor, strips: Strips) -> Tensor:
        shapes = [(*part.shape[:-2], rows, part.shape[-1]) for rows in strips.heights]
        parts = self.communicator.gather("output", part, shapes).wait()
        return torch.cat(list(parts.values()), dim=-2)

    def _rebalance(self, strips: Strips, busy: float, history: History | None) -> None:
        every = self.settings.rebalance
        if not every:
            return
        self.forwards = getattr(self, "forwards", 0) + 1
        if self.forwards % every:
            return
        seconds = self.communicator.gather("balance", torch.tensor([busy], dtype=torch.float64)).wait()
        self.shares = balanced(strips.heights, [float(second) for second in seconds.values()])


def balanced(heights: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
    """Shares of the rows that would have kept all ranks busy equally long, given how long each took for its own."""
    return tuple(rows / max(second, 1e-9) for rows, second in zip(heights, seconds, strict=True))


def granularity(model: Any) -> int:
    """Rows that must stay together: the model's total downsampling, or the rows of a patch."""
    patch = getattr(model.config, "patch_size", None)
    if patch:
        return patch if isinstance(patch, int) else int(patch[-2])
    channels = getattr(model.config, "block_out_channels", None) or (1,)
    return 2 ** (len(channels) - 1)


def _refuse_uncuttable(arguments: dict[str, Any], name: str) -> None:
    sample = arguments[name]
    if (arguments.get("cross_attention_kwargs") or {}).get("ip_adapter_masks") is not None:
        raise Unsupported("masks of IP-Adapters follow the whole picture; leave them out, or run on one rank")
    if arguments.get("block_controlnet_hidden_states") is not None:
        raise Unsupported("residuals of this transformer's ControlNet are tokens of the whole picture; run on one rank")
    for other, value in arguments.items():
        if other in (name, *_RESIDUALS) or not isinstance(value, Tensor) or value.dim() < 4:
            continue
        if value.shape[-2:] == sample.shape[-2:]:
            raise Unsupported(f"{other} has the picture's shape, and no rule says how to cut it; run on one rank")


def _cut_residuals(value: Any, strips: Strips, rank: int) -> Any:
    if isinstance(value, Tensor):
        low, high = strips.level(value.shape[-2]).own(rank)
        return value[..., low:high, :]
    return type(value)(_cut_residuals(part, strips, rank) for part in value)

"""Sparse and 8-bit attention for any denoiser of diffusers, checked while it runs."""

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fastdiff.acceleration import Acceleration, Verdict, check_choice, check_number
from fastdiff.anatomy import anatomy, attention_backend, attentions, parallel_config
from fastdiff.attention.far import FAR, Nothing, near
from fastdiff.attention.plug import Call, Plug
from fastdiff.attention.selection import SELECTORS, Selector
from fastdiff.hooks import Hooks
from fastdiff_kernels.attention import PRECISIONS, Selection, attention, blocks_in

log = logging.getLogger(__name__)
Choice = tuple[str, float, float, float, str, str]


@dataclass(frozen=True)
class SparseAttention(Acceleration):
    """Attend to the key blocks that matter, and let memory stand for the rest. Lossy, bounded by PSNR.

    Args:
        density: share of key blocks computed, over 0 to 1; 1 with 8 bits is dense 8-bit attention.
        select: how blocks are chosen, one of `fastdiff.attention.selection.SELECTORS`.
        far: what stands for the others, one of `fastdiff.attention.far.FAR`.
        far_bytes: memory that kept far parts of one request may take; layers beyond it take "centroid", which keeps
            nothing, and the report says so. 0 for no limit.
        precision: "exact", "int8" or "int8_fp8"; faster on GPUs only, on a CPU it is emulated.
        query_block, key_block: tokens in a block; powers of two from 16 for Triton.
        warm_up: first denoiser calls of each branch with full attention; refresh: every how many calls after them
            attention is full again; 0 for never.
        minimum_tokens: shorter sequences keep exact attention.
        check_every: every how many sparse calls of a layer one query block is computed densely and compared; 0 for
            never. check_limit: relative L1 error at which the layer is exact for the rest of the request.
        budget: rows of (layer, lowest timestep, highest timestep, density, precision, far) from a calibration; where
            one matches it rules, and a layer in none of them stays exact.
    """

    stage: ClassVar[str] = "attention"
    density: float = 0.25
    select: str = "mass"
    far: str = "centroid"
    far_bytes: int = 0
    precision: str = "exact"
    query_block: int = 128
    key_block: int = 64
    warm_up: int = 3
    refresh: int = 5
    minimum_tokens: int = 1024
    check_every: int = 0
    check_limit: float = 0.5
    budget: tuple[Choice, ...] = ()

    def __post_init__(self):
        own = type(self).__name__
        check_number(own, "density", self.density, low=1e-6, high=1)
        check_choice(own, "select", self.select, SELECTORS)
        check_choice(own, "far", self.far, FAR)
        check_choice(own, "precision", self.precision, PRECISIONS)
        for name in ("query_block", "key_block", "minimum_tokens"):
            check_number(own, name, getattr(self, name), low=1, whole=True)
        for name in ("warm_up", "refresh", "check_every", "far_bytes"):
            check_number(own, name, getattr(self, name), low=0, whole=True)
        check_number(own, "check_limit", self.check_limit, low=0)
        object.__setattr__(self, "budget", tuple(map(tuple, self.budget)))
        for row in self.budget:
            if len(row) != 6:
                raise ValueError(f"{own}: a budget row is (layer, low, high, density, precision, far), not {row}")
            check_number(own, "budget density", row[3], low=1e-6, high=1)
            check_choice(own, "budget precision", row[4], PRECISIONS)
            check_choice(own, "budget far", row[5], FAR)
        needs_full = FAR[self.far].remembers or SELECTORS[self.select].when != "step"
        if needs_full and self.warm_up == 0:
            raise ValueError(
                f"{own}: select={self.select!r} with far={self.far!r} learns from full steps; set warm_up=1"
            )

    def supports(self, pipe: Any) -> Verdict:
        """Refused where attention does not pass through torch's function, and under context parallelism."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            if not attentions(denoiser):
                return Verdict(False, f"the {name} has no attention module that diffusers recognises")
            backend = attention_backend(denoiser)
            if backend != "native":
                return Verdict(
                    False,
                    f"the {name} computes attention with diffusers' backend {backend!r}, which takes no selection; "
                    "call set_attention_backend('native') first",
                )
            if parallel_config(denoiser) is not None:
                return Verdict(
                    False, f"the {name} runs diffusers' context parallelism, whose ranks see parts of the keys"
                )
            on_cpu = next(denoiser.parameters()).device.type == "cpu"
            if on_cpu and (self.precision != "exact" or any(row[4] != "exact" for row in self.budget)):
                return Verdict(True, "8 bits are emulated on a CPU: the result is theirs, the speed is not")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Take over the attention of every denoiser."""
        runs = []
        for denoiser in anatomy(pipe).denoisers.values():
            run = Run(self, hooks)
            run.plug = Plug(hooks, denoiser, run.attend, self.minimum_tokens)
            runs.append(run)
        hooks.counter.held = lambda: hooks.requests.bytes_held
        hooks.counter.describe = lambda: "; ".join(run.describe() for run in runs)


@dataclass
class Memory:
    """What a layer keeps from call to call of one branch.

    Attributes:
        asked: name of the far part that was asked for, which memory may have been too short for.
        since: sparse calls since the last full one; None before the first.
    """

    shape: tuple[int, ...] = ()
    selection: Selection | None = None
    far: Nothing = field(default_factory=Nothing)
    asked: str = ""
    since: int | None = None
    sparse_calls: int = 0
    exact: bool = False


class Run:
    """Decides for each attention call of one denoiser how it is computed."""

    def __init__(self, settings: SparseAttention, hooks: Hooks):
        self.settings = settings
        self.hooks = hooks
        self.plug: Plug | None = None
        self.selector: Selector = SELECTORS[settings.select](settings.query_block, settings.key_block)
        self.pairs = [0.0, 0.0]  # block pairs computed, and there were, over all calls that the plug was given

    def attend(self, call: Call) -> Tensor | None:
        """The output of one call; None for exact attention."""
        choice = self.choice(call)
        memory: Memory = call.moment.state((self, call.layer), Memory)
        if choice is None or memory.exact or (choice[0] == 1 and choice[1] == "exact"):
            self._count(1.0)
            return None
        density, precision, far = choice
        if density == 1:
            self._count(1.0)
            call.moment.engaged = True
            return near(call, None, precision)[0]
        if memory.shape != tuple(call.q.shape) or memory.asked != far:
            memory.shape, memory.since, memory.selection, memory.asked = tuple(call.q.shape), None, None, far
            memory.far = FAR[self._affordable(call, far)](precision)
        memory.far.precision = precision
        try:
            return self._sparse(call, memory, density)
        except ValueError as error:
            # a grid that cannot be found is no reason to stop a run, but one to say so
            self.hooks.counter.miss(f"keeps {call.layer} exact: {error}")
            memory.exact = True
            return None

    def _affordable(self, call: Call, far: str) -> str:
        """The far part, or the one that needs no memory where this one's would not fit any more."""
        limit = self.settings.far_bytes
        if not limit or not FAR[far].remembers:
            return far
        taken = call.moment.request.state((self, "far bytes"), lambda: [0])
        # one byte a channel and a float32 a row; Re-ttention keeps its residual in the dtype of q
        bytes_each = call.q.element_size() if far == "ratio" else 1
        needed = call.q.numel() * bytes_each + 4 * call.q.shape[:3].numel()
        if taken[0] + needed > limit:
            self.hooks.counter.note(f"{call.layer} stands in by centroids: its far part exceeds far_bytes={limit}")
            return "centroid"
        taken[0] += needed
        return far

    def _sparse(self, call: Call, memory: Memory, density: float) -> Tensor:
        settings, moment = self.settings, call.moment
        warm = moment.step < settings.warm_up
        late = settings.refresh and memory.since is not None and memory.since >= settings.refresh - 1
        first = memory.since is None and (memory.far.remembers or self.selector.when != "step")
        if warm or late or first:
            self._count(1.0)
            # of the first full steps only the last is learned from
            return self._full(call, memory, density) if moment.step >= settings.warm_up - 1 else near(call, None)[0]
        if self.selector.when == "step" or memory.selection is None:
            memory.selection = self.selector.choose(call, density)
        chosen = memory.selection
        output = memory.far.sparse(call, chosen)
        memory.since = (memory.since or 0) + 1
        memory.sparse_calls += 1
        moment.engaged = True
        self._count(chosen.blocks.shape[-1] / blocks_in(call.k.shape[2], settings.key_block))
        if settings.check_every and memory.sparse_calls % settings.check_every == 0:
            self._check(call, memory, output)
        return output

    def _full(self, call: Call, memory: Memory, density: float) -> Tensor:
        """Full attention, from which selection and far part are learned."""
        output, lse = near(call, None)
        if memory.selection is None or self.selector.when == "refresh":
            memory.selection = self.selector.choose(call, density, lse)
        if memory.far.remembers:
            memory.far.full(call, self._selection(call, memory, density), output, lse)
        memory.since = 0
        return output

    def _selection(self, call: Call, memory: Memory, density: float) -> Selection:
        # what stands for the keys left out must be of the keys that will be left out
        if memory.selection is None or self.selector.when == "step":
            memory.selection = self.selector.choose(call, density)
        return memory.selection

    def _count(self, share: float) -> None:
        self.pairs = [self.pairs[0] + share, self.pairs[1] + 1]

    def choice(self, call: Call) -> tuple[float, str, str] | None:
        """Density, precision and far part of one call; None for exact attention."""
        settings = self.settings
        if not settings.budget:
            return settings.density, settings.precision, settings.far
        for layer, low, high, density, precision, far in settings.budget:
            if layer == call.layer and low <= call.moment.timestep <= high:
                return density, precision, far
        return None

    def _check(self, call: Call, memory: Memory, output: Tensor) -> None:
        """Compute one query block densely and compare; the block moves on with every check."""
        size = self.settings.query_block
        blocks = blocks_in(call.q.shape[2], size)
        start = (memory.sparse_calls // self.settings.check_every * 7919 % blocks) * size
        rows = slice(start, start + size)
        exact, _ = attention(call.q[:, :, rows], call.k, call.v, scale=call.scale, lengths=call.lengths)
        difference = (output[:, :, rows].float() - exact.float()).abs().sum()
        error = float(difference / exact.float().abs().sum().clamp(min=1e-30))
        if not error <= self.settings.check_limit:
            memory.exact = True
            reason = f"fell back to exact attention in {call.layer}: off by {error:.3f} of {self.settings.check_limit}"
            self.hooks.counter.miss(reason)
            log.warning("SparseAttention %s", reason)

    def describe(self) -> str:
        """Say what share of block pairs was computed, full steps counted, and what stayed exact."""
        computed, there = self.pairs
        share = f"{computed / there:.2f} of all block pairs computed" if there else "no attention call fits"
        return "; ".join(filter(None, (share, self.plug.describe() if self.plug else "")))

"""diffusers' own cache hooks with the guards they lack.

diffusers keeps a cache's state on the model, under names such as "cond" that every request shares, and clears it at
the end of a call that succeeds. Here the hooks are diffusers' and the state is ours: it belongs to a request and a
guidance branch, and is gone when the request ends. Branches are told apart by what they are conditioned on, so it does
not matter whether the pipeline opens a `cache_context`. The first steps and the last are always computed, and no more
than `max_run` steps in a row are taken from memory.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_choice, check_number
from fastdiff.anatomy import (
    COMPILED_CALL,
    HOOK_REGISTRY,
    anatomy,
    attentions,
    block_metadata,
    blocks,
    denoiser_arguments,
    diffusers_hooks,
    forward_names,
    is_last_step,
    step_count,
)
from fastdiff.caching.branches import branch_of
from fastdiff.hooks import MISSING, Hooks, Request, Requests

METHODS = ("first_block", "taylorseer", "pyramid_attention", "mag")


@dataclass(frozen=True)
class DiffusersCache(Acceleration):
    """Reuse what changes little from one step to the next, through diffusers' cache hooks. Lossy, bounded by PSNR.

    Args:
        method: "first_block" skips the other blocks while the first one's residual changes little; "taylorseer"
            forecasts attention outputs linearly and "pyramid_attention" repeats them, both on a fixed schedule;
            "mag" skips blocks while the product of calibrated residual ratios stays near one.
        threshold: first_block: relative change below which blocks are skipped; mag: accumulated error allowed.
        interval: taylorseer and pyramid_attention: every how many steps to compute.
        warm_up: steps computed before anything is reused.
        max_run: most steps in a row taken from memory.
        ratios: mag: one ratio per step, from diffusers' calibration of this model with this number of steps.
    """

    stage: ClassVar[str] = "blocks"
    method: str = "first_block"
    threshold: float = 0.08
    interval: int = 3
    warm_up: int = 3
    max_run: int = 2
    ratios: tuple[float, ...] = ()

    def __post_init__(self):
        check_choice("DiffusersCache", "method", self.method, METHODS)
        check_number("DiffusersCache", "threshold", self.threshold, low=0)
        check_number("DiffusersCache", "interval", self.interval, low=1, whole=True)
        check_number("DiffusersCache", "warm_up", self.warm_up, low=2, whole=True)
        check_number("DiffusersCache", "max_run", self.max_run, low=0, whole=True)
        object.__setattr__(self, "ratios", tuple(self.ratios))
        for ratio in self.ratios:
            check_number("DiffusersCache", "ratios", ratio, low=0)
        if (self.method == "mag") != bool(self.ratios):
            raise ValueError("DiffusersCache: ratios belong to method='mag' and are needed for it")

    def supports(self, pipe: Any) -> Verdict:
        """Refused where diffusers' hook would crash or match nothing, and beside another cache."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            if getattr(denoiser, "is_cache_enabled", False):
                return Verdict(False, f"the {name} has a diffusers cache already; call disable_cache() first")
            if hasattr(denoiser, "_orig_mod") or getattr(denoiser, COMPILED_CALL, None) is not None:
                return Verdict(False, f"the {name} is compiled and cache hooks would break its graph; add Compile last")
            reason = refusal(denoiser, self.method)
            if reason:
                return Verdict(False, f"{name}: {reason}")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Install diffusers' hooks, give them request-scoped state, and stand around the denoiser to steer them."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            steering = _Steering(self, hooks, denoiser)
            before = {part: _attributes(part) for part in denoiser.modules()}
            known = {id(hook) for _, _, hook in diffusers_hooks(denoiser)}
            _INSTALL[self.method](self, denoiser, steering)
            new = [entry for entry in diffusers_hooks(denoiser) if id(entry[2]) not in known]
            if not new:
                raise Unsupported(f"DiffusersCache: {self.method} matched no module of the {name}")
            for part, attributes in before.items():
                for attribute, value in attributes.items():
                    if part.__dict__.get(attribute, MISSING) is not value:
                        hooks.adopt(part, attribute, value)
            for part, hook_name, hook in new:
                registry = part.__dict__[HOOK_REGISTRY]
                hooks.on_undo(lambda registry=registry, name=hook_name: registry.remove_hook(name, recurse=False))
                steering.scope(hook)
            hooks.counter.note(f"{name}: {self.method} on {len(new)} modules")
            hooks.wrap(denoiser, "forward", steering.around)
        hooks.counter.held = lambda: hooks.requests.bytes_held


def refusal(denoiser: Any, method: str) -> str:
    """Why diffusers' hook of this method is not sound on this denoiser; empty when it is."""
    if method in ("taylorseer", "pyramid_attention"):
        return "" if attentions(denoiser) else "has no attention module that diffusers recognises"
    found = blocks(denoiser)
    if len(found) < 2:
        return "has no list of transformer blocks, without which diffusers' block caches raise or do nothing"
    metadata = [(block, block_metadata(block)) for _, block in found]
    for block, known in metadata:
        if known is None:
            return f"diffusers has no entry for the block {type(block).__name__} in its registry and would raise"
        argument = "hidden_states" if method == "first_block" else known.hidden_states_argument_name
        if argument not in forward_names(block):
            return f"diffusers' hook reads {argument!r}, which {type(block).__name__} does not take, and would raise"
    (first, head), (last, tail) = metadata[0], metadata[-1]
    if (head.return_encoder_hidden_states_index is None) != (tail.return_encoder_hidden_states_index is None):
        return f"{type(first).__name__} and {type(last).__name__} return different things and diffusers subtracts them"
    if method == "first_block" and getattr(last, "context_pre_only", False):
        return f"the last {type(last).__name__} returns no text stream, and diffusers' hook subtracts from it"
    return ""


class _Progress:
    """How far one branch of one request has come."""

    def __init__(self):
        self.calls = 0
        self.run = 0
        self.compute = True


class _Steering:
    """Decides per denoiser call whether hooks must compute, and gives their state to the request."""

    def __init__(self, settings: DiffusersCache, hooks: Hooks, denoiser: Any):
        self.settings = settings
        self.hooks = hooks
        self.requests = hooks.requests
        self.denoiser = denoiser
        # of the block caches, whose hooks share one; the others have one each
        self.states: ScopedStates | None = None
        self._scoped: dict[int, tuple[Any, ScopedStates]] = {}

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser inside its request and branch."""
        request = self.requests.current()
        if request is None:
            with self.requests.open(stray=True):
                return self.around(inner, *args, **kwargs)
        outer = request.branch
        request.branch = branch_of(request, self, denoiser_arguments(self.denoiser, args, kwargs))
        try:
            progress = self.progress()
            progress.compute = self._decide(request, progress)
            if progress.compute and self.settings.method == "mag":
                self._state().previous_residual = None  # without one, diffusers' hook computes
            output = inner(*args, **kwargs)
            reused = self._reused(progress)
            progress.calls += 1
            progress.run = progress.run + 1 if reused else 0
        finally:
            request.branch = outer
        self.hooks.counter.count(reused)
        return output

    def progress(self) -> _Progress:
        """The progress of the current request and branch."""
        request = self.requests.current()
        assert request is not None
        return request.state((self, "progress", request.branch), _Progress)

    def forced(self) -> bool:
        """True when nothing may be taken from memory in this call."""
        return self.progress().compute

    def scope(self, hook: Any) -> None:
        """Move a hook's state into the request, and its decision here."""
        if hasattr(hook, "state_manager"):
            manager = hook.state_manager
            if not isinstance(manager, ScopedStates):
                # hooks that share a manager must go on sharing it; it is kept, so that its id stays its own
                make = functools.partial(manager._state_cls, *manager._init_args, **manager._init_kwargs)
                fresh = (manager, ScopedStates(self.requests, make))
                hook.state_manager = self._scoped.setdefault(id(manager), fresh)[1]
            self.states = hook.state_manager
            if hasattr(hook, "_measure_should_compute"):
                hook._measure_should_compute = functools.partial(self._measure, hook.state_manager)
        elif hasattr(hook, "state"):
            hook.state = ScopedState(ScopedStates(self.requests, type(hook.state)))

    def _measure(self, states: "ScopedStates") -> tuple[bool, Any]:
        """What a TaylorSeer hook asks: compute now or forecast?"""
        state = states.get_state()
        state.current_step += 1
        return self.forced(), state

    def _state(self) -> Any:
        assert self.states is not None
        return self.states.get_state()

    def _decide(self, request: Request, progress: _Progress) -> bool:
        settings, calls = self.settings, progress.calls
        last = request.pipe is not None and is_last_step(request.pipe, calls)
        if calls < settings.warm_up or last:
            return True
        if settings.method == "first_block":
            return False  # the hook counts the run of each row
        if progress.run >= settings.max_run:
            return True
        if settings.method == "mag":
            steps = step_count(request.pipe)
            if steps is not None and steps != len(settings.ratios):
                self.hooks.counter.miss(f"has {len(settings.ratios)} ratios and the run takes {steps} steps", request)
                return True
            return False
        return (calls - settings.warm_up) % settings.interval == settings.interval - 1

    def _reused(self, progress: _Progress) -> bool:
        if self.settings.method in ("taylorseer", "pyramid_attention"):
            return not progress.compute
        return not self._state().should_compute


class ScopedStates:
    """Stands where diffusers keeps a `StateManager`; the state lives in the current request, per guidance branch."""

    _context = "the current request"  # diffusers' hooks ask whether there is one

    def __init__(self, requests: Requests, make: Callable[[], Any]):
        self.requests = requests
        self.make = make

    def get_state(self) -> Any:
        """The state of the current request and branch."""
        request = self.requests.current()
        assert request is not None, "cache hooks run beneath the denoiser's forward, which opens a request"
        return request.state((self, request.branch), self.make)

    def set_context(self, context: Any) -> None:
        """Ignored: names that pipelines give are shared by all requests."""

    def reset(self) -> None:
        """Ignored: the request drops its state when it ends."""


class ScopedState:
    """Stands where a hook keeps its one state object; reads and writes go to the current request's."""

    def __init__(self, states: ScopedStates):
        object.__setattr__(self, "_states", states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._states.get_state(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._states.get_state(), name, value)

    def reset(self) -> None:
        """Ignored: the request drops its state when it ends."""


def _attributes(part: Any) -> dict[str, Any]:
    return {name: part.__dict__.get(name, MISSING) for name in ("forward", HOOK_REGISTRY)}


def _install_first_block(settings: DiffusersCache, denoiser: Any, steering: _Steering) -> None:
    from diffusers.hooks import HookRegistry

    from fastdiff.caching.first_block import RowHead, RowState, RowTail

    states: Any = ScopedStates(steering.requests, RowState)
    found = [block for _, block in blocks(denoiser)]
    for index, block in enumerate(found):
        hook: Any = RowTail(states, is_tail=index == len(found) - 1)
        if index == 0:
            hook = RowHead(states, settings.threshold, settings.max_run, steering.forced)
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "fastdiff_first_block")


def _install_taylorseer(settings: DiffusersCache, denoiser: Any, steering: _Steering) -> None:
    from diffusers import TaylorSeerCacheConfig
    from diffusers.hooks import apply_taylorseer_cache

    # by the names found, since diffusers' default patterns match no module on most models
    names = [re.escape(name) for name, _ in attentions(denoiser)]
    dtype = next(denoiser.parameters()).dtype
    apply_taylorseer_cache(denoiser, TaylorSeerCacheConfig(cache_identifiers=names, taylor_factors_dtype=dtype))


def _install_pyramid_attention(settings: DiffusersCache, denoiser: Any, steering: _Steering) -> None:
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks import apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        # the schedule is ours: a timestep inside diffusers' window means reuse, one outside of it compute
        current_timestep_callback=lambda: 0 if steering.forced() else 400,
        spatial_attention_block_skip_range=10**9,
        cross_attention_block_skip_range=10**9,
        spatial_attention_block_identifiers=("",),
        cross_attention_block_identifiers=("",),
    )
    apply_pyramid_attention_broadcast(denoiser, config)


def _install_mag(settings: DiffusersCache, denoiser: Any, steering: _Steering) -> None:
    from diffusers import MagCacheConfig
    from diffusers.hooks import apply_mag_cache

    config = MagCacheConfig(
        threshold=settings.threshold,
        max_skip_steps=settings.max_run,
        retention_ratio=0.0,  # the warm-up is ours
        num_inference_steps=len(settings.ratios),
        mag_ratios=list(settings.ratios),
    )
    apply_mag_cache(denoiser, config)


_INSTALL = {
    "first_block": _install_first_block,
    "taylorseer": _install_taylorseer,
    "pyramid_attention": _install_pyramid_attention,
    "mag": _install_mag,
}

"""Choosing each layer's scheme by what it does to the denoiser's output and to its time, both measured.

`record` keeps a few denoiser calls of real generations. `score` puts one group of layers at a time into each scheme
and measures the error of the denoiser's output on those calls, and each layer's time on its own inputs. `choose` finds
the cheapest schemes whose errors add up to no more than a budget. `plan` does all three, measures the composition, and
tightens until what was measured is inside the budget.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastdiff.acceleration import Unsupported
from fastdiff.anatomy import anatomy
from fastdiff.hooks import MISSING

from .layer_precision import KEEP, LayerPrecision, build
from .layers import MINIMUM_FEATURES, SKIP, Place, held_bytes, places

COSTS = ("ms", "bytes")
_STATES = 4096
_ROUNDS = 6


@dataclass(frozen=True)
class Score:
    """One group of layers in one scheme.

    Attributes:
        group: what the layers have in common; names: the layers.
        error: squared error of the denoiser's output over its square, mean over recorded calls; it adds up over
            groups as far as their errors are unrelated.
        ms: time of the layers together for one denoiser call; bytes: of their weights.
    """

    group: str
    names: tuple[str, ...]
    scheme: str
    error: float
    ms: float
    bytes: float


@dataclass(frozen=True)
class Chosen:
    """A plan and what was measured of it.

    Attributes:
        error: of the composed plan, measured; predicted: the sum of its groups' errors.
        ms, bytes: sums over its groups; ms_before, bytes_before: the same with every layer kept.
        calls: denoiser calls that scoring took.
    """

    plan: LayerPrecision
    error: float
    predicted: float
    ms: float
    bytes: float
    ms_before: float
    bytes_before: float
    calls: int


@dataclass(frozen=True)
class Call:
    """One recorded denoiser call."""

    denoiser: Any
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor


def record(pipe: Any, generate: Callable[[], Any], calls: int = 4) -> list[Call]:
    """Denoiser calls spread evenly over what `generate` makes, with their outputs; leaves nothing behind."""
    heard: list[Call] = []
    before = [(part, part.__dict__.get("forward", MISSING)) for part in anatomy(pipe).denoisers.values()]

    def listening(part: Any, inner: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            heard.append(Call(part, _copied(args), _copied(kwargs), _sample(output).clone()))
            return output

        return forward

    try:
        for part, _ in before:
            part.__dict__["forward"] = listening(part, part.forward)
        with torch.no_grad():
            generate()
    finally:
        for part, value in before:
            if value is MISSING:
                part.__dict__.pop("forward", None)
            else:
                part.__dict__["forward"] = value
    if not heard:
        raise Unsupported("the denoiser was never called; generate() must run the pipeline")
    step = max(len(heard) / calls, 1)
    return [heard[int(place * step)] for place in range(min(calls, len(heard)))]


def block_of_layer(name: str) -> str:
    """The group of a layer by default: its path up to the last number but those of small lists within a block."""
    parts = name.split(".")
    last = max((place for place, part in enumerate(parts[:-2]) if part.isdigit()), default=0)
    return ".".join(parts[: last + 1])


def score(
    calls: Sequence[Call],
    found: Sequence[Place],
    schemes: Sequence[str],
    group: Callable[[str], str] = block_of_layer,
    path: str | None = None,
) -> list[Score]:
    """Measure every group in every scheme, and kept. Takes groups x schemes x calls denoiser calls."""
    groups: dict[str, list[Place]] = {}
    for place in found:
        groups.setdefault(group(place.name), []).append(place)
    inputs = _inputs(calls, found)
    scores = []
    for name, members in groups.items():
        names = tuple(place.name for place in members)
        kept_ms = sum(_milliseconds(place.linear, inputs.get(place.name)) for place in members)
        scores.append(Score(name, names, KEEP, 0.0, kept_ms, held_bytes(place.linear for place in members)))
        for scheme in schemes:
            made = [(place, build(place.linear, scheme, path)) for place in members]
            ms = sum(_milliseconds(module, inputs.get(place.name)) for place, module in made)
            held = held_bytes(module for _, module in made)
            scores.append(Score(name, names, scheme, _error(calls, made), ms, held))
    return scores


def choose(scores: Sequence[Score], budget: float, cost: str = "ms") -> list[Score]:
    """One score a group, cheapest together, whose errors add up to at most `budget`.

    Exact up to 4,096 undominated part-solutions, thinned evenly beyond.

    Raises:
        Unsupported: even the most careful choice exceeds the budget.
    """
    if cost not in COSTS:
        raise ValueError(f"cost {cost!r} is not known; use one of {', '.join(COSTS)}")
    groups: dict[str, list[Score]] = {}
    for one in scores:
        groups.setdefault(one.group, []).append(one)
    # (cost, error, choices so far), none of which is worse than another in both
    states: list[tuple[float, float, tuple[Score, ...]]] = [(0.0, 0.0, ())]
    for options in groups.values():
        grown = [
            (spent + getattr(one, cost), error + one.error, (*picked, one))
            for spent, error, picked in states
            for one in options
            if error + one.error <= budget
        ]
        if not grown:
            raise Unsupported(f"no choice of schemes stays within an error of {budget}; allow more, or add 'keep'")
        grown.sort(key=lambda state: state[:2])
        states, least = [], float("inf")
        for state in grown:
            if state[1] < least:
                least = state[1]
                states.append(state)
        if len(states) > _STATES:
            step = (len(states) - 1) / (_STATES - 1)
            states = [states[round(place * step)] for place in range(_STATES)]
    return list(states[0][2])


def plan(
    pipe: Any,
    generate: Callable[[], Any],
    budget: float,
    schemes: Sequence[str] = ("w8a8",),
    cost: str = "ms",
    calls: int = 4,
    minimum_features: int = MINIMUM_FEATURES,
    skip: tuple[str, ...] = SKIP,
    group: Callable[[str], str] = block_of_layer,
    path: str | None = None,
) -> Chosen:
    """The cheapest scheme for every group of layers, with the composed error measured to be inside the budget.

    Args:
        generate: runs the pipeline on prompts like those to come.
        budget: squared error of the denoiser's output over its square; 1e-4 is an error of one percent.
        schemes: candidates beside keeping a group, from `layer_precision.SCHEMES`.
        cost: what to save, "ms" or "bytes".
        calls: denoiser calls to record.
    """
    recorded = record(pipe, generate, calls)
    found = places(pipe, minimum_features, skip)
    scores = score(recorded, found, schemes, group, path)
    tried, allowed = len({one.group for one in scores}) * len(schemes) * len(recorded), budget
    kept = [one for one in scores if one.scheme == KEEP]
    picked, measured = kept, 0.0
    for _ in range(_ROUNDS):
        picked = choose(scores, allowed, cost)
        measured = _composed(recorded, found, picked, path)
        tried += len(recorded)
        if measured <= budget:
            break
        # errors of groups were not unrelated: ask for as much less as was measured too much
        allowed *= 0.9 * budget / measured
    else:
        picked, measured = kept, 0.0
    rows = tuple((name, one.scheme) for one in picked if one.scheme != KEEP for name in one.names)
    return Chosen(
        LayerPrecision(rows or (("*", KEEP),), minimum_features, skip, path),
        error=measured,
        predicted=sum(one.error for one in picked),
        ms=sum(one.ms for one in picked),
        bytes=sum(one.bytes for one in picked),
        ms_before=sum(one.ms for one in kept),
        bytes_before=sum(one.bytes for one in kept),
        calls=tried,
    )


def _composed(calls: Sequence[Call], found: Sequence[Place], picked: Sequence[Score], path: str | None) -> float:
    scheme = {name: one.scheme for one in picked for name in one.names}
    made = [(place, build(place.linear, scheme[place.name], path)) for place in found if scheme[place.name] != KEEP]
    return _error(calls, made)


def _error(calls: Sequence[Call], made: Sequence[tuple[Place, torch.nn.Module]]) -> float:
    """Squared error of the denoiser's output over its square with some layers replaced, mean over calls."""
    for place, module in made:
        place.parent._modules[place.attribute] = module
    try:
        errors = []
        for call in calls:
            with torch.no_grad():
                found = _sample(call.denoiser(*_copied(call.args), **_copied(call.kwargs))).double()
            truth = call.output.double()
            errors.append(float((found - truth).square().sum() / truth.square().sum()))
        return sum(errors) / len(errors)
    finally:
        for place, _ in made:
            place.parent._modules[place.attribute] = place.linear


def _inputs(calls: Sequence[Call], found: Sequence[Place]) -> dict[str, Tensor]:
    """Each layer's input in one recorded call."""
    seen: dict[str, Tensor] = {}
    watching = []
    for place in found:

        def watch(module: Any, inputs: tuple, name: str = place.name) -> None:
            seen[name] = inputs[0].detach().clone()

        watching.append(place.linear.register_forward_pre_hook(watch))
    try:
        for call in {id(call.denoiser): call for call in calls}.values():
            with torch.no_grad():
                call.denoiser(*_copied(call.args), **_copied(call.kwargs))
    finally:
        for handle in watching:
            handle.remove()
    return seen


def _milliseconds(module: torch.nn.Module, x: Tensor | None, repeats: int = 5) -> float:
    if x is None:
        return 0.0
    taken = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            module(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            taken.append(1000 * (time.perf_counter() - start))
    return median(taken[1:])


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else copy.copy(value)


def _sample(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample

"""Units of a denoiser that keep their previous output at some steps: A-SDM's mask over time and units.

A unit is a resnet, a self- or cross-attention, a feed-forward, a layer (a resnet with its attention) or a whole block
(https://arxiv.org/abs/2406.00210). On a transformer, attention and feed-forward outputs are kept while the gates around
them are computed afresh, which is FORA (https://arxiv.org/abs/2407.01425). What ControlNets add is added outside of
units and stays fresh.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch

from fastdiff.acceleration import Acceleration, Verdict, check_choice, check_number
from fastdiff.anatomy import anatomy, attentions, blocks
from fastdiff.caching.boundary import Boundary, Call
from fastdiff.caching.schedule import check_schedule, computes
from fastdiff.hooks import Hooks
from fastdiff.runtime.compile import LEAVES_OUT

KINDS = ("block", "layer", "resnet", "self-attention", "cross-attention", "feed-forward")
Rule = tuple[str, str, float, float]


@dataclass(frozen=True)
class UnitMask(Acceleration):
    """Let units keep their previous output at some steps. Lossy, bounded by PSNR.

    Args:
        rules: (kind, where, low, high): units of a kind (one of `KINDS`) whose name matches the pattern `where` (as in
            "up_blocks.*") inherit between noise levels `low` and `high` (0 clean, 1 noise).
        interval: they are computed every so many steps all the same, and at the first `warm_up` and last `tail` steps.
    """

    stage: ClassVar[str] = "blocks"
    rules: tuple[Rule, ...] = (("cross-attention", "*", 0.0, 1.0),)
    interval: int = 2
    warm_up: int = 3
    tail: int = 1

    def __post_init__(self):
        check_schedule("UnitMask", self.interval, self.warm_up, self.tail)
        object.__setattr__(self, "rules", tuple(tuple(rule) for rule in self.rules))
        if not self.rules:
            raise ValueError("UnitMask: rules are needed, such as (('self-attention', 'up_blocks.*', 0.0, 0.9),)")
        for rule in self.rules:
            if len(rule) != 4 or not isinstance(rule[1], str):
                raise ValueError(f"UnitMask: a rule is (kind, where, low, high), not {rule}")
            check_choice("UnitMask", "kind", rule[0], KINDS)
            for level in rule[2:]:
                check_number("UnitMask", "level", level, low=0, high=1)

    def supports(self, pipe: Any) -> Verdict:
        """Refused where a rule matches no unit."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            known = units(denoiser)
            for kind, where, _, _ in self.rules:
                if not any(of == kind and fnmatch(path, where) for path, (of, _) in known.items()):
                    kinds = ", ".join(sorted({of for of, _ in known.values()})) or "none"
                    return Verdict(False, f"no {kind} of the {name} matches {where!r}; it has units of kind {kinds}")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser and its units that a rule matches."""
        for denoiser in anatomy(pipe).denoisers.values():
            _Mask(self, hooks, pipe, denoiser)
        hooks.counter.held = lambda: hooks.requests.bytes_held


def units(denoiser: Any) -> dict[str, tuple[str, Any]]:
    """Every unit of a denoiser by a name, with its kind; layers are named after their block, with their number."""
    found: dict[str, tuple[str, Any]] = {path: ("block", block) for path, block in blocks(denoiser)}
    attending = {path for path, _ in attentions(denoiser)}
    for path, part in denoiser.named_modules():
        last = path.rsplit(".", 1)[-1]
        if type(part).__name__.startswith("ResnetBlock"):
            found[path] = ("resnet", part)
        elif path in attending:
            found[path] = ("cross-attention" if last in ("attn2", "cross_attention") else "self-attention", part)
        elif last in ("ff", "ff_context", "ffn", "feed_forward"):
            found[path] = ("feed-forward", part)
        parent = path.rsplit(".", 2)[0]
        if path.count(".") <= 2 and last.isdigit() and parent in ("down_blocks", "up_blocks"):
            found[path] = ("block", part)
    for path, (kind, part) in list(found.items()):
        if kind == "resnet" and ".resnets." in path:
            twin = path.replace(".resnets.", ".attentions.")
            both = [part, *(one for name, one in denoiser.named_modules() if name == twin)]
            found[path.replace(".resnets.", ".layers.")] = ("layer", both)
    return found


class _Mask:
    """Decides for one denoiser which units run."""

    def __init__(self, settings: UnitMask, hooks: Hooks, pipe: Any, denoiser: Any):
        self.settings, self.hooks = settings, hooks
        self.boundary = Boundary(hooks, pipe, denoiser, self.act)
        spans: dict[int, tuple[Any, list[tuple[float, float]]]] = {}
        for path, (kind, part) in units(denoiser).items():
            for rule, where, low, high in settings.rules:
                if rule == kind and fnmatch(path, where):
                    for one in part if isinstance(part, list) else [part]:
                        spans.setdefault(id(one), (one, []))[1].append((low, high))
        for part, levels in spans.values():
            hooks.wrap(part, "forward", functools.partial(self.inherit, id(part), levels))
            hooks.set(part, LEAVES_OUT, True)

    def act(self, call: Call) -> Any:
        """The output of one call."""
        settings = self.settings
        kept: dict[Any, Any] = self.boundary.state(call.request, "units", dict)
        shape = (call.sample.shape, call.sample.dtype, call.sample.device)
        if kept.get("shape") != shape:
            kept.clear()
        may = bool(kept) and not computes(call, settings.interval, settings.warm_up, settings.tail)
        kept |= {"shape": shape, "level": call.level if may else None, "reused": 0}
        output = call.compute()
        self.hooks.counter.count(accelerated=kept["reused"] > 0)
        return output

    def inherit(self, unit: int, levels: list[tuple[float, float]], inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """A unit's output: its previous one where the mask says so."""
        request = self.hooks.requests.current()
        if request is None:
            return inner(*args, **kwargs)
        kept = self.boundary.state(request, "units", dict)
        level = kept.get("level")
        if level is not None and unit in kept and any(low <= level <= high for low, high in levels):
            kept["reused"] += 1
            return _copied(kept[unit])
        output = inner(*args, **kwargs)
        kept[unit] = _copied(output)
        return output


def _copied(output: Any) -> Any:
    """The same in memory of its own: what comes after a unit may write into its output, as FreeU does."""
    if isinstance(output, tuple):
        return tuple(_copied(one) for one in output)
    return output.clone() if isinstance(output, torch.Tensor) else output

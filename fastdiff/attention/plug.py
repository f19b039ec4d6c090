"""Where attention is taken over: every scaled-dot-product call of a denoiser's attention modules, on either route.

diffusers' processors call torch's function directly (UNets, SD3, CogVideoX, Mochi) or through its dispatch, whose
native backend calls the same function. A torch function mode around one module's forward sees both, belongs to one
thread, traces into one graph, and leaves nothing behind. In a compiled graph the call becomes one opaque operation;
which layer it belongs to travels as a tensor, so that equal blocks share a graph.
"""

import itertools
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastdiff.anatomy import attentions, conditioning, denoiser_arguments, step_count, step_index
from fastdiff.attention.grid import Grid, latent_grid
from fastdiff.hooks import Hooks, Request

_numbers = itertools.count()
# what a compiled graph finds its layer by; an entry is gone with its layer
_layers: weakref.WeakValueDictionary[int, "Layer"] = weakref.WeakValueDictionary()


@dataclass
class Moment:
    """One denoiser call, and how far its guidance branch of its request has come.

    Attributes:
        step: denoiser calls of this branch before this one; steps: how many there will be, if known.
        timestep: as the denoiser gets it, of the first row.
        latents: frames, height and width of what the denoiser gets, None where that cannot be told.
        places: float [S, 3] frame, row and column of each image token where the denoiser was told; else None.
        engaged: set when a layer took a faster way.
        calls: how often each module has called attention so far.
    """

    request: Request
    branch: Hashable
    step: int = 0
    steps: int | None = None
    timestep: float = 0.0
    latents: Grid | None = None
    places: Tensor | None = None
    engaged: bool = False
    calls: dict[str, int] = field(default_factory=dict)

    def state(self, key: Hashable, factory: Callable[[], Any]) -> Any:
        """What is kept from call to call of this branch, until the request ends."""
        return self.request.state((key, self.branch), factory)


@dataclass
class Call:
    """One attention call as a layer sees it: q [B, N, S, D], k and v [B, M, T, D].

    Attributes:
        lengths: int32 [B] keys that count, from the first; None where all do.
        layer: the name of the attention module, with "#1" and so on behind it for a second call within the module.
        moment: which denoiser call this belongs to.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    lengths: Tensor | None
    layer: str
    moment: Moment


class Route(TorchFunctionMode):
    """Hands every attention call made inside it to one layer."""

    def __init__(self, layer: "Layer"):
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self.layer(*args, **(kwargs or {}))
        if func is Tensor.unflatten and torch.compiler.is_compiling() and not kwargs:
            # written in Python with a call of super(), which cannot be traced under a mode
            tensor, dim, sizes = args
            place = dim % tensor.dim()
            return tensor.view(*tensor.shape[:place], *sizes, *tensor.shape[place + 1 :])
        return func(*args, **(kwargs or {}))


class Layer:
    """One attention module that has been taken over."""

    def __init__(self, name: str, plug: "Plug"):
        self.name = name
        self.plug = plug
        number = next(_numbers)
        self.handle = torch.tensor(number)
        _layers[number] = self

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Stand around the module's forward."""
        with Route(self):
            return inner(*args, **kwargs)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Stand in for `scaled_dot_product_attention`."""
        if torch.compiler.is_compiling():
            return _operation(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, self.handle)
        return self.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
        grouped: bool,
    ) -> Tensor:
        """The plug's result, or exact attention where it declines."""
        plug = self.plug
        reason = _unfit(query, key, value, dropout, causal, plug.minimum_tokens)
        lengths = None
        if not reason and mask is not None:
            lengths = padding(mask, query.shape[0], key.shape[2])
            reason = "" if lengths is not None else "its mask is no padding of keys"
            if lengths is not None and bool((lengths == key.shape[2]).all()):
                lengths = None  # a mask that hides nothing
        moment = plug.moment()
        if not reason and moment is not None:
            count = moment.calls.get(self.name, 0)
            moment.calls[self.name] = count + 1
            name = f"{self.name}#{count}" if count else self.name
            by = query.shape[-1] ** -0.5 if scale is None else scale
            output = plug.attend(Call(query, key, value, by, lengths, name, moment))
            if output is not None:
                return output
        elif reason:
            plug.decline(self.name, reason)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )


def _unfit(query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, minimum: int) -> str:
    """Why a call keeps exact attention; empty when it need not."""
    if query.dim() != 4:
        return "its tensors are not [batch, heads, tokens, channels]"
    if query.shape[2] != key.shape[2]:
        return "cross-attention"
    if query.shape[2] < minimum:
        return f"fewer than {minimum} tokens"
    if causal or dropout:
        return "causal, or with dropout"
    return "" if value.shape[-1] == query.shape[-1] else "values of another head size"


def padding(mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """int32 [B], the keys that count, when a mask (bool, or added) hides only the last ones; else None."""
    if mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != keys:
        return None
    if mask.dtype != torch.bool:
        hidden = mask <= -1e4
        if bool(((mask != 0) & ~hidden).any()):
            return None
        mask = ~hidden
    lengths = mask.sum(-1, dtype=torch.int32)
    first = torch.arange(keys, device=mask.device) < lengths[:, None]
    return lengths.expand(batch).contiguous() if torch.equal(mask, first) else None


class Plug:
    """Takes over the attention of one denoiser and keeps count of its calls.

    Args:
        attend: gets a `Call`, gives the output [B, N, S, D], or None to keep exact attention.
        minimum_tokens: shorter sequences keep exact attention.
    """

    def __init__(self, hooks: Hooks, denoiser: Any, attend: Callable[[Call], Tensor | None], minimum_tokens: int):
        self.hooks = hooks
        self.denoiser = denoiser
        self.attend = attend
        self.minimum_tokens = minimum_tokens
        self.declined: dict[str, str] = {}
        self.channels: int | None = getattr(getattr(denoiser, "config", None), "in_channels", None)
        self.layers = [Layer(name, self) for name, _ in attentions(denoiser)]
        for layer, (_, module) in zip(self.layers, attentions(denoiser), strict=True):
            hooks.wrap(module, "forward", layer.around)
        hooks.wrap(denoiser, "forward", self.around)

    def decline(self, layer: str, reason: str) -> None:
        """Note why a layer keeps exact attention."""
        self.declined.setdefault(layer, reason)

    def describe(self) -> str:
        """Say which layers keep exact attention and why."""
        reasons: dict[str, int] = {}
        for reason in self.declined.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        return "; ".join(f"{count} layers exact: {reason}" for reason, count in reasons.items())

    def moment(self) -> Moment | None:
        """The denoiser call that is being served; None outside of one."""
        request = self.hooks.requests.current()
        return None if request is None else request.state((self, "now"), dict).get("moment")

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Stand around the denoiser: open the moment, count it."""
        request = self.hooks.requests.current()
        if request is None:
            with self.hooks.requests.open(stray=True):
                return self.around(inner, *args, **kwargs)
        arguments = denoiser_arguments(self.denoiser, args, kwargs)
        branch = request.branch if request.branch is not None else branch_of(request, self, arguments)
        steps = request.state((self, "steps", branch), lambda: [0])
        moment = Moment(
            request, (self, branch), steps[0], step_count(request.pipe), *_described(arguments, self.channels)
        )
        now = request.state((self, "now"), dict)
        outer = now.get("moment")
        now["moment"] = moment
        try:
            output = inner(*args, **kwargs)
            steps[0] += 1
        finally:
            now["moment"] = outer
        self.hooks.counter.count(moment.engaged)
        return output


def branch_of(request: Request, key: Hashable, arguments: dict[str, Any]) -> int:
    """Number the guidance branches of a request by what they are conditioned on; the tensors are held."""
    known = request.state((key, "branches"), list)
    tensors = conditioning(arguments)
    step = step_index(request.pipe)
    for same in (_identical, _equal):
        for number, branch in enumerate(known):
            # equal in content, but called in this step already: the other branch, with the same words
            if same is _equal and step is not None and branch[1] == step:
                continue
            if len(branch[0]) == len(tensors) and all(map(same, branch[0], tensors)):
                branch[1] = step
                return number
    known.append([tensors, step])
    return len(known) - 1


def _identical(one: Tensor, other: Tensor) -> bool:
    return one is other


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _described(arguments: dict[str, Any], channels: int | None) -> tuple[float, Grid | None, Tensor | None]:
    """Timestep, grid of the latents, and places of the tokens where ids are given."""
    timestep = next((arguments[name] for name in ("timestep", "timesteps", "t") if name in arguments), 0.0)
    if isinstance(timestep, Tensor):
        timestep = float(timestep.flatten()[0])
    ids = arguments.get("img_ids")
    places = None
    if isinstance(ids, Tensor) and ids.shape[-1] >= 3:
        places = ids.reshape(-1, ids.shape[-1])[: ids.shape[-2], :3].float()
    return float(timestep), latent_grid(arguments, channels), places


@torch.library.custom_op("fastdiff::attention", mutates_args=())
def _operation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    handle: Tensor,
) -> Tensor:
    layer = _layers[int(handle)]
    return layer.attend(query, key, value, mask, dropout, causal, scale, grouped).contiguous()


@_operation.register_fake
def _shape(
    query: Tensor, key: Any, value: Tensor, mask: Any, dropout: Any, causal: Any, scale: Any, grouped: Any, handle: Any
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))

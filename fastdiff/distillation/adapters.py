"""Guidance in one forward: small adapters on a fixed denoiser (AGD, https://arxiv.org/abs/2503.07274).

Beside every attention to text stands a small cross-attention that reads the guidance scale, the time and the text, and
adds to that attention's output what guidance would change. The denoiser itself is untouched, so an adapter comes off
again, works with LoRAs, and at 2 % of the weights takes half of the rows of every denoiser call away.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_number
from fastdiff.anatomy import anatomy, denoiser_arguments
from fastdiff.distillation import shelf
from fastdiff.distillation.networks import Batch, Networks, ddim, guided
from fastdiff.distillation.objective import Objective, check_range
from fastdiff.hooks import Hooks

FILE = "guidance_adapter.safetensors"
_FREQUENCIES = 16


class Adapter(nn.Module):
    """Cross-attention from hidden states ``[B, N, C]`` to a few tokens ``[B, S, D]``; adds nothing at birth."""

    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, hidden, bias=False)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        """What to add to the attention's output, ``[B, N, C]``."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        states = functional.layer_norm(states, states.shape[-1:])
        query, key, value = heads(self.query(states)), heads(self.key(tokens)), heads(self.value(tokens))
        return self.out(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Adapters(nn.Module):
    """The adapters of a denoiser and the tokens they read.

    Args:
        widths: channels of the hidden states of each adapted attention, by its path in the denoiser.
        text_width: channels of the text embeddings.
        hidden, heads: width and heads of every adapter.
    """

    def __init__(self, widths: dict[str, int], text_width: int, hidden: int = 48, heads: int = 3):
        super().__init__()
        if hidden % heads:
            raise ValueError(f"an adapter's width, {hidden}, must be a multiple of its {heads} heads")
        self.config = {"widths": widths, "text_width": text_width, "hidden": hidden, "heads": heads}
        self.scale, self.time = (_mlp(2 * _FREQUENCIES, hidden) for _ in range(2))
        self.text = nn.Linear(text_width, hidden)
        self.layers = nn.ModuleDict({_key(path): Adapter(width, hidden, heads) for path, width in widths.items()})

    def tokens(self, scale: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """``[B, S + 2, hidden]`` of guidance scales ``[B]``, timesteps ``[B]`` (0..1000) and text ``[B, S, E]``."""
        made = [self.scale(_waves(scale / 4))[:, None], self.time(_waves(timestep / 250))[:, None], self.text(text)]
        return torch.cat([part.to(text.dtype) for part in made], 1)

    @classmethod
    def of(cls, denoiser: nn.Module, hidden: int = 48, heads: int = 3, seed: int = 0) -> Adapters:
        """New adapters for a denoiser, drawn from ``seed``.

        Raises:
            Unsupported: it has no attention to text that adapters know.
        """
        widths = {path: _width(module) for path, module in adapted(denoiser)}
        if not widths:
            raise Unsupported(f"{type(denoiser).__name__} has no attention to text called attn2 or attn")
        config: Any = denoiser.config
        text_width = config.get("joint_attention_dim") or config.get("cross_attention_dim")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(widths, text_width, hidden, heads)


def _mlp(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden))


def _key(path: str) -> str:
    return path.replace(".", "-")


def _waves(value: Tensor) -> Tensor:
    """``[B, 2 * frequencies]`` of ``[B]``: waves from one period in 16 to one in 1/2."""
    rates = 2 ** torch.linspace(-4, 1, _FREQUENCIES, device=value.device)
    angle = 2 * math.pi * value.float()[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], 1)


def adapted(denoiser: nn.Module) -> Iterator[tuple[str, Any]]:
    """Paths and modules of the attentions that adapters stand beside: those to text, or joint ones where all are."""
    named = [(path, module) for path, module in denoiser.named_modules() if hasattr(module, "to_q")]
    cross = [(path, module) for path, module in named if path.endswith(".attn2")]
    yield from cross or [(path, module) for path, module in named if path.endswith(".attn")]


def _width(module: Any) -> int:
    return module.to_q.in_features


_now: ContextVar[tuple[Adapters, Tensor] | None] = ContextVar("fastdiff_guidance_tokens", default=None)


@contextmanager
def _reading(adapters: Adapters, tokens: Tensor) -> Iterator[None]:
    token = _now.set((adapters, tokens))
    try:
        yield
    finally:
        _now.reset(token)


def install(denoiser: nn.Module, adapters: Adapters, wrap: Callable[[Any, str, Callable], Any]) -> None:
    """Put the adapters beside their attentions by ``wrap(owner, method, around)``; they act inside `reading` only."""
    for path, module in adapted(denoiser):
        layer = adapters.layers[_key(path)]

        def around(inner: Any, hidden_states: Tensor, *args: Any, layer: Any = layer, **kwargs: Any) -> Any:
            out = inner(hidden_states, *args, **kwargs)
            now = _now.get()
            if now is None or now[0] is not adapters:
                return out
            added = layer(hidden_states, now[1])
            return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

        wrap(module, "forward", around)


class Guided(nn.Module):
    """A fixed denoiser with adapters to train: called as the denoiser, with ``guidance_scale`` ``[B]`` beside."""

    def __init__(self, denoiser: nn.Module, adapters: Adapters):
        super().__init__()
        self.adapters = adapters
        self.base = (denoiser.requires_grad_(False),)  # a tuple, so that its weights are not this module's

        def wrap(owner: Any, method: str, around: Callable) -> None:
            inner = getattr(owner, method)
            setattr(owner, method, lambda *args, **kwargs: around(inner, *args, **kwargs))

        install(denoiser, adapters, wrap)

    def forward(self, *args: Any, guidance_scale: Tensor, **kwargs: Any) -> Any:
        """The denoiser's output under guidance of these scales."""
        call = denoiser_arguments(self.base[0], args, kwargs)
        tokens = self.adapters.tokens(guidance_scale, call["timestep"], call["encoder_hidden_states"])
        with _reading(self.adapters, tokens):
            return self.base[0](*args, **kwargs)


@dataclass(frozen=True)
class AdaptedGuidance(Objective):
    """Regression of adapters to the guided teacher (AGD, section 3.2): plain mean squared error of outputs.

    States are those of the teacher's own guided trajectories, which is where the adapters will act: noised data are
    not, for guidance leads away from them.

    Args:
        scales: guidance, drawn uniformly, as diffusers counts it.
        hops: states of a trajectory, one at the noisiest level and one at random in each of ``hops - 1`` equal parts of
            the levels; the student learns at all of them, so that a batch of 16 trajectories has 16 x ``hops`` states.
    """

    scales: tuple[float, float] = (1.0, 8.0)
    hops: int = 8

    def __post_init__(self) -> None:
        check_range(type(self).__name__, "scales", self.scales, 0)
        check_number(type(self).__name__, "hops", self.hops, low=1, whole=True)

    def loss(self, networks: Networks, batch: Batch, helpers: nn.ModuleDict) -> Tensor:
        scale = batch.uniform(*self.scales)
        x, level, target = self.visited(networks, batch, scale)
        many = {name: value.repeat(self.hops, *[1] * (value.ndim - 1)) for name, value in batch.condition.items()}
        output = networks.student(x, level, {**many, "guidance_scale": scale.repeat(self.hops)})
        return functional.mse_loss(output, target)

    @torch.no_grad()
    def visited(self, networks: Networks, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States ``[hops * B, C, h, w]`` of guided DDIM trajectories, their levels, and the guided outputs there."""
        levels, last = networks.levels, networks.levels.last
        level = torch.full((len(batch.clean),), last, device=batch.clean.device)
        x = levels.add(torch.zeros_like(batch.clean), batch.normal(), level)
        states, places, targets = [], [], []
        for hop in range(self.hops):
            target = guided(networks.teacher, x, level, batch, scale)
            states.append(x)
            places.append(level)
            targets.append(target)
            part = (self.hops - 1 - hop - batch.uniform()) / max(1, self.hops - 1)
            to = torch.minimum((part.clamp(min=0) * last).long(), level - 1).clamp(min=1)
            x, level = ddim(levels, x, target, level, to), to
        return torch.cat(states), torch.cat(places), torch.cat(targets)


def save(folder: Path, adapters: Adapters) -> None:
    """Write adapters as float16, with what is needed to build them."""
    from safetensors.torch import save_file

    state = {name: value.detach().to(torch.float16).contiguous() for name, value in adapters.state_dict().items()}
    save_file(state, folder / FILE, metadata={"format": "pt", "config": json.dumps(adapters.config)})


def read(folder: Path) -> Adapters:
    """Adapters from a folder.

    Raises:
        FileNotFoundError: there are none.
    """
    from safetensors import safe_open

    if not (folder / FILE).exists():
        raise FileNotFoundError(f"{folder} holds no guidance adapter: it has no {FILE}")
    with safe_open(folder / FILE, "pt") as file:
        adapters = Adapters(**json.loads(file.metadata()["config"]))
        adapters.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return adapters.eval().requires_grad_(False)


@dataclass(frozen=True)
class GuidanceAdapter(Acceleration):
    """Guidance without its second branch: half of the rows of every denoiser call. Lossy.

    Args:
        source: a folder that `fastdiff distill --method agd` wrote, or "embedded" for the one that ships.

    A call's ``guidance_scale`` is read by the adapters and taken away from the pipeline. A call with a negative prompt
    is drawn with the pipeline's own guidance, and the report says so: adapters know only the empty one.
    """

    stage: ClassVar[str] = "steps"
    source: str = "embedded"

    @property
    def bound(self) -> str:
        """Accuracy of what the prompt asks for."""
        return "attribute"

    def supports(self, pipe: Any) -> Verdict:
        """Needs adapters trained for these weights, and a pipeline that takes a guidance scale."""
        if "guidance_scale" not in inspect.signature(type(pipe).__call__).parameters:
            return Verdict(False, f"{type(pipe).__name__} takes no guidance_scale")
        return shelf.fits(self.source, "guidance", FILE, pipe)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Put the adapters in, and guidance_scale to them."""
        denoiser = anatomy(pipe).denoiser
        adapters = read(shelf.find(self.source, "guidance", pipe))
        adapters.to(denoiser.device, denoiser.dtype)
        install(denoiser, adapters, hooks.wrap)
        scale: ContextVar[float | None] = ContextVar("scale", default=None)

        def call(inner: Any, *args: Any, **kwargs: Any) -> Any:
            wanted = scale.get()
            hooks.counter.count(wanted is not None)
            if wanted is None:
                return inner(*args, **kwargs)
            given = denoiser_arguments(denoiser, args, kwargs)
            text = given["encoder_hidden_states"]
            timestep = torch.as_tensor(given["timestep"], device=text.device).expand(len(text))
            scales = torch.full((len(text),), wanted, device=text.device)
            with _reading(adapters, adapters.tokens(scales, timestep, text)):
                return inner(*args, **kwargs)

        hooks.wrap(denoiser, "forward", call)
        signature = inspect.signature(type(pipe).__call__)

        def entry(inner: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind_partial(pipe, *args, **kwargs)
            wanted = bound.arguments.get("guidance_scale", signature.parameters["guidance_scale"].default)
            if any(bound.arguments.get(name) for name in ("negative_prompt", "negative_prompt_2", "negative_prompt_3")):
                hooks.counter.miss("leaves a call with a negative prompt to the pipeline's own guidance")
                return inner(*args, **kwargs)
            bound.arguments["guidance_scale"] = 1.0
            token = scale.set(float(wanted))
            try:
                return inner(*bound.args[1:], **bound.kwargs)
            finally:
                scale.reset(token)

        hooks.override(pipe, "__call__", entry)

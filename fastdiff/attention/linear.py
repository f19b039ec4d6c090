"""Sparse-linear attention (SLA, https://arxiv.org/abs/2509.24006): few key blocks exactly, all of them linearly.

Without training it is no more than top-k block-sparse attention, so there are two halves: `FineTune` teaches a denoiser
by its own dense outputs and writes a small file, and `SparseLinear` applies that file to a pipeline and takes it off.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_choice, check_number
from fastdiff.anatomy import anatomy, attention_backend, attentions, parallel_config
from fastdiff.attention.plug import Call, Plug
from fastdiff.hooks import Hooks, Requests
from fastdiff_kernels.sparse_linear import FEATURES, route, sparse_linear

TRAINED = ("to_q", "to_k", "to_v", "to_out")
_HEADER = "fastdiff"


@dataclass(frozen=True)
class Linear:
    """How sparse-linear attention is computed; part of what was trained, so it is kept with the weights.

    Args:
        density: share of key blocks computed exactly, over 0 to 1.
        query_block, key_block: tokens in a block; powers of two from 16 for Triton.
        features: what makes queries and keys positive in the linear branch, one of
            `fastdiff_kernels.sparse_linear.FEATURES`.
        minimum_tokens: shorter sequences keep exact attention.
    """

    density: float = 0.1
    query_block: int = 64
    key_block: int = 64
    features: str = "softmax"
    minimum_tokens: int = 1024

    def __post_init__(self):
        own = type(self).__name__
        check_number(own, "density", self.density, low=1e-6, high=1)
        check_choice(own, "features", self.features, FEATURES)
        for name in ("query_block", "key_block", "minimum_tokens"):
            check_number(own, name, getattr(self, name), low=1, whole=True)

    def attend(self, call: Call, projection: Tensor) -> Tensor:
        """[B, N, S, D] of one call; `projection` [N, D, D] of its layer."""
        chosen = route(call.q, call.k, self.density, self.query_block, self.key_block)
        return sparse_linear(
            call.q, call.k, call.v, projection, selection=chosen, scale=call.scale, features=self.features
        )


@dataclass(frozen=True)
class SparseLinear(Acceleration):
    """Sparse-linear attention with fine-tuned weights. Lossy, bounded by PSNR.

    Args:
        path: a file that `FineTune.save` wrote for this denoiser.
        density: share of key blocks computed exactly; 0 takes what the file was trained with.
    """

    stage: ClassVar[str] = "attention"
    path: str = ""
    density: float = 0.0

    def __post_init__(self):
        check_number(type(self).__name__, "density", self.density, low=0, high=1)

    def supports(self, pipe: Any) -> Verdict:
        """Refused without a file that fits, and where attention does not pass through torch's function."""
        if not self.path or not Path(self.path).is_file():
            return Verdict(False, f"{self.path or 'the empty path'} is no file; fine-tune one with FineTune")
        denoisers = anatomy(pipe).denoisers
        if len(denoisers) > 1:
            return Verdict(False, "this pipeline has several denoisers, and a file does not say which one it is for")
        name, denoiser = next(iter(denoisers.items()))
        backend = attention_backend(denoiser)
        if backend != "native" or parallel_config(denoiser) is not None:
            return Verdict(
                False,
                f"the {name} computes attention with diffusers' backend {backend!r} or in parallel; call "
                "set_attention_backend('native') first",
            )
        try:
            shapes = _shapes(Path(self.path))
        except ValueError as error:
            return Verdict(False, str(error))
        layers = dict(attentions(denoiser))
        for key, shape in shapes.items():
            layer, _, rest = key.partition(":")
            there = dict(layers[layer].named_parameters()).get(rest) if layer in layers else None
            if layer not in layers or (rest != "projection" and (there is None or list(there.shape) != shape)):
                return Verdict(False, f"{self.path} was trained for another denoiser: {key} {shape} fits nothing here")
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Exchange the trained weights and take over the attention they belong to."""
        denoiser = anatomy(pipe).denoiser
        settings, values = load(Path(self.path))
        if self.density:
            settings = replace(settings, density=self.density)
        like = next(denoiser.parameters())
        values = {name: value.to(like) for name, value in values.items()}
        _exchange(denoiser, values, hooks)
        projections = _projections(values)

        def attend(call: Call) -> Tensor | None:
            if call.layer not in projections:
                return None
            if call.lengths is not None:
                hooks.counter.miss(f"keeps {call.layer} exact: the linear branch takes no padding")
                return None
            call.moment.engaged = True
            return settings.attend(call, projections[call.layer])

        plug = Plug(hooks, denoiser, attend, settings.minimum_tokens)
        hooks.counter.held = lambda: sum(value.nbytes for value in values.values())
        hooks.counter.describe = lambda: "; ".join(
            filter(None, (f"{settings.density:.2f} of key blocks exact, the rest linear", plug.describe()))
        )


def _exchange(denoiser: nn.Module, values: Mapping[str, Tensor], hooks: Hooks) -> None:
    """Put the trained values in the place of the denoiser's own, which come back bit for bit."""
    layers = dict(attentions(denoiser))
    for key, value in values.items():
        layer, _, name = key.partition(":")
        if name == "projection":
            continue
        parameter = dict(layers[layer].named_parameters())[name]
        before = parameter.data
        parameter.data = value

        def restore(parameter: nn.Parameter = parameter, before: Tensor = before) -> None:
            parameter.data = before

        hooks.on_undo(restore)


def _projections(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.partition(":")[0]: value for key, value in values.items() if key.endswith(":projection")}


def load(path: Path) -> tuple[Linear, dict[str, Tensor]]:
    """Settings and values of a file: "<layer>:projection" and "<layer>:<parameter of the attention module>".

    Raises:
        ValueError: it is no file of `FineTune.save`.
    """
    _shapes(path)
    with safe_open(path, "pt") as file:
        settings = Linear(**json.loads(file.metadata()[_HEADER]))
    return settings, load_file(path)


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, "pt") as file:
            if _HEADER in (file.metadata() or {}):
                return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    raise ValueError(f"{path} holds no sparse-linear attention; FineTune.save writes one")


class FineTune:
    """Teaches a copy of a denoiser sparse-linear attention, by the outputs of the original.

    Trained are the projections of the linear branch, born zero, and `TRAINED` of the attention modules concerned;
    everything else stays. The original is not changed.

    Args:
        denoiser: of diffusers, in float32.
        settings: the attention to come.
        arguments: one denoiser call's keyword arguments, to find which layers have enough tokens.
        rate: learning rate; warmed up over 20 steps and let down over the last fifth of `steps`.
        steps: how many there will be.

    Raises:
        Unsupported: no attention call has enough tokens.
    """

    def __init__(
        self, denoiser: Any, settings: Linear, arguments: Mapping[str, Any], rate: float = 1e-3, steps: int = 500
    ):
        self.teacher = denoiser
        self.settings = settings
        self.rate, self.steps, self.done = rate, steps, 0
        self.projections: dict[str, Tensor] = {}
        self.student: Any = copy.deepcopy(denoiser).requires_grad_(False)
        self.hooks = Hooks("FineTune", Requests())
        Plug(self.hooks, self.student, self._attend, settings.minimum_tokens)
        with torch.no_grad():
            self.student(**arguments)
        if not self.projections:
            raise Unsupported(f"no self-attention of this denoiser has {settings.minimum_tokens} tokens at this size")
        layers = dict(attentions(self.student))
        self.trained = {f"{layer}:projection": value for layer, value in self.projections.items()}
        for layer in self.projections:
            for name, parameter in layers[layer].named_parameters():
                if name.split(".")[0] in TRAINED:
                    self.trained[f"{layer}:{name}"] = parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=rate, weight_decay=0.0)

    def _attend(self, call: Call) -> Tensor | None:
        if call.lengths is not None or "#" in call.layer:
            return None
        if call.layer not in self.projections:
            heads, head = call.q.shape[1], call.q.shape[3]
            zeros = torch.zeros(heads, head, head, device=call.q.device)
            self.projections[call.layer] = zeros.requires_grad_(True)
        call.moment.engaged = True
        return self.settings.attend(call, self.projections[call.layer])

    def step(self, arguments: Mapping[str, Any]) -> float:
        """One step on the keyword arguments of one denoiser call; returns the squared error relative to the output."""
        with torch.no_grad():
            wanted = _first(self.teacher(**arguments))
        self.optimizer.zero_grad(set_to_none=True)
        made = _first(self.student(**arguments))
        loss = (made - wanted).square().mean() / wanted.square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        for group in self.optimizer.param_groups:
            left = (self.steps - self.done) / max(1, self.steps // 5)
            group["lr"] = self.rate * min(1.0, (self.done + 1) / 20, max(0.02, left))
        self.optimizer.step()
        self.done += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """What `resume` goes on from."""
        return {"values": self.trained, "optimizer": self.optimizer.state_dict(), "done": self.done}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where another run of the same settings was."""
        with torch.no_grad():
            for name, value in state["values"].items():
                self.trained[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]

    def save(self, path: Path) -> None:
        """Write the file that `SparseLinear` takes, in float16."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: value.detach().half().contiguous() for name, value in self.trained.items()}
        save_file(values, path, metadata={_HEADER: json.dumps(asdict(self.settings))})


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.sample

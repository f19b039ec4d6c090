"""Clip parallelism: each rank denoises some frames of a long video (Video-Infinity, Tan et al. 2024, arXiv 2406.16260).

Only layers that look along time talk: convolutions over frames fetch the neighbours' frames, group norms over frames
merge exactly, and attention over frames sees a window around each frame and a few frames of the whole video. Windows
end where the video ends: what lies outside is not there, rather than there and zero. When the windows cover everything
the result is one device's, up to rounding.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_choice, check_number
from fastdiff.anatomy import anatomy, denoiser_arguments
from fastdiff.hooks import Hooks
from fastdiff.parallel import layers
from fastdiff.parallel.agreement import check_same_input, enter, guard_call, together
from fastdiff.parallel.communicator import Communicator, current
from fastdiff.parallel.exchange import Pass, output_sample, with_sample
from fastdiff.parallel.rules import TEMPORAL, Cut
from fastdiff.parallel.strips import Strips

_PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


@dataclass(frozen=True)
class ClipParallel(Acceleration):
    """Give each rank some of a video's frames.

    Args:
        window: frames on either side of a frame that attention over time sees.
        global_frames: frames of the whole video, spread evenly, that every frame sees as well; 0 for none.
        positions: "video" counts frames through the whole video (needs a motion module made for so many); "clip" begins
            anew on each rank, for videos longer than the motion module knows.
        turn: timestep from which on (noisier) `global_bias` is added to the attention scores of global frames, and
            below which `local_bias` is added to those of the window.
        local_bias, global_bias: see `turn`; 0 leaves the scores as they are.
    """

    stage: ClassVar[str] = "devices"

    window: int = 8
    global_frames: int = 16
    positions: str = "video"
    turn: float = 800
    local_bias: float = 0.0
    global_bias: float = 0.0

    def __post_init__(self):
        owner = type(self).__name__
        check_number(owner, "window", self.window, 0, whole=True)
        check_number(owner, "global_frames", self.global_frames, 0, whole=True)
        check_choice(owner, "positions", self.positions, ("video", "clip"))
        check_number(owner, "turn", self.turn, 0)
        check_number(owner, "local_bias", self.local_bias, 0)
        check_number(owner, "global_bias", self.global_bias, 0)

    def conflict(self, other: Acceleration) -> str:
        if type(other).__name__ == "PatchParallel":
            return "both cut the same model; use one of them"
        if type(other).__name__ == "Compile":
            return "ranks exchange frames inside the model, which a compiled graph cannot; compile without it"
        return ""

    def supports(self, pipe: Any) -> Verdict:
        for name, denoiser in anatomy(pipe).denoisers.items():
            found = _find(denoiser)
            if not found.attentions and not found.convolutions:
                return Verdict(False, f"{name} has no layers over frames, so it makes no video; use PatchParallel")
            if found.refused:
                return Verdict(False, f"{name} cannot be cut into clips: {found.refused}")
        return Verdict(True, "" if current().size > 1 else "one rank: nothing was installed; launch more with torchrun")

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        communicator = current()
        if communicator.size == 1:
            hooks.counter.expects = "nothing"
            return
        for denoiser in anatomy(pipe).denoisers.values():
            cut, found = Cut(), _find(denoiser)
            for name, module in found.convolutions.items():
                hooks.wrap(module, "forward", _Convolution(name, module, cut))
            for name, module in found.normalizations.items():
                hooks.wrap(module, "forward", _Normalization(name, module, cut))
            for name, module in found.attentions.items():
                hooks.wrap(module, "forward", _Attention(name, module, cut, self))
            for module in found.positions if self.positions == "video" else ():
                hooks.wrap(module, "forward", _Position(module, cut))
            hooks.wrap(denoiser, "forward", _Denoiser(denoiser, cut, communicator, hooks, found.frame_axis))
        guard_call(hooks, pipe, communicator)


@dataclass
class _Found:
    convolutions: dict[str, nn.Conv3d]
    normalizations: dict[str, nn.GroupNorm]
    attentions: dict[str, Any]
    positions: list[Any]
    frame_axis: int
    refused: str = ""


def _find(denoiser: nn.Module) -> _Found:
    found = _Found({}, {}, {}, [], 2)
    inside: list[str] = []
    for name, module in denoiser.named_modules():
        kind = type(module).__name__
        temporal = any(name.startswith(prefix + ".") for prefix in inside)
        if kind in TEMPORAL and not temporal:
            inside.append(name)
        if kind == "TransformerSpatioTemporalModel":
            found.frame_axis = 1
            found.positions.append(module.time_proj)
        elif kind == "SinusoidalPositionalEmbedding":
            found.positions.append(module)
        elif isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
            if type(module).forward is not nn.Conv3d.forward or module.stride[0] > 1:
                found.refused = f"{name} ({kind}) pads or strides over frames in its own way"
            found.convolutions[name] = module
        elif isinstance(module, nn.GroupNorm):
            found.normalizations[name] = module
        elif temporal and all(hasattr(module, part) for part in ("to_q", "to_k", "to_v")):
            if type(module.processor).__name__ not in _PLAIN_PROCESSORS:
                found.refused = f"{name} runs {type(module.processor).__name__}; use the default attention processor"
            found.attentions[name] = module
        elif "rotary" in kind.lower() or "CausalConv3d" in kind:
            found.refused = f"{name} ({kind}) is for models whose frames cannot be cut this way"
    return found


class _Denoiser:
    """Runs one denoiser on this rank's frames."""

    def __init__(self, denoiser: Any, cut: Cut, communicator: Communicator, hooks: Hooks, frame_axis: int):
        self.denoiser = denoiser
        self.cut = cut
        self.communicator = communicator
        self.hooks = hooks
        self.frame_axis = frame_axis

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = denoiser_arguments(self.denoiser, args, kwargs)
        name, sample = next(iter(arguments.items()))
        axis, frames = self.frame_axis, sample.shape[self.frame_axis]
        enter(self.communicator)
        try:
            strips = Strips.share(frames, [1.0] * self.communicator.size)
        except ValueError as error:
            raise Unsupported(f"a video of {frames} frames cannot be shared: {error}") from error
        self._check(sample)
        forward = Pass(self.communicator, strips)
        forward.timestep = float(torch.as_tensor(arguments["timestep"]).flatten()[0])
        low, high = strips.own(self.communicator.rank)
        with together(self.communicator), self.cut.during(forward):
            folded = sample.shape[0] * frames
            mine = {key: _frames(value, folded, frames, low, high) for key, value in arguments.items()}
            output = inner(**{**mine, name: sample.narrow(axis, low, high - low)})
            part = output_sample(output)
            shapes = [(*part.shape[:axis], count, *part.shape[axis + 1 :]) for count in strips.heights]
            parts = self.communicator.gather("output", part, shapes).wait()
        self.hooks.counter.count(True)
        return with_sample(output, torch.cat(list(parts.values()), dim=axis))

    def _check(self, sample: Tensor) -> None:
        request = self.hooks.requests.current()
        checked = [] if request is None else request.state(("clip checked", id(self)), list)
        if not checked:
            check_same_input(self.communicator, sample)
            checked.append(True)


def _frames(value: Any, folded: int, frames: int, low: int, high: int) -> Any:
    """The part of an argument that belongs to frames `low` to `high`, where frames are folded into the batch."""
    if isinstance(value, tuple | list):
        return type(value)(_frames(part, folded, frames, low, high) for part in value)
    if isinstance(value, Tensor) and value.dim() > 1 and frames > 1 and value.shape[0] == folded:
        return value.unflatten(0, (-1, frames))[:, low:high].flatten(0, 1)
    return value


@dataclass(frozen=True)
class _Rule:
    name: str
    module: Any
    cut: Cut


class _Convolution(_Rule):
    def __call__(self, inner: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward = self.cut.now
        if forward is None:
            return inner(x, *args, **kwargs)
        kernel, strips = layers.kernel_of(self.module, -3), forward.strips
        needs = [kernel.needs(strips.own(rank)) for rank in range(strips.ranks)]
        x, first = forward.extend(self.name, "convolution", x, -3, strips, needs)  # [B, C, F with neighbours, H, W]
        return layers.convolve(self.module, x, first, strips.rows, kernel, strips.own(forward.rank), -3)


class _Normalization(_Rule):
    def __call__(self, inner: Any, x: Tensor) -> Tensor:
        forward = self.cut.now
        if forward is None or x.dim() != 5:
            # four dimensions: frames are in the batch, and each has its own statistics
            return inner(x)
        values = x[0].numel() // self.module.num_groups // x.shape[-3]
        parts = forward.share(self.name, "normalization", layers.statistics(x, self.module.num_groups), layers.follow)
        mean, variance = layers.merge(parts, [values * frames for frames in forward.strips.heights])
        return layers.normalize(x, mean, variance, self.module)


@dataclass(frozen=True)
class _Position:
    """Positions along time count from the first frame of the video, not of the clip."""

    module: Any
    cut: Cut

    def __call__(self, inner: Any, x: Tensor) -> Tensor:
        forward = self.cut.now
        if forward is None:
            return inner(x)
        first = forward.strips.own(forward.rank)[0]
        if not hasattr(self.module, "pe"):
            # frame numbers about to be embedded, repeated for each video of the batch
            return inner(x + first)
        known = self.module.pe.shape[1]
        if forward.strips.rows > known:
            raise Unsupported(
                f"the motion module knows {known} frames and the video has {forward.strips.rows}; use positions='clip'"
            )
        return x + self.module.pe[:, first : first + x.shape[1]]


@dataclass(frozen=True)
class _Attention(_Rule):
    """Attention over frames, at one place of the picture, in a window and over global frames."""

    settings: ClipParallel

    def __call__(self, inner: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward = self.cut.now
        context = args[0] if args else kwargs.get("encoder_hidden_states")
        if forward is None or context is not None:
            return inner(hidden_states, *args, **kwargs)
        module, x = self.module, hidden_states  # [B * H * W, F of this rank, C]
        kv, frames = self._keys_and_values(forward, torch.cat((module.to_k(x), module.to_v(x)), dim=-1))
        heads = module.heads
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (module.to_q(x), *kv.chunk(2, dim=-1)))
        mask = self._mask(forward, frames, q)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=module.scale)  # [B * H * W, N, F, D]
        y = module.to_out[1](module.to_out[0](y.transpose(1, 2).flatten(2).to(x.dtype)))
        return (y + x if module.residual_connection else y) / module.rescale_output_factor

    def _keys_and_values(self, forward: Pass, own: Tensor) -> tuple[Tensor, tuple[list[int], list[int]]]:
        """Keys and values of the window around this rank's frames, then of the global frames, and which they are."""
        strips = forward.strips
        windows = strips.windows(self.settings.window)
        near, first = forward.extend(self.name, "attention", own, 1, strips, windows)
        window = list(range(first, first + near.shape[1]))
        chosen = [global_frames(strips, rank, self.settings.global_frames) for rank in range(strips.ranks)]
        covered = all(high - low == strips.rows for low, high in windows)
        if covered or not any(chosen):
            return near, (window, [])
        start = strips.own(forward.rank)[0]
        picked = own[:, [frame - start for frame in chosen[forward.rank]]]
        shapes = [(own.shape[0], len(frames), own.shape[2]) for frames in chosen]
        parts = forward.communicator.gather("attention", picked, shapes).wait()
        return torch.cat((near, *parts.values()), dim=1), (window, [frame for part in chosen for frame in part])

    def _mask(self, forward: Pass, frames: tuple[list[int], list[int]], like: Tensor) -> Tensor | None:
        """Scores added for [query frame, key frame]: none outside the window; a global frame counts once."""
        low, high = forward.strips.own(forward.rank)
        window, everywhere = (torch.tensor(part, device=like.device, dtype=torch.long) for part in frames)
        queries = torch.arange(low, high, device=like.device)[:, None]
        near = (queries - window).abs() <= self.settings.window
        far = (queries - everywhere).abs() > self.settings.window
        noisy = forward.timestep >= self.settings.turn
        local_bias = 0.0 if noisy else self.settings.local_bias
        global_bias = self.settings.global_bias if noisy else 0.0
        if bool(near.all()) and not len(everywhere):
            return None
        nothing = torch.full((), float("-inf"), dtype=like.dtype, device=like.device)
        scores = [nothing.new_full((), bias) for bias in (local_bias, global_bias)]
        return torch.cat((torch.where(near, scores[0], nothing), torch.where(far, scores[1], nothing)), dim=1)


def global_frames(strips: Strips, rank: int, total: int) -> list[int]:
    """The frames of `rank` that every rank sees: an equal part of `total`, evenly spread over the rank's own."""
    low, high = strips.own(rank)
    count = min(total // strips.ranks, high - low)
    return [low + place * ((high - low) // count) for place in range(count)] if count else []

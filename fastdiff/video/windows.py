"""Clips longer than a model was made for, in windows of frames that overlap.

Each denoiser call becomes one call a window, blended where windows overlap (MultiDiffusion,
https://arxiv.org/abs/2302.08113, along time as in Gen-L-Video, https://arxiv.org/abs/2305.18264). Attention over all
frames costs the square of their number and memory with it; here both grow with the number of windows, the memory of a
call not at all. Neighbours agree through what they share, frames that share no window only through those between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_number
from fastdiff.anatomy import anatomy, denoiser_arguments, forward_names
from fastdiff.anatomy_video import FrameLayout, frame_axis, frame_layout
from fastdiff.hooks import Hooks
from fastdiff.parallel.exchange import output_sample, with_sample


@dataclass(frozen=True)
class FrameWindows(Acceleration):
    """Call the denoiser on windows of latent frames. A clip that one window covers passes unchanged, bit for bit.

    Args:
        frames: latent frames of a window; what the model was trained at, or what fits.
        overlap: latent frames that neighbouring windows share, fewer than ``frames``.
    """

    stage: ClassVar[str] = "steps"
    frames: int = 16
    overlap: int = 4

    def __post_init__(self):
        check_number("FrameWindows", "frames", self.frames, 1, whole=True)
        check_number("FrameWindows", "overlap", self.overlap, 0, self.frames - 1, whole=True)

    def supports(self, pipe: Any) -> Verdict:
        """Needs denoisers of frames that take a clip at once."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            if any("history" in argument for argument in forward_names(denoiser)):
                return Verdict(False, f"the {name} goes chunk by chunk by itself; see fastdiff.video.helios.chunks")
            if frame_axis(denoiser) is None:
                return Verdict(False, f"the {name} takes pictures and no frames")
        return Verdict(True)

    def conflict(self, other: Acceleration) -> str:
        if other.stage in ("attention", "blocks") and not other.exact:
            return "what is kept from one denoiser call would be used on the next window, which is another time"
        if type(other).__name__ in ("ClipParallel", "ContextParallel"):
            return "each rank would cut its own frames into windows; take one of them"
        return ""

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser."""
        for denoiser in anatomy(pipe).denoisers.values():
            hooks.wrap(denoiser, "forward", _Windows(self, hooks, denoiser).around)


class _Windows:
    """Calls one denoiser window by window."""

    def __init__(self, settings: FrameWindows, hooks: Hooks, denoiser: Any):
        self.settings, self.hooks, self.denoiser = settings, hooks, denoiser

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """One call of the pipeline's, as many of the denoiser as there are windows."""
        given = denoiser_arguments(self.denoiser, args, kwargs)
        layout = frame_layout(self.denoiser, given)
        if layout.count <= self.settings.frames:
            self.hooks.counter.count(False)
            self.hooks.counter.note(f"a clip of {layout.count} latent frames fits one window and was not cut")
            return inner(*args, **kwargs)
        other = [key for key, value in given.items() if "residual" in key and value is not None]
        if other:
            raise Unsupported(f"FrameWindows cannot cut {other[0]} into windows; remove the adapter, or the windows")
        self.hooks.counter.count(True)
        return self._joined(inner, given, layout)

    def _joined(self, inner: Callable, given: dict[str, Any], layout: FrameLayout) -> Any:
        size, each = self.settings.frames, layout.each
        total = weight = output = None
        for start in window_starts(layout.count, size, self.settings.overlap):
            output = inner(**cut(given, layout, start, size))
            made = output_sample(output)
            if total is None or weight is None:
                shape = list(made.shape)
                shape[layout.axis] = layout.count * each
                total = made.new_zeros(shape)
                weight = made.new_zeros(
                    [layout.count * each if axis == layout.axis else 1 for axis in range(made.ndim)]
                )
            ramp = window_weights(size, self.settings.overlap).repeat_interleave(each).to(made)
            ramp = ramp.view([-1 if axis == layout.axis else 1 for axis in range(made.ndim)])
            total.narrow(layout.axis, start * each, size * each).add_(made * ramp)
            weight.narrow(layout.axis, start * each, size * each).add_(ramp)
        assert total is not None and weight is not None
        return with_sample(output, total / weight)


def window_starts(count: int, size: int, overlap: int) -> list[int]:
    """First frames of windows that cover ``count`` frames; the last window ends where the clip does."""
    if count <= size:
        return [0]
    return [*range(0, count - size, size - overlap), count - size]


def window_weights(size: int, overlap: int) -> Tensor:
    """How much each frame of a window counts, float32 ``[size]``: rising over the overlap, falling at the end."""
    place = torch.arange(1, size + 1, dtype=torch.float32)
    return torch.minimum(torch.minimum(place, place.flip(0)), torch.tensor(float(overlap + 1)))


def cut(given: dict[str, Any], layout: FrameLayout, start: int, size: int) -> dict[str, Any]:
    """The arguments of a denoiser call for the window of ``size`` latent frames from ``start`` on.

    Raises:
        Unsupported: an argument with frames of its own, of another number than the latents.
    """
    latents = given[layout.name]
    rows, tokens = len(latents), _tokens(given, layout)

    def part(name: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(part(name, item) for item in value)
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if "rotary" in name and len(value) % layout.count == 0:  # positions of a clip that begins here
            return value[: len(value) // layout.count * size]
        if "scale" not in name and layout.count > 1 and len(value) == rows * layout.count:  # told to each frame
            return value.unflatten(0, (rows, layout.count))[:, start : start + size].flatten(0, 1)
        if "timestep" in name and value.ndim == 2 and value.shape[1] in (layout.count, tokens):
            each = value.shape[1] // layout.count
            return value[:, start * each : (start + size) * each]
        if value.ndim == latents.ndim > 3 and value.shape[layout.axis] > 1:  # pictures of its own
            if value.shape[layout.axis] != latents.shape[layout.axis]:
                raise Unsupported(
                    f"FrameWindows cannot cut {name}: {value.shape[layout.axis]} frames beside "
                    f"{latents.shape[layout.axis]} of {layout.name}; leave the windows out"
                )
            return value.narrow(layout.axis, start * layout.each, size * layout.each)
        return value

    made = {name: part(name, value) for name, value in given.items() if name != layout.name}
    if "num_frames" in given:
        made["num_frames"] = size
    return {layout.name: latents.narrow(layout.axis, start * layout.each, size * layout.each), **made}


def _tokens(given: dict[str, Any], layout: FrameLayout) -> int:
    """Tokens of the whole clip where the timestep may be told for each; -1 where it is not."""
    timestep = given.get("timestep")
    if isinstance(timestep, Tensor) and timestep.ndim == 2 and timestep.shape[1] % layout.count == 0:
        return timestep.shape[1]
    return -1

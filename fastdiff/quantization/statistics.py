"""What a pipeline's linear layers are given: peaks of each channel, and a sample of tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.anatomy import capture, default_size

from .layers import Place

ROWS = 256
_A_CALL = 32
_TRIAL_PIXELS = 256


@dataclass
class Statistics:
    """Inputs of linear layers by name, on the CPU.

    Attributes:
        peaks: the largest magnitude of each channel over all calls, float32 [K].
        samples: tokens from all over the calls, float32 [n, K].
    """

    peaks: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        tensors = {f"peak.{name}": tensor for name, tensor in self.peaks.items()}
        tensors |= {f"sample.{name}": tensor for name, tensor in self.samples.items()}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        found = cls()
        for name, tensor in load_file(path).items():
            kind, layer = name.split(".", 1)
            (found.peaks if kind == "peak" else found.samples)[layer] = tensor
        return found

    def take(self, name: str, x: Tensor) -> None:
        """Note one call's inputs [..., K]."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if not len(flat):
            return
        peak = flat.abs().amax(0).float().cpu()
        self.peaks[name] = torch.maximum(self.peaks[name], peak) if name in self.peaks else peak
        held = self.samples.get(name)
        if held is None or len(held) < ROWS:
            # a copy, as the layers of one input would share it
            some = flat[:: max(len(flat) // _A_CALL, 1)][:_A_CALL].float().cpu().clone()
            self.samples[name] = some if held is None else torch.cat([held, some])[:ROWS]


def collect(found: list[Place], generate: Callable[[], Any]) -> Statistics:
    """Watch layers while `generate` runs the pipeline, on prompts like those to come; leaves nothing behind."""
    statistics = Statistics()
    watching = []
    try:
        for place in found:

            def watch(module: Any, inputs: tuple, name: str = place.name) -> None:
                statistics.take(name, inputs[0])

            watching.append(place.linear.register_forward_pre_hook(watch))
        with torch.no_grad():
            generate()
    finally:
        for handle in watching:
            handle.remove()
    return statistics


def trial(pipe: Any, found: list[Place]) -> Statistics:
    """Watch layers during a single denoiser call of a made-up prompt, at up to 256 pixels: a rough substitute."""
    side = min(_TRIAL_PIXELS, *default_size(pipe))
    denoiser, args, kwargs = capture(pipe, side, side)
    return collect(found, lambda: denoiser(*args, **kwargs))

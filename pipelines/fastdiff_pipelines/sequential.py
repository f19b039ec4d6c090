"""The ordinary way, done fairly: one frame at a time through its own denoiser calls, with nothing wasted around them.

Embeddings, noises and tables are made once, there is no pipeline overhead, and the noises are the stream's. What is
left against `Stream` is the batching alone, so this is the baseline to measure it by, and the reference to test it
against: steps and guidance are written here as the formulas have them, not folded.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastdiff.sampling import algebra, rows
from fastdiff_pipelines.prepared import Prepared
from fastdiff_pipelines.session import Session, check_finite
from fastdiff_pipelines.settings import Settings
from fastdiff_pipelines.slots import Output, Slot, Timings


class SequentialStream:
    """`Stream`'s interface, one frame at a time: every push returns its own picture.

    Args:
        pipe: as for `Stream`.
        prompt, **settings: see `Settings`.
        height, width: in pixels, the pipeline's default if None.
    """

    def __init__(self, pipe: Any, prompt: str, *, height: int | None = None, width: int | None = None, **settings: Any):
        self._session = Session(pipe, Settings(prompt).changed(**settings), height, width)
        self._count = 0
        self.denoiser_calls = 0

    @property
    def settings(self) -> Settings:
        """What frames pushed now get."""
        return self._session.prepared.settings

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of frames, in pixels."""
        return self._session.height, self._session.width

    def push(self, frame: Any = None, frame_id: Any = None, captured: float | None = None) -> list[Output]:
        """Make one picture; arguments, output and errors as of `Stream.push`."""
        timings = Timings(captured, pushed=time.perf_counter())
        checked = self._session.admit(frame)
        number = self._count
        slot = Slot(number if frame_id is None else frame_id, self._session.prepared, timings, checked, number)
        self._count += 1
        with self._session.running():
            self._session.enter([slot])
            started = time.perf_counter()
            slot.latent = self._denoise(slot)
            timings.denoise_ms = (time.perf_counter() - started) * 1000
            self._session.decode([slot])
            failure = check_finite(slot)
        if failure is not None:
            raise failure
        assert slot.pixels is not None
        return [Output(slot.frame_id, slot.pixels, slot.prepared.settings, timings)]

    def run(self, frames: Iterable[Any]) -> Iterator[Output]:
        """One output per frame, in order."""
        for frame in frames:
            yield from self.push(frame)

    def flush(self) -> list[Output]:
        """Nothing: no frame is ever left inside."""
        return []

    def update(self, **changes: Any) -> None:
        """Change settings for the frames to come."""
        with self._session.running():
            self._session.prepared = self._session.prepare(self.settings.changed(**changes))

    def warmup(self) -> None:
        """Run every model once."""
        counted = self._count, self.denoiser_calls
        height, width = self.size
        self.push(torch.zeros(3, height, width))
        self._count, self.denoiser_calls = counted

    def _denoise(self, slot: Slot) -> torch.Tensor:
        prepared, x = slot.prepared, slot.latent
        reference, past = slot.reference, torch.zeros_like(x)
        for i in range(len(prepared)):
            output = self._call(x, prepared.told[i : i + 1], prepared.positive)
            negative = None
            if i < prepared.negative_steps:
                assert prepared.negative is not None
                negative = self._call(x, prepared.told[i : i + 1], prepared.negative)
            guided, reference = guided_output(prepared, i, x, output, negative, reference)
            noise = slot.noises[min(i + 1, len(prepared) - 1)][None]
            x, past = rows.step(prepared.table, x, guided, torch.tensor([i], device=x.device), noise, past)
        return x

    def _call(self, x: torch.Tensor, told: torch.Tensor, conditioning: Any) -> torch.Tensor:
        self.denoiser_calls += 1
        return self._session.denoiser(x.to(self._session.denoiser.dtype), told, conditioning).to(x.dtype)


def guided_output(
    prepared: Prepared,
    step: int,
    x: torch.Tensor,
    output: torch.Tensor,
    negative: torch.Tensor | None,
    reference: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The guided output at a step and the reference of the next, each ``[1, C, h, w]``.

    The formulas of `fastdiff.sampling.guidance` in noise space (velocity space for flow models), without folding.
    """
    settings, kind = prepared.settings, prepared.table.prediction
    scale, delta = settings.guidance_scale, settings.delta
    if settings.guidance == "none" or scale == 1:
        return output, reference
    if settings.guidance == "full":
        assert negative is not None
        return negative + scale * (output - negative), reference
    signal, noise = prepared.table.signal[step], prepared.table.noise[step]
    if negative is not None:
        reference, real = algebra.estimates(kind, x, negative, signal, noise)
    else:
        assert reference is not None
        real = (x - signal * reference) / noise
    if kind == "flow_prediction":
        velocity = real - reference
        return delta * velocity + scale * (output - delta * velocity), reference
    _, eps = algebra.estimates(kind, x, output, signal, noise)
    guided = delta * real + scale * (eps - delta * real)
    clean = (x - noise * guided) / signal
    return algebra.predict(kind, clean, guided, signal, noise), reference

"""A frame on its way through the stream, and what comes out at the other end."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdiff_pipelines.frames import to_uint8
from fastdiff_pipelines.prepared import Prepared
from fastdiff_pipelines.settings import Settings

if TYPE_CHECKING:
    from fastdiff_pipelines.flight import Call


@dataclass
class Timings:
    """When things happened to a frame: `time.perf_counter` seconds, and milliseconds of the work it took part in.

    On an accelerator the milliseconds are of submitting the work, not of the device.
    """

    captured: float | None = None
    pushed: float = 0.0
    entered: float = 0.0
    finished: float = 0.0
    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0

    @property
    def latency_ms(self) -> float:
        """From push to finished image."""
        return (self.finished - self.pushed) * 1000

    @property
    def age_ms(self) -> float | None:
        """From capture to finished image; None when the capture time is not known."""
        return None if self.captured is None else (self.finished - self.captured) * 1000


class NotFinite(ArithmeticError):
    """A model produced NaN. The frames concerned are lost, the stream goes on."""


@dataclass(frozen=True)
class Output:
    """A finished frame.

    Attributes:
        frame_id: as pushed.
        pixels: float ``[3, H, W]`` in [0, 1], on the stream's device.
        settings: those the frame was finished with.
        timings: when and how long.
        repeated: True when the similarity filter found it equal to an earlier frame, whose pixels these are.
    """

    frame_id: Any
    pixels: torch.Tensor
    settings: Settings
    timings: Timings
    repeated: bool = False

    @cached_property
    def image(self) -> np.ndarray:
        """The picture as uint8 ``[H, W, 3]``."""
        return to_uint8(self.pixels)


@dataclass(eq=False)
class Slot:
    """One frame in flight: its state between two denoiser calls.

    Attributes:
        frame: pixels ``[1, 3, H, W]`` until it enters, None for text-to-image.
        number: how many processed frames came before it; fresh noise depends on it.
        step: steps taken, which is the row of its sampler's table that is next.
        latent, reference, past: state, guidance reference and previous clean estimate, ``[1, C, h, w]``.
        encoded: the latent of the frame itself, None for text-to-image.
        noises: ``[n, C, h, w]``.
        call, row: the last denoiser call it took part in, and its row there.
        source: for a repeated frame, the slot whose picture it shows.
    """

    frame_id: Any
    prepared: Prepared
    timings: Timings
    frame: torch.Tensor | None = None
    number: int = 0
    step: int = 0
    latent: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    reference: torch.Tensor | None = None
    encoded: torch.Tensor | None = None
    past: torch.Tensor | None = None
    noises: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    call: Call | None = None
    row: int = 0
    source: Slot | None = None
    pixels: torch.Tensor | None = None
    lost: bool = False

    @property
    def finished(self) -> bool:
        """Whether every step has been taken."""
        return self.step >= len(self.prepared)

    @property
    def origin(self) -> Slot:
        """The slot whose picture this one shows: itself, unless it repeats another."""
        return self.source or self

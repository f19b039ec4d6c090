"""A model that gives back what it gets: what is left of a live session's latency is the way there and back."""

from __future__ import annotations

import time
from typing import Any

import torch

from fastdiff_pipelines.frames import check_frame
from fastdiff_pipelines.settings import Settings
from fastdiff_pipelines.slots import Output, Timings


class IdentityStream:
    """`Stream`'s interface over no model at all."""

    def __init__(self, height: int = 512, width: int = 512, **settings: Any):
        self.size = height, width
        self.settings = Settings("").changed(**settings)
        self.in_flight = 0
        self._count = 0

    def push(self, frame: Any = None, frame_id: Any = None, captured: float | None = None) -> list[Output]:
        """The frame itself, as an output; the `pixels` of a uint8 frame are its bytes, ``[3, H, W]`` of 0 to 255."""
        timings = Timings(captured, pushed=time.perf_counter())
        checked = check_frame(frame, *self.size)
        # bytes stay bytes: turning 512 x 512 pixels into floats and back takes longer than the way there and back
        plain = checked.dtype == torch.uint8
        pixels = checked.permute(2, 0, 1) if plain else checked * 0.5 + 0.5
        number, self._count = self._count, self._count + 1
        timings.finished = time.perf_counter()
        output = Output(number if frame_id is None else frame_id, pixels, self.settings, timings)
        if plain:
            output.__dict__["image"] = checked.cpu().numpy()
        return [output]

    def flush(self) -> list[Output]:
        """Nothing: no frame is ever left inside."""
        return []

    def update(self, **changes: Any) -> None:
        """Settings change nothing here, but wrong ones raise as anywhere."""
        changes.pop("on_update", None)
        self.settings = self.settings.changed(**changes)

    def clear(self) -> None:
        """Nothing to forget."""

    def warmup(self) -> None:
        """Nothing to warm."""

"""Noise for chunks: known by seed, chunk, step and row alone, so a row does not depend on its batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def draw(seed: int, rows: int, shape: tuple[int, ...], *place: int) -> Tensor:
    """Standard normal float32 ``[rows, *shape]``, the same for the same seed and place on every machine."""
    made = []
    for row in range(rows):
        state = int(np.random.SeedSequence([seed, *place, row]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(state % 2**63)
        made.append(torch.randn(shape, generator=generator))
    return torch.stack(made)


class Noise:
    """A session's noise: ``[steps, B, C, c, h, w]`` for every chunk, one for its beginning and one for each step.

    Args:
        kind: "fresh", "fixed" or "warped".
        seed: of everything drawn.
        rows: videos of the batch.
        cell: channels, rows and columns of one latent frame.
    """

    def __init__(self, kind: str, seed: int, rows: int, cell: tuple[int, int, int], device: Any, dtype: torch.dtype):
        self.kind, self.seed, self.rows, self.cell = kind, seed, rows, cell
        self.device, self.dtype = device, dtype
        self._fixed: dict[tuple[int, int], Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forget where noise was carried to."""
        self._carried: Tensor | None = None
        self._rest: Tensor | None = None

    def chunk(self, number: int, frames: int, steps: int, flows: Tensor | None = None) -> Tensor:
        """Noise of one chunk.

        Args:
            number: of the chunk, from 0.
            frames: latent frames of it.
            steps: how many noises.
            flows: for "warped": how the control frames moved up to each latent frame, in cells, ``[B, 2, c, h, w]``
                (x, y); see `fastdiff_pipelines.rollout.flow`.

        Raises:
            ValueError: warped noise without control frames to go by.
        """
        if self.kind == "warped":
            if flows is None:
                raise ValueError('noise="warped" moves with control frames, and there are none; use "fixed" or "fresh"')
            made = torch.stack([self._warped(number, i, steps, flows[:, :, i]) for i in range(frames)], dim=3)
        else:
            place = 0 if self.kind == "fixed" else number + 1
            if self.kind == "fixed" and (frames, steps) in self._fixed:
                return self._fixed[frames, steps]
            shape = (self.cell[0], frames, *self.cell[1:])
            made = torch.stack([draw(self.seed, self.rows, shape, place, step) for step in range(steps)])
        made = made.to(self.device, self.dtype)
        if self.kind == "fixed":
            self._fixed = {(frames, steps): made}
        return made

    def _warped(self, number: int, frame: int, steps: int, flow: Tensor) -> Tensor:
        """Noise of one latent frame ``[steps, B, C, h, w]``: that of the frame before, moved."""
        shape = (steps * self.cell[0], *self.cell[1:])
        fresh = draw(self.seed, self.rows, shape, number + 1, frame)
        if self._carried is None or self._carried.shape != fresh.shape or self._rest is None:
            self._carried, self._rest = fresh, torch.zeros(self.rows, 2, *self.cell[1:])
        else:
            self._carried, self._rest = warp(self._carried, self._rest + flow.float().cpu(), fresh)
        return self._carried.unflatten(1, (steps, -1)).transpose(0, 1)


def warp(noise: Tensor, flow: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Move noise along a flow so that it stays white.

    Every cell takes the noise of the cell its content comes from, if that lies inside and no other cell took it; a cell
    without one gets fresh noise. So each value is used once at most, and the result is again independent and normal (an
    interpolation would not be, see https://arxiv.org/abs/2501.08331 for the continuous case).

    Args:
        noise, fresh: ``[B, C, h, w]``.
        flow: how far content moved, in cells, ``[B, 2, h, w]`` (x, y).

    Returns:
        The moved noise, and what whole cells left over of the flow, to be added to the next one.
    """
    rows, channels, height, width = noise.shape
    whole = flow.round()
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    from_x, from_y = x - whole[:, 0].long(), y - whole[:, 1].long()  # [B, h, w]
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    source = (from_y.clamp(0, height - 1) * width + from_x.clamp(0, width - 1)).flatten(1)  # [B, h w]
    target = torch.arange(height * width).expand(rows, -1)
    outside = torch.full_like(source, height * width)
    claims = torch.full((rows, height * width), height * width, dtype=torch.int64)
    claims.scatter_reduce_(1, source, torch.where(inside.flatten(1), target, outside), "amin")
    first = (claims.gather(1, source) == target).view(rows, 1, height, width)
    moved = noise.flatten(2).gather(2, source[:, None].expand(-1, channels, -1)).view_as(noise)
    return torch.where(first, moved, fresh), torch.where(first, flow - whole, torch.zeros(()))

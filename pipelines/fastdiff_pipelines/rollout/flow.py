"""Where things in control frames moved to, cell by cell, good enough to carry noise along with them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor


def cell_flow(before: Tensor, after: Tensor, height: int, width: int, reach: int = 6) -> Tensor:
    """How far the content of each cell of ``after`` came since ``before``, in cells, ``[B, 2, height, width]`` (x, y).

    Every shift of up to ``reach`` pixels is tried and compared over the cell and half a cell around it; nearer shifts
    win where two fit equally well.

    Args:
        before, after: frames ``[B, 3, H, W]`` in -1..1.
        height, width: cells down and across; `H` and `W` are multiples of them.
    """
    rows, _, tall, wide = after.shape
    cell = (tall // height, wide // width)
    around = (2 * cell[0], 2 * cell[1])
    edge = functional.pad(before.float(), (reach, reach, reach, reach), mode="replicate")
    shifts = [(x, y) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    shifts.sort(key=lambda shift: shift[0] ** 2 + shift[1] ** 2)
    best = after.new_full((rows, height, width), torch.inf, dtype=torch.float32)
    found = after.new_zeros(rows, 2, height, width, dtype=torch.float32)
    for x, y in shifts:
        moved = edge[..., reach - y : reach - y + tall, reach - x : reach - x + wide]
        wrong = (after.float() - moved).abs().mean(1, keepdim=True)
        padded = functional.pad(wrong, (cell[1] // 2, cell[1] // 2, cell[0] // 2, cell[0] // 2), mode="replicate")
        cost = functional.avg_pool2d(padded, around, stride=cell)[:, 0, :height, :width]
        better = cost < best - 1e-4
        best = torch.where(better, cost, best)
        step = torch.tensor([x / cell[1], y / cell[0]], device=after.device).view(1, 2, 1, 1)
        found = torch.where(better[:, None], step, found)
    return found


def chunk_flows(last: Tensor | None, frames: Tensor, groups: Sequence[int], height: int, width: int) -> Tensor:
    """The flow up to each latent frame of a chunk ``[B, 2, latents, height, width]``, 0 for the very first.

    Args:
        last: the frame before the chunk ``[B, 3, 1, H, W]``; None at the beginning of a stream.
        frames: control frames of the chunk ``[B, 3, F, H, W]``.
        groups: how many of them become each latent frame; the last one of each counts.
    """
    flows, before = [], last
    for end in itertools.accumulate(groups):
        now = frames[:, :, end - 1]
        still = now.new_zeros(len(now), 2, height, width, dtype=torch.float32)
        flows.append(still if before is None else cell_flow(before[:, :, 0], now, height, width))
        before = now[:, :, None]
    return torch.stack(flows, dim=2)

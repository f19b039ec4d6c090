"""Rotary positions of video tokens, with time apart from space.

A key's place in the picture never changes, its place in time does: relative to a cache that rolls, it grows older with
every chunk. So keys are turned by row and column when they are written and by frame when they are read, at a position
counted within the cache, which keeps every distance inside the range the model was trained on however long the video
(SANA-WM and LongLive do the same; https://arxiv.org/abs/2104.09864 for the rotation itself). A rotation of a pair of
channels is one complex number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.anatomy_wan import WanShape, rotary_angles


def in_space(shape: WanShape, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Turns of one frame's tokens by row and column, 1 for the channels of time: complex ``[S, D / 2]``."""
    rows, columns = height // shape.patch[1], width // shape.patch[2]
    time, across, along = shape.rotary
    place = torch.arange(max(rows, columns), device=device)
    still = torch.zeros(rows, columns, time // 2, dtype=torch.float64, device=device)
    down = rotary_angles(place[:rows], across)[:, None].expand(rows, columns, -1)
    right = rotary_angles(place[:columns], along)[None].expand(rows, columns, -1)
    return _turns(torch.cat([still, down, right], dim=-1).flatten(0, 1), dtype)


def in_time(shape: WanShape, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns by frame at ``positions`` ``[B, F]``, 1 for the channels of space: complex ``[B, F, 1, D / 2]``."""
    angles = rotary_angles(positions, shape.rotary[0])
    space = angles.new_zeros(*angles.shape[:-1], (shape.head - shape.rotary[0]) // 2)
    return _turns(torch.cat([angles, space], dim=-1), dtype)[:, :, None]


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate pairs of channels.

    Args:
        x: ``[..., N, D]``, any floating dtype; half precision is rotated in float32.
        turns: complex ``[..., D / 2]``, without the axis of heads.

    Returns:
        A new contiguous tensor like ``x``.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2).to(x.dtype)


def _turns(angles: Tensor, dtype: torch.dtype) -> Tensor:
    turns = torch.polar(torch.ones_like(angles), angles)
    return turns if dtype == torch.float64 else turns.to(torch.complex64)

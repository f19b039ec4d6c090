"""Control frames as people hand them in, checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff_pipelines.frames import check_frame


def check_controls(given: Any, videos: int, height: int, width: int) -> None:
    """Raise a `TypeError` or `ValueError` for a control frame (one for each of several videos) that does not fit."""
    frames = [given] if videos == 1 else list(given) if isinstance(given, Iterable) else [given]
    if len(frames) != videos:
        raise ValueError(f"{videos} videos take {videos} control frames at a time, got {len(frames)}")
    for frame in frames:
        check_frame(frame, height, width)


def control_clip(given: Any, videos: int, most: int, height: int, width: int) -> Tensor:
    """Control frames of a chunk as float32 ``[B, 3, F, H, W]`` in -1..1.

    Args:
        given: a sequence of frames; for several videos a sequence of such sequences, all equally long.
        most: frames that fill the chunk.

    Raises:
        TypeError, ValueError: frames of another size, dtype or number, or not finite.
    """
    each = [given] if videos == 1 else list(given)
    if len(each) != videos:
        raise ValueError(f"{videos} videos take {videos} sequences of control frames, got {len(each)}")
    made = [_clip(frames, most, height, width) for frames in each]
    if len({clip.shape[2] for clip in made}) > 1:
        raise ValueError("all videos of a rollout take the same number of control frames")
    return torch.cat(made)


def _clip(frames: Sequence[Any], most: int, height: int, width: int) -> Tensor:
    if not 1 <= len(frames) <= most:
        raise ValueError(f"the next chunk takes 1 to {most} control frames, got {len(frames)}")
    made = []
    for frame in frames:
        checked = check_frame(frame, height, width)
        if checked.dtype == torch.uint8:
            checked = checked.permute(2, 0, 1).float() / 127.5 - 1
        made.append(checked)
    return torch.stack(made, dim=1)[None]  # [1, 3, F, H, W]

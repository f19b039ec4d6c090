"""Where the tokens of a denoiser lie: frames, rows and columns, and the order they were put in."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fastdiff.hooks import Request

Grid = tuple[int, int, int]
_ORDERS: Hashable = "order of tokens"


def latent_grid(arguments: dict[str, Any], channels: int | None) -> Grid | None:
    """Frames, height and width of what a denoiser is given; None where its arguments do not say.

    Args:
        arguments: of one denoiser call, by name.
        channels: how many it takes, by which [B, F, C, H, W] is told from [B, C, F, H, W].
    """
    sides = [arguments.get(name) for name in ("num_frames", "height", "width")]
    whole = [side for side in sides if isinstance(side, int)]
    if len(whole) == 3:
        return whole[0], whole[1], whole[2]
    latents = next((arguments[name] for name in ("hidden_states", "sample", "x") if name in arguments), None)
    if not isinstance(latents, Tensor) or latents.dim() not in (4, 5):
        return None
    shape = tuple(latents.shape)
    if len(shape) == 4:
        return 1, shape[2], shape[3]
    swapped = shape[2] == channels != shape[1]
    return shape[1] if swapped else shape[2], shape[3], shape[4]


def token_grid(latents: Grid, tokens: int, words: bool = False) -> Grid | None:
    """The grid of this many tokens: the latents', halved as often as it takes; None where none fits.

    With `words`, some of the tokens may be no part of the picture.
    """
    frames, *sides = latents
    levels = [tuple(max(1, -(-side >> level)) for side in sides) for level in range(8)]
    for height, width in levels:
        for length in (frames, -(-frames // 2)):
            if length * height * width == tokens:
                return length, height, width
    for height, width in levels:
        if words and frames * height * width <= tokens:
            return frames, height, width
    return None


def raster(grid: Grid) -> Tensor:
    """Float [S, 3]: frame, row and column of every token, row by row."""
    axes = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    return torch.stack(axes, -1).reshape(-1, 3).float()


def tiled(places: Tensor, tile: int, frames: int = 1) -> Tensor:
    """int64 [S]: tokens tile by tile, of places [S, 3 or more] (frame, row, column).

    A tile has `tile` rows and columns and `frames` frames; within it tokens stay frame by frame, row by row.
    """
    frame, row, column = (places[:, axis].long() for axis in range(3))
    rows, columns = (int(side.max()) // tile + 1 for side in (row, column))
    key = (frame // frames * rows + row // tile) * columns + column // tile
    inside = (frame % frames * tile + row % tile) * tile + column % tile
    return torch.argsort(key * frames * tile * tile + inside, stable=True)


def orders(request: Request) -> dict[Grid, Tensor]:
    """The order that tokens of each grid were put in, in the denoiser call being served."""
    return request.state(_ORDERS, dict)

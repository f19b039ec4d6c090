"""Tokens in tiles instead of rows, once per denoiser call.

Attention does not mind the order of its tokens and everything else works on each alone, so tokens and their positions
may be put in any order at the door and back at the exit. In tiles, a block of consecutive tokens is a small square of
the picture, which is what sparse selections want.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Verdict, check_number
from fastdiff.anatomy import anatomy, denoiser_arguments, forward_names
from fastdiff.hooks import Hooks


@dataclass(frozen=True)
class TokenOrder(Acceleration):
    """Order image tokens by square tiles, for denoisers that take tokens with their positions (Flux). Exact.

    Gains nothing alone: put it after `SparseAttention`, whose blocks then are squares.

    Args:
        tile: tokens along one side of a tile.
    """

    stage: ClassVar[str] = "attention"
    tile: int = 8

    def __post_init__(self):
        check_number("TokenOrder", "tile", self.tile, low=2, whole=True)

    @property
    def exact(self) -> bool:
        """Always True."""
        return True

    def supports(self, pipe: Any) -> Verdict:
        """Refused where the denoiser makes its tokens itself."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            if not {"hidden_states", "img_ids"} <= set(forward_names(denoiser)):
                return Verdict(
                    False, f"the {name} takes no tokens with positions (img_ids), so they cannot be reordered"
                )
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser."""
        for denoiser in anatomy(pipe).denoisers.values():
            hooks.wrap(denoiser, "forward", _Door(self.tile, hooks, denoiser).around)


class _Door:
    """Reorders what goes into one denoiser and what comes out."""

    def __init__(self, tile: int, hooks: Hooks, denoiser: Any):
        self.tile = tile
        self.hooks = hooks
        self.denoiser = denoiser

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser with its tokens in tiles."""
        given = denoiser_arguments(self.denoiser, args, kwargs)
        tokens, ids = given.get("hidden_states"), given.get("img_ids")
        other = [name for name, value in given.items() if "controlnet" in name and value is not None]
        fits = isinstance(tokens, Tensor) and isinstance(ids, Tensor) and ids.shape[-2] == tokens.shape[1]
        if other or not fits:
            self.hooks.counter.miss(
                f"left the order alone: {other[0] if other else 'img_ids'} does not go with the tokens"
            )
            self.hooks.counter.count(False)
            return inner(*args, **kwargs)
        assert isinstance(tokens, Tensor) and isinstance(ids, Tensor)
        order = tiled(ids.reshape(-1, *ids.shape[-2:])[0], self.tile)
        moved = {**given, "hidden_states": tokens[:, order], "img_ids": ids.index_select(-2, order)}
        output = inner(**moved)
        back = order.argsort()
        self.hooks.counter.count(True)
        if isinstance(output, tuple):
            return (output[0][:, back], *output[1:])
        return type(output)(sample=output.sample[:, back])


def tiled(ids: Tensor, tile: int) -> Tensor:
    """int64 [S]: tokens by tile, then by row within it, of places [S, 3 or more] (frame, row, column)."""
    frame, row, column = (ids[:, axis].long() for axis in range(3))
    rows, columns = (int(side.max()) // tile + 1 for side in (row, column))
    key = (frame * rows + row // tile) * columns + column // tile
    return torch.argsort(key * tile * tile + row % tile * tile + column % tile, stable=True)

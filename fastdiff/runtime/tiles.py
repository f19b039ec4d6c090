"""Pictures larger than a denoiser was trained for, in tiles that leave hardly a seam and cost nothing twice.

After the "fast seamless tiled diffusion" of Any-Size-Diffusion (https://arxiv.org/abs/2308.16582): tiles that do not
overlap, on a grid that moves from step to step, so that no place is a border for long. There, a moved grid leaves
strips at the frame's edge to the previous step's noise; here it wraps round, so that every cell is computed at every
step, by exactly ``ceil(H / T) * ceil(W / T)`` calls. Wrapping joins opposite edges, which one sees in pictures whose
edges differ; the moving grid spreads that over the steps.

A moving grid alone still leaves its last borders in the picture, for no later step smooths them. So at the last noise
levels tiles are larger by a few cells each way: the outer half of these, where the network saw an edge, is thrown away,
and over the inner half neighbours fade into each other.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.acceleration import Acceleration, Unsupported, Verdict, check_choice, check_number
from fastdiff.anatomy import anatomy, denoiser_arguments, forward_names
from fastdiff.hooks import Hooks
from fastdiff.parallel.exchange import output_sample, with_sample
from fastdiff.sampling.told import timestep_name, told_rows

GRIDS = ("moving", "overlapping", "fixed")


@dataclass(frozen=True)
class TiledInference(Acceleration):
    """Call the denoiser on tiles of its own size, so that memory and quality are those of that size.

    A latent that one tile covers passes unchanged, bit for bit. The prompt is told to every tile, so a picture made
    from noise alone repeats its subject: start from an enlarged picture (image to image) for one that does not.

    Args:
        tile: side of a tile in latent cells; 0 takes the size the denoiser was trained at.
        grid: "moving" as above; "overlapping" steps by half a tile and averages (MultiDiffusion,
            https://arxiv.org/abs/2302.08113), in 2 to 4 times as many calls; "fixed" never moves and leaves seams.
        seed: of the moves, which depend on it and the timestep alone.
        halo: latent cells by which tiles of the moving grid are larger, each way, at timesteps below ``halo_below``;
            twice the halo must suit the denoiser as a tile does, which 4 does for all whose tiles are multiples of 8.
        halo_below: a timestep, 0 to 1000; 0 never looks beyond a tile.
    """

    stage: ClassVar[str] = "steps"
    tile: int = 0
    grid: str = "moving"
    seed: int = 0
    halo: int = 4
    halo_below: float = 100.0

    def __post_init__(self):
        check_number("TiledInference", "tile", self.tile, low=0, whole=True)
        check_choice("TiledInference", "grid", self.grid, GRIDS)
        check_number("TiledInference", "seed", self.seed, low=0, whole=True)
        check_number("TiledInference", "halo", self.halo, low=0, whole=True)
        check_number("TiledInference", "halo_below", self.halo_below, low=0, high=1000)

    def supports(self, pipe: Any) -> Verdict:
        """Needs a denoiser of pictures that takes latents as they are: [B, C, h, w]."""
        for name, denoiser in anatomy(pipe).denoisers.items():
            names = forward_names(denoiser)
            if "img_ids" in names or names[0] not in ("sample", "hidden_states"):
                return Verdict(False, f"the {name} takes tokens and their positions, which cannot be cut into tiles")
            try:
                timestep_name(names)
                self._side(denoiser)
            except Unsupported as error:
                return Verdict(False, str(error))
        return Verdict(True)

    def apply(self, pipe: Any, hooks: Hooks) -> None:
        """Stand around every denoiser."""
        for denoiser in anatomy(pipe).denoisers.values():
            hooks.wrap(denoiser, "forward", _Tiles(self, self._side(denoiser), hooks, denoiser).around)

    def conflict(self, other: Acceleration) -> str:
        if other.stage in ("attention", "blocks") and not other.exact:
            return "what is kept from one denoiser call would be used on the next tile, which is another place"
        if type(other).__name__ == "PatchParallel":
            return "each rank would cut its own strip into tiles; take tiles or patches"
        return ""

    def _side(self, denoiser: Any) -> int:
        if self.tile:
            return self.tile
        own = getattr(denoiser.config, "sample_size", None)
        if isinstance(own, (list, tuple)):
            own = min(own)
        if not isinstance(own, int):
            raise Unsupported("the denoiser does not say which size it was trained at; give tile= in latent cells")
        return own


class _Tiles:
    """Calls one denoiser tile by tile."""

    def __init__(self, settings: TiledInference, side: int, hooks: Hooks, denoiser: Any):
        self.settings = settings
        self.side = side
        self.hooks = hooks
        self.denoiser = denoiser

    def around(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """One call of the pipeline's, as many of the denoiser as there are tiles."""
        given = denoiser_arguments(self.denoiser, args, kwargs)
        name = forward_names(self.denoiser)[0]
        sample = given[name]
        if not isinstance(sample, Tensor) or sample.dim() != 4:
            raise Unsupported("TiledInference cuts pictures [B, C, h, w]; this call is of another shape")
        height, width = sample.shape[-2:]
        if max(height, width) <= self.side:
            self.hooks.counter.count(False)
            self.hooks.counter.note(f"a latent of {height} x {width} fits one tile of {self.side} and was not cut")
            return inner(*args, **kwargs)
        other = [key for key, value in given.items() if _is_spatial(key) and value is not None]
        if other:
            raise Unsupported(
                f"TiledInference cannot cut {other[0]} into tiles; remove the ControlNet or adapter, or the tiles"
            )
        self.hooks.counter.count(True)
        return self._tiled(inner, given, name, sample, told_rows(given[timestep_name(given)]))

    def _tiled(self, inner: Callable, given: dict[str, Any], name: str, sample: Tensor, told: list[float]) -> Any:
        height, width = sample.shape[-2:]
        down = [tile_starts(self.settings, self.side, height, time, "rows") for time in told]
        across = [tile_starts(self.settings, self.side, width, time, "columns") for time in told]
        sides = min(self.side, height), min(self.side, width)
        halo = self._halo(height, told), self._halo(width, told)
        seen = sides[0] + 2 * halo[0], sides[1] + 2 * halo[1]
        share = (_fade(sides[0], halo[0])[:, None] * _fade(sides[1], halo[1])).to(sample.device).flatten()
        total = weight = output = None
        for row in range(len(down[0])):
            for column in range(len(across[0])):
                # rows told different times (a stream's) each have a grid of their own, of as many tiles
                cells = torch.stack(
                    [
                        _cells(one[row] - halo[0], other[column] - halo[1], seen, (height, width))
                        for one, other in zip(down, across, strict=True)
                    ]
                )
                cells = cells.to(sample.device).expand(len(sample), -1, -1)[:, None]  # [B, 1, rows, columns of a tile]
                flat = cells.flatten(-2).expand(-1, sample.shape[1], -1)
                output = inner(**{**given, name: sample.flatten(-2).gather(-1, flat).unflatten(-1, seen)})
                made = output_sample(output)
                cells = cells.flatten(-2)
                if total is None or weight is None:
                    total = made.new_zeros(*made.shape[:2], height * width)
                    weight = made.new_zeros(len(made), 1, height * width)
                here = share.to(made.dtype).expand(len(made), 1, -1)
                total.scatter_add_(-1, cells.expand(-1, made.shape[1], -1), made.flatten(-2) * here)
                weight.scatter_add_(-1, cells.expand(len(made), -1, -1), here)
        assert total is not None and weight is not None
        return with_sample(output, (total / weight).unflatten(-1, (height, width)))

    def _halo(self, length: int, told: list[float]) -> int:
        """Cells of its neighbours that a tile sees on each side along an axis of `length` cells."""
        wanted = self.settings.grid == "moving" and min(told) < self.settings.halo_below
        return self.settings.halo if wanted and length > self.side else 0


def tile_starts(settings: TiledInference, side: int, length: int, told: float, axis: str) -> list[int]:
    """Where tiles begin along an axis of `length` cells at a timestep; `axis` is "rows" or "columns"."""
    if length <= side:
        return [0]
    if settings.grid == "overlapping":
        return [*range(0, length - side, max(1, side // 2)), length - side]
    count = -(-length // side)
    offset = 0
    if settings.grid == "moving":
        offset = random.Random(f"{settings.seed} {axis} {told}").randrange(length)
    return [(offset + place * length // count) % length for place in range(count)]


def _is_spatial(name: str) -> bool:
    return "controlnet" in name or "additional_residual" in name or "intrablock" in name


def _fade(side: int, halo: int) -> Tensor:
    """How much each of a tile's ``side + 2 * halo`` lines counts: 0 at the rim, and a ramp centred on the border."""
    thrown, ramp = halo // 2, 2 * (halo - halo // 2)
    if not halo:
        return torch.ones(side)
    depth = torch.arange(side + 2 * halo) + 0.5 - thrown
    return (torch.minimum(depth, depth.flip(0)) / ramp).clamp(0, 1)


def _cells(top: int, left: int, sides: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Flat places of a tile's cells in the latent, beyond an edge from the opposite one: int64 [rows, columns]."""
    rows, columns = (
        (start + torch.arange(side)) % of for start, side, of in zip((top, left), sides, size, strict=True)
    )
    return rows[:, None] * size[1] + columns

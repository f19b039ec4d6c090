"""Ways of choosing key blocks, one small class each.

Each is made with (query_block, key_block) and gives a `Selection` with the same number of key blocks in every row.
Those that need a full attention step first are reused after it; the others choose anew at every call.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.attention.grid import orders, raster, token_grid
from fastdiff.attention.plug import Call
from fastdiff_kernels.attention import Selection, blocks_in
from fastdiff_kernels.quantise.reference import pooled
from fastdiff_kernels.selection import antidiagonal_scores, block_mass, count_of, pooled_scores, top_k


@dataclass(frozen=True)
class Selector:
    """Base: scores of block pairs become the best `density` of each row."""

    query_block: int
    key_block: int
    # "step": at every call; "refresh": at full steps; "once": at the first full step
    when: ClassVar[str] = "step"

    def scores(self, call: Call, lse: Tensor | None) -> Tensor:
        """Float [B, N, I, J], higher is better; `lse` [B, N, S] is given at full steps."""
        raise NotImplementedError

    def choose(self, call: Call, density: float, lse: Tensor | None = None) -> Selection:
        """The selection of one call."""
        scores = self.scores(call, lse)
        if call.lengths is not None:
            starts = torch.arange(scores.shape[-1], device=scores.device) * self.key_block
            hidden = starts >= call.lengths.view(-1, 1, 1, 1)
            scores = scores.masked_fill(hidden, -1e30)
        count = count_of(density, call.k.shape[2], self.key_block)
        return top_k(scores, count, self.query_block, self.key_block)


@dataclass(frozen=True)
class Mass(Selector):
    """Exact share of attention at a full step, reused until the next one. Ours."""

    when: ClassVar[str] = "refresh"

    def scores(self, call: Call, lse: Tensor | None) -> Tensor:
        """See `Selector.scores`."""
        assert lse is not None
        if call.lengths is not None:
            rows = torch.arange(lse.shape[2], device=lse.device)
            # where keys are padding, so are the queries beside them
            lse = lse.masked_fill(rows >= call.lengths.view(-1, 1, 1), float("-inf"))
        by = (self.query_block, self.key_block, call.scale)
        return block_mass(call.q, call.k, lse, *by, lengths=call.lengths)


@dataclass(frozen=True)
class Pattern(Mass):
    """Each head's pattern, measured once with full attention early and kept (SparseD, arXiv 2509.24014)."""

    when: ClassVar[str] = "once"


@dataclass(frozen=True)
class Antidiagonal(Selector):
    """Sums along antidiagonals of strided scores (XAttention, arXiv 2503.16428)."""

    def scores(self, call: Call, lse: Tensor | None) -> Tensor:
        """See `Selector.scores`."""
        stride = next(size for size in (8, 4, 2, 1) if self.query_block % size == self.key_block % size == 0)
        return antidiagonal_scores(*_visible(call), self.query_block, self.key_block, stride, call.scale)


@dataclass(frozen=True)
class Pooled(Selector):
    """Products of block means; key blocks whose mean says nothing go before all others (SpargeAttn, 2502.18137)."""

    similar: float = -0.1

    def scores(self, call: Call, lse: Tensor | None) -> Tensor:
        """See `Selector.scores`."""
        scores, forced = pooled_scores(*_visible(call), self.query_block, self.key_block, call.scale, self.similar)
        return scores + forced


@dataclass(frozen=True)
class Near(Selector):
    """The tiles nearest in space and time (sliding tile attention, arXiv 2502.04507); clamped at borders by itself."""

    def scores(self, call: Call, lse: Tensor | None) -> Tensor:
        """See `Selector.scores`."""
        where, words = places(call)
        rows, row_words = _centres(where, words, self.query_block)
        columns, column_words = _centres(where, words, self.key_block)
        far = self.distance((rows[:, None] - columns[None]).abs())  # [I, J]
        # blocks of words are near to everything
        far = torch.where(column_words[None], -1.0, torch.where(row_words[:, None], 0.0, far))
        return -far.to(call.q.device).expand(*call.q.shape[:2], *far.shape)

    def distance(self, apart: Tensor) -> Tensor:
        """Distance [I, J] of centres that lie `apart` [I, J, 3] in frames, rows and columns."""
        return apart.amax(-1) + 1e-3 * apart.sum(-1)


@dataclass(frozen=True)
class Radial(Near):
    """The window halves with every frame of distance (radial attention, arXiv 2506.19852)."""

    def distance(self, apart: Tensor) -> Tensor:
        """See `Near.distance`."""
        return (apart[..., 1:].norm(dim=-1) + 0.5) * torch.exp2(apart[..., 0])


@dataclass(frozen=True)
class Tiles(Near):
    """Nearest tiles, fewer at the first and last steps and more between (FPSAttention's schedule, arXiv 2506.04648)."""

    def choose(self, call: Call, density: float, lse: Tensor | None = None) -> Selection:
        """See `Selector.choose`; the mean over all steps is `density`."""
        steps = call.moment.steps or 1
        middle = 0.25 <= (call.moment.step + 0.5) / steps < 0.75
        return super().choose(call, min(1.0, density * (4 / 3 if middle else 2 / 3)), lse)


@dataclass(frozen=True)
class SinkRecent(Selector):
    """The first block and those next in order (StreamingLLM's mask, arXiv 2309.17453)."""

    def scores(self, call: Call, lse: Tensor | None) -> Tensor:
        """See `Selector.scores`."""
        rows = torch.arange(blocks_in(call.q.shape[2], self.query_block)) * self.query_block
        columns = torch.arange(blocks_in(call.k.shape[2], self.key_block)) * self.key_block
        scores = -(rows[:, None] - columns[None]).abs().float()
        scores[:, 0] = 1.0
        return scores.to(call.q.device).expand(*call.q.shape[:2], *scores.shape)


SELECTORS: dict[str, type[Selector]] = {
    "mass": Mass,
    "pattern": Pattern,
    "antidiagonal": Antidiagonal,
    "pooled": Pooled,
    "near": Near,
    "radial": Radial,
    "tiles": Tiles,
    "sink": SinkRecent,
}


def _visible(call: Call) -> tuple[Tensor, Tensor]:
    """q and k with the last token that counts in the place of padding, which must not speak for its block."""
    if call.lengths is None:
        return call.q, call.k
    last = (call.lengths.long() - 1).clamp(min=0).view(-1, 1, 1, 1)
    numbers = torch.arange(call.k.shape[2], device=call.k.device).view(1, 1, -1, 1).minimum(last)
    q, k = (one.gather(2, numbers.expand(*one.shape[:2], -1, one.shape[3])) for one in (call.q, call.k))
    return q, k


def places(call: Call) -> tuple[Tensor, Tensor]:
    """Frame, row and column [S, 3] of every token, and bool [S] where it is a word.

    Words come first where the denoiser is given ids of image tokens (Flux), else last (SD3).

    Raises:
        ValueError: the tokens cannot be matched to a grid.
    """
    tokens, moment = call.q.shape[2], call.moment
    if moment.places is not None and len(moment.places) <= tokens:
        extra = tokens - len(moment.places)
        return torch.cat([torch.zeros(extra, 3), moment.places.cpu()]), torch.arange(tokens) < extra
    grid = token_grid(moment.latents, tokens, words=True) if moment.latents else None
    if grid is None:
        raise ValueError(f"latents {moment.latents} do not say where {tokens} tokens lie; select by 'mass'")
    where = raster(grid)
    order = orders(moment.request).get(grid)
    if order is not None:
        where = where[order.cpu()]
    extra = tokens - len(where)
    return torch.cat([where, torch.zeros(extra, 3)]), torch.arange(tokens) >= len(where)


def _centres(where: Tensor, words: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean place [I, 3] of each block, and bool [I] where it holds words."""
    return pooled(where, block), pooled(words.float()[:, None], block)[:, 0] > 0
